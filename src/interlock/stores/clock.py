"""Where a store's time comes from. No rule about time is here, and no other module of the stores reads a clock."""

from __future__ import annotations

import time
from typing import Final

from interlock.ports import Clock


class SystemClock:
    """The wall clock as it was when this object was made, carried on by the monotonic clock.

    Setting the wall clock afterwards moves nothing. While the machine is suspended it stands still: that can delay a
    takeover and never hastens one.
    """

    def __init__(self) -> None:
        self._wall_ms: Final = time.time_ns() // 1_000_000  # noqa: TID251  (the one place where the wall clock is read)
        self._started_ns: Final = time.monotonic_ns()

    def now_ms(self) -> int:
        return self._wall_ms + (time.monotonic_ns() - self._started_ns) // 1_000_000


class StoreClock:
    """Another clock, raised so that it begins no earlier than what the store has seen, and never goes back."""

    def __init__(self, clock: Clock, seen_ms: int) -> None:
        self._clock: Final = clock
        self._raised_by_ms: Final = max(0, seen_ms - clock.now_ms())
        self._last_ms = 0

    def now_ms(self) -> int:
        """Milliseconds since the Unix epoch. May be called from any thread."""
        now_ms = self._clock.now_ms() + self._raised_by_ms
        if now_ms < self._last_ms:
            return self._last_ms
        self._last_ms = now_ms
        return now_ms
