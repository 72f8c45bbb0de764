"""What the simulated hypervisor adds to the port: faults by seed and by script, delays, and a host that is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from conformance.hypervisor import GivenPermit, Told
from conformance.simulated_host import IMAGE, SimulatedUnderTest
from in_process.virtual_time import VirtualClock, run_in_virtual_time, settle
from interlock.core.errors import Fenced, GuestNotFound, HypervisorError, NotResponding, OperationRejected, Unavailable
from interlock.core.records import GuestEvent, Spec
from interlock.core.states import PowerState
from interlock.hypervisors.simulated import (
    AnswerLost,
    Fault,
    FaultRates,
    GuestIgnores,
    GuestPanics,
    GuestVanishes,
    Hangs,
    Method,
    Refuses,
    SimulatedHost,
    SimulatedHypervisor,
    Slow,
)

SPEC = Spec(image=IMAGE)
PERMIT = GivenPermit()
DISK = SimulatedUnderTest().disk("v1")


async def running(host: SimulatedHost | None = None, **options: object) -> tuple[SimulatedHypervisor, Told]:
    """An open hypervisor with one running guest, `one`."""
    hypervisor = SimulatedHypervisor(host, **options)  # type: ignore[arg-type]
    told = Told()
    await hypervisor.open(told)
    await hypervisor.define(PERMIT, "one", SPEC)
    await hypervisor.power_on(PERMIT, "one", SPEC)
    return hypervisor, told


async def power(hypervisor: SimulatedHypervisor) -> PowerState:
    return (await hypervisor.inspect("one")).power_state


# ------------------------------------------------------------------------------------------------------------ faults


async def test_a_slow_call_takes_its_time_and_then_its_effect() -> None:
    clock = VirtualClock()
    hypervisor, _ = await running(sleep=clock.sleep)
    hypervisor.host.faults.script("one", Method.PAUSE, Slow(2_000))
    worker = asyncio.ensure_future(hypervisor.pause(PERMIT, "one"))
    await clock.advance(1.9)
    assert await power(hypervisor) is PowerState.RUNNING
    await clock.advance(0.2)
    assert worker.done()
    assert await power(hypervisor) is PowerState.PAUSED


async def test_a_permit_lost_during_a_slow_call_leaves_no_effect() -> None:
    clock = VirtualClock()
    hypervisor, _ = await running(sleep=clock.sleep)
    calls: dict[Method, Callable[[GivenPermit], Awaitable[None]]] = {
        Method.PAUSE: lambda permit: hypervisor.pause(permit, "one"),
        Method.RESET: lambda permit: hypervisor.reset(permit, "one"),
        Method.POWER_OFF: lambda permit: hypervisor.power_off(permit, "one"),
        Method.UNDEFINE: lambda permit: hypervisor.undefine(permit, "one"),
        Method.ATTACH_DISK: lambda permit: hypervisor.attach_disk(permit, "one", DISK),
        Method.DEFINE: lambda permit: hypervisor.define(permit, "two", SPEC),
    }
    for method, call in calls.items():
        hypervisor.host.faults.script("two" if method is Method.DEFINE else "one", method, Slow(1_000))
        before = (await hypervisor.inspect("one"), await hypervisor.known(), hypervisor.host.guests["one"].resets)
        permit = GivenPermit()
        worker = asyncio.ensure_future(call(permit))
        await clock.advance(0.5)
        permit.revoke()
        await clock.advance(1)
        assert isinstance(worker.exception(), Fenced), method
        after = (await hypervisor.inspect("one"), await hypervisor.known(), hypervisor.host.guests["one"].resets)
        assert after == before


async def test_a_lost_answer_is_not_responding_although_it_was_done() -> None:
    hypervisor, _ = await running(answer_timeout_s=0)
    hypervisor.host.faults.script("one", Method.PAUSE, AnswerLost())
    with pytest.raises(NotResponding):
        await hypervisor.pause(PERMIT, "one")
    assert await power(hypervisor) is PowerState.PAUSED


async def test_a_refusal_changes_nothing_and_befalls_one_call() -> None:
    hypervisor, _ = await running()
    hypervisor.host.faults.script("one", Method.ATTACH_DISK, Refuses("No room."))
    with pytest.raises(OperationRejected, match="No room"):
        await hypervisor.attach_disk(PERMIT, "one", DISK)
    assert "v1" not in (await hypervisor.inspect("one")).disks
    await hypervisor.attach_disk(PERMIT, "one", DISK)
    assert "v1" in (await hypervisor.inspect("one")).disks


async def test_a_guest_panics_after_the_effect_and_that_is_told() -> None:
    hypervisor, told = await running()
    hypervisor.host.faults.script("one", Method.RESET, GuestPanics())
    await hypervisor.reset(PERMIT, "one")
    await told.until(GuestEvent.CRASHED, 5)
    assert await power(hypervisor) is PowerState.CRASHED


async def test_a_guest_vanishes_under_a_command() -> None:
    hypervisor, told = await running()
    hypervisor.host.faults.script("one", Method.PAUSE, GuestVanishes())
    with pytest.raises(GuestNotFound):
        await hypervisor.pause(PERMIT, "one")
    await told.until(GuestEvent.VANISHED, 5)
    assert await power(hypervisor) is PowerState.NONE


async def test_a_guest_vanishes_right_after_its_start() -> None:
    hypervisor, told = await running()
    await hypervisor.power_off(PERMIT, "one")
    hypervisor.host.faults.script("one", Method.POWER_ON, GuestVanishes())
    await hypervisor.power_on(PERMIT, "one", SPEC)
    await told.until(GuestEvent.VANISHED, 5)
    assert await power(hypervisor) is PowerState.NONE


async def test_a_guest_that_does_not_let_go_keeps_the_disk() -> None:
    hypervisor, _ = await running(answer_timeout_s=0)
    await hypervisor.attach_disk(PERMIT, "one", DISK)
    hypervisor.host.faults.script("one", Method.DETACH_DISK, GuestIgnores())
    with pytest.raises(NotResponding):
        await hypervisor.detach_disk(PERMIT, "one", "v1")
    assert "v1" in (await hypervisor.inspect("one")).disks


async def test_a_guest_ignores_one_press_and_heeds_the_next() -> None:
    hypervisor, told = await running()
    hypervisor.host.faults.script("one", Method.PRESS_POWER_BUTTON, GuestIgnores())
    await hypervisor.press_power_button(PERMIT, "one")
    await settle()
    assert await power(hypervisor) is PowerState.RUNNING
    await hypervisor.press_power_button(PERMIT, "one")
    await told.until(GuestEvent.STOPPED, 5)


async def test_a_hang_that_ends_in_time_is_only_slow() -> None:
    clock = VirtualClock()
    hypervisor, _ = await running(sleep=clock.sleep, answer_timeout_s=5)
    hypervisor.host.faults.script("one", Method.PAUSE, Hangs(thaw_after_ms=3_000))
    worker = asyncio.ensure_future(hypervisor.pause(PERMIT, "one"))
    await clock.advance(2.9)
    assert not worker.done()
    await clock.advance(0.2)
    assert worker.exception() is None
    assert await power(hypervisor) is PowerState.PAUSED


async def test_what_a_hung_guest_was_sent_takes_effect_when_it_thaws() -> None:
    hypervisor, _ = await running(answer_timeout_s=0)
    hypervisor.host.faults.script("one", Method.PAUSE, Hangs())
    with pytest.raises(NotResponding):
        await hypervisor.pause(PERMIT, "one")
    seen = await hypervisor.inspect("one")
    assert (seen.power_state, seen.responsive) == (PowerState.RUNNING, False)
    hypervisor.host.thaw("one")
    seen = await hypervisor.inspect("one")
    assert (seen.power_state, seen.responsive) == (PowerState.PAUSED, True)


async def test_whoever_waits_for_a_hung_guest_hears_at_once_when_the_plug_is_pulled() -> None:
    clock = VirtualClock()
    hypervisor, _ = await running(sleep=clock.sleep, answer_timeout_s=60)
    hypervisor.host.freeze("one")
    worker = asyncio.ensure_future(hypervisor.pause(PERMIT, "one"))
    await clock.advance(1)
    assert not worker.done()
    await hypervisor.power_off(PERMIT, "one")
    await settle()
    assert isinstance(worker.exception(), GuestNotFound)
    assert hypervisor.host.guests["one"].waiting_commands == []


async def test_a_fault_that_cannot_befall_a_call_is_an_error_of_the_script() -> None:
    host = SimulatedHost()
    with pytest.raises(ValueError, match="does not apply"):
        host.faults.script("one", Method.POWER_OFF, Refuses())
    with pytest.raises(ValueError, match="whose sum is 1"):
        FaultRates(slow=0.6, hangs=0.6)


async def test_a_calmed_host_has_no_faults_left() -> None:
    host = SimulatedHost(rates=FaultRates(refuses=1.0))
    host.faults.script("one", Method.DEFINE, AnswerLost())
    host.faults.calm()
    hypervisor, _ = await running(host)
    assert await power(hypervisor) is PowerState.RUNNING


# --------------------------------------------------------------------------------------------------------- one seed


RATES = FaultRates(
    slow=0.1, hangs=0.05, answer_lost=0.1, refuses=0.1, panics=0.05, vanishes=0.05, ignores=0.1, thaw_after_ms_max=9_000
)


async def history(seed: int, others: int) -> list[str]:
    """What 70 commands to one instance meet and lead to, while `others` are busy beside it."""
    hypervisor = SimulatedHypervisor(SimulatedHost(seed=seed, rates=RATES), answer_timeout_s=2)
    await hypervisor.open(Told())
    busy = [asyncio.ensure_future(_life(hypervisor, f"other-{number}")) for number in range(others)]
    told = await _life(hypervisor, "one")
    await asyncio.gather(*busy)
    return told


async def _life(hypervisor: SimulatedHypervisor, instance_id: str) -> list[str]:
    steps: tuple[Callable[[], Awaitable[None]], ...] = (
        lambda: hypervisor.define(PERMIT, instance_id, SPEC),
        lambda: hypervisor.power_on(PERMIT, instance_id, SPEC),
        lambda: hypervisor.pause(PERMIT, instance_id),
        lambda: hypervisor.reset(PERMIT, instance_id),
        lambda: hypervisor.unpause(PERMIT, instance_id),
        lambda: hypervisor.press_power_button(PERMIT, instance_id),
        lambda: hypervisor.power_off(PERMIT, instance_id),
    )
    lines = []
    for turn in range(70):
        try:
            await steps[turn % len(steps)]()
            answer = "done"
        except HypervisorError as error:
            answer = type(error).__name__
        lines.append(f"{turn} {answer} {(await hypervisor.inspect(instance_id)).power_state}")
    return lines


def test_one_seed_is_one_history_however_others_interleave() -> None:
    alone = run_in_virtual_time(history(7, others=0))
    assert run_in_virtual_time(history(7, others=5)) == alone
    assert {line.split()[1] for line in alone} >= {"done", "OperationRejected", "NotResponding"}


def test_another_seed_is_another_history() -> None:
    assert run_in_virtual_time(history(7, others=0)) != run_in_virtual_time(history(8, others=0))


@pytest.mark.parametrize("fault", [Slow(1), AnswerLost(), Refuses(), GuestPanics(), GuestVanishes(), Hangs(1)])
async def test_a_rate_of_one_befalls_every_call(fault: Fault) -> None:
    names = {
        "Slow": "slow",
        "AnswerLost": "answer_lost",
        "Refuses": "refuses",
        "GuestPanics": "panics",
        "GuestVanishes": "vanishes",
        "Hangs": "hangs",
    }
    plan = SimulatedHost(rates=FaultRates(**{names[type(fault).__name__]: 1.0})).faults  # type: ignore[arg-type]
    assert {type(plan.next("one", Method.PAUSE)) for _ in range(50)} == {type(fault)}
    assert plan.next("one", Method.UNDEFINE) is None or isinstance(fault, Slow)


# ------------------------------------------------------------------------------------------------------------ delays


async def test_a_start_cut_short_leaves_a_process_whose_guest_never_ran() -> None:
    clock = VirtualClock()
    hypervisor = SimulatedHypervisor(sleep=clock.sleep, delays_ms={Method.POWER_ON: 500})
    told = Told()
    await hypervisor.open(told)
    await hypervisor.define(PERMIT, "one", SPEC)
    worker = asyncio.ensure_future(hypervisor.power_on(PERMIT, "one", SPEC))
    await clock.advance(0.2)
    worker.cancel()
    await asyncio.wait({worker})
    assert await power(hypervisor) is PowerState.NONE
    assert hypervisor.host.guests["one"].starts == 1
    again = asyncio.ensure_future(hypervisor.power_on(PERMIT, "one", SPEC))
    await clock.advance(1)
    assert again.exception() is None
    assert await power(hypervisor) is PowerState.RUNNING
    assert hypervisor.host.guests["one"].starts == 1
    assert told.kinds() == []


async def test_a_start_cut_short_is_not_completed_with_other_disks() -> None:
    hypervisor, _ = await running()
    await hypervisor.power_off(PERMIT, "one")
    hypervisor.host.start(hypervisor.host.guests["one"], SPEC, PowerState.PAUSED)
    await hypervisor.power_on(PERMIT, "one", msgspec.structs.replace(SPEC, disks=(DISK,)))
    assert "v1" in (await hypervisor.inspect("one")).disks


async def test_a_guest_takes_its_time_to_heed_the_button() -> None:
    clock = VirtualClock()
    hypervisor, told = await running(sleep=clock.sleep, power_off_ms=3_000)
    await hypervisor.press_power_button(PERMIT, "one")
    await clock.advance(2.9)
    assert await power(hypervisor) is PowerState.RUNNING
    await clock.advance(0.2)
    assert told.kinds() == [GuestEvent.STOPPED]


async def test_a_disk_is_in_use_by_one_guest_at_a_time() -> None:
    hypervisor, _ = await running()
    await hypervisor.attach_disk(PERMIT, "one", DISK)
    await hypervisor.define(PERMIT, "two", SPEC)
    with pytest.raises(OperationRejected, match="in use by VM one"):
        await hypervisor.power_on(PERMIT, "two", msgspec.structs.replace(SPEC, disks=(DISK,)))
    await hypervisor.power_off(PERMIT, "one")
    await hypervisor.power_on(PERMIT, "two", msgspec.structs.replace(SPEC, disks=(DISK,)))


# ----------------------------------------------------------------------------------------------------- being kept


async def test_a_crashed_object_changes_and_tells_nothing_any_more() -> None:
    hypervisor, told = await running()
    hypervisor.crash()
    with pytest.raises(Unavailable):
        await hypervisor.power_off(PERMIT, "one")
    hypervisor.host.guest_panics("one")
    await settle()
    assert told.events == []


async def test_who_opens_the_host_later_is_in_charge() -> None:
    host = SimulatedHost()
    earlier, told_earlier = await running(host)
    later, told_later = SimulatedHypervisor(host), Told()
    await later.open(told_later)
    with pytest.raises(Unavailable):
        await earlier.pause(PERMIT, "one")
    host.guest_panics("one")
    await told_later.until(GuestEvent.CRASHED, 5)
    assert told_earlier.events == []


async def test_an_event_not_yet_told_at_a_crash_is_told_at_the_next_open(tmp_path: Path) -> None:
    hypervisor, told = await running(SimulatedHost(folder=tmp_path))
    hypervisor.host.guest_panics("one")
    hypervisor.crash()
    reopened, told_later = SimulatedHypervisor(SimulatedHost(folder=tmp_path)), Told()
    await reopened.open(told_later)
    assert told.events == []
    assert [(event.kind, event.during_watch) for event in told_later.events] == [(GuestEvent.CRASHED, False)]


async def test_a_frozen_guest_is_kept_with_what_it_was_sent(tmp_path: Path) -> None:
    hypervisor, _ = await running(SimulatedHost(folder=tmp_path), answer_timeout_s=0)
    hypervisor.host.freeze("one")
    with pytest.raises(NotResponding):
        await hypervisor.pause(PERMIT, "one")
    hypervisor.crash()
    reopened = SimulatedHypervisor(SimulatedHost(folder=tmp_path), answer_timeout_s=0)
    await reopened.open(Told())
    assert not (await reopened.inspect("one")).responsive
    reopened.host.thaw("one")
    assert await power(reopened) is PowerState.PAUSED


async def test_a_pressed_button_is_heeded_while_nobody_watches(tmp_path: Path) -> None:
    hypervisor, _ = await running(SimulatedHost(folder=tmp_path), power_off_ms=60_000)
    await hypervisor.press_power_button(PERMIT, "one")
    hypervisor.crash()
    reopened, told = SimulatedHypervisor(SimulatedHost(folder=tmp_path)), Told()
    await reopened.open(told)
    assert [(event.kind, event.during_watch) for event in told.events] == [(GuestEvent.STOPPED, False)]


async def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    await running(SimulatedHost(folder=tmp_path))
    (tmp_path / "one.json").write_text("{")
    with pytest.raises(Unavailable, match=str(tmp_path)) as caught:
        await SimulatedHypervisor(SimulatedHost(folder=tmp_path)).open(Told())
    assert caught.value.remedy is not None
