"""Parsing and formatting of durations: `500ms`, `3s`, `2m`, `1h`, `7d`, and sums such as `1m30s`."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Final

_UNITS_MS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_UNIT_NAMES: Final = {"ms": "millisecond", "s": "second", "m": "minute", "h": "hour", "d": "day"}
_PART: Final = re.compile(r"(\d{1,12}(?:\.\d{1,3})?)(ms|s|m|h|d)", re.ASCII)
_WHOLE: Final = re.compile(r"(?:\d{1,12}(?:\.\d{1,3})?(?:ms|s|m|h|d))+", re.ASCII)

_LENGTH_MAX: Final = 64

DURATION_MAX_MS: Final = 3650 * _UNITS_MS["d"]
"""The longest valid duration: ten years."""

EXPECTED: Final = 'a duration such as "500ms", "15s", "3m", "1h" or "1m30s", at most ten years'


def parse_duration(text: str) -> int | None:
    """Return whole milliseconds, or None if `text` is not a duration."""
    if len(text) > _LENGTH_MAX or _WHOLE.fullmatch(text) is None:
        return None
    total = sum(Fraction(number) * _UNITS_MS[unit] for number, unit in _PART.findall(text))
    if total != int(total) or total > DURATION_MAX_MS:
        return None
    return int(total)


def format_seconds(milliseconds: int) -> str:
    """Format as `181s` or `0.25s`."""
    return f"{seconds(milliseconds)}s"


def short_time(milliseconds: int) -> str:
    """Format in the largest unit that gives a whole number, such as `90s` or `3m`."""
    count, unit = _in_largest_unit(milliseconds)
    return f"{count}{unit}"


@lru_cache(maxsize=256)
def spelled_time(milliseconds: int) -> str:
    """Format as `short_time` does, with the unit spelled out, such as `90 seconds` or `1 minute`."""
    count, unit = _in_largest_unit(milliseconds)
    return f"{count} {_UNIT_NAMES[unit]}{'' if count == 1 else 's'}"


def _in_largest_unit(milliseconds: int) -> tuple[int, str]:
    unit, length = next(
        (one for one in reversed(_UNITS_MS.items()) if milliseconds and milliseconds % one[1] == 0), ("ms", 1)
    )
    return milliseconds // length, unit


def seconds(milliseconds: int) -> int | float:
    """Convert to seconds, as an int if it is whole."""
    whole, rest = divmod(milliseconds, 1_000)
    return whole if rest == 0 else milliseconds / 1_000
