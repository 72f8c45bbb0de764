"""For how long a host may hold guests: what the server granted, kept where the watchdog reads it.

A lease ends at a moment of the clock that runs from the machine's boot and cannot be set. The file outlives the agent:
its guests do too, and the watchdog goes on counting. What is counted for another boot is over: so are its guests.
"""

from __future__ import annotations

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
    """The clock on which leases are counted: nanoseconds since the machine's boot, sleep included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Lease:
    """The lease of one host's folder. The agent writes it, the watchdog reads it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def open(self) -> None:
        """Open the file, made where there is none; one of another boot is begun anew, with a lease that is over."""
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
        """When it ends; 0 if there never was one."""
        if self._descriptor is None:
            return 0
        return int.from_bytes(os.pread(self._descriptor, _WIDTH, _HEAD_BYTES), "little")

    def extend(self, ends_ns: int) -> None:
        """Let it end then, if that is later."""
        if self._descriptor is not None and (ends_ns > self.ends_ns or self.ends_ns == ENDLESS_NS):
            os.pwrite(self._descriptor, ends_ns.to_bytes(_WIDTH, "little"), _HEAD_BYTES)

    @property
    def left_ns(self) -> int:
        """How long it lasts; not more than 0 when it is over."""
        return self.ends_ns - now_ns()

    def require(self) -> None:
        """Raise `NotResponding` when it is over."""
        if self.left_ns <= 0:
            raise NotResponding(
                "This host's lease is over: it may hold no guests until it reaches the server again.",
                remedy="See why the agent does not reach the server.",
            )
