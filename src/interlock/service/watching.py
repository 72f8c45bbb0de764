"""Waiting for something to happen to an instance, without asking again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from interlock.core.records import Event

ValueT = TypeVar("ValueT")

EVERYTHING: Final = ""
"""Stands for the events of all instances."""


class Watch:
    """Wakes those who wait for an instance whenever something of it was committed."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self.closed = False
        """Whether everyone was let go: nobody waits here any more."""

    def ring(self, events: Sequence[Event]) -> None:
        """Wake everyone who waits for the instances of these events. A store's listener."""
        if self._waiting:
            for instance_id in {event.instance_id for event in events} | {EVERYTHING}:
                self._wake(instance_id)

    def close(self) -> None:
        """Let everyone go: they answer with what there is."""
        self.closed = True
        for instance_id in tuple(self._waiting):
            self._wake(instance_id)

    def _wake(self, instance_id: str) -> None:
        for future in self._waiting.pop(instance_id, ()):
            if not future.done():
                future.set_result(None)

    async def until(
        self, instance_id: str, ready: Callable[[], Awaitable[ValueT | None]], wait_ms: int
    ) -> ValueT | None:
        """What `ready` answers, as soon as that is not None; None if the time has passed or the watch is closed.

        `ready` is asked at once and after each event of the instance, so that nothing is missed between the two.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_ms / 1000
        while True:
            future: asyncio.Future[None] = loop.create_future()
            waiting = self._waiting.setdefault(instance_id, set())
            waiting.add(future)
            try:
                value = await ready()
                left = deadline - loop.time()
                if value is not None or left <= 0 or self.closed:
                    return value
                await asyncio.wait((future,), timeout=left)
            finally:
                waiting.discard(future)
                if not waiting and self._waiting.get(instance_id) is waiting:
                    del self._waiting[instance_id]
