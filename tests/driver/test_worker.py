"""What a worker owes its request however early it is stopped."""

from __future__ import annotations

import asyncio
import errno
import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest

from in_process.embedded import QUICK, Embedded, admitted
from in_process.virtual_time import settle
from interlock.config import DriverConfig
from interlock.core import lifecycle
from interlock.core.admission import admit
from interlock.core.errors import Fenced, InterlockError, NotResponding, OperationRejected
from interlock.core.operations import Lane, Operation
from interlock.core.records import Change, GuestEvent, Instance, Request, Status, Submission
from interlock.core.states import GuestTrouble, PowerState, VmState
from interlock.driver.operation_context import Done, OperationContext
from interlock.driver.operations import HANDLERS, OperationHandler
from interlock.driver.worker import Worker
from interlock.hypervisors.simulated import SimulatedHost
from interlock.hypervisors.simulated.faults import Hangs, Method
from interlock.ports import Observation
from waiting import PATIENCE_S

O = Operation  # noqa: E741


async def _taken(fleet: Embedded, vm: str) -> tuple[Instance, Request]:
    """A start that was admitted and taken, told to nobody, so that no driver sees to it."""
    submission = Submission(request_id="start", operation=O.START, requested_by="tester")

    def decide(instance: Instance, now_ms: int) -> Change[tuple[Instance, Request | None]]:
        asked = admit(instance, submission, fleet.server.policy, now_ms).instance
        change = lifecycle.take(asked, Lane.STATE, now_ms)
        return Change(instance=change.instance, requests=change.requests, answer=(change.instance, change.answer))

    instance, taken = await fleet.server.store.change(vm, decide)
    assert taken is not None
    return instance, taken


@pytest.mark.parametrize("how", ["interrupt", "supersede"])
async def test_a_worker_that_is_stopped_before_its_first_step_still_ends_its_request(fleet: Embedded, how: str) -> None:
    """A task cancelled before its first step never runs; its request would have stayed in flight without anybody."""
    vm = await fleet.create("early", start=False)
    instance, taken = await _taken(fleet, vm)
    server = fleet.server
    work = OperationContext(server.means, instance, taken)
    worker = Worker(work, server.in_force, lambda: None)
    getattr(worker, how)()
    await worker.wait(PATIENCE_S)
    ended = await server.store.request(taken.id)
    assert ended is not None
    assert ended.status is Status.CANCELLED


