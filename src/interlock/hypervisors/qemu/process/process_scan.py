"""Finds the QEMU processes that Interlock started on this machine, even if their files are gone.

Each is started with three environment variables: its instance, the host identity, and the VM folder at that time (path,
device and inode). The kernel keeps the environment of a process, so that the marks outlive agent and server, and hold
after the folder was moved, emptied or deleted, and inside a chroot or a namespace. The environment of another user's
process cannot be read without privileges; such a process is not found.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from interlock.confinement.sandbox import BWRAP
from interlock.hypervisors.qemu.process.qemu_process import FIRST_DESCRIPTOR, kill, lives, started_ticks

_INSTANCE: Final = "INTERLOCK_GUEST_INSTANCE"
_HOST: Final = "INTERLOCK_GUEST_HOST_ID"
_FOLDER: Final = "INTERLOCK_GUEST_FOLDER"
_PROC: Final = Path("/proc")
_DELETED: Final = " (deleted)"
"""The suffix that the kernel appends to the path of a deleted file."""


class GuestFolder(msgspec.Struct, frozen=True, kw_only=True):
    """A VM folder, identified by device and inode, and by its path."""

    host_id: str
    """The identity of its host."""
    path: str
    device: int
    inode: int

    @classmethod
    def of(cls, folder: Path, host_id: str) -> GuestFolder:
        """Describe a folder that exists."""
        found = folder.stat()
        return cls(host_id=host_id, path=str(folder.resolve()), device=found.st_dev, inode=found.st_ino)

    def is_same(self, other: GuestFolder) -> bool:
        """Whether both are the same folder, which may have been moved. The inode of a deleted folder can be reused."""
        return (self.device, self.inode) == (other.device, other.inode)

    def marks(self, instance_id: str) -> list[str]:
        """Return the environment variables that mark a guest of this folder."""
        return [
            f"{_INSTANCE}={instance_id}",
            f"{_HOST}={self.host_id}",
            f"{_FOLDER}={self.device}:{self.inode}:{self.path}",
        ]


class FoundGuest(msgspec.Struct, frozen=True, kw_only=True):
    """A process that holds a guest."""

    process_id: int
    started_ticks: int
    """Its start time by the kernel, by which a reused process id is noticed."""
    instance_id: str
    folder: GuestFolder
    """The VM folder in which it was started, as it was then."""

    @property
    def working_folder(self) -> Path:
        """A link to its working folder, whose target is the path in its own mount namespace."""
        return _PROC / str(self.process_id) / "cwd"

    @property
    def lock(self) -> Path:
        """A link to the lock of its instance, which it has open."""
        return _PROC / str(self.process_id) / "fd" / str(FIRST_DESCRIPTOR)

    def place(self) -> Path | None:
        """Return the current path of its working folder; None if that was deleted, or the process has ended.

        The path is that of the lock beside it, which the process has open.
        """
        try:
            lock = _lock_of(_PROC / str(self.process_id))
            if lock is None or (lock.name.endswith(_DELETED) and not lock.exists()):
                return None
            return lock.parent / "inside" if self.working_folder.stat().st_nlink else None
        except OSError:
            return None

    def lives(self) -> bool:
        """Whether the process exists and is not a zombie."""
        return lives(self.process_id, self.started_ticks)

    def kill(self, wait_ms: int = 0) -> bool:
        """Send SIGKILL; return whether the process has ended within the time."""
        return kill(self.process_id, self.started_ticks, wait_ms)


def find_guests() -> Iterator[FoundGuest]:
    """Find the processes of this machine that hold a guest of any server or agent, and are readable."""
    for place in _PROC.iterdir():
        if place.name.isdigit():
            found = _guest_in(place)
            if found is not None:
                yield found


def _lock_of(place: Path) -> Path | None:
    """Return the path of the lock that a guest's process has open, as the kernel writes it; None if it has none."""
    lock = (place / "fd" / str(FIRST_DESCRIPTOR)).readlink()
    return lock if lock.name.removesuffix(_DELETED) == "lock" else None


def _guest_in(place: Path) -> FoundGuest | None:
    try:
        arguments = (place / "cmdline").read_bytes().split(b"\0")
        if b"-uuid" not in arguments or (arguments[0] == BWRAP.encode() and _lock_of(place) is None):
            return None  # also bubblewrap that waits for a guest
        # Before it executes QEMU, its later environment is among its arguments.
        marks = dict(
            word.decode(errors="replace").partition("=")[::2]
            for word in (*arguments, *(place / "environ").read_bytes().split(b"\0"))
            if word.startswith(b"INTERLOCK_GUEST_")
        )
    except OSError:
        return None
    process_id = int(place.name)
    ticks = started_ticks(process_id)
    if ticks is None or not {_INSTANCE, _HOST, _FOLDER} <= marks.keys():
        return None
    device, _, rest = marks[_FOLDER].partition(":")
    inode, _, path = rest.partition(":")
    if not (device.isdigit() and inode.isdigit()):
        return None
    folder = GuestFolder(host_id=marks[_HOST], path=path, device=int(device), inode=int(inode))
    return FoundGuest(process_id=process_id, started_ticks=ticks, instance_id=marks[_INSTANCE], folder=folder)
