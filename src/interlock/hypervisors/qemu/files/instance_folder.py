"""The folder of one instance on its host: records, disks, sockets and the lock that its QEMU process holds.

vms/ID/                 0700, of the server's user: QEMU gets everything in it as open descriptors
    spec.json           what the guest was last started with, and the disks plugged in since
    node-names.json     disk id by block node of the running QEMU, where the device's name is that of another disk
    process.json        the process that holds the guest; absent when there should be none
    lock                locked (flock) by the process that holds the guest, for exactly as long as it lives
    monitor             the socket of the command monitor
    console             the socket of the serial console
    agent               the socket of the guest agent's port
    network[-ID]        the socket of a user network, for QEMU's first interface or another
    network[-ID].json   the process of that network
    frozen              present while the guest's file systems may be frozen
    root.qcow2          root disk 0, an overlay of the image or without backing file, unless it is in a shared folder
    root-N.qcow2        root disk N, created by a rebuild, a resize or an unshelve
    rescue.qcow2        during a rescue: an overlay of the rescue image
    memory.saved        the guest's memory: no vCPU has run since it was written
    memory.used         the same, from the moment on at which vCPUs may have run from it
    memory.json         the spec and machine that the memory belongs to
    memory.part         the guest's memory while it is being written
    machine.json        the machine that QEMU was last started with
    seed.iso            the cloud-init seed, if there is one
    *.new               files that are being created
    console.log         the output of the serial console
    errors.log          QEMU's standard error
    awaited, sent       marks of a live migration: see `migration`
    inside/             0711: the working folder of QEMU, by which its process is recognised
        journal.in/.out the pipes of the event log
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import msgspec

from interlock.core.errors import NotResponding, OperationRejected
from interlock.core.records import Spec
from interlock.core.specs import PRIMARY
from interlock.hypervisors.qemu.command_line import EVENT_LOG, MONITOR, Machine, network_name
from interlock.hypervisors.qemu.files.root_folder import RootFolder, root_folder
from interlock.images.atomic_files import drafted
from interlock.ports import Permit

RecordT = TypeVar("RecordT")


class Phase(StrEnum):
    """The recorded phase of a process."""

    STARTING = "starting"
    """The guest's vCPUs have not run yet."""
    RUNNING = "running"
    """They have; if the process is missing, it vanished."""
    ENDED = "ended"
    """The guest powered itself off or crashed, and that was reported."""
    ENDING = "ending"
    """Its end was requested."""


class Saving(StrEnum):
    """The state of a guest before it was paused so that its memory could be saved."""

    RAN = "ran"
    STOOD_STILL = "stood still"


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The process that holds the guest."""

    phase: Phase
    process_id: int = 0
    """0 until it is known."""
    started_ticks: int = 0
    """Its start time by the kernel, by which a reused process id is noticed."""
    saving: Saving | None = None
    """The guest's state before saving its memory began; None while that is not in progress."""


