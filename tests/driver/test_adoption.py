"""A server that starts beside guests that are there: what is accepted before they were inspected, and what waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from in_process.embedded import Embedded, admitted
from in_process.trusting_verifier import TrustingProver
from interlock.core.operations import Operation
from interlock.core.records import SERVED, Request, Status
from interlock.core.states import PowerState, VmState
from interlock.driver import dispatcher
from interlock.hypervisors.simulated import Hangs, Method, SimulatedHost, SimulatedHypervisor
from interlock.ports import HypervisorEvent, Observation
from interlock.server import Server
from waiting import PATIENCE_S

ASKS = {"known", "inspect", "open", "close", "wait_powered_off", "agent_answers"}


class Slow(SimulatedHypervisor):
    """Takes charge, and looks at each guest, when it is let; notes every call that may change something."""

    def __init__(self, host: SimulatedHost) -> None:
        super().__init__(host, answer_timeout_s=0.05)
        self.may_open = asyncio.Event()
        self.held: dict[str, asyncio.Event] = {}
        self.looking = self.looking_most = 0
        self.acted: list[str] = []

    async def open(self, listener: Callable[[HypervisorEvent], None]) -> None:
        await self.may_open.wait()
        await super().open(listener)

    async def inspect(self, instance_id: str) -> Observation:
        self.looking += 1
        self.looking_most = max(self.looking_most, self.looking)
        try:
            await asyncio.sleep(0)
            if instance_id in self.held:
                await self.held[instance_id].wait()
            return await super().inspect(instance_id)
        finally:
            self.looking -= 1

    async def power_off(self, permit: Any, instance_id: str) -> None:
        self.acted.append(instance_id)
        await super().power_off(permit, instance_id)


class Restarted:
    """A server that has just begun beside guests of an earlier one."""

    def __init__(self, fleet: Embedded, host: SimulatedHost) -> None:
        self.fleet = fleet
        self.hypervisor = Slow(host)

    async def begin(self) -> None:
        await self.fleet.crash()
        self.fleet.server = Server(self.fleet._config, self.hypervisor, prover=TrustingProver())
        await self.fleet.server.begin()

    @property
    def server(self) -> Server:
        return self.fleet.server

    async def stop(self, name: str) -> Request:
        return admitted(await self.fleet.submit(name, Operation.STOP, hard=True))

    async def status(self, request: Request) -> Status:
        found = await self.server.store.request(request.id)
        assert found is not None
        return found.status


@pytest.fixture
async def restarted(fleet: Embedded, host: SimulatedHost) -> AsyncIterator[Restarted]:
    one = Restarted(fleet, host)
    yield one
    one.hypervisor.may_open.set()
    for event in one.hypervisor.held.values():
        event.set()


async def turns(count: int = 200) -> None:
    """Let everything run that is ready."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_requests_are_accepted_before_the_guests_were_found_and_served_afterwards(
    fleet: Embedded, restarted: Restarted
) -> None:
    await fleet.create("a")
    await restarted.begin()
    assert restarted.server.accepting
    assert "looking for the guests" in (await restarted.server.readiness.missing())[0]
    stop = await restarted.stop("a")
    await turns()
    assert await restarted.status(stop) is Status.QUEUED
    assert restarted.hypervisor.acted == []
    restarted.hypervisor.may_open.set()
    assert (await fleet.ended(stop)).status is Status.SUCCEEDED
    await restarted.server.agent.adopted()
    assert (await restarted.server.readiness.missing()) == ()


async def test_a_guest_that_is_not_inspected_yet_holds_up_nobody_else(fleet: Embedded, restarted: Restarted) -> None:
    first, second = await fleet.create("a"), await fleet.create("b")
    restarted.hypervisor.held[first] = asyncio.Event()
    restarted.hypervisor.may_open.set()
    await restarted.begin()
    stops = [await restarted.stop(name) for name in ("a", "b")]
    assert (await fleet.ended(stops[1])).status is Status.SUCCEEDED
    assert await restarted.status(stops[0]) is Status.QUEUED
    assert restarted.hypervisor.acted == [second]
    assert "1." in (await restarted.server.readiness.missing())[0]
    restarted.hypervisor.held[first].set()
    assert (await fleet.ended(stops[0])).status is Status.SUCCEEDED


