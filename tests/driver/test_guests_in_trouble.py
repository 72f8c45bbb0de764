"""A guest whose machine gives no answer while nothing is outstanding: noticed, shown, listed, and over when it is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from in_process.embedded import Embedded
from interlock.core.operations import Operation
from interlock.core.records import GuestEvent, Status
from interlock.core.states import GuestTrouble, PowerState, VmState
from interlock.hypervisors.simulated import SimulatedHost

O = Operation  # noqa: E741


@pytest.fixture
async def fleet(tmp_path: Path, host: SimulatedHost) -> AsyncIterator[Embedded]:
    embedded = Embedded(tmp_path / "data", host, answer_timeout_s=0.05, liveness_timeout_ms=50)
    await embedded.start()
    yield embedded
    await embedded.server.close()


async def test_a_machine_that_gives_no_answer_is_noticed_and_listed_with_its_way_out(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await fleet.create("web")
    before = await fleet.until(vm)
    host.freeze(vm)
    instance = await fleet.until(vm, guest_trouble=GuestTrouble.NOT_RESPONDING)
    assert instance.vm_state is VmState.ACTIVE
    assert instance.updated_at_ms == before.updated_at_ms, "silence is no sign of life"
    assert (instance.guest_trouble_since_ms or 0) >= before.updated_at_ms
    (stuck,) = await fleet.server.instances.stuck(fleet.caller)
    assert (stuck.instance.id, stuck.request) == (vm, None)
    assert {O.STOP, O.REBOOT, O.DELETE} <= set(stuck.allowed)
    assert (await fleet.server.instances.troubled())["not_responding"] == 1

    host.thaw(vm)
    instance = await fleet.until(vm, guest_trouble=None)
    assert instance.guest_trouble_since_ms is None
    assert await fleet.server.instances.stuck(fleet.caller) == ()
    assert (await fleet.server.instances.troubled())["not_responding"] == 0
    told = [event.kind for event in await fleet.events(vm) if event.kind.startswith("guest.")]
    assert told == ["guest.not_responding", "guest.responding"]


@pytest.mark.parametrize(
    ("operation", "parameters"), [(O.STOP, {}), (O.STOP, {"hard": True}), (O.REBOOT, {"hard": True}), (O.DELETE, {})]
)
async def test_every_way_out_that_is_named_leads_out(
    fleet: Embedded, host: SimulatedHost, operation: Operation, parameters: dict[str, bool]
) -> None:
    vm = await fleet.create("web")
    host.freeze(vm)
    await fleet.until(vm, guest_trouble=GuestTrouble.NOT_RESPONDING)
    assert (await fleet.carry_out(vm, operation, **parameters)).status is Status.SUCCEEDED
    instance = await fleet.until(vm, guest_trouble=None)
    assert instance.guest_trouble_since_ms is None


async def test_a_machine_that_ends_is_in_trouble_no_more(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    host.freeze(vm)
    await fleet.until(vm, guest_trouble=GuestTrouble.NOT_RESPONDING)
    host.vanish(vm)
    await fleet.until(vm, vm_state=VmState.ERROR, guest_trouble=None)


async def test_a_machine_that_recovered_while_no_server_was_there_is_found_so(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await fleet.create("web")
    host.freeze(vm)
    await fleet.until(vm, guest_trouble=GuestTrouble.NOT_RESPONDING)
    await fleet.crash()
    host.thaw(vm)
    await fleet.start()
    await fleet.until(vm, guest_trouble=None)


async def test_a_machine_that_is_silent_still_as_a_server_starts_is_told_of_once(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await fleet.create("web")
    host.freeze(vm)
    await fleet.until(vm, guest_trouble=GuestTrouble.NOT_RESPONDING)
    await fleet.crash()
    await fleet.start()
    await fleet.until(vm, guest_trouble=GuestTrouble.NOT_RESPONDING)
    host.thaw(vm)
    await fleet.until(vm, guest_trouble=None)
    told = [event.kind for event in await fleet.events(vm) if event.kind.startswith("guest.")]
    assert told == ["guest.not_responding", "guest.responding"]


@pytest.mark.parametrize("why", [GuestEvent.NO_SPACE, GuestEvent.IO_ERROR])
async def test_a_guest_that_was_halted_is_shown_with_the_reason_until_it_goes_on(
    fleet: Embedded, host: SimulatedHost, why: GuestEvent
) -> None:
    vm = await fleet.create("web")
    host.guest_halts(vm, why)
    instance = await fleet.until(vm, guest_trouble=GuestTrouble(why.value))
    assert (instance.vm_state, instance.power_state) == (VmState.ACTIVE, PowerState.PAUSED)
    (stuck,) = await fleet.server.instances.stuck(fleet.caller)
    assert stuck.instance.id == vm
    assert (await fleet.server.instances.troubled())[why.value] == 1
    host.guest_goes_on(vm)
    instance = await fleet.until(vm, guest_trouble=None)
    assert (instance.vm_state, instance.power_state) == (VmState.ACTIVE, PowerState.RUNNING)
    assert await fleet.server.instances.stuck(fleet.caller) == ()
    told = [event.kind for event in await fleet.events(vm) if event.kind.startswith("guest.")]
    assert told == [f"guest.{why.value}", "guest.went_on"]


async def test_a_halted_guest_can_be_stopped_and_is_in_no_trouble_then(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    host.guest_halts(vm)
    await fleet.until(vm, guest_trouble=GuestTrouble.NO_SPACE)
    assert (await fleet.carry_out(vm, O.STOP)).status is Status.SUCCEEDED
    instance = await fleet.until(vm, vm_state=VmState.STOPPED)
    assert instance.guest_trouble is None
