"""What is said to be allowed is what a submission is then answered."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from interlock.core.operations import Operation
from interlock.core.records import Admitted, Denied, Held, Status
from interlock.hypervisors.simulated import SimulatedHost
from interlock.ports import HostState
from interlock.service.wishes import NewInstance, NewRequest
from interlock.testing.embedded import IMAGE, Embedded, admitted
from interlock.testing.neighbour import Neighbour

O = Operation  # noqa: E741
BARE = (
    *(O.START, O.STOP, O.REBOOT, O.PAUSE, O.UNPAUSE, O.SUSPEND, O.RESUME, O.RESCUE, O.UNRESCUE, O.CONFIRM_RESIZE),
    *(O.REVERT_RESIZE, O.SHELVE, O.SHELVE_OFFLOAD, O.UNSHELVE, O.EVACUATE, O.SOFT_DELETE, O.RESTORE, O.LOCK, O.UNLOCK),
)
"""What can be asked without saying anything more."""


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Embedded]:
    embedded = Embedded(tmp_path / "data", SimulatedHost())
    await embedded.start()
    yield embedded
    await embedded.server.close()


@pytest.fixture
async def north(house: Embedded, tmp_path: Path) -> AsyncIterator[Neighbour]:
    neighbour = Neighbour("north", tmp_path / "north")
    await neighbour.open()
    await neighbour.connect(house)
    yield neighbour
    await neighbour.close()


async def on_north(house: Embedded) -> str:
    wish = NewInstance(name="web", image=IMAGE.name, host="north")
    answer = await house.server.instances.create(house.caller, wish)
    await house.ended(admitted(answer))
    return answer.instance.id


async def allowed(house: Embedded, vm: str) -> set[Operation]:
    _, answers = await house.server.instances.allowed(house.caller, vm)
    return {operation for operation, answer in answers.items() if isinstance(answer, Admitted)}


async def test_an_evacuation_is_allowed_from_when_the_host_is_fenced(house: Embedded, north: Neighbour) -> None:
    vm = await on_north(house)
    assert O.EVACUATE not in await allowed(house, vm)
    assert isinstance((await house.submit(vm, O.EVACUATE)).disposition, Denied)
    await north.disconnect()
    assert O.EVACUATE not in await allowed(house, vm)
    await house.server.other_hosts.fence(house.caller, "north")
    assert O.EVACUATE in await allowed(house, vm)
    refused = await house.submit(vm, O.UNPAUSE)
    if isinstance(refused.disposition, Denied):
        assert O.EVACUATE in refused.allowed_instead
    assert (await house.carry_out(vm, O.EVACUATE)).status == "succeeded"
    assert O.EVACUATE not in await allowed(house, vm)


@pytest.mark.parametrize("fenced", [False, True])
@pytest.mark.parametrize("seed", range(3))
async def test_whatever_is_asked_is_answered_as_was_said(
    house: Embedded, north: Neighbour, seed: int, *, fenced: bool
) -> None:
    chance = random.Random(seed)
    vm = await on_north(house)
    if fenced:
        await north.disconnect()
        await house.server.other_hosts.fence(house.caller, "north")
    for _ in range(25):
        operation = chance.choice(BARE)
        said = operation in await allowed(house, vm)
        answer = await house.submit(vm, operation)
        assert isinstance(answer.disposition, Admitted) == said, (operation, answer.disposition)
        if said and fenced:
            break  # what was admitted waits for a host that is gone
        if isinstance(answer.disposition, Admitted):
            await house.ended(answer.disposition.request)


async def test_an_evacuation_that_is_held_is_admitted_when_its_host_is_fenced(
    house: Embedded, north: Neighbour
) -> None:
    vm = await on_north(house)
    wish = NewRequest(operation=O.EVACUATE, hold="10m")
    answer = await house.server.instances.submit(house.caller, vm, wish)
    assert isinstance(answer.disposition, Held)
    await north.disconnect()
    assert len((await house.server.instances.describe(house.caller, vm)).held) == 1
    await house.server.other_hosts.fence(house.caller, "north")
    ended = await house.ended(answer.disposition.request)
    assert ended.status is Status.SUCCEEDED
    assert (await house.server.instances.describe(house.caller, vm)).host == "here"


async def test_one_that_is_held_when_the_server_starts_again_finds_its_host_fenced(
    house: Embedded, north: Neighbour
) -> None:
    vm = await on_north(house)
    wish = NewRequest(operation=O.EVACUATE, hold="10m")
    answer = await house.server.instances.submit(house.caller, vm, wish)
    assert isinstance(answer.disposition, Held)
    await north.disconnect()
    (host,) = await house.server.store.hosts()
    await house.server.store.put_host(msgspec.structs.replace(host, state=HostState.FENCED))
    await house.crash()
    await house.start()
    assert (await house.ended(answer.disposition.request)).status is Status.SUCCEEDED