async def test_what_became_of_a_guest_is_heard_before_what_was_asked_for_meanwhile(
    fleet: Embedded, restarted: Restarted, host: SimulatedHost
) -> None:
    """The guest ended while no server ran, and nobody kept that: an inspection finds it."""
    vm = await fleet.create("a")
    await fleet.crash()
    host.guests.pop(vm)
    restarted.fleet.server = Server(fleet._config, restarted.hypervisor, prover=TrustingProver())
    await restarted.server.begin()
    pause = admitted(await fleet.submit("a", Operation.PAUSE))
    restarted.hypervisor.may_open.set()
    ended = await fleet.ended(pause)
    assert ended.status is Status.CANCELLED
    kinds = [event.kind for event in await fleet.events(vm)]
    assert kinds.index("guest.vanished") < kinds.index("request.cancelled")
    assert "request.taken" not in kinds[kinds.index("guest.vanished") :]
    await fleet.until(vm, vm_state=VmState.ERROR)


async def test_what_was_in_flight_waits_for_the_inspection_and_is_then_performed_again(
    fleet: Embedded, restarted: Restarted, host: SimulatedHost
) -> None:
    vm = await fleet.create("a")
    host.freeze(vm)
    pause = admitted(await fleet.submit("a", Operation.PAUSE))
    await fleet.until_event(vm, "request.taken")
    await restarted.begin()
    host.thaw(vm)
    await turns()
    assert await restarted.status(pause) is Status.UNKNOWN
    restarted.hypervisor.may_open.set()
    assert (await fleet.ended(pause)).status is Status.SUCCEEDED


async def test_a_component_change_that_waited_with_a_state_change_is_served_beside_it(
    fleet: Embedded, restarted: Restarted, host: SimulatedHost
) -> None:
    vm = await fleet.create("a")
    await fleet.carry_out(vm, Operation.STOP)
    volume = await fleet.make_volume("data")
    await restarted.begin()
    host.faults.script(vm, Method.POWER_ON, Hangs())
    start = admitted(await fleet.submit("a", Operation.START))
    attach = admitted(await fleet.submit("a", Operation.ATTACH_VOLUME, volume=volume.id))
    restarted.hypervisor.may_open.set()
    await fleet.until_event(vm, "request.unknown")
    assert {await restarted.status(one) for one in (start, attach)} <= SERVED
    host.thaw(vm)
    assert [(await fleet.ended(one)).status for one in (start, attach)] == [Status.SUCCEEDED, Status.SUCCEEDED]


async def test_a_process_that_a_killed_server_left_of_a_guest_that_powered_itself_off_is_ended(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await fleet.create("a")
    await fleet.carry_out(vm, Operation.STOP)
    await fleet.crash()
    host.guests[vm].power = PowerState.SHUTDOWN
    await fleet.start()
    await fleet.server.agent.adopted()
    assert host.guests[vm].power is PowerState.NONE


async def test_a_guest_that_cannot_be_inspected_in_time_is_served_all_the_same(
    fleet: Embedded, restarted: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "_INSPECTION_S_MAX", 0.05)
    first = await fleet.create("a")
    restarted.hypervisor.held[first] = asyncio.Event()
    restarted.hypervisor.may_open.set()
    await restarted.begin()
    await restarted.server.agent.adopted()
    assert (await restarted.server.readiness.missing()) == ()
    stop = await restarted.stop("a")
    await fleet.until_event(first, "request.taken")
    restarted.hypervisor.held[first].set()
    assert (await fleet.ended(stop)).status is Status.SUCCEEDED


async def test_so_many_guests_are_inspected_at_once_and_no_more(
    fleet: Embedded, restarted: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "_AT_ONCE", 5)
    for number in range(12):
        await fleet.create(f"vm{number}")
    restarted.hypervisor.may_open.set()
    await restarted.begin()
    await restarted.server.agent.adopted()
    assert restarted.hypervisor.looking_most == 5


async def test_a_server_that_cannot_hold_guests_says_so_and_ends(fleet: Embedded, restarted: Restarted) -> None:
    async def refuse(_listener: object) -> None:
        await restarted.hypervisor.may_open.wait()
        raise OSError("no guests here")

    restarted.hypervisor.open = refuse  # type: ignore[assignment, method-assign]
    await fleet.crash()
    server = Server(fleet._config, restarted.hypervisor, prover=TrustingProver())
    started = asyncio.Event()
    serving = asyncio.create_task(server.serve(started))
    await started.wait()
    assert await server.readiness.missing()
    restarted.hypervisor.may_open.set()
    with pytest.raises(OSError, match="no guests here"):
        await asyncio.wait_for(serving, PATIENCE_S)
    await fleet.start()


async def test_closing_does_not_wait_for_guests_that_are_being_looked_for(
    fleet: Embedded, restarted: Restarted
) -> None:
    await fleet.create("a")
    await restarted.begin()
    await asyncio.wait_for(restarted.server.close(), PATIENCE_S)
    await fleet.start()
