"""Time windows as absolute intervals: which of them are open at a time, and when that changes next.

The core knows no time zones: a shell resolves the weekly windows of a policy to intervals on the store's clock
(`policies.time_windows`).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from typing import Final

import msgspec

_DAY: Final = "(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)"
_DAYS: Final = f"{_DAY}(?:-{_DAY})?(?:,{_DAY}(?:-{_DAY})?)*"
_TIME: Final = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
WINDOW: Final = re.compile(f"({_DAYS}) ({_TIME})-(?:({_DAY}) )?({_TIME}|24:00) ([A-Za-z][A-Za-z0-9_+/-]{{0,63}})")
"""A weekly window: days, start, day of the end (none: at most 24 hours after the start), end, time zone."""


class Calendar(msgspec.Struct, frozen=True):
    """When windows are open, for some weeks from when it was made."""

    intervals: dict[str, tuple[tuple[int, int], ...]]
    """For each window, by its text: start and end of each interval on the store's clock, in milliseconds. They are in
    order and disjoint, and a window is closed at an interval's end."""

    def open_at(self, at_ms: int) -> tuple[str, ...]:
        """Return the windows that are open."""
        return tuple(window for window, spans in self.intervals.items() if _is_open(spans, at_ms))

    def next_change_ms(self, windows: Iterable[str], after_ms: int) -> int | None:
        """Return the first time after `after_ms` at which one of these windows opens or closes; None if none does."""
        moments = (_next_moment_ms(self.intervals.get(window, ()), after_ms) for window in windows)
        return min((moment for moment in moments if moment is not None), default=None)


def _place(spans: tuple[tuple[int, int], ...], at_ms: int) -> int:
    """Return how many intervals have begun."""
    return bisect_right(spans, at_ms, key=lambda span: span[0])


def _is_open(spans: tuple[tuple[int, int], ...], at_ms: int) -> bool:
    begun = _place(spans, at_ms)
    return begun > 0 and at_ms < spans[begun - 1][1]


def _next_moment_ms(spans: tuple[tuple[int, int], ...], after_ms: int) -> int | None:
    if _is_open(spans, after_ms):
        return spans[_place(spans, after_ms) - 1][1]
    return next((start for start, _ in spans[_place(spans, after_ms) :]), None)
