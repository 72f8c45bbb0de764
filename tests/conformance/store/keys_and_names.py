"""What a store promises of idempotency keys, names and time."""

from __future__ import annotations

import asyncio
from typing import Any

from msgspec.structs import replace

from conformance.store.harness import START_MS, Bench, GivenClock, admitting, check, creating, putting, raises
from interlock.core.errors import KeyReused, NameTaken
from interlock.core.operations import Operation
from interlock.core.records import Change, Denied, Disposition, Instance
from interlock.core.states import VmState
from interlock.ports import IdempotencyKey

KEY = IdempotencyKey(scope="token", key="k1", fingerprint="reboot a")
HOUR_MS = 3_600_000


@check
async def a_key_answers_what_it_answered(bench: Bench) -> None:
    await bench.create("a")
    first = await bench.admit("a", "r1", KEY)
    assert await bench.admit("a", "r2", KEY) == first
    assert await bench.store.request("r2") is None
    assert len((await bench.kept("a")).outstanding) == 1


@check
async def what_a_key_answered_can_be_read_without_deciding(bench: Bench) -> None:
    await bench.create("a")
    assert await bench.store.recorded_answer(KEY.scope, KEY.key) is None
    first = asyncio.create_task(bench.admit("a", "r1", KEY))
    await asyncio.sleep(0)
    assert await bench.store.recorded_answer(KEY.scope, KEY.key) == (KEY.fingerprint, await first)
    assert await bench.store.recorded_answer("another", KEY.key) is None
    await bench.reopen()
    assert await bench.store.recorded_answer(KEY.scope, KEY.key) == (KEY.fingerprint, await first)


@check
async def a_key_answers_what_it_answered_before_closing(bench: Bench) -> None:
    await bench.create("a")
    first = await bench.admit("a", "r1", KEY)
    await bench.reopen()
    assert await bench.admit("a", "r2", KEY) == first
    assert await bench.store.request("r2") is None


@check
async def a_key_used_twice_at_once_is_decided_once(bench: Bench) -> None:
    await bench.create("a")
    answers = await asyncio.gather(*(bench.admit("a", f"r{number}", KEY) for number in range(10)))
    assert len({answer.request.id for answer in answers}) == 1
    assert len((await bench.kept("a")).outstanding) == 1


@check
async def a_repeated_key_is_answered_only_when_the_first_is_durable(bench: Bench) -> None:
    await bench.create("a")
    first = asyncio.create_task(bench.admit("a", "r1", KEY))
    await asyncio.sleep(0)
    again = await bench.admit("a", "r2", KEY)
    async with bench.power_cut() as found:
        assert await found.request(again.request.id) is not None
    assert await first == again


@check
async def a_key_works_for_creating_too(bench: Bench) -> None:
    def decide(now_ms: int) -> Change[Disposition]:
        fresh = creating("a")(now_ms)
        change = admitting("r1", Operation.CREATE)(fresh.instance, now_ms)
        return Change(instance=change.instance, requests=change.requests, events=change.events, answer=change.answer)

    first = await bench.store.create(decide, KEY)
    assert await bench.store.create(decide, KEY) == first
    await bench.reopen()
    assert await bench.store.create(decide, KEY) == first
    assert await bench.store.last_event() == 1


@check
async def a_key_used_for_something_else_is_noticed(bench: Bench) -> None:
    await bench.create("a")
    other = replace(KEY, fingerprint="stop a")
    first = asyncio.create_task(bench.admit("a", "r1", KEY))
    await asyncio.sleep(0)
    async with raises(KeyReused):
        await bench.admit("a", "r2", other)
    await first
    async with raises(KeyReused):
        await bench.admit("a", "r3", other)
    async with raises(KeyReused):
        await bench.store.create(creating("b"), other)
    assert [request.id for request in (await bench.kept("a")).outstanding] == ["r1"]


@check
async def the_same_key_of_another_caller_is_another_key(bench: Bench) -> None:
    await bench.create("a")
    await bench.admit("a", "r1", KEY)
    await bench.admit("a", "r2", replace(KEY, scope="another", fingerprint="anything"))
    assert len((await bench.kept("a")).outstanding) == 2


@check
async def a_refusal_is_not_remembered_under_its_key(bench: Bench) -> None:
    await bench.create("a")

    def refuse(instance: Instance, _now_ms: int) -> Change[Disposition]:
        denied = Denied(operation=Operation.REBOOT, reason="busy", rule="a-rule", vm_state=VmState.ACTIVE)
        return Change(instance=instance, answer=denied)

    assert isinstance(await bench.store.change("a", refuse, KEY), Denied)
    admitted = await bench.admit("a", "r1", KEY)
    assert await bench.store.change("a", refuse, KEY) == admitted


@check
async def a_decision_that_raised_is_not_remembered_under_its_key(bench: Bench) -> None:
    await bench.create("a")

    def fail(_instance: Instance, _now_ms: int) -> Change[Disposition]:
        raise ZeroDivisionError

    async with raises(ZeroDivisionError):
        await bench.store.change("a", fail, KEY)
    assert (await bench.admit("a", "r1", KEY)).request.id == "r1"


@check
async def a_name_is_taken_while_its_instance_lives(bench: Bench) -> None:
    calls: list[Any] = [bench.create(f"i{number}", name="vm") for number in range(5)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(answer, Instance) for answer in answers) == 1
    assert sum(isinstance(answer, NameTaken) for answer in answers) == 4
    await bench.create("elsewhere", name="vm", project="two")
    await bench.reopen()
    async with raises(NameTaken):
        await bench.create("late", name="vm")
    assert await bench.store.instance("late") is None


