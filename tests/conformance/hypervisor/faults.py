"""The hypervisor's promises for bad days: lost permits, guests that act by themselves, crashes, frozen guests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from conformance.hypervisor.harness import Bench, Check, GivenPermit, check, raises
from interlock.core.errors import Fenced, HypervisorError, NotResponding
from interlock.core.records import GuestEvent
from interlock.core.states import PowerState
from interlock.ports import Observation

# ---------------------------------------------------------------------------------------------------- lost permits


async def _nothing(_: Bench) -> None: ...


async def _defined(bench: Bench) -> None:
    await bench.hypervisor.define(bench.permit, "one", bench.spec)


async def _running(bench: Bench) -> None:
    await bench.start()


async def _paused(bench: Bench) -> None:
    await bench.start()
    await bench.hypervisor.pause(bench.permit, "one")


async def _with_disk(bench: Bench) -> None:
    await bench.start()
    await bench.hypervisor.attach_disk(bench.permit, "one", bench.host.disk("v1"))


Step = Callable[[Bench], Awaitable[None]]
Effect = Callable[[Bench, GivenPermit], Awaitable[None]]

EFFECTS: Final[dict[str, tuple[Step, Effect]]] = {
    "define": (_nothing, lambda bench, permit: bench.hypervisor.define(permit, "one", bench.spec)),
    "undefine": (_defined, lambda bench, permit: bench.hypervisor.undefine(permit, "one")),
    "undefine_running": (_running, lambda bench, permit: bench.hypervisor.undefine(permit, "one")),
    "power_on": (_defined, lambda bench, permit: bench.hypervisor.power_on(permit, "one", bench.spec)),
    "power_off": (_running, lambda bench, permit: bench.hypervisor.power_off(permit, "one")),
    "press_power_button": (_running, lambda bench, permit: bench.hypervisor.press_power_button(permit, "one")),
    "reset": (_running, lambda bench, permit: bench.hypervisor.reset(permit, "one")),
    "pause": (_running, lambda bench, permit: bench.hypervisor.pause(permit, "one")),
    "unpause": (_paused, lambda bench, permit: bench.hypervisor.unpause(permit, "one")),
    "attach_disk": (_running, lambda bench, permit: bench.hypervisor.attach_disk(permit, "one", bench.host.disk("v1"))),
    "detach_disk": (_with_disk, lambda bench, permit: bench.hypervisor.detach_disk(permit, "one", "v1")),
}
"""For each method that changes something: a state in which it would, and the call."""


def _revoked(name: str, prepare: Step, effect: Effect) -> Check:
    async def promise(bench: Bench) -> None:
        await prepare(bench)
        before = await bench.hypervisor.inspect("one")
        incarnation = await bench.host.incarnation("one")
        permit = GivenPermit()
        permit.revoke()
        async with raises(Fenced):
            await effect(bench, permit)
        assert await bench.hypervisor.inspect("one") == before
        assert await bench.host.incarnation("one") == incarnation
        assert bench.told.kinds() == []

    promise.__name__ = f"a_revoked_permit_has_no_effect_on_{name}"
    return promise


for _name, (_prepare, _effect) in EFFECTS.items():
    check(_revoked(_name, _prepare, _effect))


# -------------------------------------------------------------------------------- what guests do of their own accord


@check
async def each_event_is_told_once_and_in_order(bench: Bench) -> None:
    await bench.start()
    await bench.host.guest_reset("one")
    await bench.expect(GuestEvent.RESET)
    await bench.host.until_up("one")
    await bench.host.guest_power_off("one")
    await bench.expect(GuestEvent.STOPPED)
    await bench.hypervisor.power_on(bench.permit, "one", bench.spec)
    await bench.host.until_up("one")
    await bench.host.guest_panic("one")
    await bench.expect(GuestEvent.CRASHED)
    await bench.hypervisor.power_off(bench.permit, "one")
    await bench.start()
    await bench.host.kill("one")
    await bench.expect(GuestEvent.VANISHED)
    assert bench.told.kinds() == [GuestEvent.RESET, GuestEvent.STOPPED, GuestEvent.CRASHED, GuestEvent.VANISHED]
    assert {(event.instance_id, event.during_watch) for event in bench.told.events} == {("one", True)}


@check
async def what_a_guest_did_can_be_seen(bench: Bench) -> None:
    await bench.start()
    await bench.host.guest_panic("one")
    await bench.expect(GuestEvent.CRASHED)
    assert await bench.power() is PowerState.CRASHED
    await bench.hypervisor.power_off(bench.permit, "one")
    await bench.start()
    await bench.host.guest_power_off("one")
    await bench.expect(GuestEvent.STOPPED)
    assert await bench.power() in {PowerState.SHUTDOWN, PowerState.NONE}
    await bench.hypervisor.power_off(bench.permit, "one")
    await bench.start()
    await bench.host.kill("one")
    await bench.expect(GuestEvent.VANISHED)
    assert await bench.hypervisor.inspect("one") == Observation(defined=True, power_state=PowerState.NONE)


@check
async def an_end_that_was_asked_for_is_not_told(bench: Bench) -> None:
    await bench.start()
    await bench.hypervisor.power_off(bench.permit, "one")
    await bench.start()
    await bench.hypervisor.reset(bench.permit, "one")
    await bench.host.until_up("one")
    await bench.hypervisor.undefine(bench.permit, "one")
    await bench.start("two")
    await bench.host.guest_power_off("two")
    await bench.expect(GuestEvent.STOPPED)
    assert [(event.instance_id, event.kind) for event in bench.told.events] == [("two", GuestEvent.STOPPED)]
    await bench.hypervisor.power_off(bench.permit, "two")
    await bench.abandon()
    assert await bench.open() == []


# ---------------------------------------------------------------------------------- crashes of who drives the guests


@check
async def guests_outlive_the_hypervisor_object(bench: Bench) -> None:
    await bench.start("one")
    await bench.start("two")
    await bench.hypervisor.define(bench.permit, "three", bench.spec)
    await bench.hypervisor.attach_disk(bench.permit, "one", bench.host.disk("v1"))
    await bench.hypervisor.pause(bench.permit, "two")
    incarnation = await bench.host.incarnation("one")
    await bench.abandon()
    assert await bench.open() == []
    assert await bench.hypervisor.known() == {"one", "two", "three"}
    seen = await bench.hypervisor.inspect("one")
    assert (seen.power_state, "v1" in seen.disks) == (PowerState.RUNNING, True)
    assert await bench.power("two") is PowerState.PAUSED
    assert await bench.power("three") is PowerState.NONE
    assert await bench.host.incarnation("one") == incarnation
    await bench.hypervisor.detach_disk(bench.permit, "one", "v1")
    await bench.hypervisor.unpause(bench.permit, "two")
    assert await bench.power("two") is PowerState.RUNNING


@check
async def close_does_not_disturb_the_guests(bench: Bench) -> None:
    await bench.start()
    incarnation = await bench.host.incarnation("one")
    await bench.close()
    assert await bench.open() == []
    assert await bench.power() is PowerState.RUNNING
    assert await bench.host.incarnation("one") == incarnation


@check
async def what_happened_while_nobody_watched_is_told_at_open(bench: Bench) -> None:
    acts = {
        "one": (bench.host.guest_power_off, GuestEvent.STOPPED),
        "two": (bench.host.guest_reset, GuestEvent.RESET),
        "three": (bench.host.guest_panic, GuestEvent.CRASHED),
        "four": (bench.host.kill, GuestEvent.VANISHED),
    }
    for instance_id in acts:
        await bench.start(instance_id)
    await bench.abandon()
    for instance_id, (act, _) in acts.items():
        await act(instance_id)
    told = await bench.open()
    assert sorted((event.instance_id, event.kind, event.during_watch) for event in told) == sorted(
        (instance_id, kind, False) for instance_id, (_, kind) in acts.items()
    )


@check
async def what_was_told_at_open_is_not_told_again(bench: Bench) -> None:
    await bench.start()
    await bench.abandon()
    await bench.host.guest_power_off("one")
    assert [event.kind for event in await bench.open()] == [GuestEvent.STOPPED]
    await bench.close()
    assert await bench.open() == []


@check
async def events_are_told_again_after_a_reopen(bench: Bench) -> None:
    await bench.start()
    await bench.abandon()
    await bench.open()
    await bench.host.guest_panic("one")
    await bench.expect(GuestEvent.CRASHED)
    assert [event.during_watch for event in bench.told.events] == [True]


@check
async def a_start_whose_worker_was_cancelled_can_be_completed(bench: Bench) -> None:
    await bench.hypervisor.define(bench.permit, "one", bench.spec)
    worker = asyncio.ensure_future(bench.hypervisor.power_on(bench.permit, "one", bench.spec))
    await asyncio.sleep(0)
    worker.cancel()
    await asyncio.wait({worker})
    await bench.hypervisor.power_on(bench.permit, "one", bench.spec)
    assert await bench.power() is PowerState.RUNNING
    assert bench.told.kinds() == []
    await bench.hypervisor.undefine(bench.permit, "one")
    assert await bench.host.remains("one") == []


# --------------------------------------------------------------------------------------------------- frozen guests


@check
async def a_frozen_guest_is_reported_unresponsive_in_time(bench: Bench) -> None:
    await bench.start()
    await bench.host.freeze("one")
    async with asyncio.timeout(bench.host.notice_s):
        seen = await bench.hypervisor.inspect("one")
    assert (seen.defined, seen.power_state, seen.responsive) == (True, PowerState.RUNNING, False)
    await bench.host.thaw("one")
    assert (await bench.hypervisor.inspect("one")).responsive


@check
async def a_guest_found_frozen_at_open_is_no_obstacle(bench: Bench) -> None:
    await bench.start("one")
    await bench.start("two")
    await bench.host.freeze("one")
    await bench.abandon()
    await bench.in_time(bench.open())
    assert not (await bench.hypervisor.inspect("one")).responsive
    assert await bench.power("two") is PowerState.RUNNING
    await bench.hypervisor.power_off(bench.permit, "one")
    assert await bench.power() is PowerState.NONE


@check
async def a_command_to_a_frozen_guest_ends_as_not_responding(bench: Bench) -> None:
    await bench.start()
    for command in (bench.hypervisor.pause, bench.hypervisor.press_power_button):
        await bench.host.freeze("one")
        async with raises(NotResponding), asyncio.timeout(bench.host.notice_s):
            await command(bench.permit, "one")
        await bench.hypervisor.power_off(bench.permit, "one")
        await bench.start()


@check
async def after_an_unanswered_command_others_are_not_sent(bench: Bench) -> None:
    await bench.start()
    await bench.leave_unanswered()
    async with raises(NotResponding), asyncio.timeout(bench.host.notice_s):
        await bench.hypervisor.attach_disk(bench.permit, "one", bench.host.disk("v1"))
    await bench.host.thaw("one")
    await _until_responsive(bench)
    assert "v1" not in (await bench.hypervisor.inspect("one")).disks


@check
async def a_thawed_guest_can_be_used_again(bench: Bench) -> None:
    await bench.start()
    await bench.leave_unanswered()
    await bench.host.thaw("one")
    await _until_responsive(bench)
    await bench.hypervisor.unpause(bench.permit, "one")
    assert await bench.power() is PowerState.RUNNING
    await bench.hypervisor.pause(bench.permit, "one")
    assert await bench.power() is PowerState.PAUSED


async def _until_responsive(bench: Bench) -> None:
    async with asyncio.timeout(bench.host.patience_s):
        while not (await bench.hypervisor.inspect("one")).responsive:  # noqa: ASYNC110
            await asyncio.sleep(0)  # looking is all that the port offers to wait with


@check
async def power_off_ends_a_frozen_guest(bench: Bench) -> None:
    await bench.start()
    await bench.leave_unanswered()
    await bench.in_time(bench.hypervisor.power_off(bench.permit, "one"))
    assert await bench.hypervisor.inspect("one") == Observation(defined=True, power_state=PowerState.NONE)
    assert bench.told.kinds() == []


@check
async def undefine_ends_a_frozen_guest_and_leaves_nothing(bench: Bench) -> None:
    await bench.start()
    await bench.leave_unanswered()
    await bench.in_time(bench.hypervisor.undefine(bench.permit, "one"))
    assert await bench.host.remains("one") == []


@check
async def reset_of_a_frozen_guest_starts_another(bench: Bench) -> None:
    await bench.start()
    incarnation = await bench.host.incarnation("one")
    await bench.hypervisor.attach_disk(bench.permit, "one", bench.host.disk("v1"))
    await bench.leave_unanswered()
    await bench.in_time(bench.hypervisor.reset(bench.permit, "one"))
    seen = await bench.hypervisor.inspect("one")
    assert (seen.power_state, seen.responsive) == (PowerState.RUNNING, True)
    assert "v1" in seen.disks
    assert await bench.host.incarnation("one") != incarnation
    assert bench.told.kinds() == []


@check
async def what_was_sent_to_a_frozen_guest_takes_no_effect_after_power_off(bench: Bench) -> None:
    await bench.start()
    await bench.leave_unanswered()
    await bench.hypervisor.power_off(bench.permit, "one")
    await bench.start()
    assert await bench.power() is PowerState.RUNNING
    await bench.host.guest_power_off("one")
    await bench.expect(GuestEvent.STOPPED)
    assert bench.told.kinds() == [GuestEvent.STOPPED]


@check
async def a_superseded_worker_cannot_touch_a_guest_that_thaws(bench: Bench) -> None:
    await bench.start()
    await bench.host.freeze("one")
    late = GivenPermit()
    async with raises(NotResponding):
        await bench.in_time(bench.hypervisor.press_power_button(late, "one"))
    late.revoke()
    await bench.hypervisor.power_off(bench.permit, "one")
    await bench.start()
    for effect in (bench.hypervisor.pause, bench.hypervisor.power_off, bench.hypervisor.undefine):
        async with raises(Fenced):
            await effect(late, "one")
    assert await bench.power() is PowerState.RUNNING


@check
async def the_end_of_a_frozen_guest_is_told(bench: Bench) -> None:
    await bench.start()
    await bench.host.freeze("one")
    asked = asyncio.ensure_future(bench.hypervisor.pause(bench.permit, "one"))
    await bench.host.kill("one")
    async with raises(HypervisorError):
        await bench.in_time(asked)
    await bench.expect(GuestEvent.VANISHED)
    assert await bench.power() is PowerState.NONE


@check
async def a_machine_that_gives_no_answer_is_told_of_and_so_is_that_it_answers_again(bench: Bench) -> None:
    """Nobody asked anything of it."""
    await bench.start()
    await bench.start("two")
    await bench.host.freeze("one")
    await bench.expect(GuestEvent.NOT_RESPONDING)
    await bench.host.thaw("one")
    await bench.expect(GuestEvent.RESPONDING)
    of_the_machine = [event for event in bench.told.events if event.kind is not GuestEvent.CHANGED]
    assert [(event.instance_id, event.kind) for event in of_the_machine] == [
        ("one", GuestEvent.NOT_RESPONDING),
        ("one", GuestEvent.RESPONDING),
    ]


@check
async def a_machine_that_was_silent_already_as_somebody_took_charge_is_told_of(bench: Bench) -> None:
    await bench.start()
    await bench.abandon()
    await bench.host.freeze("one")
    await bench.open()
    await bench.expect(GuestEvent.NOT_RESPONDING)
    await bench.host.thaw("one")
    await bench.expect(GuestEvent.RESPONDING)


@check
async def what_takes_effect_when_nobody_waits_any_more_is_told(bench: Bench) -> None:
    """A pause that was given up on may pause the guest all the same when its machine comes to it."""
    await bench.start()
    await bench.leave_unanswered()
    await bench.host.thaw("one")
    if await bench.power() is PowerState.PAUSED:
        await bench.expect(GuestEvent.CHANGED)
