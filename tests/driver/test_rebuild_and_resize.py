"""Rebuild and resize, on simulated guests: which disk there is, what is on it, and what a failure leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from in_process.embedded import Embedded, admitted, refused
from instance_disks import OTHER, now, put_images, root
from interlock.core.errors import Invalid
from interlock.core.operations import Operation
from interlock.core.records import Status
from interlock.core.states import PowerState, VmState
from interlock.hypervisors.simulated import SimulatedHost
from interlock.hypervisors.simulated.faults import Method, Refuses, Slow

O = Operation  # noqa: E741


async def made(fleet: Embedded) -> str:
    await put_images(fleet)
    return await fleet.create("web", image="disk")


async def test_a_rebuild_gives_a_new_disk_and_keeps_everything_else(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await made(fleet)
    await fleet.make_volume("data")
    await fleet.carry_out(vm, O.ATTACH_VOLUME, volume="data")
    before = (await now(fleet, vm)).spec
    assert before is not None
    host.guest_writes(vm, "precious")
    assert (await fleet.carry_out(vm, O.REBUILD, image="other")).status is Status.SUCCEEDED
    instance = await now(fleet, vm)
    assert instance.spec is not None
    assert (instance.id, instance.name, instance.vm_state) == (vm, "web", VmState.ACTIVE)
    assert instance.spec.image.id == OTHER.id
    assert (instance.spec.disks, instance.spec.forwards) == (before.disks, before.forwards)
    assert (root(host, vm).made_from, root(host, vm).written) == ("image:other", ())
    assert host.guests[vm].power is PowerState.RUNNING
    assert set(host.guests[vm].disks) == {"root", "data"}


async def test_a_rebuild_of_a_stopped_instance_leaves_it_stopped(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await made(fleet)
    await fleet.carry_out(vm, O.STOP)
    assert (await fleet.carry_out(vm, O.REBUILD)).status is Status.SUCCEEDED
    assert (await now(fleet, vm)).vm_state is VmState.STOPPED
    assert host.guests[vm].power is PowerState.NONE
    assert root(host, vm).made_from == "image:disk"


async def test_a_rebuild_repairs_an_instance_in_error(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await made(fleet)
    host.guest_panics(vm)
    await fleet.until(vm, vm_state=VmState.ERROR)
    assert (await fleet.carry_out(vm, O.REBUILD)).status is Status.SUCCEEDED
    assert (await now(fleet, vm)).vm_state is VmState.ACTIVE
    assert host.guests[vm].power is PowerState.RUNNING


async def test_a_vanished_image_is_refused_before_anything_is_changed(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await made(fleet)
    host.guest_writes(vm, "precious")
    await fleet.carry_out(vm, O.STOP)
    (fleet.server.folder / "images" / "other.disk").unlink()
    ended = await fleet.carry_out(vm, O.REBUILD, image="other")
    assert ended.status is Status.FAILED
    assert ended.message is not None
    assert "Image not found: other; nothing was changed" in ended.message
    assert (await now(fleet, vm)).vm_state is VmState.ERROR
    assert (await fleet.carry_out(vm, O.START)).status is Status.SUCCEEDED
    assert root(host, vm).written == ("precious",)


async def test_a_rebuild_that_cannot_make_the_disk_leaves_the_old_one_to_be_started(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await made(fleet)
    host.guest_writes(vm, "precious")
    host.faults.script(vm, Method.DEFINE, Refuses("no room"))
    assert (await fleet.carry_out(vm, O.REBUILD)).status is Status.FAILED
    assert (await now(fleet, vm)).power_state is PowerState.NONE, "it was powered off before that"
    assert (await fleet.carry_out(vm, O.START)).status is Status.SUCCEEDED
    assert root(host, vm).written == ("precious",)


@pytest.mark.parametrize("method", [Method.POWER_OFF, Method.DEFINE, Method.POWER_ON, Method.DROP_ROOT_DISKS])
async def test_a_rebuild_is_finished_by_the_next_server_wherever_the_last_one_died(
    fleet: Embedded, host: SimulatedHost, method: Method
) -> None:
    vm = await made(fleet)
    host.guest_writes(vm, "old")
    host.faults.script(vm, method, Slow(5_000))
    request = admitted(await fleet.submit(vm, O.REBUILD, image="other"))
    await fleet.until(vm, task_state=("rebuild_spawning" if method is Method.POWER_ON else "rebuilding"))
    await fleet.crash()
    await fleet.start()
    assert (await fleet.ended(request)).status is Status.SUCCEEDED
    assert (root(host, vm).made_from, root(host, vm).written) == ("image:other", ())
    assert (await now(fleet, vm)).vm_state is VmState.ACTIVE
    assert host.guests[vm].power is PowerState.RUNNING


async def test_a_resize_is_confirmed_and_the_old_disk_is_gone(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await made(fleet)
    host.guest_writes(vm, "before")
    assert (await fleet.carry_out(vm, O.RESIZE, vcpus=2, memory_mib=256, root_gib=2)).status is Status.SUCCEEDED
    instance = await now(fleet, vm)
    assert instance.spec is not None
    assert instance.prior_spec is not None
    assert (instance.vm_state, instance.prior_vm_state) == (VmState.RESIZED, VmState.ACTIVE)
    assert (instance.spec.vcpus, instance.spec.memory_mib, instance.spec.root_gib) == (2, 256, 2)
    assert host.guests[vm].spec.vcpus == 2
    assert len(host.guests[vm].roots) == 2
    host.guest_writes(vm, "after")
    starts = host.guests[vm].starts
    assert (await fleet.carry_out(vm, O.CONFIRM_RESIZE)).status is Status.SUCCEEDED
    instance = await now(fleet, vm)
    assert (instance.vm_state, instance.prior_spec) == (VmState.ACTIVE, None)
    assert root(host, vm).written == ("before", "after")
    assert root(host, vm).size_bytes == 2 << 30
    assert host.guests[vm].starts == starts


async def test_reverting_brings_back_the_size_and_the_disk(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await made(fleet)
    host.guest_writes(vm, "before")
    await fleet.carry_out(vm, O.RESIZE, vcpus=2)
    host.guest_writes(vm, "after")
    assert (await fleet.carry_out(vm, O.REVERT_RESIZE)).status is Status.SUCCEEDED
    instance = await now(fleet, vm)
    assert instance.spec is not None
    assert (instance.vm_state, instance.prior_spec, instance.spec.vcpus) == (VmState.ACTIVE, None, 1)
    assert root(host, vm).written == ("before",)
    assert host.guests[vm].power is PowerState.RUNNING


async def test_reverting_keeps_what_was_plugged_in_since(tmp_path: Path, host: SimulatedHost) -> None:
    fleet = Embedded(tmp_path / "data", host, "nova")
    await fleet.start()
    vm = await made(fleet)
    await fleet.make_volume("data")
    await fleet.carry_out(vm, O.RESIZE, vcpus=2)
    await fleet.carry_out(vm, O.ATTACH_VOLUME, volume="data")
    await fleet.carry_out(vm, O.REVERT_RESIZE)
    assert set(host.guests[vm].disks) == {"root", "data"}
    await fleet.server.close()


async def test_a_stopped_instance_is_resized_without_being_started(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await made(fleet)
    await fleet.carry_out(vm, O.STOP)
    await fleet.carry_out(vm, O.RESIZE, vcpus=2)
    instance = await now(fleet, vm)
    assert (instance.vm_state, instance.power_state) == (VmState.RESIZED, PowerState.NONE)
    await fleet.crash()
    await fleet.start()
    assert (await now(fleet, vm)).vm_state is VmState.RESIZED, "it was not meant to run"
    await fleet.carry_out(vm, O.REVERT_RESIZE)
    assert (await now(fleet, vm)).vm_state is VmState.STOPPED
    assert host.guests[vm].power is PowerState.NONE


async def test_a_start_confirms_a_resize(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await made(fleet)
    await fleet.carry_out(vm, O.STOP)
    await fleet.carry_out(vm, O.RESIZE, vcpus=2)
    await fleet.carry_out(vm, O.START)
    instance = await now(fleet, vm)
    assert instance.spec is not None
    assert (instance.vm_state, instance.prior_spec, instance.spec.vcpus) == (VmState.ACTIVE, None, 2)
    assert len(host.guests[vm].roots) == 1


async def ended_while_resized(fleet: Embedded, host: SimulatedHost, end: str) -> str:
    """A resized instance whose guest has ended since, and had written before the resize and after."""
    vm = await made(fleet)
    host.guest_writes(vm, "before")
    await fleet.carry_out(vm, O.RESIZE, vcpus=2)
    host.guest_writes(vm, "after")
    {"crash": host.guest_panics, "vanish": host.vanish, "power off": host.guest_powers_off}[end](vm)
    instance = await fleet.until(vm, power_state=_POWER_AT_END[end])
    assert (instance.vm_state, instance.prior_vm_state, instance.error) == (VmState.RESIZED, VmState.ACTIVE, None)
    return vm


_POWER_AT_END = {"crash": PowerState.CRASHED, "vanish": PowerState.NONE, "power off": PowerState.SHUTDOWN}
_SETTLED = {
    O.START: (VmState.ACTIVE, PowerState.RUNNING, 2, ("before", "after")),
    O.CONFIRM_RESIZE: (VmState.STOPPED, PowerState.NONE, 2, ("before", "after")),
    O.REVERT_RESIZE: (VmState.ACTIVE, PowerState.RUNNING, 1, ("before",)),
}
"""What settles a resize whose guest has ended; and where that leads: vm_state, power_state, vcpus, what was written."""


@pytest.mark.parametrize("away", [(), (O.SOFT_DELETE, O.RESTORE)])
@pytest.mark.parametrize("settled_by", list(_SETTLED))
@pytest.mark.parametrize("end", list(_POWER_AT_END))
async def test_a_resize_whose_guest_ended_by_itself_can_still_be_confirmed_and_reverted(
    fleet: Embedded, host: SimulatedHost, end: str, settled_by: Operation, away: tuple[Operation, ...]
) -> None:
    vm = await ended_while_resized(fleet, host, end)
    for operation in (*away, settled_by):
        assert (await fleet.carry_out(vm, operation)).status is Status.SUCCEEDED
    instance = await now(fleet, vm)
    assert instance.spec is not None
    assert (instance.prior_spec, instance.state_stack) == (None, ())
    power = host.guests[vm].power
    assert (instance.vm_state, power, instance.spec.vcpus, root(host, vm).written) == _SETTLED[settled_by]


@pytest.mark.parametrize("end", list(_POWER_AT_END))
async def test_the_end_of_a_resized_guest_is_no_news_for_the_next_server(
    fleet: Embedded, host: SimulatedHost, end: str
) -> None:
    vm = await ended_while_resized(fleet, host, end)
    before = await now(fleet, vm)
    await fleet.crash()
    await fleet.start()
    await fleet.create("other")
    assert (await now(fleet, vm)) == before


async def test_a_guest_that_ends_while_its_resize_is_confirmed_is_stopped_then(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await made(fleet)
    await fleet.carry_out(vm, O.RESIZE, vcpus=2)
    host.faults.script(vm, Method.DROP_ROOT_DISKS, Slow(200))
    request = admitted(await fleet.submit(vm, O.CONFIRM_RESIZE))
    await fleet.until(vm, task_state="resize_confirming")
    host.guest_powers_off(vm)
    assert (await fleet.ended(request)).status is Status.SUCCEEDED
    instance = await fleet.until(vm, vm_state=VmState.STOPPED, power_state=PowerState.SHUTDOWN)
    assert (instance.prior_spec, instance.state_stack) == (None, ())
    assert (await fleet.carry_out(vm, O.START)).status is Status.SUCCEEDED
    assert host.guests[vm].power is PowerState.RUNNING


async def test_a_guest_that_does_not_come_up_with_its_new_size_has_its_old_one_again(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await made(fleet)
    host.guest_writes(vm, "before")
    host.faults.script(vm, Method.POWER_ON, Refuses("no memory for that"))
    ended = await fleet.carry_out(vm, O.RESIZE, vcpus=2)
    assert ended.status is Status.FAILED
    assert ended.message is not None
    assert "no memory for that" in ended.message
    assert (await now(fleet, vm)).vm_state is VmState.ERROR
    assert (await fleet.carry_out(vm, O.START)).status is Status.SUCCEEDED
    instance = await now(fleet, vm)
    assert instance.spec is not None
    assert instance.spec.vcpus == 1
    assert root(host, vm).written == ("before",)


async def test_what_a_failed_resize_left_is_never_taken_for_the_next_copy(fleet: Embedded, host: SimulatedHost) -> None:
    """The copy has a number, and one of that number may be older than what the guest wrote since."""
    vm = await made(fleet)
    host.faults.script(vm, Method.POWER_ON, Refuses("no"))
    host.faults.script(vm, Method.DROP_ROOT_DISKS, Slow(0), Slow(0))
    await fleet.carry_out(vm, O.RESIZE, vcpus=2)
    await fleet.carry_out(vm, O.START)
    host.guest_writes(vm, "since")
    await fleet.carry_out(vm, O.RESIZE, vcpus=2)
    await fleet.carry_out(vm, O.CONFIRM_RESIZE)
    assert root(host, vm).written == ("since",)


@pytest.mark.parametrize("phase", ["resize_prep", "resize_migrating", "resize_finish"])
async def test_a_resize_is_finished_by_the_next_server_wherever_the_last_one_died(
    fleet: Embedded, host: SimulatedHost, phase: str
) -> None:
    vm = await made(fleet)
    host.guest_writes(vm, "before")
    slow = {"resize_prep": Method.POWER_OFF, "resize_migrating": Method.COPY_ROOT_DISK}.get(phase, Method.POWER_ON)
    host.faults.script(vm, slow, Slow(5_000))
    request = admitted(await fleet.submit(vm, O.RESIZE, root_gib=3))
    await fleet.until(vm, task_state=phase)
    await fleet.crash()
    await fleet.start()
    assert (await fleet.ended(request)).status is Status.SUCCEEDED
    assert host.guests[vm].power is PowerState.RUNNING
    await fleet.carry_out(vm, O.CONFIRM_RESIZE)
    assert (root(host, vm).written, root(host, vm).size_bytes) == (("before",), 3 << 30)


async def test_a_size_that_makes_no_sense_is_told_at_once(fleet: Embedded) -> None:
    vm = await made(fleet)
    assert refused(await fleet.submit(vm, O.RESIZE, vcpus=1)) == "same_size"
    for wrong in ({}, {"memory_mib": 1 << 20}, {"vcpus": 0}):
        with pytest.raises(Invalid):
            await fleet.submit(vm, O.RESIZE, **wrong)
    await fleet.carry_out(vm, O.RESIZE, root_gib=2)
    await fleet.carry_out(vm, O.CONFIRM_RESIZE)
    assert refused(await fleet.submit(vm, O.RESIZE, root_gib=1)) == "disk_would_shrink"
