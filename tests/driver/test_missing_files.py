"""A root disk that was made and is missing: nothing is made in its place, whichever operation needs it."""

from __future__ import annotations

import msgspec
import pytest

from in_process.embedded import Embedded
from instance_disks import now, put_images, root
from interlock.core.operations import Operation
from interlock.core.records import Change, Instance, Status
from interlock.core.states import VmState
from interlock.hypervisors.simulated import SimulatedHost

O = Operation  # noqa: E741


async def made(fleet: Embedded, *first: Operation) -> str:
    await put_images(fleet)
    vm = await fleet.create("web", image="disk")
    for operation in first:
        assert (await fleet.carry_out(vm, operation)).status is Status.SUCCEEDED
    return vm


@pytest.mark.parametrize(
    ("first", "operation", "parameters"),
    [
        ((O.STOP,), O.START, {}),
        ((O.STOP,), O.REBOOT, {"hard": True}),
        ((O.STOP,), O.RESCUE, {}),
        ((O.STOP,), O.RESIZE, {"root_gib": 3}),
        ((O.STOP,), O.SNAPSHOT, {"name": "copy"}),
        ((O.SUSPEND,), O.RESUME, {}),
        ((O.SUSPEND,), O.REBOOT, {"hard": True}),
        ((O.SOFT_DELETE,), O.RESTORE, {}),
    ],
)
async def test_a_missing_root_disk_is_not_made_again(
    fleet: Embedded,
    host: SimulatedHost,
    first: tuple[Operation, ...],
    operation: Operation,
    parameters: dict[str, object],
) -> None:
    vm = await made(fleet, *first)
    host.guests[vm].roots.clear()
    request = await fleet.carry_out(vm, operation, **parameters)
    assert request.status is Status.FAILED
    assert "missing" in (request.message or "")
    assert host.guests[vm].roots == {}
    if (await now(fleet, vm)).vm_state in {VmState.STOPPED, VmState.ERROR}:
        assert (await fleet.carry_out(vm, O.REBUILD)).status is Status.SUCCEEDED
        assert root(host, vm).made_from == "image:disk"


@pytest.mark.parametrize("first", [O.CREATE, O.START])
async def test_it_is_recorded_that_a_root_disk_was_made_before_its_guest_runs(
    fleet: Embedded, host: SimulatedHost, first: Operation
) -> None:
    await put_images(fleet)
    vm = await fleet.create("web", image="disk", start=first is O.CREATE)
    if first is O.START:
        await fleet.carry_out(vm, first)
    spec = (await now(fleet, vm)).spec
    assert spec is not None
    assert spec.root_made
    assert host.guests[vm].spec.root_made


async def test_a_record_from_before_that_was_noted_counts_as_made_once_it_was_launched(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await made(fleet, O.STOP)
    forget = Change(instance=before(await now(fleet, vm)), answer=None)
    await fleet.server.store.change(vm, lambda _instance, _now_ms: forget)
    host.guests[vm].roots.clear()
    assert (await fleet.carry_out(vm, O.START)).status is Status.FAILED
    assert host.guests[vm].roots == {}


def before(instance: Instance) -> Instance:
    """The instance as an older version recorded it."""
    assert instance.spec is not None
    return msgspec.structs.replace(instance, spec=msgspec.structs.replace(instance.spec, root_made=None))
