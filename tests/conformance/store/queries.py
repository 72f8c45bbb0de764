"""What a store promises of lists: pages, filters and order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from conformance.store.harness import Bench, admitting, check, ending, putting, raises, serving
from interlock.core.errors import Invalid
from interlock.core.records import Request, Status
from interlock.core.states import VmState
from interlock.ports import InstanceFilter, Page

EVERYONE = InstanceFilter()


async def _walk(page_at: Callable[[str | None], Awaitable[Page]]) -> list[str]:
    """The ids on all pages, one after the other."""
    ids: list[str] = []
    cursor: str | None = None
    while True:
        page = await page_at(cursor)
        ids += [item.id for item in page.items]
        cursor = page.next_cursor
        if cursor is None:
            return ids


async def _ids(bench: Bench, where: InstanceFilter) -> list[str]:
    return [item.id for item in (await bench.store.instances(where, 100)).items]


@check
async def pages_neither_repeat_nor_skip_while_instances_are_created(bench: Bench) -> None:
    first = [f"old{number:02}" for number in range(20)]
    for instance_id in first:
        await bench.create(instance_id)
    created: list[str] = []

    async def page_at(cursor: str | None) -> Page:
        created.append(f"new{len(created):02}")
        await bench.create(created[-1])
        return await bench.store.instances(EVERYONE, 7, cursor)

    ids = await _walk(page_at)
    assert ids[:20] == first
    assert len(ids) == len(set(ids))
    assert ids[20:] == created[: len(ids) - 20]


@check
async def the_last_page_has_no_next(bench: Bench) -> None:
    for number in range(4):
        await bench.create(f"i{number}")
    assert (await bench.store.instances(EVERYONE, 4)).next_cursor is None
    page = await bench.store.instances(EVERYONE, 2)
    assert page.next_cursor is not None
    assert (await bench.store.instances(EVERYONE, 2, page.next_cursor)).next_cursor is None


@check
async def requests_are_listed_newest_first_page_by_page(bench: Bench) -> None:
    await bench.create("a")
    await bench.create("b")
    for number in range(9):
        await asyncio.gather(bench.admit("a", f"a{number}"), bench.admit("b", f"b{number}"))
    later: list[str] = []

    async def page_at(cursor: str | None) -> Page:
        later.append(f"later{len(later)}")
        page = await bench.store.requests("a", 4, cursor)
        await bench.admit("a", later[-1])
        return page

    assert await _walk(page_at) == [f"a{number}" for number in reversed(range(9))]
    assert (await bench.store.requests("nobody", 4)).items == ()


@check
async def requests_that_were_made_and_ended_at_once_are_kept_as_they_are(bench: Bench) -> None:
    await bench.create("a")
    await asyncio.gather(
        bench.store.change("a", admitting("r1")),
        bench.store.change("a", admitting("r2")),
        bench.store.change("a", ending("r1")),
    )
    for _ in range(2):
        items: tuple[Request, ...] = (await bench.store.requests("a", 10)).items
        assert [(item.id, item.status) for item in items] == [("r2", Status.QUEUED), ("r1", Status.SUCCEEDED)]
        await bench.reopen()


@check
async def a_request_is_found_in_its_own_project_only(bench: Bench) -> None:
    await bench.create("a")
    await bench.admit("a", "r1")
    instance = await bench.store.instance("a")
    assert instance is not None
    for project in (None, instance.project):
        found = await bench.store.request("r1", project)
        assert found is not None
        assert found.id == "r1"
    assert await bench.store.request("r1", "another") is None


@check
async def a_cursor_that_no_page_gave_is_invalid(bench: Bench) -> None:
    await bench.create("a")
    await bench.create("b")
    await bench.admit("a", "r1")
    for wrong in ("", "x", "-1", "1 OR 1=1", "9" * 40, "²"):
        async with raises(Invalid):
            await bench.store.instances(EVERYONE, 5, wrong)
        async with raises(Invalid):
            await bench.store.requests("a", 5, wrong)


@check
async def every_filter_shows_what_it_names_and_nothing_else(bench: Bench) -> None:
    await bench.create("a", project="one", host="h1", tags=("red", "big"))
    await bench.create("b", project="two", host="h2", vm_state=VmState.STOPPED, tags=("red",))
    await bench.create("c", project="two", host="h1", name="sea")
    await bench.store.change("c", serving("r1"))
    expected = {
        InstanceFilter(): ["a", "b", "c"],
        InstanceFilter(project="two"): ["b", "c"],
        InstanceFilter(vm_state=VmState.STOPPED): ["b"],
        InstanceFilter(task_state="rebooting"): ["c"],
        InstanceFilter(task_state="none"): ["a", "b"],
        InstanceFilter(host="h1"): ["a", "c"],
        InstanceFilter(tag="red"): ["a", "b"],
        InstanceFilter(tag="big"): ["a"],
        InstanceFilter(name="sea"): ["c"],
        InstanceFilter(project="two", host="h1", vm_state=VmState.ACTIVE, task_state="rebooting"): ["c"],
        InstanceFilter(project="one", tag="none such"): [],
    }
    for where, ids in expected.items():
        assert await _ids(bench, where) == ids, where


@check
async def filters_follow_changes(bench: Bench) -> None:
    await bench.create("a", tags=("red",))
    changes = [
        (
            putting(vm_state=VmState.PAUSED),
            InstanceFilter(vm_state=VmState.ACTIVE),
            InstanceFilter(vm_state=VmState.PAUSED),
        ),
        (putting(host="h2"), InstanceFilter(host="h1"), InstanceFilter(host="h2")),
        (putting(name="z"), InstanceFilter(name="a"), InstanceFilter(name="z")),
        (putting(tags=("blue",)), InstanceFilter(tag="red"), InstanceFilter(tag="blue")),
        (serving("r1"), InstanceFilter(task_state="none"), InstanceFilter(task_state="rebooting")),
    ]
    for decide, before, after in changes:
        assert await _ids(bench, before) == ["a"]
        await bench.store.change("a", decide)
        assert await _ids(bench, before) == []
        assert await _ids(bench, after) == ["a"]
    await bench.store.change("a", putting(tags=()))
    assert await _ids(bench, InstanceFilter(tag="blue")) == []


@check
async def deleted_instances_are_shown_only_when_asked_for(bench: Bench) -> None:
    await bench.create("a")
    await bench.create("b")
    await bench.store.change("a", putting(vm_state=VmState.DELETED))
    assert await _ids(bench, EVERYONE) == ["b"]
    assert await _ids(bench, InstanceFilter(host="h1")) == ["b"]
    assert await _ids(bench, InstanceFilter(vm_state=VmState.DELETED)) == ["a"]
    assert await _ids(bench, InstanceFilter(vm_state=VmState.DELETED, project="two")) == []


@check
async def unsettled_are_those_with_something_outstanding(bench: Bench) -> None:
    await bench.create("a", host="h1")
    await bench.create("b", host="h2")
    await bench.create("c", host="h1")
    await bench.admit("a", "r1")
    await bench.admit("b", "r2")
    assert {item.id for item in await bench.store.unsettled()} == {"a", "b"}
    assert [item.id for item in await bench.store.unsettled("h2")] == ["b"]
    await bench.store.change("b", ending("r2"))
    await bench.reopen()
    assert [item.id for item in await bench.store.unsettled()] == ["a"]
    assert await bench.store.unsettled("h2") == ()


@check
async def events_can_be_read_from_any_place_by_instance_and_by_project(bench: Bench) -> None:
    await bench.create("a", project="one")
    await bench.create("b", project="two")
    for number in range(3):
        await bench.admit("a", f"a{number}")
        await bench.admit("b", f"b{number}")

    async def told(after: int, limit: int, instance_id: str | None = None, project: str | None = None) -> list[int]:
        return [event.sequence for event in await bench.store.events(after, limit, instance_id, project)]

    assert await told(0, 100) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert await told(5, 2) == [6, 7]
    assert await told(8, 100) == []
    assert await told(2, 100, "a") == [3, 5, 7]
    assert await told(0, 100, None, "two") == [2, 4, 6, 8]
    assert await told(0, 100, "a", "two") == []
    assert await told(0, 100, "nobody") == []
    assert await bench.store.last_event() == 8


@check
async def what_is_not_there_is_none(bench: Bench) -> None:
    store = bench.store
    assert await store.instance("nobody") is None
    assert await store.instance_named("one", "nobody") is None
    assert await store.request("none") is None
    assert await store.last_event() == 0
    assert store.fence("nobody") is None
    assert await store.events(0, 10) == ()
