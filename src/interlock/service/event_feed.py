"""Event streams: what was committed, kept in memory for all readers, and sent to them at a bounded cost.

Readers do not query the database for each event, and they are not all resumed at once: with many of them, writes would
wait. They are resumed in groups, after pauses that leave most of the event loop's time to everything else.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Sequence
from typing import Final

import msgspec

from interlock.core.records import Event
from interlock.ports import Store
from interlock.service.change_notifier import release

RECENT_MAX: Final = 4_096
"""How many events of all projects are kept in memory; a reader who is further behind reads the database."""
PAGE_MAX: Final = 200
"""How many events a reader gets at a time."""
_GROUP: Final = 16
"""How many readers are resumed at a time."""
_PAUSE_SHARE: Final = 4
"""How long the next readers wait, as a multiple of the time that the present ones take."""
_PROJECTS_MAX: Final = 10_000
"""How many projects of instances are kept in memory."""


class FeedEvent(msgspec.Struct, gc=False):
    """An event for streams."""

    event: Event
    project: str
    text: bytes | None = None
    """As it is sent, once a reader has encoded it."""


class _Waiter(msgspec.Struct, eq=False):
    """A reader that waits."""

    seen: int
    """The sequence number up to which it has read."""
    resumed: asyncio.Future[None]
    queued: bool = True


class EventFeed:
    """The committed events, for any number of readers.

    Args:
        store: has the events.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._unlisten = store.listen(self._on_events)
        self._recent: list[FeedEvent] = []
        self._sequences: list[int] = []
        """Of `_recent`, in order."""
        self._complete_after = 0
        """Every event after this one is in `_recent`, or in `_arrived`; 0 before the first reader."""
        self._latest = 0
        """The last event that readers can have."""
        self._arrived: deque[Event] = deque()
        self._projects: OrderedDict[str, str] = OrderedDict()
        """Projects of instances, by id."""
        self._readers = 0
        self._waiting: deque[_Waiter] = deque()
        """In the order of `seen`."""
        self._publishing: asyncio.Task[None] | None = None
        self._pausing: asyncio.Handle | None = None
        self.closed = False

    def close(self) -> None:
        """End all streams."""
        if self.closed:
            return
        self.closed = True
        self._unlisten()
        if self._publishing is not None:
            self._publishing.cancel()
        if self._pausing is not None:
            self._pausing.cancel()
        while self._waiting:
            self._resume(self._waiting.popleft())

    # ---------------------------------------------------------------------------------------------- publishing

    def _on_events(self, events: Sequence[Event]) -> None:
        if not self._readers:
            self._complete_after = self._latest = events[-1].sequence
            self._recent.clear()
            self._sequences.clear()
            self._arrived.clear()
            return
        self._arrived.extend(events)
        if self._publishing is None or self._publishing.done():
            self._publishing = asyncio.create_task(self._publish(), name="publish events")

    async def _publish(self) -> None:
        while self._arrived:
            event = self._arrived.popleft()
            project = await self._project_of(event.instance_id)
            self._recent.append(FeedEvent(event=event, project=project))
            self._sequences.append(event.sequence)
            self._latest = max(self._latest, event.sequence)
        if len(self._recent) > 2 * RECENT_MAX:
            excess = len(self._recent) - RECENT_MAX
            self._complete_after = self._sequences[excess - 1]
            del self._recent[:excess], self._sequences[:excess]
        self._resume_some()

    async def _project_of(self, instance_id: str) -> str:
        found = self._projects.get(instance_id)
        if found is None:
            instance = await self._store.instance(instance_id)
            found = "" if instance is None else instance.project
            self._projects[instance_id] = found
            if len(self._projects) > _PROJECTS_MAX:
                self._projects.popitem(last=False)
        return found

    @staticmethod
    def _resume(waiter: _Waiter) -> None:
        waiter.queued = False
        release(waiter.resumed)

    def _resume_some(self) -> None:
        """Resume the readers that wait longest for what there is, unless others were resumed just now."""
        if self._pausing is not None:
            return
        began_s, count = time.perf_counter(), 0
        while self._waiting and self._waiting[0].seen < self._latest and count < _GROUP:
            self._resume(self._waiting.popleft())
            count += 1
        if count:
            # Runs after those readers have.
            self._pausing = asyncio.get_running_loop().call_soon(self._pause, began_s)

    def _pause(self, began_s: float) -> None:
        took_s = time.perf_counter() - began_s
        self._pausing = asyncio.get_running_loop().call_later(took_s * _PAUSE_SHARE, self._go_on)

    def _go_on(self) -> None:
        self._pausing = None
        self._resume_some()

    # ------------------------------------------------------------------------------------------------- reading

    async def follow(
        self, project: str, after: int, idle_ms: int, instance_id: str | None = None
    ) -> AsyncIterator[list[FeedEvent]]:
        """Stream a project's events after a sequence number, in order; yield an empty list after each idle time.

        Ends when the server stops.
        """
        self._readers += 1
        try:
            if not self._complete_after:
                last = await self._store.last_event()
                self._complete_after, self._latest = max(self._complete_after, last), max(self._latest, last)
            while not self.closed:
                if after < self._complete_after:
                    complete_after = self._complete_after
                    events = await self._older(project, after, instance_id)
                    after = events[-1].event.sequence if events else complete_after
                    if events:
                        yield events
                    continue
                events, after = self._newer(project, after, instance_id)
                if events:
                    yield events
                elif not await self._more(min(after, self._latest), idle_ms):
                    yield []
        finally:
            self._readers -= 1

    async def _older(self, project: str, after: int, instance_id: str | None) -> list[FeedEvent]:
        found = await self._store.events(after, PAGE_MAX, instance_id=instance_id, project=project)
        return [FeedEvent(event=event, project=project) for event in found]

    def _newer(self, project: str, after: int, instance_id: str | None) -> tuple[list[FeedEvent], int]:
        """Return events in memory after a sequence number, and up to which one they are all that there is."""
        found: list[FeedEvent] = []
        for index in range(bisect_right(self._sequences, after), len(self._recent)):
            one = self._recent[index]
            after = one.event.sequence
            if one.project == project and instance_id in {None, one.event.instance_id}:
                found.append(one)
                if len(found) == PAGE_MAX:
                    break
        return found, after

    async def _more(self, seen: int, idle_ms: int) -> bool:
        """Wait for events after that one, for a time. Return whether there may be some."""
        loop = asyncio.get_running_loop()
        waiter = _Waiter(seen=seen, resumed=loop.create_future())
        self._waiting.append(waiter)
        self._resume_some()
        timer = loop.call_later(idle_ms / 1000, release, waiter.resumed)
        try:
            await waiter.resumed
        finally:
            timer.cancel()
            if waiter.queued:
                self._waiting.remove(waiter)
        return not waiter.queued
