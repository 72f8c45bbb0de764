"""Rescue and unrescue, soft delete and restore, seen from a caller, on simulated guests."""

from __future__ import annotations

import msgspec
import pytest

from in_process.embedded import IMAGE, Embedded
from interlock.core.errors import InUse, NotFound
from interlock.core.operations import Operation
from interlock.core.records import Image, Status
from interlock.core.states import PowerState, VmState
from interlock.hypervisors.simulated import SimulatedHost
from interlock.hypervisors.simulated.faults import Method, Refuses

O = Operation  # noqa: E741


async def put_disk(fleet: Embedded, name: str) -> Image:
    return await fleet.put_image(msgspec.structs.replace(IMAGE, id=name, name=name, kind="disk", size_bytes=1 << 20))


async def test_a_rescued_instance_boots_another_image_and_goes_back(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    await put_disk(fleet, "medic")
    assert (await fleet.carry_out(vm, O.RESCUE, image="medic")).status is Status.SUCCEEDED
    instance = await fleet.until(vm, vm_state=VmState.RESCUED, power_state=PowerState.RUNNING)
    assert instance.prior_vm_state is VmState.ACTIVE
    assert "rescue" in host.guests[vm].disks
    assert (await fleet.carry_out(vm, O.UNRESCUE)).status is Status.SUCCEEDED
    instance = await fleet.until(vm, vm_state=VmState.ACTIVE, power_state=PowerState.RUNNING)
    assert instance.spec is not None
    assert instance.spec.rescue_image is None
    assert "rescue" not in host.guests[vm].disks
    assert host.guests[vm].rescue is None


async def test_a_rescue_asks_the_guest_as_a_stop_does(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    host.ignore_power_button(vm)
    request = await fleet.carry_out(vm, O.RESCUE)
    assert "shutdown timed out" in (request.message or "")
    assert host.guests[vm].starts == 2


async def test_what_was_stopped_is_stopped_again_after_its_rescue(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    await put_disk(fleet, "medic")
    await fleet.carry_out(vm, O.STOP)
    await fleet.carry_out(vm, O.RESCUE, image="medic")
    assert (await fleet.carry_out(vm, O.UNRESCUE)).status is Status.SUCCEEDED
    await fleet.until(vm, vm_state=VmState.STOPPED, power_state=PowerState.NONE)
    assert (host.guests[vm].power, host.guests[vm].rescue) == (PowerState.NONE, None)


@pytest.mark.parametrize("operation", [O.REBOOT, O.START])
async def test_a_start_or_reboot_boots_the_own_disk(fleet: Embedded, host: SimulatedHost, operation: Operation) -> None:
    vm = await fleet.create("web")
    await put_disk(fleet, "medic")
    await fleet.carry_out(vm, O.RESCUE, image="medic")
    if operation is O.START:
        # A guest that powers itself off while it is rescued is stopped.
        host.guest_powers_off(vm)
        await fleet.until(vm, vm_state=VmState.STOPPED)
        request = await fleet.carry_out(vm, operation)
    else:
        request = await fleet.carry_out(vm, operation, hard=True)
    assert request.status is Status.SUCCEEDED
    instance = await fleet.until(vm, vm_state=VmState.ACTIVE)
    assert instance.spec is not None
    assert instance.spec.rescue_image is None
    assert "rescue" not in host.guests[vm].disks
    assert host.guests[vm].power is PowerState.RUNNING


async def test_a_rescue_that_cannot_boot_is_an_error_from_which_a_start_leads(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await fleet.create("web")
    host.faults.script(vm, Method.POWER_ON, Refuses("It does not start."))
    assert (await fleet.carry_out(vm, O.RESCUE)).status is Status.FAILED
    await fleet.until(vm, vm_state=VmState.ERROR)
    assert (await fleet.carry_out(vm, O.START)).status is Status.SUCCEEDED
    instance = await fleet.until(vm, vm_state=VmState.ACTIVE)
    assert instance.spec is not None
    assert instance.spec.rescue_image is None


async def test_the_image_of_a_rescue_must_exist_and_is_used_while_it_lasts(fleet: Embedded) -> None:
    vm = await fleet.create("web")
    with pytest.raises(NotFound, match="Image not found: missing"):
        await fleet.submit(vm, O.RESCUE, image="missing")
    await put_disk(fleet, "medic")
    await fleet.carry_out(vm, O.RESCUE, image="medic")
    inventory = fleet.server.inventory
    with pytest.raises(InUse, match="web"):
        await inventory.delete_image(fleet.caller, "medic")
    await fleet.carry_out(vm, O.UNRESCUE)
    await inventory.delete_image(fleet.caller, "medic")


@pytest.mark.parametrize(
    ("before", "power"),
    [
        ((), PowerState.RUNNING),
        ((O.PAUSE,), PowerState.PAUSED),
        ((O.STOP,), PowerState.NONE),
        ((O.RESCUE,), PowerState.RUNNING),
    ],
)
async def test_what_was_soft_deleted_is_restored_as_it_was(
    fleet: Embedded, host: SimulatedHost, before: tuple[Operation, ...], power: PowerState
) -> None:
    vm = await fleet.create("web")
    volume = await fleet.make_volume("data")
    await fleet.carry_out(vm, O.ATTACH_VOLUME, volume=volume.id)
    for operation in before:
        await fleet.carry_out(vm, operation)
    state = (await fleet.until(vm, task_state="none")).vm_state
    assert (await fleet.carry_out(vm, O.SOFT_DELETE)).status is Status.SUCCEEDED
    await fleet.until(vm, vm_state=VmState.SOFT_DELETED, power_state=PowerState.NONE)
    assert host.guests[vm].power is PowerState.NONE
    (kept,) = await fleet.server.store.volumes.all()
    assert kept.attached_to == vm
    assert (await fleet.carry_out(vm, O.RESTORE)).status is Status.SUCCEEDED
    await fleet.until(vm, vm_state=state, power_state=power)
    assert host.guests[vm].power is power
    if power is not PowerState.NONE:
        assert volume.id in host.guests[vm].disks
