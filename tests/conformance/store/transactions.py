"""What a store promises of decisions: they are durable, one after the other, and told in order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from msgspec.structs import replace

from conformance.store.harness import Bench, admitting, check, creating, ending, growing, putting, raises
from interlock.core.errors import NotFound
from interlock.core.operations import Operation
from interlock.core.records import Approval, Change, Event, Instance, Request, Status
from interlock.ports import InstanceFilter, Store

MANY = 300


@check
async def a_held_request_keeps_who_asked_and_who_approved_it(bench: Bench) -> None:
    await bench.create("a")
    approval = Approval(by="bob", belongs=("role:member", "group:audit"), at_ms=5)
    held = Request(
        id="r1",
        instance_id="a",
        operation=Operation.DELETE,
        requested_by="alice",
        project="one",
        groups=("ops",),
        windows=("Sat 02:00-06:00 UTC",),
        approver=("group:audit",),
        approvals=(approval,),
        rule="two-persons",
        admitted_at_ms=1,
        status=Status.HELD,
    )

    def hold(instance: Instance, _now_ms: int) -> Change[None]:
        return Change(instance=replace(instance, held=(held,)), requests=(held,), answer=None)

    await bench.store.change("a", hold)
    async with bench.power_cut() as found:
        instance = await found.instance("a")
        assert instance is not None
        assert instance.held == (held,)
        assert await found.request("r1") == held


@check
async def whoever_changed_something_sees_it_at_once(bench: Bench) -> None:
    store = bench.store
    created = await bench.create("a")
    assert await store.instance("a") == created
    assert await store.instance_named("one", "a") == created
    admitted = await bench.admit("a", "r1")
    await store.change("a", putting(fence=7))
    instance = await bench.kept("a")
    assert instance.outstanding == (admitted.request,)
    assert instance.fence == store.fence("a") == 7
    assert (await store.instances(InstanceFilter(), 10)).items == (instance,)
    assert await store.unsettled() == (instance,)
    assert await store.request("r1") == admitted.request
    assert (await store.requests("a", 10)).items == (admitted.request,)
    assert [event.request_id for event in await store.events(0, 10)] == [None, "r1"]
    ended = await store.change("a", ending("r1"))
    assert await store.request("r1") == ended
    assert await store.unsettled() == ()


@check
async def everything_is_found_again_after_opening_anew(bench: Bench) -> None:
    await bench.create("a", tags=("red", "blue"))
    for number in range(3):
        await bench.admit("a", f"r{number}")
    await bench.store.change("a", ending("r1"))
    before = await _everything(bench.store)
    await bench.reopen()
    assert await _everything(bench.store) == before
    assert await bench.grow("a") == 5
    assert await bench.store.last_event() == 6


async def _everything(store: Store) -> list[Any]:
    return [
        await store.instance("a"),
        await store.instances(InstanceFilter(tag="blue"), 10),
        await store.requests("a", 10),
        await store.events(0, 100),
        await store.last_event(),
        store.fence("a"),
    ]


@check
async def an_answer_is_given_only_when_it_is_durable(bench: Bench) -> None:
    await bench.create("a")
    async with bench.power_cut() as found:
        assert await found.instance("a") == await bench.kept("a")

    async def grow_and_look() -> None:
        generation = await bench.grow("a")
        async with bench.power_cut() as found:
            instance = await found.instance("a")
            assert instance is not None
            assert instance.generation >= generation
            assert await found.last_event() >= generation + 1

    await asyncio.gather(*(grow_and_look() for _ in range(5)))


@check
async def an_answer_that_keeps_nothing_rests_only_on_what_is_durable(bench: Bench) -> None:
    await bench.create("a")
    growing_now = asyncio.create_task(bench.grow("a"))
    await asyncio.sleep(0)
    seen = await bench.store.change("a", lambda instance, _: Change(instance=instance, answer=instance.generation))
    async with bench.power_cut() as found:
        instance = await found.instance("a")
        assert instance is not None
        assert instance.generation >= seen
    await growing_now


@check
async def listeners_are_told_only_what_is_durable(bench: Bench) -> None:
    await bench.create("a")
    found: list[tuple[int, Store]] = []

    def listener(events: Sequence[Event]) -> None:
        found.append((events[-1].sequence, bench.under_test.make_after_power_cut(bench.clock)))

    bench.store.listen(listener)
    await asyncio.gather(*(bench.grow("a") for _ in range(5)))
    assert found
    for told, store in found:
        await store.open()
        assert await store.last_event() >= told
        await store.close()


@check
async def a_decision_that_raises_keeps_nothing_and_disturbs_nobody(bench: Bench) -> None:
    await bench.create("a")

    def refuse(_instance: Instance, _now_ms: int) -> Change[int]:
        raise ZeroDivisionError

    def refuse_new(_now_ms: int) -> Change[int]:
        raise ZeroDivisionError

    calls: list[Any] = []
    for _ in range(20):
        calls += [bench.grow("a"), bench.store.change("a", refuse), bench.store.create(refuse_new)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert sorted(answer for answer in answers if isinstance(answer, int)) == list(range(1, 21))
    assert sum(isinstance(answer, ZeroDivisionError) for answer in answers) == 40
    assert await bench.store.last_event() == 21
    await bench.reopen()
    assert (await bench.kept("a")).generation == 20


@check
async def a_decision_that_cannot_be_written_down_fails_alone(bench: Bench) -> None:
    await bench.create("a")

    def unwritable(instance: Instance, now_ms: int) -> Change[int]:
        change = growing(instance, now_ms)
        return Change(
            instance=change.instance,
            events=(*change.events, replace(change.events[0], data={"what": object()})),
            answer=change.answer,
        )

    def unwritable_new(now_ms: int) -> Change[Instance]:
        change = creating("b")(now_ms)
        return replace(change, instance=replace(change.instance, tags=(object(),)))

    answers = await asyncio.gather(
        bench.grow("a"),
        bench.store.change("a", unwritable),
        bench.store.create(unwritable_new),
        bench.create("b"),
        bench.grow("a"),
        return_exceptions=True,
    )
    assert [isinstance(answer, Exception) for answer in answers] == [False, True, True, False, False], answers
    assert (answers[0], answers[4]) == (1, 2)
    assert (await bench.kept("a")).generation == 2
    assert [event.sequence for event in await bench.store.events(0, 10)] == [1, 2, 3, 4]


@check
async def changes_of_an_instance_come_one_after_the_other(bench: Bench) -> None:
    await bench.create("a")
    answers = await asyncio.gather(*(bench.grow("a") for _ in range(MANY)))
    assert sorted(answers) == list(range(1, MANY + 1))
    assert (await bench.kept("a")).generation == MANY
    await bench.reopen()
    assert (await bench.kept("a")).generation == MANY


@check
async def a_caller_that_gives_up_disturbs_nobody(bench: Bench) -> None:
    await bench.create("a")
    calls = [asyncio.create_task(bench.grow("a")) for _ in range(40)]
    await asyncio.sleep(0)
    for call in calls[::2]:
        call.cancel()
    await asyncio.wait(calls)
    stayed = [call.result() for call in calls[1::2]]
    assert sorted(set(stayed)) == sorted(stayed)
    assert (await bench.kept("a")).generation >= max(stayed)


@check
async def what_was_admitted_before_closing_is_kept(bench: Bench) -> None:
    await bench.create("a")
    calls = [asyncio.create_task(bench.grow("a")) for _ in range(10)]
    await asyncio.sleep(0)
    await bench.reopen()
    assert sorted(await asyncio.gather(*calls)) == list(range(1, 11))
    assert (await bench.kept("a")).generation == 10


@check
async def a_change_that_changes_nothing_writes_nothing(bench: Bench) -> None:
    await bench.create("a")
    before = await bench.kept("a")
    told: list[Event] = []
    bench.store.listen(told.extend)
    assert await bench.store.change("a", lambda instance, _: Change(instance=instance, answer="no")) == "no"
    assert (await bench.kept("a"), await bench.store.last_event(), told) == (before, 1, [])


@check
async def an_unknown_instance_cannot_be_changed(bench: Bench) -> None:
    async with raises(NotFound):
        await bench.grow("nobody")


@check
async def events_are_numbered_in_order_and_told_as_they_are_kept(bench: Bench) -> None:
    told: list[Event] = []
    bench.store.listen(told.extend)
    await asyncio.gather(*(bench.create(f"i{number}") for number in range(10)))
    await asyncio.gather(*(bench.store.change(f"i{n % 10}", admitting(f"r{n}")) for n in range(100)))
    kept = await bench.store.events(0, 1000)
    assert [event.sequence for event in kept] == list(range(1, 111))
    assert list(kept) == told
    for number in range(10):
        generations = [event.generation for event in kept if event.instance_id == f"i{number}"]
        assert generations == list(range(11))
    sample = kept[-1]
    assert sample.data["nested"] == {"list": [1, None, "ü"]}
    assert (await bench.kept(sample.instance_id)).outstanding[-1].id == sample.request_id


@check
async def listeners_hear_of_a_change_before_its_caller_goes_on(bench: Bench) -> None:
    told: list[int] = []
    bench.store.listen(lambda events: told.extend(event.generation for event in events))
    await bench.create("a")

    async def grow_and_ask() -> None:
        generation = await bench.grow("a")
        assert generation in told

    await asyncio.gather(*(grow_and_ask() for _ in range(20)))


@check
async def what_listeners_hear_of_can_be_read(bench: Bench) -> None:
    await bench.create("a")
    fences: list[int | None] = []
    bench.store.listen(lambda _events: fences.append(bench.store.fence("a")))

    def fencing(instance: Instance, now_ms: int) -> Change[int]:
        change = growing(instance, now_ms)
        return replace(change, instance=replace(change.instance, fence=instance.fence + 1))

    await bench.store.change("a", fencing)
    await bench.store.change("a", fencing)
    assert fences == [1, 2]


@check
async def a_listener_can_be_taken_away(bench: Bench) -> None:
    stays: list[Event] = []
    goes: list[Event] = []
    bench.store.listen(stays.extend)
    take_away = bench.store.listen(goes.extend)
    await bench.create("a")
    take_away()
    await bench.grow("a")
    assert (len(stays), len(goes)) == (2, 1)


@check
async def a_listener_that_fails_disturbs_nobody(bench: Bench) -> None:
    failures: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    handler = loop.get_exception_handler()
    loop.set_exception_handler(lambda _loop, context: failures.append(context))
    told: list[Event] = []

    def fail(_events: Sequence[Event]) -> None:
        raise ZeroDivisionError

    bench.store.listen(fail)
    bench.store.listen(told.extend)
    try:
        await bench.create("a")
    finally:
        loop.set_exception_handler(handler)
    assert len(told) == 1
    assert isinstance(failures[0]["exception"], ZeroDivisionError)


@check
async def the_fence_is_the_one_that_was_committed_last(bench: Bench) -> None:
    seen: list[int | None] = [bench.store.fence("a")]
    await bench.create("a")

    def fencing(instance: Instance, _now_ms: int) -> Change[None]:
        seen.append(bench.store.fence("a"))
        return Change(instance=replace(instance, fence=instance.fence + 1), answer=None)

    for _ in range(3):
        await bench.store.change("a", fencing)
    seen.append(bench.store.fence("a"))
    assert seen == [None, 0, 1, 2, 3]
    await bench.reopen()
    assert bench.store.fence("a") == 3


@check
async def no_decision_is_made_while_the_store_is_paused(bench: Bench) -> None:
    store = bench.store
    await bench.create("a")
    before = asyncio.create_task(bench.grow("a"))
    await asyncio.sleep(0)
    async with store.paused():
        decided_before = await bench.kept("a")
        async with bench.power_cut() as found:
            assert await found.instance("a") == decided_before
        waiting = [asyncio.create_task(bench.grow("a")), asyncio.create_task(bench.create("b"))]
        await store.tokens.all()
        await store.settled()
        assert await bench.kept("a") == decided_before
        assert await store.instance("b") is None
        assert not any(task.done() for task in waiting)
    await asyncio.gather(before, *waiting)
    assert decided_before.generation == before.result()
    assert (await bench.kept("a")).generation == decided_before.generation + 1


@check
async def decisions_go_on_after_a_pause_that_fails(bench: Bench) -> None:
    await bench.create("a")
    with suppress(NotFound):
        async with bench.store.paused():
            raise NotFound("Nothing here.")
    assert await bench.grow("a") == (await bench.kept("a")).generation
