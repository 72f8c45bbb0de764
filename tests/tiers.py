"""The two tiers of tests: `make test`, and `make test-long` with more examples, rounds and seconds of the same."""

from __future__ import annotations

import os
from typing import Any, Final, TypeVar

import pytest

ValueT = TypeVar("ValueT")

LONG: Final = os.environ.get("TEST_TIER") == "long"


def tier(quick: ValueT, long: ValueT) -> ValueT:
    """The first in `make test`, the second in `make test-long`."""
    return long if LONG else quick


def only_long(*values: Any) -> list[Any]:
    """Values of a parameter, or tuples of several parameters, that are tried in `make test-long` only."""
    several = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*each, marks=pytest.mark.long) for each in several]
