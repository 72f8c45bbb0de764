"""How long a host may run guests: the lease that the server granted, in a file that the watchdog reads.

A lease ends at a time of the clock that runs from the machine's boot and cannot be set. The file outlives the agent, as
its guests do, and the watchdog goes on. A lease of an earlier boot has expired, as its guests have ended.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Final

from interlock.core.errors import NotResponding

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_HEAD_BYTES: Final = 64
_WIDTH: Final = 8
ENDLESS_NS: Final = 2**62


def now_ns() -> int:
    """Return the clock of leases: nanoseconds since the machine's boot, including suspend."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Lease:
    """The lease of one host's folder. The agent writes it, the watchdog reads it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def open(self) -> None:
        """Open the file, or create it. One of another boot is reset to an expired lease."""
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        boot = _BOOT_ID.read_bytes().strip().ljust(_HEAD_BYTES)
        if os.pread(self._descriptor, _HEAD_BYTES, 0) != boot:
            os.pwrite(self._descriptor, boot + bytes(_WIDTH), 0)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @property
    def ends_ns(self) -> int:
        """When it expires; 0 if there never was one."""
        if self._descriptor is None:
            return 0
        return int.from_bytes(os.pread(self._descriptor, _WIDTH, _HEAD_BYTES), "little")

    def extend(self, ends_ns: int) -> None:
        """Let it expire then, if that is later."""
        if self._descriptor is not None and (ends_ns > self.ends_ns or self.ends_ns == ENDLESS_NS):
            os.pwrite(self._descriptor, ends_ns.to_bytes(_WIDTH, "little"), _HEAD_BYTES)

    @property
    def left_ns(self) -> int:
        """The time until it expires; 0 or less once it has."""
        return self.ends_ns - now_ns()

    def require(self) -> None:
        """Raise `NotResponding` if it has expired."""
        if self.left_ns <= 0:
            raise NotResponding(
                "This host's lease has expired: it may not run guests until it reaches the server again.",
                remedy="See why the agent does not reach the server.",
            )


class EndedByLease:
    """The guests that the watchdog has ended: an empty file each, until the server is notified of the reason."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "ended-by-lease"
        self._descriptor = -1

    def open(self) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def add(self, instance_id: str) -> None:
        """Record that a guest is about to be ended; if that fails, it is reported as vanished."""
        with contextlib.suppress(OSError):
            flags = os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC
            os.close(os.open(instance_id, flags, 0o600, dir_fd=self._descriptor))

    def take(self, instance_id: str) -> bool:
        """Return whether the watchdog ended that guest, and delete the record."""
        try:
            os.unlink(instance_id, dir_fd=self._descriptor)
        except OSError:
            return False
        return True
