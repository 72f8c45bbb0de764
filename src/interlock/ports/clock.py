"""The machine's clocks."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """The machine's clocks. Ages are measured on the store's clock instead."""

    def wall_ms(self) -> int:
        """Return the wall clock, in milliseconds since the Unix epoch. It may be set at any moment."""
        ...

    def running_ms(self) -> int:
        """Return the time since boot, including suspend, in milliseconds (CLOCK_BOOTTIME). It cannot be set."""
        ...

    def boot(self) -> str:
        """Return the boot id of the machine; empty if unknown."""
        ...
