"""Waiting for what is promised: one limit for all tests, which only a test that hangs reaches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

PATIENCE_S: Final = 120.0
"""For how long a test waits for what is promised, in seconds; the time-out of a whole test is longer."""
_LOOK_AGAIN_S: Final = 0.02


def until(true: Callable[[], object], what: str | Callable[[], object] = "what is waited for does not happen") -> None:
    """Return as soon as something is true that nothing announces, such as a file or the state of another process.

    Args:
        true: looks once.
        what: says what is wrong if it does not become true, or looks for it then.

    Raises:
        AssertionError: it is not true after `PATIENCE_S`.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(_LOOK_AGAIN_S)


async def eventually(
    true: Callable[[], object], what: str | Callable[[], object] = "what is waited for does not happen"
) -> None:
    """As `until`, for tests with an event loop."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, what() if callable(what) else what
        await asyncio.sleep(_LOOK_AGAIN_S)
