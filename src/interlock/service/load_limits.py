"""Limits on what clients ask and hold: rates by token bucket, and slots that are taken for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Final, Self

from interlock.config import HttpConfig

_BUCKETS_MAX: Final = 10_000
"""How many buckets are kept before those that are full are removed."""


class TokenBuckets:
    """Limits rates by key: a bucket has `burst` tokens at first, and gets `per_s` tokens a second back.

    Args:
        per_s: tokens a second.
        burst: the most tokens of a bucket.
        clock: returns the time in seconds.
    """

    def __init__(self, per_s: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_s
        self._burst = burst
        self._clock = clock
        self._full_at_s: dict[str, float] = {}
        """When each bucket will be full again: all that its content needs."""

    def take(self, key: str) -> float:
        """Take a token from a bucket and return 0, or return after how many seconds it has one."""
        now_s = self._clock()
        full_at_s = max(self._full_at_s.get(key, now_s), now_s) + 1 / self._per_s
        excess_s = full_at_s - now_s - self._burst / self._per_s
        if excess_s > 1e-9:  # noqa: PLR2004 - rounding
            return excess_s
        if key not in self._full_at_s and len(self._full_at_s) >= _BUCKETS_MAX:
            self._full_at_s = {one: at_s for one, at_s in self._full_at_s.items() if at_s > now_s}
        self._full_at_s[key] = full_at_s
        return 0


class Slots:
    """Counts what is held at the same time, in all and by key.

    Args:
        most: the most in all.
        per_key: the most of one key.
    """

    def __init__(self, most: int, per_key: int) -> None:
        self.most = most
        self.per_key = per_key
        self.taken = 0
        self._counts: dict[str, int] = {}

    def take(self, key: str) -> bool:
        """Take a slot. Return whether there was one."""
        held = self._counts.get(key, 0)
        if self.taken >= self.most or held >= self.per_key:
            return False
        self.taken += 1
        self._counts[key] = held + 1
        return True

    def release(self, key: str) -> None:
        self.add(key, -1)

    def add(self, key: str, count: int) -> None:
        """Take or release slots, whether there are any or not."""
        self.taken += count
        held = self._counts.get(key, 0) + count
        if held:
            self._counts[key] = held
        else:
            del self._counts[key]

    def full_for(self, key: str) -> bool:
        """Whether it is the key that has no slot left, and not all of them together."""
        return self._counts.get(key, 0) >= self.per_key


class RequestSlot:
    """The slot of a request that is being served, for the time of a block, without the time in which it waits."""

    __slots__ = ("_ended", "_held", "_key", "_slots")

    def __init__(self, slots: Slots, key: str) -> None:
        self._slots = slots
        self._key = key
        self._held = True
        self._ended = False

    def __enter__(self) -> Self:
        _PRESENT.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        # It stays the task's present slot, and has no effect any more.
        self._ended = True
        self.suspend()

    def suspend(self) -> bool:
        """Release the slot. Return whether it was held."""
        held, self._held = self._held, False
        if held:
            self._slots.release(self._key)
        return held

    def resume(self) -> None:
        """Take the slot again, unless the request has ended: a task of it may end later than the request."""
        if not self._ended:
            self._held = True
            self._slots.add(self._key, 1)


_PRESENT: Final[ContextVar[RequestSlot | None]] = ContextVar("the slot of the present request", default=None)


class waiting:  # noqa: N801 - used as a function
    """Release the slot of the present request, for the time of a block in which it waits for its client or an event."""

    __slots__ = ("_slot",)

    def __enter__(self) -> None:
        slot = _PRESENT.get()
        self._slot = slot if slot is not None and slot.suspend() else None

    def __exit__(self, *_: object) -> None:
        if self._slot is not None:
            self._slot.resume()


class LoadLimits:
    """The limits of a server on requests and event streams.

    Args:
        limits: of the configuration.
        clock: returns the time in seconds.
    """

    def __init__(self, limits: HttpConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.rates = TokenBuckets(limits.token_requests_per_s, limits.token_requests_burst, clock)
        """Requests by token."""
        self.auth_failures = TokenBuckets(limits.auth_failures_per_s, limits.auth_failures_burst, clock)
        """Requests without a valid token by address."""
        self.streams = Slots(limits.streams_max, limits.token_streams_max)
        """Event streams by token."""
        self.requests = Slots(limits.requests_max, limits.token_requests_max)
        """Requests that are being served by token."""

    def serve(self, key: str) -> RequestSlot | None:
        """Return a slot for a request of a token; None if too many are being served."""
        return RequestSlot(self.requests, key) if self.requests.take(key) else None
