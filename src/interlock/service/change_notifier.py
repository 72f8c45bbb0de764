"""Notification of tasks that wait for changes of instances (long polling)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from interlock.core.records import Event
from interlock.service.load_limits import waiting

ValueT = TypeVar("ValueT")

EVERYTHING: Final = ""
"""Key of tasks that wait for anything that their notifier is for."""


class ChangeNotifier:
    """Wakes waiting tasks when events of their instance are committed."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self.closed = False
        """Whether all waiting tasks were released."""

    def notify(self, events: Sequence[Event]) -> None:
        """Wake the tasks that wait for the instances of these events. A listener of the store."""
        if self._waiting:
            for instance_id in {event.instance_id for event in events}:
                self.wake(instance_id)

    def close(self) -> None:
        """Release all waiting tasks; `until` returns the current value."""
        self.closed = True
        for instance_id in tuple(self._waiting):
            self.wake(instance_id)

    def wake(self, instance_id: str) -> None:
        """Wake the tasks that wait for this instance, or under another key."""
        for future in self._waiting.pop(instance_id, ()):
            release(future)

    async def until(
        self, instance_id: str, ready: Callable[[], Awaitable[ValueT | None]], wait_ms: int
    ) -> ValueT | None:
        """Call `ready` now and after each event of the instance; return its first result that is not None.

        Returns None when the time has passed or the notifier is closed. Registers before each call of `ready`, so that
        no event is missed.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_ms / 1000
        while True:
            future: asyncio.Future[None] = loop.create_future()
            others = self._waiting.setdefault(instance_id, set())
            others.add(future)
            try:
                value = await ready()
                left_s = deadline - loop.time()
                if value is not None or left_s <= 0 or self.closed:
                    return value
                timer = loop.call_later(left_s, release, future)
                try:
                    with waiting():
                        await future
                finally:
                    timer.cancel()
            finally:
                others.discard(future)
                if not others and self._waiting.get(instance_id) is others:
                    del self._waiting[instance_id]


def release(future: asyncio.Future[None]) -> None:
    """Complete a future, unless it is done."""
    if not future.done():
        future.set_result(None)
