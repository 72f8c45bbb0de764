"""Lets decisions wait while the next transaction is full or the store is paused, and refuses them once it closes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from interlock.core.errors import StoreClosed
from interlock.stores.writer import CLOSED, CLOSED_REMEDY


class DecisionGate:
    """What a decision passes before it is made."""

    def __init__(self, full: Callable[[], bool]) -> None:
        """`full` returns whether the next transaction can take no more decisions."""
        self._full = full
        self._waiting: list[asyncio.Future[None]] = []
        self._pauses = 0
        self.closing = False

    @property
    def shut(self) -> bool:
        """Whether no decision can be made now."""
        return self.closing or self._pauses > 0 or self._full()

    async def passed(self) -> None:
        """Return when a decision can be made. Raises `StoreClosed` once the store closes."""
        while self.shut and not self.closing:
            opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(opened)
            await opened
        if self.closing:
            raise StoreClosed(CLOSED, remedy=CLOSED_REMEDY)

    def wake(self) -> None:
        """Have everyone who waits in `passed` look again."""
        for opened in self._waiting:
            if not opened.done():
                opened.set_result(None)
        self._waiting.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the gate shut."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            self.wake()
