"""Time windows of policies: weekly times in a time zone, and the intervals that they are on the store's clock.

A local time that a change of the clocks skips counts with the offset before the change, as in iCalendar (RFC 5545). Of
one that occurs twice, a window begins with the first and ends with the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from typing import Final
from zoneinfo import ZoneInfo

from interlock.core.policy import CompiledPolicy
from interlock.core.time_windows import WINDOW, Calendar

HORIZON: Final = timedelta(days=60)
"""How far ahead windows are resolved."""
_BEHIND: Final = timedelta(days=9)
"""How far back: longer than the longest window."""
_DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def error_in(window: str) -> str | None:
    """Return what is wrong with the text of a window that has the form of one; None if nothing is."""
    parsed = WINDOW.fullmatch(window.removeprefix("!"))
    if parsed is None:
        return "Expected days, times and a time zone, such as 'Sat,Sun 02:00-06:00 Europe/Berlin'."
    days, _, end_day, _, zone = parsed.groups()
    if end_day is not None and days not in _DAYS:
        return f"A window that ends on another day ({end_day}) begins on one day, not on {days}."
    try:
        _zone(zone)
    except (KeyError, ValueError, OSError):
        return f"Time zone {zone!r} not found: expected a name of the tz database, such as Europe/Berlin or UTC."
    return None


def resolved(policy: CompiledPolicy, now_ms: int, offset_ms: int) -> CompiledPolicy:
    """Return the policy with the intervals of its windows from now on, for `HORIZON`.

    `now_ms` is on the store's clock, and `offset_ms` what is added to that for the wall clock.
    """
    if not policy.windows:
        return policy
    return policy.with_calendar(calendar(policy.windows, now_ms, offset_ms))


def calendar(windows: Iterable[str], now_ms: int, offset_ms: int) -> Calendar:
    """Return the intervals of windows around now, on the store's clock."""
    now = datetime.fromtimestamp((now_ms + offset_ms) / 1000, UTC)
    return Calendar(
        {
            window: tuple((start - offset_ms, end - offset_ms) for start, end in _intervals(window, now.date()))
            for window in sorted(windows)
        }
    )


@lru_cache(maxsize=1024)
def _intervals(window: str, today: date) -> tuple[tuple[int, int], ...]:
    """Return the intervals of a window around a day, in milliseconds of the wall clock; overlapping ones are joined."""
    joined: list[tuple[int, int]] = []
    for start, end in _single(window, today - _BEHIND, today + HORIZON):
        if start >= end:
            continue  # all of it is skipped by a change of the clocks
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return tuple(joined)


def _single(window: str, first: date, last: date) -> Iterator[tuple[int, int]]:
    parsed = WINDOW.fullmatch(window)
    assert parsed is not None, "checked when the policy was read"
    days, start, end_day, end, zone_name = parsed.groups()
    weekdays, zone = _weekdays(days), _zone(zone_name)
    start_minutes, end_minutes = _minutes(start), _minutes(end)
    for number in range((last - first).days):
        day = first + timedelta(days=number)
        if day.weekday() not in weekdays:
            continue
        later = 0 if end_day is None else (_DAYS.index(end_day) - day.weekday()) % 7
        if later == 0 and end_minutes <= start_minutes:
            later = 1 if end_day is None else 7
        yield (
            _moment_ms(day, start_minutes, zone, fold=0),
            max(_moment_ms(day + timedelta(days=later), end_minutes, zone, fold=fold) for fold in (0, 1)),
        )


def _weekdays(days: str) -> frozenset[int]:
    found: set[int] = set()
    for part in days.split(","):
        first, _, last = part.partition("-")
        start = _DAYS.index(first)
        length = (_DAYS.index(last or first) - start) % 7
        found.update((start + number) % 7 for number in range(length + 1))
    return frozenset(found)


def _minutes(text: str) -> int:
    hours, minutes = text.split(":")
    return int(hours) * 60 + int(minutes)


def _moment_ms(day: date, minutes: int, zone: ZoneInfo, *, fold: int) -> int:
    days, minute = divmod(minutes, 24 * 60)
    local = datetime.combine(day + timedelta(days=days), time(minute // 60, minute % 60), zone).replace(fold=fold)
    return round(local.timestamp() * 1000)


@lru_cache(maxsize=64)
def _zone(name: str) -> ZoneInfo:
    return ZoneInfo(name)