async def test_a_wait_for_a_guest_inspects_it_at_intervals_and_ends_with_what_it_waits_for_or_in_time(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await fleet.create("early", start=False)
    instance, taken = await _taken(fleet, vm)
    work = OperationContext(fleet.server.means, instance, taken)
    signs: list[None] = []
    work.on_progress = lambda: signs.append(None)
    loop = asyncio.get_running_loop()

    async def waits(seconds: float, timeout_ms: int) -> tuple[bool, int, float]:
        signs.clear()
        begun_s = loop.time()
        ended = await work.while_alive(lambda: asyncio.sleep(seconds), timeout_ms)
        return ended, len(signs), round(loop.time() - begun_s, 3)

    assert QUICK.heartbeat_ms == 50
    assert await waits(0.02, 180) == (True, 0, 0.02)
    assert await waits(0.12, 180) == (True, 2, 0.12)
    assert await waits(9, 180) == (False, 3, 0.18)
    await work.hypervisor.define(work.permit, vm, work.spec)
    await work.hypervisor.power_on(work.permit, vm, work.spec)
    host.freeze(vm)
    assert (await waits(9, 180))[:2] == (False, 0)


async def _reported_failure(
    fleet: Embedded, monkeypatch: pytest.MonkeyPatch, errors: list[InterlockError]
) -> OperationContext:
    """A start whose performance raises these, one each time that it is performed; all of them are used, and no more."""
    vm = await fleet.create("broken", start=False)
    instance, taken = await _taken(fleet, vm)
    times = 0

    async def perform(work: OperationContext) -> Done:
        nonlocal times
        times += 1
        work.permit.check()
        raise errors[times - 1]

    monkeypatch.setitem(HANDLERS, O.START, OperationHandler(perform=perform))
    work = OperationContext(fleet.server.means, instance, taken)
    worker = Worker(work, fleet.server.in_force, lambda: None)
    await worker.wait(PATIENCE_S)
    assert worker.done
    assert times == len(errors)
    ended = await fleet.server.store.request(taken.id)
    assert ended is not None
    assert ended.status is Status.FAILED
    return work


async def test_a_worker_performs_nothing_after_its_request_has_failed(
    fleet: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by a deliberate change: without one `return` it performed again and again, with a permit that held."""
    work = await _reported_failure(fleet, monkeypatch, [OperationRejected("no")])
    with pytest.raises(Fenced, match="after its request had ended"):
        work.permit.check()


async def test_a_guest_that_answers_and_still_does_not_do_it_is_asked_twice_and_no_more(
    fleet: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = await _reported_failure(fleet, monkeypatch, [NotResponding("silent"), NotResponding("silent")])
    with pytest.raises(Fenced, match="after its request had ended"):
        work.permit.check()


@pytest.mark.parametrize("turns", range(5))
async def test_a_worker_is_stopped_also_together_with_news(fleet: Embedded, host: SimulatedHost, turns: int) -> None:
    """Found by an attach that was superseded, went on when the guest thawed, and claimed its volume once more."""
    vm = await fleet.create("early", start=False)
    instance, taken = await _taken(fleet, vm)
    host.faults.script(vm, Method.POWER_ON, Hangs())
    worker = Worker(OperationContext(fleet.server.means, instance, taken), fleet.server.in_force, lambda: None)
    await fleet.until_event(vm, "request.unknown")
    await settle()
    worker.work.wakeup.set()
    for _ in range(turns):
        await asyncio.sleep(0)  # one turn of the loop, for each order in which the two can come
    worker.supersede()
    await worker.wait(PATIENCE_S)
    assert worker.done


async def test_a_key_keeps_its_answer_when_its_volume_has_gone_elsewhere_since(fleet: Embedded) -> None:
    """Found under load: the second attach with the same key was told that the volume was in use."""
    from interlock.service.request_models import NewRequest

    one, two = await fleet.create("one"), await fleet.create("two")
    volume = await fleet.make_volume("shared")
    wish = NewRequest(operation=O.ATTACH_VOLUME, parameters={"volume": volume.id})
    first = admitted(await fleet.server.instances.submit(fleet.caller, one, wish, "key"))
    await fleet.ended(first)
    await fleet.carry_out(one, O.DETACH_VOLUME, volume=volume.id)
    await fleet.carry_out(two, O.ATTACH_VOLUME, volume=volume.id)
    again = admitted(await fleet.server.instances.submit(fleet.caller, one, wish, "key"))
    assert again.id == first.id


async def test_what_is_being_reported_is_stopped_by_nobody(fleet: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was done, and is kept as that; what the guest does from then on is an event again."""
    vm = await fleet.create("early", start=False)
    instance, taken = await _taken(fleet, vm)
    reporting, go_on, change = asyncio.Event(), asyncio.Event(), fleet.server.store.change

    async def held_up(*arguments: Any) -> Any:
        reporting.set()
        await go_on.wait()
        return await change(*arguments)

    async def perform(work: OperationContext) -> Done:
        assert worker.expects(GuestEvent.RESET)
        assert not worker.expects(GuestEvent.CRASHED)
        monkeypatch.setattr(work.store, "change", held_up)
        return Done(power_state=PowerState.RUNNING)

    monkeypatch.setitem(
        HANDLERS, O.START, OperationHandler(perform=perform, expected_events=frozenset({GuestEvent.RESET}))
    )
    worker = Worker(OperationContext(fleet.server.means, instance, taken), fleet.server.in_force, lambda: None)
    async with asyncio.timeout(PATIENCE_S):
        await reporting.wait()
    worker.interrupt()
    worker.supersede()
    assert not worker.expects(GuestEvent.RESET)
    await settle()
    go_on.set()
    await worker.wait(PATIENCE_S)
    assert (await fleet.ended(taken)).status is Status.SUCCEEDED
    assert (worker.succeeded, worker.used_up, worker.left_over) == (True, True, [])


@pytest.mark.parametrize(
    "error", [OperationRejected("It stays.", remedy="Look."), OSError(errno.EIO, "I/O error", "/srv/vm")]
)
async def test_what_cannot_be_undone_says_so_and_has_failed(
    fleet: Embedded, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    vm = await fleet.create("early", start=False)
    instance, taken = await _taken(fleet, vm)
    begun = asyncio.Event()

    async def perform(_work: OperationContext) -> Done:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def undo(_work: OperationContext) -> None:
        raise error

    monkeypatch.setitem(HANDLERS, O.START, OperationHandler(perform=perform, undo=undo))
    worker = Worker(OperationContext(fleet.server.means, instance, taken), fleet.server.in_force, lambda: None)
    async with asyncio.timeout(PATIENCE_S):
        await begun.wait()
    worker.interrupt()
    await worker.wait(PATIENCE_S)
    ended = await fleet.ended(taken)
    assert ended.status is Status.FAILED
    assert "interrupted, and the rollback failed" in str(ended.message)
    assert ("It stays. Look." if isinstance(error, OperationRejected) else "/srv/vm") in str(ended.message)
    assert worker.left_half_way
    assert not worker.succeeded


@pytest.mark.parametrize("how", ["interrupt", "supersede"])
async def test_one_that_is_being_stopped_is_not_stopped_again(
    fleet: Embedded, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Its driver says so each time that it looks at the instance; what it undoes meanwhile is seen through."""
    vm = await fleet.create("early", start=False)
    instance, taken = await _taken(fleet, vm)
    begun, stopping, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()
    change = fleet.server.store.change

    async def perform(_work: OperationContext) -> Done:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def held_up(*arguments: Any) -> Any:
        stopping.set()
        await go_on.wait()
        return await change(*arguments)

    monkeypatch.setitem(HANDLERS, O.START, OperationHandler(perform=perform))
    worker = Worker(OperationContext(fleet.server.means, instance, taken), fleet.server.in_force, lambda: None)
    async with asyncio.timeout(PATIENCE_S):
        await begun.wait()
        monkeypatch.setattr(fleet.server.store, "change", held_up)
        getattr(worker, how)()
        await stopping.wait()
        worker._reporting = False  # as it is while something is undone
        getattr(worker, how)()
        await settle()
        assert not worker.done, "it ends when what it wants to say is kept"
        go_on.set()
    await worker.wait(PATIENCE_S)
    assert (await fleet.ended(taken)).status is Status.CANCELLED


@pytest.mark.parametrize("succeeds", [True, False])
@pytest.mark.parametrize("expected_events", [True, False])
@pytest.mark.parametrize("brought_back", [True, False])
async def test_what_a_guest_did_meanwhile_is_no_news_where_it_was_part_of_it_or_is_over(
    fleet: Embedded, monkeypatch: pytest.MonkeyPatch, *, succeeds: bool, expected_events: bool, brought_back: bool
) -> None:
    vm = await fleet.create("early", start=False)
    instance, taken = await _taken(fleet, vm)

    async def perform(work: OperationContext) -> Done:
        if expected_events:
            worker.expects(GuestEvent.RESET)
        work.brought_back = brought_back
        if not succeeds:
            raise OperationRejected("no")
        return Done(power_state=PowerState.RUNNING)

    monkeypatch.setitem(
        HANDLERS, O.START, OperationHandler(perform=perform, expected_events=frozenset({GuestEvent.RESET}))
    )
    worker = Worker(OperationContext(fleet.server.means, instance, taken), fleet.server.in_force, lambda: None)
    await worker.wait(PATIENCE_S)
    assert worker.used_up is (brought_back or (succeeds and expected_events))
    wakeup = expected_events and not succeeds and not brought_back
    assert worker.left_over == ([GuestEvent.RESET] if wakeup else [])


# ------------------------------------------------------------------------------------------------ limits of patience


def _impatient(**limits: int) -> dict[str, DriverConfig]:
    return {"driver": msgspec.structs.replace(QUICK, **limits)}


async def _one_frozen(fleet: Embedded, host: SimulatedHost) -> str:
    await fleet.start()
    vm = await fleet.create("web")
    host.freeze(vm)
    return vm


async def test_an_operation_without_an_answer_fails_in_the_end_with_what_is_known(
    tmp_path: Path, host: SimulatedHost
) -> None:
    """It waited in `unknown` for ever."""
    settings = _impatient(unknown_timeout_ms=300)
    fleet = Embedded(tmp_path / "data", host, settings=settings, answer_timeout_s=0.02)
    vm = await _one_frozen(fleet, host)
    ended = await fleet.carry_out(vm, O.PAUSE)
    assert ended.status is Status.FAILED
    assert "It did not respond for 0.3 s; the outcome is unknown" in str(ended.message)
    assert "request.unknown" in [event.kind for event in await fleet.events(vm)]

    host.thaw(vm)  # and now it carries out what was sent to it
    await fleet.until(vm, vm_state=VmState.PAUSED, power_state=PowerState.PAUSED)
    changed = await fleet.until_event(vm, "guest.changed")
    assert changed.data == {"power_state": "paused"}
    assert (await fleet.carry_out(vm, O.UNPAUSE)).status is Status.SUCCEEDED
    await fleet.server.close()


async def test_a_guest_that_does_not_respond_is_inspected_at_growing_intervals(
    tmp_path: Path, host: SimulatedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Embedded(tmp_path / "data", host, settings=_impatient(unknown_timeout_ms=600), answer_timeout_s=0.02)
    vm = await _one_frozen(fleet, host)
    loop, times_s = asyncio.get_running_loop(), []

    async def silent(_instance_id: str) -> Observation:
        times_s.append(loop.time())
        return Observation(defined=True, power_state=PowerState.RUNNING, responsive=False)

    monkeypatch.setattr(fleet.server.hypervisor, "inspect", silent)
    await fleet.carry_out(vm, O.PAUSE)
    pauses_ms = [round((after - before) * 1000) for before, after in itertools.pairwise(times_s)]
    assert pauses_ms[:7] == [10, 20, 40, 80, 160, 160, 130], "until its time is over"
    await fleet.server.close()


async def test_an_operation_that_is_unknown_again_and_again_fails_after_so_many_times(
    tmp_path: Path, host: SimulatedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time its machine answers when it is looked at, and freezes before it does anything."""
    fleet = Embedded(tmp_path / "data", host, settings=_impatient(unknown_attempts_max=3), answer_timeout_s=0.02)
    await fleet.start()
    vm = await fleet.create("web")
    tried: list[int] = []
    looks: list[bool] = []

    async def freezes(*_: object) -> None:
        tried.append(1)
        raise NotResponding("It froze.")

    found = fleet.server.hypervisor.inspect

    async def answers_every_other_time(instance_id: str) -> Observation:
        looks.append(True)
        return msgspec.structs.replace(await found(instance_id), responsive=len(looks) % 2 == 1)

    monkeypatch.setattr(fleet.server.hypervisor, "pause", freezes)
    monkeypatch.setattr(fleet.server.hypervisor, "inspect", answers_every_other_time)
    ended = await fleet.carry_out(vm, O.PAUSE)
    assert ended.status is Status.FAILED
    assert "It froze. It was tried 3 times; the outcome is unknown" in str(ended.message)
    assert len(tried) == 3
    await fleet.server.close()


@pytest.mark.parametrize("where", ["between two hosts", "on a host that is away"])
async def test_what_may_not_be_given_up_is_tried_until_it_is_done(
    tmp_path: Path, host: SimulatedHost, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Only its success lets the guest run that is on its way; and a host that is away tells when it is back."""
    limits = _impatient(unknown_attempts_max=2, unknown_timeout_ms=20)
    fleet = Embedded(tmp_path / "data", host, settings=limits)
    await fleet.start()
    instance, taken = await _taken(fleet, await fleet.create("early", start=False))
    if where == "between two hosts":
        instance = msgspec.structs.replace(instance, left_host="north")
    else:
        monkeypatch.setattr(fleet.server.hosts, "linked", lambda _name: False)
    loop, times, looks = asyncio.get_running_loop(), list[float](), list[bool]()

    async def perform(_work: OperationContext) -> Done:
        times.append(loop.time())
        if len(times) < 5:
            raise NotResponding("It froze.")
        return Done(power_state=PowerState.RUNNING)

    async def inspect(_instance_id: str) -> Observation:
        # After the first time it is silent for longer than the limit; then it answers every other time.
        silent = len(times) == 1 and loop.time() < times[0] + 0.05
        looks.append(not silent and not (looks and looks[-1]))
        return Observation(defined=True, power_state=PowerState.NONE, responsive=looks[-1])

    monkeypatch.setitem(HANDLERS, O.START, OperationHandler(perform=perform))
    monkeypatch.setattr(fleet.server.hypervisor, "inspect", inspect)
    worker = Worker(OperationContext(fleet.server.means, instance, taken), fleet.server.in_force, lambda: None)
    await worker.wait(PATIENCE_S)
    assert (await fleet.ended(taken)).status is Status.SUCCEEDED
    assert len(times) == 5
    await fleet.server.close()


async def test_an_operation_that_shows_no_sign_of_life_is_given_up(
    tmp_path: Path, host: SimulatedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it waits for, such as an agent whose disk hangs."""
    fleet = Embedded(tmp_path / "data", host, settings=_impatient(silence_timeout_ms=200), answer_timeout_s=0.02)
    await fleet.start()
    vm = await fleet.create("web")

    async def hangs(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(fleet.server.hypervisor, "pause", hangs)
    ended = await fleet.carry_out(vm, O.PAUSE)
    assert ended.status is Status.FAILED
    assert "no progress for 0.2 s" in str(ended.message)
    await fleet.server.close()


@pytest.mark.parametrize("retry_ms", [100, 600])
async def test_signs_of_life_put_the_end_off(tmp_path: Path, host: SimulatedHost, retry_ms: int) -> None:
    """Also between two requests to shut down."""
    settings = _impatient(silence_timeout_ms=400, guest_shutdown_timeout_ms=1_200, guest_shutdown_retry_ms=retry_ms)
    fleet = Embedded(tmp_path / "data", host, settings=settings)
    await fleet.start()
    vm = await fleet.create("web")
    host.ignore_power_button(vm)
    ended = await fleet.carry_out(vm, O.STOP)
    assert (ended.status, "shutdown timed out after 1.2 s" in str(ended.message)) == (Status.SUCCEEDED, True)
    details = [event.data.get("detail") for event in await fleet.events(vm) if event.kind == "request.progress"]
    assert "waiting for the guest to power off, for 1.2 s at most" in details
    await fleet.server.close()


async def test_an_attach_that_was_given_up_on_and_does_not_happen_gives_its_volume_back(
    tmp_path: Path, host: SimulatedHost
) -> None:
    fleet = Embedded(
        tmp_path / "data",
        host,
        settings=_impatient(unknown_timeout_ms=200),
        answer_timeout_s=0.02,
        liveness_timeout_ms=50,
    )
    vm = await _one_frozen(fleet, host)
    volume = await fleet.make_volume("data")
    ended = await fleet.carry_out(vm, O.ATTACH_VOLUME, volume=volume.id)
    assert ended.status is Status.FAILED
    host.guests[vm].waiting_commands.clear()  # it was never sent, as far as the machine is concerned
    await fleet.until(vm, guest_trouble=GuestTrouble.NOT_RESPONDING)
    host.thaw(vm)

    await fleet.until(vm, guest_trouble=None)
    async with asyncio.timeout(PATIENCE_S):
        while (await fleet.server.store.volumes.get(volume.id)).attached_to is not None:  # type: ignore[union-attr] # noqa: ASYNC110
            await asyncio.sleep(0.01)  # nothing tells of it
    await fleet.server.close()
