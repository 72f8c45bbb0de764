"""How lengths of time are written: `500ms`, `3s`, `2m`, `1h`, `7d`, and sums such as `1m30s`.

Only reading and writing. What a length of time means is with whoever asks for it.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

_UNITS_MS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_PART: Final = re.compile(r"(\d{1,12}(?:\.\d{1,3})?)(ms|s|m|h|d)", re.ASCII)
_WHOLE: Final = re.compile(r"(?:\d{1,12}(?:\.\d{1,3})?(?:ms|s|m|h|d))+", re.ASCII)

_LENGTH_MAX: Final = 64

DURATION_MAX_MS: Final = 3650 * _UNITS_MS["d"]
"""The longest length of time that is taken: ten years. What is longer is a slip of the pen."""

EXPECTED: Final = 'a length of time such as "500ms", "15s", "3m", "1h" or "1m30s", at most ten years'


def parse_duration(text: str) -> int | None:
    """Whole milliseconds, or None if `text` is no length of time."""
    if len(text) > _LENGTH_MAX or _WHOLE.fullmatch(text) is None:
        return None
    total = sum(Decimal(number) * _UNITS_MS[unit] for number, unit in _PART.findall(text))
    if total != int(total) or total > DURATION_MAX_MS:
        return None
    return int(total)


def format_seconds(milliseconds: int) -> str:
    """Such as `181s` or `0.25s`."""
    return f"{seconds(milliseconds)}s"


def seconds(milliseconds: int) -> int | float:
    """Seconds as people and JSON want them: a whole number where it is one."""
    whole, rest = divmod(milliseconds, 1_000)
    return whole if rest == 0 else milliseconds / 1_000
