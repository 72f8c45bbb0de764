"""What a state driver promises, seen from a caller, on simulated guests."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from in_process.embedded import Embedded, admitted
from interlock.core.operations import Operation
from interlock.core.records import Admitted, Denied, Redundant, Status
from interlock.core.states import PowerState, VmState
from interlock.hypervisors.simulated import SimulatedHost
from interlock.hypervisors.simulated.faults import (
    AnswerLost,
    GuestIgnores,
    GuestPanics,
    GuestVanishes,
    Hangs,
    Method,
    Refuses,
    Slow,
)
from interlock.ports import Observation, Permit
from interlock.service.request_models import Labels

O = Operation  # noqa: E741
NO_GPU_RESIZE = """
[policy]
name = "no-gpu-resize"
extends = "standard"

[[rule]]
id = "no-gpu-resize"
operations = ["resize"]
tags = ["gpu"]
verdict = "deny"
reason = "gpu_fixed_size"
because = "A VM with a GPU keeps its size."
"""


def power(host: SimulatedHost, instance_id: str) -> PowerState:
    return host.guests[instance_id].power


async def test_a_created_instance_runs(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    instance = await fleet.until(vm, vm_state=VmState.ACTIVE, task_state="none")
    assert instance.power_state is PowerState.RUNNING
    assert power(host, vm) is PowerState.RUNNING
    kinds = [event.kind for event in await fleet.events(vm)]
    assert kinds[:3] == ["instance.created", "request.admitted", "request.taken"]
    assert kinds[-1] == "request.succeeded"


async def test_an_instance_that_was_only_recorded_is_made_by_its_first_start(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await fleet.create("later", start=False)
    assert vm not in host.guests
    assert (await fleet.carry_out(vm, O.START)).status is Status.SUCCEEDED
    assert power(host, vm) is PowerState.RUNNING


@pytest.mark.parametrize(
    ("operation", "state", "seen"),
    [
        (O.PAUSE, VmState.PAUSED, PowerState.PAUSED),
        (O.STOP, VmState.STOPPED, PowerState.NONE),
        (O.REBOOT, VmState.ACTIVE, PowerState.RUNNING),
    ],
)
async def test_an_operation_leads_where_the_catalogue_says(
    fleet: Embedded, host: SimulatedHost, operation: Operation, state: VmState, seen: PowerState
) -> None:
    vm = await fleet.create("web")
    assert (await fleet.carry_out(vm, operation)).status is Status.SUCCEEDED
    await fleet.until(vm, vm_state=state, power_state=seen)
    assert power(host, vm) is seen


async def test_deleting_leaves_nothing_on_the_host(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    assert (await fleet.carry_out(vm, O.DELETE)).status is Status.SUCCEEDED
    assert vm not in host.guests


async def test_a_guest_that_ignores_a_stop_loses_its_power_and_the_owner_is_told(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await fleet.create("web")
    host.ignore_power_button(vm)
    request = await fleet.carry_out(vm, O.STOP)
    assert request.status is Status.SUCCEEDED
    assert "shutdown timed out" in (request.message or "")
    assert power(host, vm) is PowerState.NONE


_SHUTS_DOWN: dict[Operation, dict[str, object]] = {
    O.STOP: {},
    O.REBOOT: {},
    O.RESCUE: {},
    O.RESIZE: {"memory_mib": 256},
    O.SHELVE: {},
}


@pytest.mark.parametrize("operation", _SHUTS_DOWN)
async def test_a_guest_that_misses_its_power_button_as_it_boots_is_asked_again(
    fleet: Embedded, host: SimulatedHost, operation: Operation
) -> None:
    """It was pressed once, and the plug of a healthy guest was pulled at the deadline."""
    vm = await fleet.create("web")
    host.faults.script(vm, Method.ASK_SHUTDOWN, GuestIgnores())
    request = await fleet.carry_out(vm, operation, **_SHUTS_DOWN[operation])
    assert request.status is Status.SUCCEEDED, request.message
    assert "shutdown timed out" not in (request.message or "")


@pytest.mark.parametrize("operation", _SHUTS_DOWN)
async def test_the_deadline_of_a_shutdown_runs_while_the_machine_gives_no_answer(
    fleet: Embedded, host: SimulatedHost, operation: Operation
) -> None:
    """A stop of a frozen machine never ended: it waited to be able to ask its guest."""
    vm = await fleet.create("web")
    host.freeze(vm)
    request = await fleet.carry_out(vm, operation, **_SHUTS_DOWN[operation])
    assert request.status is Status.SUCCEEDED, request.message
    assert request.message == "QEMU did not respond within 0.3 s; its process was ended."
    assert power(host, vm) is not PowerState.PAUSED
    assert not host.guests[vm].frozen


async def test_a_machine_that_answers_again_before_the_deadline_is_shut_down_by_its_guest(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await fleet.create("web")
    host.freeze(vm)
    stop = admitted(await fleet.submit(vm, O.STOP))

    async def told() -> bool | None:
        request = await fleet.server.store.request(stop.id)
        return True if request is not None and "does not respond" in (request.detail or "") else None

    assert await fleet.server.instances.watch.until(vm, told, 5_000)
    host.thaw(vm)
    ended = await fleet.ended(stop)
    assert (ended.status, ended.message) == (Status.SUCCEEDED, None)


async def test_a_hard_stop_ends_the_waiting_of_a_soft_one(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    host.faults.script(vm, Method.ASK_SHUTDOWN, GuestIgnores(), GuestIgnores())
    soft = admitted(await fleet.submit(vm, O.STOP))
    await fleet.until(vm, task_state="powering_off")
    hard = await fleet.carry_out(vm, O.STOP, hard=True)
    assert hard.status is Status.SUCCEEDED
    ended = await fleet.ended(soft)
    assert ended.status is Status.SUPERSEDED
    assert power(host, vm) is PowerState.NONE


async def test_new_tags_cancel_what_they_forbid_while_what_is_in_flight_goes_on(
    tmp_path: Path, host: SimulatedHost
) -> None:
    policy = tmp_path / "gpu.toml"
    policy.write_text(NO_GPU_RESIZE)
    fleet = Embedded(tmp_path / "data", host, str(policy))
    await fleet.start()
    try:
        vm = await fleet.create("web")
        host.ignore_power_button(vm)
        stop = admitted(await fleet.submit(vm, O.STOP))
        resize = admitted(await fleet.submit(vm, O.RESIZE, vcpus=2))
        await fleet.server.instances.relabel(fleet.caller, vm, Labels(tags=("gpu",)))
        cancelled = await fleet.ended(resize)
        assert (cancelled.status, cancelled.reason) == (Status.CANCELLED, "gpu_fixed_size")
        assert (await fleet.ended(stop)).status is Status.SUCCEEDED
    finally:
        await fleet.server.close()


async def test_a_stop_interrupts_a_start_that_takes_long(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    await fleet.carry_out(vm, O.STOP)
    host.faults.script(vm, Method.POWER_ON, Slow(60_000))
    start = admitted(await fleet.submit(vm, O.START))
    await fleet.until(vm, task_state="powering_on")
    stop = await fleet.carry_out(vm, O.STOP)
    assert stop.status is Status.SUCCEEDED
    assert (await fleet.ended(start)).status is Status.SUPERSEDED
    await fleet.until(vm, vm_state=VmState.STOPPED, task_state="none")
    assert power(host, vm) is PowerState.NONE


async def test_what_was_queued_behind_is_served_in_order(fleet: Embedded) -> None:
    vm = await fleet.create("web")
    stop = admitted(await fleet.submit(vm, O.STOP))
    start = admitted(await fleet.submit(vm, O.START))
    pause = admitted(await fleet.submit(vm, O.PAUSE))
    ends = [(await fleet.ended(request)) for request in (stop, start, pause)]
    assert [request.status for request in ends] == [Status.SUCCEEDED] * 3
    times = [request.ended_at_ms or 0 for request in ends]
    assert times == sorted(times)
    await fleet.until(vm, vm_state=VmState.PAUSED)


async def test_two_that_ask_at_the_same_instant_get_one_admission(fleet: Embedded) -> None:
    vm = await fleet.create("web")
    answers = await asyncio.gather(*(fleet.submit(vm, O.STOP) for _ in range(20)))
    kinds = [type(answer.disposition) for answer in answers]
    assert kinds.count(Admitted) == 1
    assert kinds.count(Redundant) == 19


async def test_a_start_that_is_refused_by_the_host_fails_and_says_why(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    await fleet.carry_out(vm, O.STOP)
    host.faults.script(vm, Method.POWER_ON, Refuses("no room for it"))
    request = await fleet.carry_out(vm, O.START)
    assert request.status is Status.FAILED
    assert "no room" in (request.message or "")
    instance = await fleet.until(vm, vm_state=VmState.ERROR)
    assert "no room" in (instance.error or "")
    assert (await fleet.carry_out(vm, O.START)).status is Status.SUCCEEDED
    await fleet.until(vm, vm_state=VmState.ACTIVE, error=None)


async def test_an_answer_that_is_lost_is_looked_for(fleet: Embedded, host: SimulatedHost) -> None:
    """Law 10: the request waits in `unknown`, and ends as what the host shows."""
    vm = await fleet.create("web")
    host.faults.script(vm, Method.PAUSE, AnswerLost())
    request = await fleet.carry_out(vm, O.PAUSE)
    assert request.status is Status.SUCCEEDED
    assert power(host, vm) is PowerState.PAUSED
    assert "request.unknown" in [event.kind for event in await fleet.events(vm)]


async def test_a_frozen_machine_is_refused_with_a_time_and_then_taken_over(
    fleet: Embedded, host: SimulatedHost
) -> None:
    """The everyday stuck case, with the late worker that is fenced."""
    vm = await fleet.create("web")
    host.faults.script(vm, Method.PAUSE, Hangs())
    pause = admitted(await fleet.submit(vm, O.PAUSE))
    await fleet.until(vm, task_state="pausing")

    async def refused() -> Denied | None:
        answer = (await fleet.submit(vm, O.STOP)).disposition
        return answer if isinstance(answer, Denied) else None

    denied = None
    while denied is None:
        denied = await refused()
        queued = [one for one in (await fleet.until(vm)).outstanding if one.status is Status.QUEUED]
        for one in queued:
            await fleet.server.instances.cancel(fleet.caller, one.id)
        await asyncio.sleep(0.02)
    assert denied.reason == "no_sign_of_life"
    assert denied.blocked_by is not None
    assert denied.blocked_by.id == pause.id
    assert denied.allowed_at_ms is not None

    now = fleet.server.store.now_ms
    while isinstance((stop := await fleet.submit(vm, O.STOP)).disposition, Denied):  # noqa: ASYNC110 - the clock admits it
        await asyncio.sleep(0.02)
    assert isinstance(stop.disposition, Admitted)
    assert now() >= denied.allowed_at_ms
    assert pause.id in stop.disposition.supersedes
    assert (await fleet.ended(stop.disposition.request)).status is Status.SUCCEEDED
    assert (await fleet.ended(pause)).status is Status.SUPERSEDED
    assert power(host, vm) is PowerState.NONE
    host.thaw(vm)
    assert power(host, vm) is PowerState.NONE
    late = await fleet.until_event(vm, "request.fenced")
    assert late.request_id == pause.id


async def test_an_instance_has_no_driver_once_its_worker_and_the_superseded_one_have_ended(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await fleet.create("web")
    host.faults.script(vm, Method.PAUSE, Hangs())
    pause = admitted(await fleet.submit(vm, O.PAUSE))
    await fleet.until_event(vm, "request.unknown")
    await asyncio.sleep(1)  # the policy's threshold passes
    assert (await fleet.carry_out(vm, O.REBOOT, hard=True)).status is Status.SUCCEEDED
    assert (await fleet.ended(pause)).status is Status.SUPERSEDED
    await asyncio.sleep(1)
    assert fleet.server.agent._drivers == {}


async def test_a_hard_reboot_of_a_frozen_machine_powers_it_off_and_on(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    starts = host.guests[vm].starts
    host.freeze(vm)
    assert (await fleet.carry_out(vm, O.REBOOT, hard=True)).status is Status.SUCCEEDED
    assert power(host, vm) is PowerState.RUNNING
    assert host.guests[vm].starts > starts


async def test_a_guest_that_powers_itself_off_is_stopped_and_its_machine_tidied_away(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await fleet.create("web")
    host.guest_powers_off(vm)
    await fleet.until(vm, vm_state=VmState.STOPPED)
    assert (await fleet.carry_out(vm, O.START)).status is Status.SUCCEEDED


async def test_no_guest_is_looked_for_once_its_instance_is_stopped(
    fleet: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await fleet.create("web")
    inspect, states = fleet.server.hypervisor.inspect, []

    async def noted(instance_id: str) -> Observation:
        states.append((await fleet.until(vm)).vm_state)
        return await inspect(instance_id)

    monkeypatch.setattr(fleet.server.hypervisor, "inspect", noted)
    await fleet.carry_out(vm, O.STOP)
    await asyncio.sleep(1)
    assert set(states) == {VmState.ACTIVE}


async def test_a_machine_that_vanishes_is_in_error_and_can_be_started(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    host.vanish(vm)
    await fleet.until(vm, vm_state=VmState.ERROR)
    assert (await fleet.carry_out(vm, O.START)).status is Status.SUCCEEDED
    await fleet.until(vm, vm_state=VmState.ACTIVE)


@pytest.mark.parametrize("fault", [GuestPanics(), GuestVanishes()])
async def test_a_guest_that_dies_while_it_is_started_does_not_stay_active(
    fleet: Embedded, host: SimulatedHost, fault: GuestPanics | GuestVanishes
) -> None:
    vm = await fleet.create("web")
    await fleet.carry_out(vm, O.STOP)
    host.faults.script(vm, Method.POWER_ON, fault)
    await fleet.carry_out(vm, O.START)
    await fleet.until(vm, vm_state=VmState.ERROR, task_state="none")


async def test_a_bug_in_a_performance_fails_the_request_and_leaves_nothing_stuck(
    fleet: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await fleet.create("web")

    async def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(fleet.server.hypervisor, "pause", broken)
    request = await fleet.carry_out(vm, O.PAUSE)
    assert request.status is Status.FAILED
    assert "a bug" in (request.message or "")
    assert (await fleet.carry_out(vm, O.STOP)).status is Status.SUCCEEDED


async def test_a_cancelled_start_is_undone(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    await fleet.carry_out(vm, O.STOP)
    host.faults.script(vm, Method.POWER_ON, Slow(60_000))
    start = admitted(await fleet.submit(vm, O.START))
    await fleet.until(vm, task_state="powering_on")
    await fleet.server.instances.cancel(fleet.caller, start.id)
    assert (await fleet.ended(start)).status is Status.CANCELLED
    await fleet.until(vm, vm_state=VmState.STOPPED, task_state="none")
    assert power(host, vm) is PowerState.NONE


async def test_delete_goes_through_while_a_machine_is_frozen(fleet: Embedded, host: SimulatedHost) -> None:
    """Law 5."""
    vm = await fleet.create("web")
    host.faults.script(vm, Method.ASK_SHUTDOWN, Hangs())
    reboot = admitted(await fleet.submit(vm, O.REBOOT))
    await fleet.until(vm, task_state="reboot_pending")
    assert (await fleet.carry_out(vm, O.DELETE)).status is Status.SUCCEEDED
    assert (await fleet.ended(reboot)).status is Status.SUPERSEDED
    assert vm not in host.guests


async def test_a_guest_that_powers_itself_off_right_after_its_reboot_is_stopped(
    fleet: Embedded, host: SimulatedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reboot absorbs that its guest powers off, and must not take the wrong one for its own."""
    vm = await fleet.create("web")
    reset = fleet.server.hypervisor.reset

    async def reset_and_off(permit: Permit, instance_id: str) -> None:
        await reset(permit, instance_id)
        assert host.guest_powers_off(instance_id)
        await asyncio.sleep(0)

    monkeypatch.setattr(fleet.server.hypervisor, "reset", reset_and_off)
    assert (await fleet.carry_out(vm, O.REBOOT)).status is Status.SUCCEEDED
    await fleet.until(vm, vm_state=VmState.STOPPED, task_state="none")


async def test_nothing_of_a_closed_server_goes_on(fleet: Embedded, host: SimulatedHost) -> None:
    """Neither a worker that waits for a frozen machine, nor one that lost its request and wants to say so."""
    vm = await fleet.create("web")
    host.faults.script(vm, Method.PAUSE, Hangs())
    await fleet.submit(vm, O.PAUSE)
    await fleet.until_event(vm, "request.unknown")
    await fleet.submit(vm, O.RESET_STATE, vm_state="active", reason="test")
    await fleet.submit(vm, O.REBOOT, hard=True)
    await fleet.crash()
    assert [task.get_name() for task in asyncio.all_tasks() if vm in task.get_name()] == []
    host.thaw(vm)
    await fleet.start()
