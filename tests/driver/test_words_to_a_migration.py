"""What is said to a live migration in flight: that it is to end with the guest where it was, or whatever that costs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from in_process.embedded import Embedded, admitted, refused
from in_process.in_memory_agent import Neighbour
from in_process.migrating_guests import TravellingHypervisor
from interlock.config import QemuConfig
from interlock.core.errors import NotResponding, OperationRejected
from interlock.core.operations import Operation
from interlock.core.records import Request, Status
from interlock.core.states import PowerState
from interlock.hypervisors.simulated import SimulatedHost
from waiting import PATIENCE_S

O = Operation  # noqa: E741


class Journey:
    """A guest of `here` that is on its way to `north`, and goes on being so."""

    def __init__(self, house: Embedded, vm: str, request: Request) -> None:
        self.house = house
        self.vm = vm
        self.request = request

    @property
    def source(self) -> TravellingHypervisor:
        hypervisor = self.house.server.hypervisor
        assert isinstance(hypervisor, TravellingHypervisor)
        return hypervisor

    async def ended(self) -> Request:
        return await self.house.ended(self.request)

    async def power_states(self) -> dict[str, PowerState]:
        """What each host has of the guest, if it has anything."""
        hosts = {name: await self.house.server.hosts.of(name).inspect(self.vm) for name in ("here", "north")}
        return {name: seen.power_state for name, seen in hosts.items() if seen.defined}


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Embedded]:
    embedded = Embedded(tmp_path / "data", SimulatedHost(), kind=TravellingHypervisor)
    await embedded.start()
    yield embedded
    await embedded.server.close()


@pytest.fixture
async def north(house: Embedded, tmp_path: Path) -> AsyncIterator[Neighbour]:
    neighbour = Neighbour("north", tmp_path / "north", kind=TravellingHypervisor)
    await neighbour.open()
    await neighbour.connect(house)
    yield neighbour
    await neighbour.close()


async def begun(house: Embedded) -> Journey:
    vm = await house.create("web")
    return Journey(house, vm, admitted(await house.submit(vm, O.LIVE_MIGRATE, host="north")))


@pytest.fixture
async def journey(house: Embedded, north: Neighbour) -> Journey:
    assert north.name == "north"
    made = await begun(house)
    async with asyncio.timeout(PATIENCE_S):
        await made.source.sending.wait()
    return made


async def test_an_abort_leaves_the_guest_running_where_it_was(journey: Journey) -> None:
    abort = await journey.house.carry_out(journey.vm, O.LIVE_MIGRATE_ABORT)
    assert abort.status is Status.SUCCEEDED
    assert (await journey.ended()).status is Status.CANCELLED
    assert await journey.power_states() == {"here": PowerState.RUNNING}
    instance = await journey.house.until(journey.vm, task_state="none")
    assert (instance.host, instance.left_host, instance.power_state) == ("here", None, PowerState.RUNNING)
    assert not journey.source.hurried.is_set()


async def test_a_forced_end_has_the_guest_arrive(journey: Journey) -> None:
    forced = await journey.house.carry_out(journey.vm, O.LIVE_MIGRATE_FORCE_COMPLETE)
    assert forced.status is Status.SUCCEEDED
    assert (await journey.ended()).status is Status.SUCCEEDED
    assert journey.source.hurried.is_set()
    assert await journey.power_states() == {"north": PowerState.RUNNING}
    instance = await journey.house.until(journey.vm, task_state="none")
    assert (instance.host, instance.left_host, instance.power_state) == ("north", None, PowerState.RUNNING)


async def test_what_is_said_before_the_guest_is_on_its_way_is_not_forgotten(house: Embedded, north: Neighbour) -> None:
    target = north.hypervisor
    assert isinstance(target, TravellingHypervisor)
    target.lets_in.clear()
    journey = await begun(house)
    async with asyncio.timeout(PATIENCE_S):
        await target.receiving.wait()
    await house.carry_out(journey.vm, O.LIVE_MIGRATE_FORCE_COMPLETE)
    assert not journey.source.sending.is_set()
    target.lets_in.set()
    assert (await journey.ended()).status is Status.SUCCEEDED
    assert journey.source.hurried.is_set()


async def test_without_a_word_it_stays_on_its_way_and_arrives_by_itself(journey: Journey) -> None:
    await journey.house.carry_out(journey.vm, O.SET_METADATA, set={"key": "value"})
    assert not journey.source.hurried.is_set()
    assert await journey.power_states() == {"here": PowerState.RUNNING, "north": PowerState.NONE}
    journey.source.arrives.set()
    assert (await journey.ended()).status is Status.SUCCEEDED
    assert await journey.power_states() == {"north": PowerState.RUNNING}


async def test_a_target_that_was_away_at_the_end_of_a_migration_is_cleaned_up_then(
    journey: Journey, north: Neighbour, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was back while the migration was in flight, and so not cleaned up at that moment."""
    await journey.house.server.agent.catch_up("north")
    assert await journey.power_states() == {"here": PowerState.RUNNING, "north": PowerState.NONE}
    undefine = north.hypervisor.undefine

    async def away(*_: object) -> None:
        monkeypatch.setattr(north.hypervisor, "undefine", undefine)
        raise NotResponding("It is away.")

    monkeypatch.setattr(north.hypervisor, "undefine", away)
    await journey.house.carry_out(journey.vm, O.LIVE_MIGRATE_ABORT)
    assert (await journey.ended()).status is Status.CANCELLED
    await asyncio.sleep(1)
    assert journey.vm not in north.host.guests


async def test_a_guest_that_a_killed_server_left_paused_runs_again(house: Embedded, north: Neighbour) -> None:
    """Its server had interrupted the migration, and was killed before the guest was resumed."""
    assert north.name == "north"
    vm = await house.create("web")
    await house.crash()
    house.host.pause_for_memory(house.host.guests[vm])
    await house.start()
    await house.server.agent.adopted()
    assert house.host.guests[vm].power is PowerState.RUNNING


@pytest.mark.parametrize("word", [O.LIVE_MIGRATE_ABORT, O.LIVE_MIGRATE_FORCE_COMPLETE])
async def test_once_it_has_arrived_there_is_nothing_left_to_say_to_it(journey: Journey, word: Operation) -> None:
    journey.source.arrives.set()
    await journey.ended()
    assert refused(await journey.house.submit(journey.vm, word)) == "not_migrating"


async def test_an_agent_that_cannot_encrypt_gets_no_guest_unless_that_is_allowed(tmp_path: Path) -> None:
    """Agents in memory speak version 4 of the protocol."""
    house = Embedded(tmp_path / "data", SimulatedHost(), kind=TravellingHypervisor, settings={"qemu": QemuConfig()})
    await house.start()
    north = Neighbour("north", tmp_path / "north", kind=TravellingHypervisor)
    await north.open()
    await north.connect(house)
    vm = await house.create("web")
    for host in ("north", "any"):
        assert refused(await house.submit(vm, O.LIVE_MIGRATE, host=host)) == "cannot_encrypt"
    with pytest.raises(OperationRejected, match="the agent of host north cannot do that"):
        house.server.hosts.certificate_names("here", "north")
    await north.close()
    await house.server.close()
