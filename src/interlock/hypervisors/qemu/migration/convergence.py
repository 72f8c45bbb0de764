"""Convergence of a live migration: it does not end by itself if the guest writes faster than the network sends.

The memory (or disk) is sent once, and then, again and again, what the guest has written meanwhile. Only that is limited
in time: the first pass may take as long as it makes progress.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec

from interlock.core.errors import OperationRejected

WARNING: Final = "does not converge"
_MIB: Final = 1024**2
_SHRINKS_BY: Final = 0.8
"""A pass that leaves a larger share than this of what the one before it left makes hardly any progress."""
_PASSES_JUDGED: Final = 3
"""The first pass in which QEMU knows the rate at which the guest writes."""
THROTTLE: Final = {"cpu-throttle-initial": 30, "cpu-throttle-increment": 20, "max-cpu-throttle": 99}
"""Throttling of the vCPUs in per cent: initially, increment, and maximum."""


class ConvergenceLimit:
    """A limit for the time in which data is sent again; none if `limit_ms` is 0."""

    def __init__(self, limit_ms: int, what: str) -> None:
        self._limit_ms = limit_ms
        self._what = what
        self._now = asyncio.get_running_loop().time
        self._since: float | None = None

    def note(self, *, again: bool, standing: str) -> None:
        """Note whether all was sent once, and data is sent again.

        Raises:
            OperationRejected: that has lasted too long; `standing` describes the progress.
        """
        if not again:
            return
        if self._since is None:
            self._since = self._now()
        elif self._limit_ms and (self._now() - self._since) * 1000 > self._limit_ms:
            raise OperationRejected(
                f"{self._what} {WARNING}: after {self._limit_ms / 1000:g} s of sending changed data "
                f"again, {standing}. It was cancelled, and the VM continues on the source host.",
                remedy="Try again with a longer --converge-timeout, when the VM writes less, with a faster network, or "
                "migrate it cold; live_migrate_force_complete pauses the VM until all is sent.",
            )


class MemoryState(msgspec.Struct, frozen=True, kw_only=True):
    """The progress of sending a guest's memory, from QEMU's `query-migrate`."""

    done: int
    total: int
    remaining: int
    passes: int
    """The number of passes begun; the first one sends all of the memory."""
    written_per_s: int
    """The rate at which the guest writes, in bytes per second; 0 if it is not known yet."""
    sent_per_s: int
    throttle: int
    """Throttling of its vCPUs in per cent."""

    @property
    def again(self) -> bool:
        """Whether all was sent once, and data is sent again."""
        return self.passes > 1

    @property
    def warning(self) -> str | None:
        """The warning that the guest writes about as fast as its memory is sent, or None."""
        judged = self.passes >= _PASSES_JUDGED and self.sent_per_s > 0
        return WARNING if judged and self.written_per_s >= self.sent_per_s * _SHRINKS_BY else None

    @property
    def standing(self) -> str:
        """A description of what is left."""
        return (
            f"{_mib(self.remaining)} are left after {self.passes} passes, and the VM writes "
            f"{_mib(self.written_per_s)}/s while {_mib(self.sent_per_s)}/s are sent"
        )

    @property
    def detail(self) -> str | None:
        """The status text; None in the first pass, which has a simple progress."""
        if not self.again:
            return None
        throttled = f", and is throttled by {self.throttle} %" if self.throttle else ""
        head = f"{self.warning}: " if self.warning else ""
        return (
            f"{head}pass {self.passes} over the memory, {_mib(self.remaining)} left; the VM writes "
            f"{_mib(self.written_per_s)}/s, {_mib(self.sent_per_s)}/s are sent{throttled}"
        )


def memory_state(seen: dict[str, Any]) -> MemoryState | None:
    """Read an answer of `query-migrate`; None if it has nothing about the memory."""
    ram = seen.get("ram")
    if ram is None:
        return None
    return MemoryState(
        done=ram["total"] - ram["remaining"],
        total=ram["total"],
        remaining=ram["remaining"],
        passes=ram.get("dirty-sync-count", 0),
        written_per_s=ram.get("dirty-pages-rate", 0) * ram.get("page-size", 4096),
        sent_per_s=int(ram.get("mbps", 0) * 1_000_000 / 8),
        throttle=seen.get("cpu-throttle-percentage", 0),
    )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / _MIB:.1f}".removesuffix(".0") + " MiB"
