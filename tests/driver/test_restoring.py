"""A soft delete undoes nothing of what was being undone: what is restored goes back to where it came from."""

from __future__ import annotations

import pytest

from in_process.embedded import Embedded
from instance_disks import image_files, now, put_images
from interlock.core.operations import Operation
from interlock.core.records import Instance, Status
from interlock.core.states import PowerState, VmState
from interlock.hypervisors.simulated import SimulatedHost

O = Operation  # noqa: E741
V = VmState
_LEADS_IN = {
    V.ACTIVE: (),
    V.STOPPED: (O.STOP,),
    V.PAUSED: (O.PAUSE,),
    V.SUSPENDED: (O.SUSPEND,),
    V.ERROR: (),
}
"""What brings a new instance into a state; into `error` its guest does."""
_POWER = {V.ACTIVE: PowerState.RUNNING, V.PAUSED: PowerState.PAUSED}
_RESIZE = {"vcpus": 2}


async def brought(fleet: Embedded, host: SimulatedHost, state: VmState, *operations: Operation) -> str:
    """An instance with a letter on its disk, in that state, and then through those operations."""
    await put_images(fleet)
    vm = await fleet.create("web", image="disk")
    host.guest_writes(vm, "letter")
    if state is V.ERROR:
        host.guest_panics(vm)
    await carried_out(fleet, vm, *_LEADS_IN[state])
    await fleet.until(vm, vm_state=state)
    await carried_out(fleet, vm, *operations)
    return vm


async def carried_out(fleet: Embedded, vm: str, *operations: Operation) -> None:
    for operation in operations:
        parameters = _RESIZE if operation is O.RESIZE else {}
        request = await fleet.carry_out(vm, operation, **parameters)
        assert request.status is Status.SUCCEEDED, (operation, request.message)


def what_it_is(instance: Instance) -> tuple[object, ...]:
    """All of an instance that a soft delete and a restore leave as it was."""
    assert instance.spec is not None
    files = (instance.spec, instance.prior_spec, instance.shelved_image)
    return (instance.vm_state, instance.power_state, instance.state_stack, instance.error, *files)


CHAINS = (
    *((state, (O.RESCUE,), O.UNRESCUE) for state in (V.ACTIVE, V.STOPPED, V.ERROR)),
    *((state, (O.RESIZE,), undo) for state in (V.ACTIVE, V.STOPPED) for undo in (O.CONFIRM_RESIZE, O.REVERT_RESIZE)),
    *((state, (O.SHELVE,), O.UNSHELVE) for state in (V.ACTIVE, V.STOPPED, V.PAUSED, V.SUSPENDED)),
    *((state, (O.SHELVE, O.SHELVE_OFFLOAD), O.UNSHELVE) for state in (V.ACTIVE, V.STOPPED, V.PAUSED)),
)


@pytest.mark.parametrize(
    ("state", "there", "back"),
    CHAINS,
    ids=[f"{state}-{'-'.join(there)}-{back}" for state, there, back in CHAINS],
)
async def test_a_soft_delete_forgets_nothing(
    fleet: Embedded, host: SimulatedHost, state: VmState, there: tuple[Operation, ...], back: Operation
) -> None:
    vm = await brought(fleet, host, state, *there)
    before = await now(fleet, vm)
    await carried_out(fleet, vm, O.SOFT_DELETE, O.RESTORE)
    assert what_it_is(await now(fleet, vm)) == what_it_is(before)
    assert host.guests[vm].power is before.power_state if vm in host.guests else True
    await carried_out(fleet, vm, back)
    await fleet.until(vm, vm_state=state, power_state=_POWER.get(state, PowerState.NONE))
    guest = host.guests[vm]
    assert guest.power is _POWER.get(state, PowerState.NONE)
    assert guest.memory_saved is (state is V.SUSPENDED)
    assert (await now(fleet, vm)).state_stack == ()
    (content,) = guest.roots.values()
    assert content.written == ("letter",)


@pytest.mark.parametrize("state", list(_LEADS_IN))
async def test_what_had_nothing_to_undo_is_restored_as_it_was(
    fleet: Embedded, host: SimulatedHost, state: VmState
) -> None:
    vm = await brought(fleet, host, state)
    await carried_out(fleet, vm, O.SOFT_DELETE, O.RESTORE)
    instance = await fleet.until(vm, vm_state=state, power_state=_POWER.get(state, PowerState.NONE))
    assert instance.state_stack == ()
    assert instance.error == ("The guest crashed." if state is V.ERROR else None)
    assert host.guests[vm].memory_saved is (state is V.SUSPENDED)


@pytest.mark.parametrize("there", [(O.RESCUE,), (O.RESIZE,), (O.SHELVE,), (O.SHELVE, O.SHELVE_OFFLOAD)])
async def test_nothing_is_left_of_what_is_deleted_for_good(
    fleet: Embedded, host: SimulatedHost, there: tuple[Operation, ...]
) -> None:
    vm = await brought(fleet, host, V.STOPPED, *there)
    await carried_out(fleet, vm, O.SOFT_DELETE, O.DELETE)
    assert vm not in host.guests
    assert image_files(fleet) == set()
    assert (await now(fleet, vm)).state_stack == ()
