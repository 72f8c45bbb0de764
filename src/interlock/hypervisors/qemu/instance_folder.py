"""What is kept of one instance on the disk of its host, and who holds it. No process is started or ended here.

vms/ID/                 0700, ours: QEMU gets everything in it as open descriptors
    spec.json           what the guest was last started with, and the disks plugged in since
    node-names.json     which disk a block node of the running QEMU is, where its device's name does not tell
    process.json        who holds the guest; absent when nobody is meant to
    lock                locked (flock) by the process that holds the guest, for exactly as long as it lives
    monitor             the socket of the command monitor
    console             the socket of the serial console
    agent               the socket of the guest agent's port
    frozen              there while the guest's file systems may be held still
    root.qcow2          the root disk number 0, an overlay of the image or whole, unless it is in a shared folder
    root-N.qcow2        the root disk number N, which a rebuild, a resize or an unshelving made
    rescue.qcow2        while it is rescued: an overlay of the rescue image
    memory.saved        the guest's memory: no processor has run since it was written
    memory.used         the same, from the moment on at which they may have run from it
    memory.json         what the memory belongs to
    memory.part         the guest's memory while it is being written
    machine.json        the machine as which QEMU was last started
    seed.iso            what the guest is told of itself, if it is told anything
    *.new               files that are being made
    console.log         what the guest wrote on its serial console
    errors.log          what QEMU wrote on its standard error
    inside/             0711: the folder in which QEMU is started, which also tells its process from all others
        journal.in/.out the pipes of the event monitor, of QEMU's user
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import msgspec

from interlock.core.errors import Refused
from interlock.core.records import Spec
from interlock.hypervisors.qemu.command_line import JOURNAL, MONITOR, Machine
from interlock.hypervisors.qemu.root_folder import RootFolder, root_folder
from interlock.ports import Permit

RecordT = TypeVar("RecordT")


class Phase(StrEnum):
    """How far a process has come, as far as we have kept it."""

    STARTING = "starting"
    """The guest's processors have not run yet."""
    RUNNING = "running"
    """They have; if the process is found gone, it vanished."""
    ENDED = "ended"
    """The guest powered itself off or crashed, and that was told."""
    ENDING = "ending"
    """We are ending it."""


class Saving(StrEnum):
    """What a guest was before it was stopped so that its memory could be written."""

    RAN = "ran"
    STOOD_STILL = "stood still"


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds the guest."""

    phase: Phase
    process_id: int = 0
    """0 until it is known."""
    started_ticks: int = 0
    """When the kernel says that it started, by which a reused process id is noticed."""
    saving: Saving | None = None
    """What its guest was when writing its memory to a file began; None while that is not under way."""


class InstanceFolder:
    """The folder of one instance."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inside = path / "inside"
        self.rescue_disk = path / "rescue.qcow2"
        self.seed_disk = path / "seed.iso"
        self.console = path / "console.log"
        self.errors = path / "errors.log"

    def exists(self) -> bool:
        return self.path.is_dir()

    def roots(self, spec: Spec) -> RootFolder:
        """Where its root disks are. Raises `Refused` where they are in a shared folder that is not there."""
        return root_folder(self.path, spec)

    def make(self, permit: Permit) -> None:
        permit.check()
        self.path.mkdir(mode=0o700, exist_ok=True)
        permit.check()
        self.inside.mkdir(mode=0o711, exist_ok=True)
        # A umask must not keep QEMU's user out of the folder that it is started in.
        self.inside.chmod(0o711)

    def remove(self, permit: Permit) -> None:
        """Remove the folder and all that is in it; does nothing where it is gone."""
        for place, _folders, files in os.walk(self.path, topdown=False):
            for name in files:
                permit.check()
                Path(place, name).unlink(missing_ok=True)
            permit.check()
            Path(place).rmdir()

    # ------------------------------------------------------------------------------------------------- records

    def process_record(self) -> ProcessRecord | None:
        return _read(self.path / "process.json", ProcessRecord)

    def keep_process_record(self, record: ProcessRecord) -> None:
        _write(self.path / "process.json", record)

    def forget_process_record(self) -> None:
        (self.path / "process.json").unlink(missing_ok=True)

    def spec(self) -> Spec | None:
        return _read(self.path / "spec.json", Spec)

    def keep_spec(self, spec: Spec) -> None:
        _write(self.path / "spec.json", spec)

    def note_frozen(self) -> None:
        """Keep that the guest's file systems may be held still from now on, for whoever comes after us."""
        (self.path / "frozen").touch()

    def is_noted_frozen(self) -> bool:
        return (self.path / "frozen").exists()

    def forget_frozen(self) -> None:
        (self.path / "frozen").unlink(missing_ok=True)

    def node_names(self) -> dict[str, str]:
        """Which disk a node is, by the node's name, where the name of its device does not tell."""
        return _read(self.path / "node-names.json", dict[str, str]) or {}

    def keep_node_names(self, more: dict[str, str]) -> None:
        """Remember of more nodes which disk they are."""
        _write(self.path / "node-names.json", {**self.node_names(), **more})

    def forget_node_names(self) -> None:
        (self.path / "node-names.json").unlink(missing_ok=True)

    def machine(self) -> Machine | None:
        return _read(self.path / "machine.json", Machine)

    def keep_machine(self, machine: Machine) -> None:
        _write(self.path / "machine.json", machine)

    # ------------------------------------------------------------------------------------- what a process needs

    def lock(self) -> int | None:
        """Lock the instance for the process that will hold it; None if a process holds it.

        The answer is a descriptor. The lock belongs to everybody who has a copy of it, and ends with the last of them.
        """
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def held(self) -> bool:
        """Whether a process holds the instance, found by trying its lock."""
        if not self.exists():
            return False
        descriptor = self.lock()
        if descriptor is None:
            return True
        os.close(descriptor)
        return False

    def listen(self, name: str) -> socket.socket:
        """A fresh socket of that name for QEMU to answer on, listening."""
        (self.path / name).unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with self._short_path() as short:
                listener.bind(f"{short}/{name}")
            # A frozen QEMU accepts nobody; each server that comes while it is frozen waits here.
            listener.listen(128)
        except BaseException:
            listener.close()
            raise
        return listener

    def call_monitor(self) -> socket.socket:
        """A socket connected to the command monitor. Raises OSError if nobody listens."""
        return self.call(MONITOR)

    def call(self, name: str) -> socket.socket:
        """A socket connected to the one of that name. Raises OSError if nobody listens."""
        caller = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        caller.setblocking(False)
        try:
            with self._short_path() as short:
                caller.connect(f"{short}/{name}")
        except BaseException:
            caller.close()
            raise
        return caller

    def make_journal(self, user: tuple[int, int] | None) -> None:
        """Fresh pipes for the event monitor, for QEMU's user and group."""
        for end in ("in", "out"):
            pipe = self.inside / f"{JOURNAL}.{end}"
            pipe.unlink(missing_ok=True)
            os.mkfifo(pipe, 0o600)
            if user is not None:
                os.chown(pipe, *user)

    def open_journal(self, end: str) -> int:
        """Open one of the pipes, `in` or `out`, without waiting for QEMU to do so too."""
        descriptor = os.open(self.inside / f"{JOURNAL}.{end}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise Refused(f"{self.inside}/{JOURNAL}.{end} is not a pipe.", remedy="Delete the instance.")
        return descriptor

    def last_error(self) -> str:
        """What QEMU wrote before it gave up: its last two lines, since it explains itself on the second."""
        with contextlib.suppress(OSError):
            lines = self.errors.read_bytes()[-4096:].decode(errors="replace").strip().splitlines()
            if lines:
                return " ".join(lines[-2:])
        return "it said nothing"

    @contextlib.contextmanager
    def _short_path(self) -> Iterator[str]:
        """A name for the folder that always fits into the 107 bytes that a socket's address may have."""
        descriptor = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)


def _read(path: Path, kind: type[RecordT]) -> RecordT | None:
    """A record that was cut short by a power failure counts as absent: it speaks of a process that is gone too."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None


def _write(path: Path, record: msgspec.Struct | dict[str, str]) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(record))
    fresh.replace(path)
