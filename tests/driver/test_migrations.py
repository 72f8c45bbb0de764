"""Where an instance is after a migration, cold or live, however that ends: on simulated guests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from in_process.embedded import Embedded, admitted
from in_process.in_memory_agent import Neighbour
from in_process.migrating_guests import TravellingHypervisor
from in_process.virtual_time import settle
from instance_disks import image_files, now, put_images, root
from interlock.core.operations import Operation
from interlock.core.records import InstanceUpdate, Status
from interlock.core.states import PowerState, VmState
from interlock.driver.operation_context import OperationContext
from interlock.hypervisors.simulated import Method, Refuses, SimulatedHost, Slow
from waiting import PATIENCE_S, eventually

O = Operation  # noqa: E741


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Embedded]:
    embedded = Embedded(tmp_path / "data", SimulatedHost(), kind=TravellingHypervisor)
    await embedded.start()
    await put_images(embedded)
    hypervisor = embedded.server.hypervisor
    assert isinstance(hypervisor, TravellingHypervisor)
    hypervisor.arrives.set()
    yield embedded
    await embedded.server.close()


@pytest.fixture
async def north(house: Embedded, tmp_path: Path) -> AsyncIterator[Neighbour]:
    neighbour = Neighbour("north", tmp_path / "north", kind=TravellingHypervisor)
    await neighbour.open()
    await neighbour.connect(house)
    yield neighbour
    await neighbour.close()


async def test_a_cold_migration_takes_the_root_disk_along(house: Embedded, north: Neighbour) -> None:
    vm = await house.create("web", image="disk")
    house.host.guest_writes(vm, "kept")
    assert (await house.carry_out(vm, O.MIGRATE, host="north")).status is Status.SUCCEEDED
    instance = await now(house, vm)
    assert (instance.host, instance.left_host, instance.vm_state) == ("north", None, VmState.ACTIVE)
    assert root(north.host, vm).written == ("kept",)
    assert north.host.guests[vm].power is PowerState.RUNNING
    assert vm not in house.host.guests
    assert image_files(house) == set()


async def test_a_live_migration_needs_no_root_disk_on_the_target_beforehand(house: Embedded, north: Neighbour) -> None:
    vm = await house.create("web", image="disk")
    assert (await house.carry_out(vm, O.LIVE_MIGRATE, host="north")).status is Status.SUCCEEDED
    assert (await now(house, vm)).host == "north"
    assert root(north.host, vm).made_from == "image:disk"


async def test_a_cold_migration_says_what_it_waits_for_and_that_the_guest_did_not_power_itself_off(
    house: Embedded, north: Neighbour
) -> None:
    vm = await house.create("web", image="disk")
    house.host.ignore_power_button(vm)
    ended = await house.carry_out(vm, O.MIGRATE, host=north.name)
    assert (ended.status, "shutdown timed out" in (ended.message or "")) == (Status.SUCCEEDED, True)
    details = [event.data.get("detail") for event in await house.events(vm) if event.request_id == ended.id]
    assert details.index("shutting the guest down") < details.index("sending the root disk to north")


@pytest.mark.parametrize("image", ["disk", "nothing"])
async def test_an_instance_that_never_ran_is_migrated_with_its_root_disk_made(
    house: Embedded, north: Neighbour, image: str
) -> None:
    vm = await house.create("web", image=image, start=False)
    assert (await house.carry_out(vm, O.MIGRATE, host="north")).status is Status.SUCCEEDED
    assert (await now(house, vm)).vm_state is VmState.STOPPED
    assert [content.made_from for content in north.host.guests[vm].roots.values()] == ["image:disk"] * (image == "disk")
    assert vm not in house.host.guests
    details = [event.data.get("detail") for event in await house.events(vm)]
    assert "shutting the guest down" not in details


async def test_the_end_of_a_guest_on_another_host_is_recorded_at_once(house: Embedded, north: Neighbour) -> None:
    vm = await house.create("web")
    await house.carry_out(vm, O.MIGRATE, host="north")
    ended_at_ms = house.server.store.now_ms()
    assert north.host.guest_powers_off(vm)
    instance = await house.until(vm, vm_state=VmState.STOPPED)
    assert instance.host == "north"
    assert instance.state_since_ms - ended_at_ms < 1_000, "from its event, and not from a later inspection"


@pytest.mark.parametrize("operation", [O.MIGRATE, O.LIVE_MIGRATE])
async def test_a_migration_that_is_cancelled_as_its_arrival_is_recorded_is_not_undone(
    house: Embedded, north: Neighbour, monkeypatch: pytest.MonkeyPatch, operation: Operation
) -> None:
    """Its record was being written when the worker was interrupted, and names the target by then."""
    keep, alive = OperationContext.keep, OperationContext.alive
    writing, go_on = asyncio.Event(), asyncio.Event()

    async def keep_late(work: OperationContext, kept: InstanceUpdate, phase: str | None = None) -> None:
        async def write() -> None:
            await go_on.wait()
            await keep(work, kept, phase)

        writing.set()
        await asyncio.shield(asyncio.ensure_future(write()))

    async def alive_behind_it(work: OperationContext) -> None:
        go_on.set()
        await settle()
        await alive(work)

    vm = await house.create("web")
    monkeypatch.setattr(OperationContext, "keep", keep_late)
    monkeypatch.setattr(OperationContext, "alive", alive_behind_it)
    request = admitted(await house.submit(vm, operation, host=north.name))
    async with asyncio.timeout(PATIENCE_S):
        await writing.wait()
    await house.server.instances.cancel(house.caller, request.id)
    ended = await house.ended(request)
    assert ended.status is Status.FAILED
    assert "The VM was already migrated to host north" in (ended.message or "")
    instance = await house.until(vm, task_state="none")
    assert (instance.host, instance.left_host) == ("north", None)
    assert north.host.guests[vm].power is PowerState.RUNNING
    assert vm not in house.host.guests


async def test_a_cold_migration_that_is_cancelled_while_it_waits_for_the_guest_starts_that_again(
    house: Embedded, north: Neighbour
) -> None:
    """Its guest was asked to shut down, and could do so at any time."""
    vm = await house.create("web")
    house.host.ignore_power_button(vm)
    request = admitted(await house.submit(vm, O.MIGRATE, host=north.name))
    await eventually(lambda: house.host.guests[vm].button_pressed)
    await house.server.instances.cancel(house.caller, request.id)
    assert (await house.ended(request)).status is Status.CANCELLED
    await house.until(vm, host="here", vm_state=VmState.ACTIVE, task_state="none")
    assert (house.host.guests[vm].power, house.host.guests[vm].starts) == (PowerState.RUNNING, 2)


async def test_a_cold_migration_that_is_cancelled_leaves_the_guest_running_where_it_was(
    house: Embedded, north: Neighbour
) -> None:
    vm = await house.create("web", image="disk")
    north.host.faults.script(vm, Method.ROOT_DISK_FROM, Slow(5_000))
    request = admitted(await house.submit(vm, O.MIGRATE, host="north"))
    await eventually(lambda: house.host.guests[vm].power is PowerState.NONE)
    await house.server.instances.cancel(house.caller, request.id)
    assert (await house.ended(request)).status is Status.CANCELLED
    instance = await house.until(vm, task_state="none")
    assert (instance.host, instance.vm_state, house.host.guests[vm].power) == (
        "here",
        VmState.ACTIVE,
        PowerState.RUNNING,
    )
    assert vm not in north.host.guests
    assert image_files(house) == set()


async def test_a_cold_migration_that_the_target_refuses_leaves_the_guest_running_where_it_was(
    house: Embedded, north: Neighbour
) -> None:
    vm = await house.create("web", image="disk")
    north.host.faults.script(vm, Method.ROOT_DISK_FROM, Refuses("No space."))
    ended = await house.carry_out(vm, O.MIGRATE, host="north")
    assert (ended.status, "No space." in (ended.message or "")) == (Status.FAILED, True)
    instance = await house.until(vm, task_state="none")
    assert (instance.host, instance.vm_state, house.host.guests[vm].power) == (
        "here",
        VmState.ACTIVE,
        PowerState.RUNNING,
    )
    assert vm not in north.host.guests
    assert image_files(house) == set()
