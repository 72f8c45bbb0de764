"""A volume or interface for which a guest has no place is refused when it is asked for, not at the next start."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from in_process.embedded import Embedded
from in_process.in_memory_agent import Neighbour
from interlock.core.errors import InsufficientCapacity
from interlock.core.operations import Operation
from interlock.hypervisors.simulated import SimulatedHost
from interlock.ports import Limits
from interlock.service.request_models import NewRequest

O = Operation  # noqa: E741


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Embedded]:
    """A server whose guests have three places."""
    embedded = Embedded(tmp_path / "data", SimulatedHost())
    await embedded.start()
    embedded.server.capacity._limits = Limits(devices_max=3)
    yield embedded
    await embedded.server.close()


async def full(house: Embedded) -> str:
    vm = await house.create("web")
    await house.make_volume("v1")
    await house.carry_out(vm, O.ATTACH_VOLUME, volume="v1")
    await house.carry_out(vm, O.ATTACH_INTERFACE)
    return vm


@pytest.mark.parametrize("stopped", [False, True])
async def test_what_finds_no_place_is_refused_in_words(house: Embedded, *, stopped: bool) -> None:
    vm = await full(house)
    if stopped:
        await house.carry_out(vm, O.STOP)
    await house.make_volume("v2")
    for operation, more in ((O.ATTACH_VOLUME, {"volume": "v2"}), (O.ATTACH_INTERFACE, {})):
        with pytest.raises(InsufficientCapacity) as refused:
            await house.submit(vm, operation, **more)
        assert refused.value.message == (
            "web does not fit on the host here: it needs hotplug ports for 3 volumes and additional interfaces; a "
            "guest there has 2 beside its root disk."
        )
        assert (refused.value.needed, refused.value.free) == ({"devices": 1}, {"devices": 0})
    await house.carry_out(vm, O.DETACH_VOLUME, volume="v1")
    await house.carry_out(vm, O.ATTACH_VOLUME, volume="v2")


async def test_what_is_on_its_way_has_its_place(house: Embedded) -> None:
    vm = await house.create("web")
    house.host.freeze(vm)
    for number in range(2):
        await house.make_volume(f"v{number}")
        await house.submit(vm, O.ATTACH_VOLUME, volume=f"v{number}")
    with pytest.raises(InsufficientCapacity, match="there has 2 beside"):
        await house.submit(vm, O.ATTACH_INTERFACE)
    wish = NewRequest(operation=O.ATTACH_INTERFACE, hold="10m")
    with pytest.raises(InsufficientCapacity, match="there has 2 beside"):
        await house.server.instances.submit(house.caller, vm, wish)
    house.host.thaw(vm)


async def test_the_same_volume_once_more_needs_no_other_place(house: Embedded) -> None:
    vm = await full(house)
    await house.submit(vm, O.ATTACH_VOLUME, volume="v1")


async def test_a_host_whose_guests_have_fewer_places_takes_only_what_fits(house: Embedded, tmp_path: Path) -> None:
    vm = await full(house)
    others = [Neighbour(name, tmp_path / name, Limits(devices_max=n)) for name, n in (("narrow", 2), ("wide", 3))]
    for other in others:
        await other.open()
        await other.connect(house)
    with pytest.raises(InsufficientCapacity, match="the host narrow"):
        await house.submit(vm, O.MIGRATE, host="narrow")
    assert (await house.carry_out(vm, O.MIGRATE, host="any")).parameters["host"] == "wide"
    for other in others:
        await other.close()


async def test_where_places_were_taken_away_what_is_plugged_in_stays_and_starts(house: Embedded) -> None:
    vm = await full(house)
    house.server.capacity._limits = Limits(devices_max=2)
    await house.carry_out(vm, O.STOP)
    await house.carry_out(vm, O.START)
