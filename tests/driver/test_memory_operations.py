"""Suspend, resume and crash dump, seen from a caller, on simulated guests."""

from __future__ import annotations

import os

import msgspec
import pytest

from in_process.embedded import Embedded, admitted
from interlock.config import DriverConfig
from interlock.core import lifecycle
from interlock.core.admission import admit
from interlock.core.operations import Lane, Operation
from interlock.core.records import Cancellation, Change, Instance, Status, Submission
from interlock.core.states import PowerState, VmState
from interlock.driver.operation_context import OperationContext
from interlock.driver.operations import memory
from interlock.hypervisors.simulated import SimulatedHost
from interlock.hypervisors.simulated.faults import GuestVanishes, Hangs, Method, Refuses, Slow

O = Operation  # noqa: E741


async def suspended(fleet: Embedded) -> str:
    vm = await fleet.create("web")
    assert (await fleet.carry_out(vm, O.SUSPEND)).status is Status.SUCCEEDED
    await fleet.until(vm, vm_state=VmState.SUSPENDED, power_state=PowerState.NONE)
    return vm


async def test_a_resumed_guest_is_the_one_that_was_suspended(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await suspended(fleet)
    assert host.guests[vm].memory_saved
    assert host.guests[vm].power is PowerState.NONE
    assert (await fleet.carry_out(vm, O.RESUME)).status is Status.SUCCEEDED
    await fleet.until(vm, vm_state=VmState.ACTIVE, power_state=PowerState.RUNNING)
    assert (host.guests[vm].starts, host.guests[vm].memory_saved) == (1, False)


async def test_a_suspension_that_is_refused_leaves_the_guest_running(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    host.faults.script(vm, Method.SAVE_MEMORY, Refuses("No room for the memory."))
    request = await fleet.carry_out(vm, O.SUSPEND)
    assert (request.status, request.message) == (Status.FAILED, "No room for the memory.")
    await fleet.until(vm, vm_state=VmState.ACTIVE)
    assert host.guests[vm].power is PowerState.RUNNING


async def test_a_suspension_that_is_cancelled_leaves_the_guest_running(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    host.faults.script(vm, Method.SAVE_MEMORY, Slow(60_000))
    request = admitted(await fleet.submit(vm, O.SUSPEND))
    await fleet.until(vm, task_state="suspending")
    assert (await fleet.server.instances.cancel(fleet.caller, request.id))[0] is Cancellation.STOPPING
    assert (await fleet.ended(request)).status is Status.CANCELLED
    await fleet.until(vm, vm_state=VmState.ACTIVE, task_state="none")
    assert (host.guests[vm].power, host.guests[vm].memory_saved) == (PowerState.RUNNING, False)


@pytest.mark.parametrize("before", [VmState.ACTIVE, VmState.PAUSED])
async def test_undoing_a_suspension_that_was_done_already_restores_the_guest(
    fleet: Embedded, host: SimulatedHost, before: VmState
) -> None:
    """Taken by hand and told to nobody, so that no driver sees to it."""
    vm = await fleet.create("web")
    submission = Submission(request_id="suspend", operation=O.SUSPEND, requested_by="tester")

    def decide(instance: Instance, now_ms: int) -> Change[OperationContext]:
        change = lifecycle.take(admit(instance, submission, fleet.server.policy, now_ms).instance, Lane.STATE, now_ms)
        assert change.answer is not None
        taken = msgspec.structs.replace(change.instance, vm_state=before)
        return Change(instance=taken, answer=OperationContext(fleet.server.means, taken, change.answer))

    work = await fleet.server.store.change(vm, decide)
    await memory.suspend(work)
    assert host.guests[vm].memory_saved
    await memory.undo_suspend(work)
    expected = PowerState.RUNNING if before is VmState.ACTIVE else PowerState.PAUSED
    assert (host.guests[vm].power, host.guests[vm].memory_saved, host.guests[vm].starts) == (expected, False, 1)


async def test_a_guest_that_ends_while_it_is_saved_is_an_error_of_its_own(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    host.faults.script(vm, Method.SAVE_MEMORY, GuestVanishes())
    assert (await fleet.carry_out(vm, O.SUSPEND)).status is Status.FAILED
    await fleet.until(vm, vm_state=VmState.ERROR, power_state=PowerState.NONE)


async def test_a_suspension_of_a_frozen_guest_ends_when_it_thaws(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    host.faults.script(vm, Method.SAVE_MEMORY, Hangs(thaw_after_ms=200))
    assert (await fleet.carry_out(vm, O.SUSPEND)).status is Status.SUCCEEDED
    assert host.guests[vm].memory_saved


async def test_a_resume_that_is_refused_can_be_asked_again_or_given_up(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await suspended(fleet)
    host.faults.script(vm, Method.RESTORE_MEMORY, Refuses("The file cannot be read."), Refuses())
    request = await fleet.carry_out(vm, O.RESUME)
    assert request.status is Status.FAILED
    assert "still saved" in (request.message or "")
    assert "hard reboot" in (request.message or "")
    await fleet.until(vm, vm_state=VmState.SUSPENDED)
    assert (await fleet.carry_out(vm, O.RESUME)).status is Status.FAILED
    assert host.guests[vm].memory_saved
    assert (await fleet.carry_out(vm, O.REBOOT, hard=True)).status is Status.SUCCEEDED
    assert (host.guests[vm].power, host.guests[vm].memory_saved, host.guests[vm].starts) == (
        PowerState.RUNNING,
        False,
        2,
    )


async def test_a_resume_without_saved_memory_fails_and_says_what_gives_it_up(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await suspended(fleet)
    host.guests[vm].memory_saved = False
    request = await fleet.carry_out(vm, O.RESUME)
    assert request.status is Status.FAILED
    assert "hard reboot" in (request.message or "")
    assert (host.guests[vm].power, host.guests[vm].starts) == (PowerState.NONE, 1)
    await fleet.until(vm, vm_state=VmState.SUSPENDED)
    assert (await fleet.carry_out(vm, O.REBOOT, hard=True)).status is Status.SUCCEEDED
    assert (host.guests[vm].power, host.guests[vm].starts) == (PowerState.RUNNING, 2)


async def test_a_suspended_instance_that_is_restored_is_still_suspended(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await suspended(fleet)
    await fleet.carry_out(vm, O.SOFT_DELETE)
    assert (await fleet.carry_out(vm, O.RESTORE)).status is Status.SUCCEEDED
    await fleet.until(vm, vm_state=VmState.SUSPENDED)
    await fleet.carry_out(vm, O.RESUME)
    assert host.guests[vm].starts == 1


async def test_a_crash_dump_is_kept_until_the_instance_is_deleted(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    request = await fleet.carry_out(vm, O.CRASH_DUMP)
    assert request.status is Status.SUCCEEDED
    (dump,) = await fleet.server.dump_files.dumps(vm)
    assert dump.id == request.id
    assert dump.path.read_bytes().startswith(b"KDUMP   ")
    assert host.guests[vm].power is PowerState.RUNNING
    await fleet.carry_out(vm, O.DELETE)
    assert await fleet.server.dump_files.dumps(vm) == ()
    assert not dump.path.parent.exists()


async def test_of_too_many_dumps_the_oldest_goes_once_the_new_one_is_there(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await fleet.create("web")
    for _ in range(DriverConfig().dumps_max):
        await fleet.carry_out(vm, O.CRASH_DUMP)
    for age, dump in enumerate(reversed(await fleet.server.dump_files.dumps(vm)), start=1):
        os.utime(dump.path, (dump.path.stat().st_mtime - age,) * 2)
    made = [dump.id for dump in await fleet.server.dump_files.dumps(vm)]
    host.faults.script(vm, Method.DUMP_MEMORY, Refuses("No room."))
    assert (await fleet.carry_out(vm, O.CRASH_DUMP)).status is Status.FAILED
    assert [dump.id for dump in await fleet.server.dump_files.dumps(vm)] == made
    newest = await fleet.carry_out(vm, O.CRASH_DUMP)
    assert made[0] in (newest.message or "")
    assert [dump.id for dump in await fleet.server.dump_files.dumps(vm)] == [*made[1:], newest.id]


async def test_a_dump_that_is_refused_leaves_none(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    host.faults.script(vm, Method.DUMP_MEMORY, Refuses("No room."))
    assert (await fleet.carry_out(vm, O.CRASH_DUMP)).status is Status.FAILED
    assert await fleet.server.dump_files.dumps(vm) == ()
    assert host.guests[vm].power is PowerState.RUNNING
