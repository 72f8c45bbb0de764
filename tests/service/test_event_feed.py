"""Readers of the event feed get every event of their project once and in order, and not all at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from interlock.core.records import Event
from interlock.ports import Store
from interlock.service import event_feed
from interlock.service.event_feed import EventFeed
from waiting import PATIENCE_S, eventually


class Events:
    """As much of a store as is read. Instances are named after their projects, such as `a-1`."""

    def __init__(self) -> None:
        self.kept: list[Event] = []
        self.listeners: list[Callable[[Sequence[Event]], None]] = []
        self.queries = 0

    def listen(self, listener: Callable[[Sequence[Event]], None]) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def commit(self, *instances: str) -> None:
        first = len(self.kept) + 1
        made = [
            Event(kind="instance.state", instance_id=one, at_ms=0, generation=1, sequence=first + index)
            for index, one in enumerate(instances)
        ]
        self.kept += made
        for listener in self.listeners:
            listener(made)

    async def instance(self, instance_id: str) -> Any:
        await asyncio.sleep(0)
        return SimpleNamespace(project=instance_id.partition("-")[0])

    async def last_event(self) -> int:
        return len(self.kept)

    async def events(
        self, after: int, limit: int, instance_id: str | None = None, project: str | None = None
    ) -> tuple[Event, ...]:
        self.queries += 1
        found = [
            one
            for one in self.kept[after:]
            if one.instance_id.partition("-")[0] == project and instance_id in {None, one.instance_id}
        ]
        return tuple(found[:limit])


@pytest.fixture
def store() -> Events:
    return Events()


@pytest.fixture
def feed(store: Events) -> EventFeed:
    return EventFeed(cast("Store", store))


class Reader:
    def __init__(
        self, feed: EventFeed, project: str, after: int, instance_id: str | None = None, idle_ms: int = 50
    ) -> None:
        self.got: list[int] = []
        self.idle = 0
        self.task = asyncio.create_task(self._read(feed.follow(project, after, idle_ms, instance_id)))

    async def _read(self, stream: Any) -> None:
        async for events in stream:
            self.got += [one.event.sequence for one in events]
            self.idle += not events


async def test_each_reader_gets_the_events_of_its_project_or_instance_from_where_it_left_off(
    store: Events, feed: EventFeed
) -> None:
    store.commit("a-1", "b-1", "a-2")
    readers = [Reader(feed, "a", 0), Reader(feed, "a", 3), Reader(feed, "b", 0), Reader(feed, "a", 0, "a-2")]
    await eventually(lambda: readers[0].got == [1, 3])
    store.commit("a-1", "b-2")
    store.commit("a-2")
    expected = [[1, 3, 4, 6], [4, 6], [2, 5], [3, 6]]
    await eventually(lambda: [one.got for one in readers] == expected)
    later = Reader(feed, "a", 4)
    await eventually(lambda: later.got == [6])
    feed.close()
    await asyncio.wait_for(asyncio.gather(*(one.task for one in (*readers, later))), PATIENCE_S)
    assert store.listeners == []


async def test_events_between_two_times_with_readers_are_in_no_memory_and_yet_not_lost(
    store: Events, feed: EventFeed
) -> None:
    first = Reader(feed, "a", 0)
    await eventually(lambda: first.idle)
    store.commit("a-1")
    await eventually(lambda: first.got == [1])
    first.task.cancel()
    await asyncio.wait({first.task})
    store.commit("a-1", "a-1")
    second = Reader(feed, "a", 1)
    await eventually(lambda: second.got == [2, 3])
    store.commit("a-1")
    await eventually(lambda: second.got == [2, 3, 4])
    feed.close()
    await second.task


async def test_a_reader_that_is_far_behind_reads_the_database(
    store: Events, feed: EventFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_feed, "RECENT_MAX", 10)
    monkeypatch.setattr(event_feed, "PAGE_MAX", 7)
    quick = Reader(feed, "a", 0)
    await eventually(lambda: quick.idle)
    for _ in range(10):
        store.commit(*["a-1", "b-1"] * 5)
        await asyncio.sleep(0)
    slow = Reader(feed, "a", 0)
    expected = list(range(1, 101, 2))
    await eventually(lambda: slow.got == quick.got == expected)
    assert len(feed._recent) <= 20
    feed.close()
    await asyncio.gather(quick.task, slow.task)


async def test_many_readers_cost_no_query_and_are_not_resumed_in_one_turn(store: Events, feed: EventFeed) -> None:
    readers = [Reader(feed, "a", 0, idle_ms=600_000) for _ in range(100)]
    await eventually(lambda: len(feed._waiting) == len(readers))
    queries = store.queries
    store.commit("a-1")
    resumed: list[int] = []
    while len([one for one in readers if one.got]) < len(readers):
        await asyncio.sleep(0)
        resumed.append(len([one for one in readers if one.got]))
    assert max(later - earlier for earlier, later in zip([0, *resumed], resumed, strict=False)) <= event_feed._GROUP
    assert store.queries == queries
    store.commit("a-1")
    await eventually(lambda: all(one.got == [1, 2] for one in readers))
    feed.close()
    await asyncio.gather(*(one.task for one in readers))
