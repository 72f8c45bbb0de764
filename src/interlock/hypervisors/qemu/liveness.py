"""Liveness: QEMU processes that stop responding are reported, and guests halted for lack of space are resumed.

Rounds are counted and not time: a host that was suspended stops the prober and QEMU alike, and that is no failure.
"""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

from interlock.core.errors import OperationRejected
from interlock.core.records import GuestEvent
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.process_registry import ProcessRegistry
from interlock.images.atomic_files import free_mib


class LivenessCheck:
    """Probes all guests of a host at an interval. Nothing in a round waits."""

    def __init__(self, registry: ProcessRegistry) -> None:
        self._registry = registry
        settings = registry.settings
        self._interval_ms = settings.liveness_interval_ms
        self._rounds_max = max(1, math.ceil(settings.liveness_timeout_ms / self._interval_ms))
        busy_ms = max(settings.liveness_timeout_ms, settings.memory_stall_timeout_ms)
        self._rounds_max_busy = max(1, math.ceil(busy_ms / self._interval_ms))
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start a round now, and the next one after the interval."""
        for guest in self._registry:
            guest.check_liveness(self._rounds_max, self._rounds_max_busy)
            if guest.halted is GuestEvent.NO_SPACE and self._has_space(guest):
                self._registry.run_in_background(guest.resume_halted())
        self._timer = asyncio.get_running_loop().call_later(self._interval_ms / 1000, self.start)

    def stop(self) -> None:
        """Start no further round."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _has_space(self, guest: Guest) -> bool:
        """Whether every file system of the guest's disks has space again."""
        try:
            spec = guest.folder.spec()
            folders = {Path(disk.path).parent for disk in spec.disks} if spec is not None else set()
            folders.add(guest.folder.path if spec is None else guest.folder.roots(spec).path)
            return min(map(free_mib, folders)) >= self._registry.settings.go_on_free_mib
        except (OSError, OperationRejected):
            return False