@check
async def a_name_is_free_again_after_its_instance_is_deleted(bench: Bench) -> None:
    for life in range(3):
        await bench.create(f"i{life}", name="vm")
        named = await bench.store.instance_named("one", "vm")
        assert named is not None
        assert named.id == f"i{life}"
        await bench.store.change(f"i{life}", putting(vm_state=VmState.DELETED))
        assert await bench.store.instance_named("one", "vm") is None
        assert await bench.store.deleted_named("one", "vm") == await bench.store.instance(named.id)
        assert await bench.store.deleted_named("other", "vm") is None
    assert (await bench.kept("i0")).vm_state is VmState.DELETED


@check
async def a_name_can_be_used_again_in_the_instant_of_the_deletion(bench: Bench) -> None:
    await bench.create("old", name="vm")
    await asyncio.gather(
        bench.store.change("old", putting(vm_state=VmState.DELETED)),
        bench.create("new", name="vm"),
    )
    named = await bench.store.instance_named("one", "vm")
    assert named is not None
    assert named.id == "new"
    # Created and deleted so quickly that nothing of it was kept in between.
    later = [
        asyncio.create_task(bench.store.change("new", putting(vm_state=VmState.DELETED))),
        asyncio.create_task(bench.create("third", name="vm")),
        asyncio.create_task(bench.store.change("third", putting(vm_state=VmState.DELETED))),
        asyncio.create_task(bench.create("fourth", name="vm")),
    ]
    await asyncio.gather(*later)
    await bench.reopen()
    named = await bench.store.instance_named("one", "vm")
    assert named is not None
    assert named.id == "fourth"


@check
async def an_instance_can_be_renamed_and_found_by_its_new_name(bench: Bench) -> None:
    await bench.create("a", name="old")
    await bench.create("b", name="taken")
    await bench.create("c", name="new", project="two")
    async with raises(NameTaken):
        await bench.store.change("a", putting(name="taken"))
    assert (await bench.kept("a")).name == "old"
    await bench.store.change("a", putting(name="new"))
    named = await bench.store.instance_named("one", "new")
    assert named is not None
    assert named.id == "a"
    assert await bench.store.instance_named("one", "old") is None
    await bench.create("d", name="old")
    await bench.reopen()
    async with raises(NameTaken):
        await bench.create("e", name="new")
    async with raises(NameTaken):
        await bench.store.change("a", putting(name="old"))


@check
async def names_can_be_passed_on_at_once(bench: Bench) -> None:
    """One takes the name that another one gives up in the same instant, whichever row is written first."""
    for name in ("a", "b", "c", "d"):
        await bench.create(name)
    await asyncio.gather(
        bench.store.change("d", putting(name="e")),
        bench.store.change("c", putting(name="d")),
        bench.store.change("b", putting(vm_state=VmState.DELETED)),
        bench.store.change("a", putting(name="b")),
    )
    await asyncio.gather(bench.store.change("a", putting(name="g")), bench.create("f", name="b"))
    await bench.reopen()
    for name, instance_id in (("e", "d"), ("d", "c"), ("g", "a"), ("b", "f")):
        named = await bench.store.instance_named("one", name)
        assert named is not None
        assert named.id == instance_id


@check
async def two_who_want_the_same_new_name_get_one_each(bench: Bench) -> None:
    for number in range(5):
        await bench.create(f"i{number}")
    renamed = (bench.store.change(f"i{number}", putting(name="vm")) for number in range(5))
    answers = await asyncio.gather(*renamed, return_exceptions=True)
    assert sum(isinstance(answer, NameTaken) for answer in answers) == 4
    named = await bench.store.instance_named("one", "vm")
    assert named is not None
    # Back and forth: what it is called in the end is what counts.
    await asyncio.gather(
        bench.store.change(named.id, putting(name="other")),
        bench.store.change(named.id, putting(name="vm")),
    )
    assert (await bench.kept(named.id)).name == "vm"
    await bench.store.change(named.id, putting(name="other"))
    await bench.create("late", name="vm")


@check
async def an_id_is_never_used_twice(bench: Bench) -> None:
    await bench.create("a")
    answers = await asyncio.gather(
        bench.create("a", name="other"), bench.grow("a"), bench.create("b"), return_exceptions=True
    )
    assert isinstance(answers[0], Exception)
    assert answers[1] == 1
    assert (await bench.kept("a")).name == "a"
    assert (await bench.kept("b")).name == "b"


@check
async def time_never_goes_back(bench: Bench) -> None:
    times = [bench.store.now_ms()]
    for jump in (+HOUR_MS, -2 * HOUR_MS, +1, -HOUR_MS):
        bench.clock.shows_ms += jump
        times.append(bench.store.now_ms())
    assert times == sorted(times)
    assert times[0] == START_MS


@check
async def time_never_goes_back_when_opened_with_a_clock_in_the_past(bench: Bench) -> None:
    ids = [f"i{number}" for number in range(5)]
    for instance_id in ids:
        await bench.create(instance_id)
    bench.clock.shows_ms += HOUR_MS
    await bench.store.change("i0", putting(error="nothing is told of this"))
    seen = (await bench.kept("i0")).updated_at_ms
    assert seen == START_MS + HOUR_MS
    bench.clock.shows_ms -= HOUR_MS
    await bench.grow("i4")
    await bench.reopen(GivenClock(START_MS - 24 * HOUR_MS))
    begun = bench.store.now_ms()
    assert begun >= seen
    bench.clock.shows_ms += 5_000
    assert bench.store.now_ms() == begun + 5_000
