"""How times, durations, sizes and states are said to people. Pure: what time it is, is an argument."""

from __future__ import annotations

from datetime import datetime
from typing import Final

_MINUTE_S: Final = 60
_HOUR_S: Final = 3600
_DAY_S: Final = 86_400
_KIBI: Final = 1024
_SUBSECOND_S: Final = 10
_TENTH_S: Final = 0.1

STATE_COLOURS: Final = {
    "active": "green",
    "error": "red",
    "failed": "red",
    "building": "yellow",
    "paused": "yellow",
    "stopped": "bright_black",
    "succeeded": "green",
    "cancelled": "yellow",
    "superseded": "yellow",
}
"""The colours of vm_states and of the ends of requests; what is not named has none."""


def duration(seconds: float) -> str:
    """A duration with its two greatest units: `2 min 41 s`."""
    if 0 < seconds < _TENTH_S:
        return f"{max(1, round(seconds * 1000))} ms"
    if seconds < _SUBSECOND_S:
        text = f"{seconds:.1f}"
        return f"{text.removesuffix('.0')} s"
    whole = round(seconds)
    if whole < _MINUTE_S:
        return f"{whole} s"
    if whole < _HOUR_S:
        return _two(whole, _MINUTE_S, "min", 1, "s")
    if whole < _DAY_S:
        return _two(whole, _HOUR_S, "h", _MINUTE_S, "min")
    return _two(whole, _DAY_S, "d", _HOUR_S, "h")


def _two(whole: int, great: int, great_unit: str, small: int, small_unit: str) -> str:
    rest = whole % great // small
    return f"{whole // great} {great_unit}" + (f" {rest} {small_unit}" if rest else "")


def seconds_of(moment: str) -> float:
    """A moment of the server, which is RFC 3339, as seconds since the epoch."""
    return datetime.fromisoformat(moment).timestamp()


def clock(moment: str, now: float | None = None) -> str:
    """A moment in local time: the time of day, after its date unless that is the date of `now`."""
    local = datetime.fromisoformat(moment).astimezone()
    same_day = now is not None and datetime.fromtimestamp(now).astimezone().date() == local.date()
    return local.strftime("%H:%M:%S" if same_day else "%Y-%m-%d %H:%M:%S")


def age(moment: str, now: float | None) -> str:
    """How long ago a moment was; its clock time where it is not known what time it is."""
    return clock(moment) if now is None else duration(max(0, round(now - seconds_of(moment))))


def size(size_bytes: int) -> str:
    """A size in the binary unit that fits it: `12.5 MiB`."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < _KIBI:
            return f"{value:.1f}".removesuffix(".0") + f" {unit}"
        value /= _KIBI
    return f"{value:.1f}".removesuffix(".0") + " TiB"


def spoken(operation: str) -> str:
    """An operation's name as people read it: `attach volume`."""
    return operation.replace("_", " ")


def printable(text: str) -> str:
    """Text that comes from elsewhere, without what would move a terminal's cursor or change its colours."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )
