"""Command-line types of sizes and durations: numbers with units."""

from __future__ import annotations

import math
import re
from typing import Any, Final

import click

_SIZE: Final = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMGT]i?B?)?", re.IGNORECASE)
_MIB: Final = {"M": 1, "G": 1024, "T": 1024 * 1024}
"""MiB per unit, by its first letter."""
_EXPECTED: Final = "expected a number, or a number with MiB, GiB or TiB, such as 512MiB or 2GiB"


class Size(click.ParamType[int]):
    """A size, as an integer number of `unit`.

    Args:
        unit: unit of the result, `MiB` or `GiB`.
        least: minimum, in `unit`.
        bare: unit of a number without one; by default `unit`.
    """

    name = "size"

    def __init__(self, unit: str, least: int, *, bare: str | None = None) -> None:
        self._unit = unit
        self._least = least
        self._bare = bare or unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = _SIZE.fullmatch(str(value).strip())
        unit = found.group(2) or self._bare if found is not None else ""
        if found is None or unit[0].upper() not in _MIB:
            self.fail(f"Invalid size {value!r}: {_EXPECTED}.", param, ctx)
        if unit.upper() in {"MB", "GB", "TB"}:
            self.fail(f"Invalid size {value!r}: use the binary unit {unit[0].upper()}iB.", param, ctx)
        size = float(found.group(1)) * _MIB[unit[0].upper()] / _MIB[self._unit[0]]
        rounded = math.floor(size + 0.5)
        if self._bare == self._unit and not math.isclose(size, rounded):
            self.fail(f"Invalid size {value!r}: not a whole number of {self._unit}.", param, ctx)
        if rounded < self._least:
            self.fail(f"Invalid size {value!r}: the minimum is {self._least} {self._unit}.", param, ctx)
        return rounded


class Duration(click.ParamType[int]):
    """A duration as in a policy, such as `5m`, in milliseconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from interlock.core.durations import EXPECTED, parse_duration

        if isinstance(value, int):
            return value
        parsed = parse_duration(value)
        if parsed is None:
            self.fail(f"Invalid duration {value[:80]!r}: expected {EXPECTED}.", param, ctx)
        return parsed
