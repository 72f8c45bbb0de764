"""Where time is read."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """Where time is read."""

    def now_ms(self) -> int:
        """Milliseconds since the Unix epoch, never less than an earlier answer, unmoved when the wall clock is set."""
        ...
