"""Formatting of times, durations, sizes, states and untrusted text. Pure: the present time is an argument."""

from __future__ import annotations

import re
import unicodedata
from datetime import datetime
from typing import Any, Final

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
"""Colours of vm_states and request statuses."""


def duration(seconds: float) -> str:
    """Format a duration with its two largest units: `2 min 41 s`."""
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
    """Parse an RFC 3339 time to seconds since the epoch."""
    return datetime.fromisoformat(moment).timestamp()


def clock(moment: str, now: float | None = None) -> str:
    """Format an RFC 3339 time in local time, without the date if it is that of `now`."""
    local = datetime.fromisoformat(moment).astimezone()
    same_day = now is not None and datetime.fromtimestamp(now).astimezone().date() == local.date()
    return local.strftime("%H:%M:%S" if same_day else "%Y-%m-%d %H:%M:%S")


def age(moment: str, now: float | None) -> str:
    """Format how long ago a time was; the time itself if `now` is None."""
    return clock(moment) if now is None else duration(max(0, round(now - seconds_of(moment))))


def size(size_bytes: int) -> str:
    """Format a size in a binary unit: `12.5 MiB`."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < _KIBI:
            return f"{value:.1f}".removesuffix(".0") + f" {unit}"
        value /= _KIBI
    return f"{value:.1f}".removesuffix(".0") + " TiB"


def humanize(operation: str) -> str:
    """Format an operation's name: `attach volume`."""
    return operation.replace("_", " ")


def printable(text: str) -> str:
    """Replace control characters in untrusted text."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def escape_line(text: str) -> str:
    """Escape line breaks and control characters, including Unicode's bidirectional controls, in untrusted text."""
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() or unicodedata.category(one) == "Zs" else one.encode("unicode_escape").decode("ascii")
        for one in text
    )


def escape_all(value: Any) -> Any:
    """Apply `escape_line` to every text in a JSON value, including keys."""
    match value:
        case str():
            return escape_line(value)
        case list():
            return [escape_all(item) for item in value]
        case dict():
            return {escape_line(name): escape_all(item) for name, item in value.items()}
        case _:
            return value


_ESCAPE_SEQUENCE: Final = re.compile(
    rb"\x1b(?:\[[\x30-\x3f]*[\x20-\x2f]*[\x40-\x7e]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|[\x20-\x2f]*[\x30-\x7e])"
)
"""Terminal control sequences: CSI, strings such as OSC, and short escapes (ECMA-48, 5.3-5.6)."""


def for_terminal(output: bytes) -> str:
    """Remove control sequences from a guest's output; text, line ends and tabs are kept."""
    text = _ESCAPE_SEQUENCE.sub(b"", output).decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
    return printable(text)