class NetworkProcess(msgspec.Struct, frozen=True, kw_only=True):
    """The process of a user network."""

    process_id: int
    started_ticks: int
    """As of `ProcessRecord`."""
    user_id: int | None = None
    """Its user, if that is its own."""


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
        """Return the folder of its root disks. Raises `OperationRejected` if that is a shared one and missing."""
        return root_folder(self.path, spec)

    def make(self, permit: Permit) -> None:
        permit.check()
        self.path.mkdir(mode=0o700, exist_ok=True)
        permit.check()
        self.inside.mkdir(mode=0o711, exist_ok=True)
        # A umask must not keep QEMU's user out of the folder that it is started in.
        self.inside.chmod(0o711)

    def remove(self, permit: Permit) -> None:
        """Remove the folder with its contents, if it exists."""
        for place, _folders, files in os.walk(self.path, topdown=False):
            for name in files:
                permit.check()
                Path(place, name).unlink(missing_ok=True)
            permit.check()
            Path(place).rmdir()

    # ------------------------------------------------------------------------------------------------- records

    def process_record(self) -> ProcessRecord | None:
        return _read(self.path / "process.json", ProcessRecord)

    def write_process_record(self, record: ProcessRecord) -> None:
        _write(self.path / "process.json", record)

    def remove_process_record(self) -> None:
        (self.path / "process.json").unlink(missing_ok=True)

    def spec(self) -> Spec | None:
        return _read(self.path / "spec.json", Spec)

    def write_spec(self, spec: Spec) -> None:
        _write(self.path / "spec.json", spec)

    def note_frozen(self) -> None:
        """Record for a later server that the guest's file systems may be frozen."""
        (self.path / "frozen").touch()

    def is_noted_frozen(self) -> bool:
        return (self.path / "frozen").exists()

    def forget_frozen(self) -> None:
        (self.path / "frozen").unlink(missing_ok=True)

    def node_names(self) -> dict[str, str]:
        """Return the disk id by block node, where the device's name is that of another disk."""
        return _read(self.path / "node-names.json", dict[str, str]) or {}

    def add_node_names(self, more: dict[str, str]) -> None:
        """Record the disk ids of more block nodes."""
        _write(self.path / "node-names.json", {**self.node_names(), **more})

    def remove_node_names(self) -> None:
        (self.path / "node-names.json").unlink(missing_ok=True)

    def machine(self) -> Machine | None:
        return _read(self.path / "machine.json", Machine)

    def write_machine(self, machine: Machine) -> None:
        _write(self.path / "machine.json", machine)

    def network_process(self, interface_id: str) -> NetworkProcess | None:
        """Return the process of a user network, which may have ended."""
        return _read(self._network(interface_id), NetworkProcess)

    def network_processes(self) -> tuple[NetworkProcess, ...]:
        """Return the processes of all user networks, which may have ended."""
        found = (_read(path, NetworkProcess) for path in self.path.glob(f"{network_name(PRIMARY)}*.json"))
        return tuple(one for one in found if one is not None)

    def write_network_process(self, interface_id: str, process: NetworkProcess) -> None:
        _write(self._network(interface_id), process)

    def remove_network_process(self, interface_id: str) -> None:
        self._network(interface_id).unlink(missing_ok=True)

    def _network(self, interface_id: str) -> Path:
        return self.path / f"{network_name(interface_id)}.json"

    # ------------------------------------------------------------------------------------- lock and sockets

    def lock(self) -> int | None:
        """Lock the instance for a new process; return the lock's descriptor, or None if a process holds it.

        The lock is held until the last copy of the descriptor is closed.
        """
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def held(self) -> bool:
        """Whether a process holds the instance."""
        if not self.exists():
            return False
        descriptor = self.lock()
        if descriptor is None:
            return True
        os.close(descriptor)
        return False

    def held_by_unknown(self) -> NotResponding:
        """Return the error for an instance that is held by a process which is not registered."""
        return NotResponding(
            f"An unknown process holds VM {self.path.name}.",
            remedy="Restart the server: it looks for such processes when it starts.",
        )

    def require_ended(self) -> None:
        """Raise `NotResponding` if a process holds the instance."""
        if self.held():
            raise NotResponding(
                f"A process still holds VM {self.path.name}, whose disks are to change.",
                remedy="Stop it hard first.",
            )

    def listen(self, name: str) -> socket.socket:
        """Return a new listening socket of that name, for QEMU."""
        (self.path / name).unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with self.short_path() as short:
                listener.bind(f"{short}/{name}")
            # A stopped QEMU accepts nobody; each server that connects meanwhile waits here.
            listener.listen(128)
        except BaseException:
            listener.close()
            raise
        return listener

    def connect_monitor(self) -> socket.socket:
        """Return a socket connected to the command monitor. Raises OSError if nobody listens."""
        return self.connect(MONITOR)

    def connect(self, name: str) -> socket.socket:
        """Return a socket connected to the one of that name. Raises OSError if nobody listens."""
        caller = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        caller.setblocking(False)
        try:
            with self.short_path() as short:
                caller.connect(f"{short}/{name}")
        except BaseException:
            caller.close()
            raise
        return caller

    def make_event_pipes(self) -> None:
        """Create the pipes of the event log.

        Every user may open them who can reach them, which is only QEMU: no other has this folder in view.
        """
        for end in ("in", "out"):
            pipe = self.inside / f"{EVENT_LOG}.{end}"
            pipe.unlink(missing_ok=True)
            os.mkfifo(pipe, 0o600)
            pipe.chmod(0o666)

    def open_event_pipe(self, end: str) -> int:
        """Open one of the pipes, `in` or `out`, without waiting for QEMU to open it."""
        path = self.inside / f"{EVENT_LOG}.{end}"
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OperationRejected(f"{path} is not a pipe.", remedy="Delete the VM.")
        return descriptor

    def last_error(self) -> str:
        """Return the last two lines of QEMU's standard error."""
        with contextlib.suppress(OSError):
            lines = self.errors.read_bytes()[-4096:].decode(errors="replace").strip().splitlines()
            if lines:
                return " ".join(lines[-2:])
        return "it gave no reason"

    @contextlib.contextmanager
    def short_path(self) -> Iterator[str]:
        """Return a path of the folder that fits into a socket address, which has 107 bytes at most."""
        descriptor = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def os_errors_rejected(self, place: Path | None = None) -> Iterator[None]:
        """Raise `OperationRejected` for OSErrors in the block, with a remedy.

        `place` is the folder that is written to, if it is not the instance's.
        """
        place = place or self.path
        try:
            yield
        except OSError as error:
            remedy: str | None
            match error.errno:
                case errno.ENOSPC | errno.EDQUOT:
                    remedy = f"Make room on the file system of {place}."
                case errno.EACCES | errno.EPERM | errno.EROFS:
                    remedy = f"Give the server's user write access to {place}."
                case errno.EMFILE | errno.ENFILE | errno.EAGAIN | errno.ENOMEM:
                    remedy = "The host is out of descriptors, processes or memory: run fewer VMs, or raise its limits."
                case _:
                    remedy = None
            where = error.filename or place
            raise OperationRejected(f"VM {self.path.name}: {where}: {error.strerror}.", remedy=remedy) from error


def _read(path: Path, kind: type[RecordT]) -> RecordT | None:
    """Read a record. One truncated by a power failure counts as missing: its process has ended too."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None


def _write(path: Path, record: msgspec.Struct | dict[str, str]) -> None:
    with drafted(path) as draft:
        draft.write_bytes(msgspec.json.encode(record))
