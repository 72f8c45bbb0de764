"""What goes to another host, or is put there, is promised room there first, or is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from in_process.embedded import IMAGE, Embedded, admitted, refused
from in_process.in_memory_agent import Neighbour
from in_process.three_hosts import LARGE, Street
from interlock.core.errors import InsufficientCapacity, InUse
from interlock.core.operations import Operation
from interlock.core.records import Admitted, Denied, Redundant
from interlock.hypervisors.simulated import SimulatedHost
from interlock.ports import Limits
from interlock.service.hosts import HostService
from interlock.service.request_models import NewInstance, NewRequest

O = Operation  # noqa: E741


@pytest.mark.parametrize("operation", [O.MIGRATE, O.LIVE_MIGRATE])
@pytest.mark.parametrize(
    ("size", "needed", "free"),
    [
        ({"memory_mib": 900}, {"memory_mib": 900}, {"memory_mib": 768}),
        ({"vcpus": 4}, {"vcpus": 4}, {"vcpus": 3}),
        ({"root_gib": 9}, {"disk_mib": 9 * 1024}, {"disk_mib": 8 * 1024}),
    ],
)
async def test_a_migration_to_a_host_without_room_is_refused(
    street: Street,
    operation: Operation,
    size: dict[str, int],
    needed: dict[str, int],
    free: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await street.create("there", 256, "north", root_gib=2)
    vm = await street.create("web", size.get("memory_mib", 256), **size_but_memory(size))
    before = await street.house.server.store.instance(vm)
    monkeypatch.setattr(HostService, "sends_guests", lambda _self, _name: True)
    with pytest.raises(InsufficientCapacity) as refusal:
        await street.house.submit(vm, operation, host="north")
    assert "web does not fit on the host north: needs" in refusal.value.message
    assert (refusal.value.needed, refusal.value.free) == (needed, free)
    assert await street.house.server.store.instance(vm) == before
    assert await street.free_mib("north") == 768


def size_but_memory(size: dict[str, int]) -> dict[str, Any]:
    return {name: value for name, value in size.items() if name != "memory_mib"}


async def test_an_evacuation_to_a_host_without_room_is_refused(street: Street) -> None:
    vm = await street.create("web", 900, "north")
    await street.create("other", 512, "south")
    await street.fence(street.north)
    with pytest.raises(
        InsufficientCapacity, match="does not fit on the host south: needs 900 MiB of memory, 512 MiB free"
    ):
        await street.house.submit(vm, O.EVACUATE, host="south")
    street.house.server.capacity._limits = Limits(memory_mib=100)
    with pytest.raises(InsufficientCapacity, match="fits on none of 2 hosts"):
        await street.house.submit(vm, O.EVACUATE, host="any")
    street.house.server.capacity._limits = LARGE
    request = await street.house.carry_out(vm, O.EVACUATE, host="any")
    assert request.parameters["host"] == "here"


async def test_two_migrations_do_not_both_get_the_last_room(street: Street) -> None:
    vms = [await street.create(f"vm{n}", 600) for n in range(4)]
    answers = await asyncio.gather(
        *(street.house.submit(vm, O.MIGRATE, host="north") for vm in vms), return_exceptions=True
    )
    admissions = [one for one in answers if not isinstance(one, BaseException)]
    assert len(admissions) == 1
    assert sum(isinstance(one, InsufficientCapacity) for one in answers) == 3
    await street.house.ended(admitted(admissions[0]))
    assert (await street.promised_mib("north"), await street.promised_mib("here")) == (600, 1800)


async def test_what_is_on_its_way_counts_on_both_hosts_also_after_a_restart(street: Street) -> None:
    vm = await street.create("web", 600)
    street.house.host.freeze(vm)  # its host gives no answer, and the migration does not end
    await street.house.submit(vm, O.MIGRATE, host="north")
    assert (await street.promised_mib("here"), await street.promised_mib("north")) == (600, 600)
    await street.restart()
    assert (await street.promised_mib("here"), await street.promised_mib("north")) == (600, 600)
    with pytest.raises(InsufficientCapacity, match="the host north: needs 600 MiB of memory, 424 MiB free"):
        await street.create("more", 600, "north")
    street.house.host.thaw(vm)
    instance = await street.house.until(vm, outstanding=())
    # Where it is by now depends on whether the other host was back in time; from the other its room is gone.
    other = "north" if instance.host == "here" else "here"
    assert (await street.promised_mib(instance.host), await street.promised_mib(other)) == (600, 0)


async def test_a_migration_that_is_given_up_leaves_its_room_there(street: Street) -> None:
    vm = await street.create("web", 600)
    street.house.host.freeze(vm)
    request = admitted(await street.house.submit(vm, O.MIGRATE, host="north"))
    assert await street.promised_mib("north") == 600
    await street.house.server.instances.cancel(street.house.caller, request.id)
    street.house.host.thaw(vm)
    await street.house.ended(request)
    assert (await street.promised_mib("here"), await street.promised_mib("north")) == (600, 0)


async def test_a_refused_migration_is_promised_nothing(street: Street) -> None:
    vm = await street.create("web", 600)
    await street.house.carry_out(vm, O.SUSPEND)
    answer = await street.house.submit(vm, O.LIVE_MIGRATE, host="north")
    assert isinstance(answer.disposition, Denied)
    assert await street.promised_mib("north") == 0


async def test_a_creation_on_another_host_is_refused_like_one_here(street: Street) -> None:
    with pytest.raises(InsufficientCapacity, match="the host north: needs 2000 MiB of memory, 1024 MiB free"):
        await street.create("big", 2000, "north")
    assert await street.house.server.store.instance_named("default", "big") is None


async def test_any_is_the_emptiest_host_that_has_room(street: Street) -> None:
    store = street.house.server.store
    hosts = [(await store.instance(await street.create(f"vm{n}", 600, "any"))) for n in range(4)]
    # After one on each host only `here` has room for another.
    assert [one.host for one in hosts if one] == ["here", "north", "south", "here"]
    with pytest.raises(InsufficientCapacity) as refusal:
        await street.create("big", 3500, "any")
    for part in ("big fits on none of 3 hosts", "the host here", "the host north", "the host south"):
        assert part in refusal.value.message
    assert refusal.value.needed == {"memory_mib": 3500}


async def test_a_migration_to_any_host_goes_where_there_is_room(street: Street) -> None:
    await street.create("small", 64, "south")
    await street.create("large", 1000, "north")
    vm = await street.create("web", 600)
    request = await street.house.carry_out(vm, O.MIGRATE, host="any")
    assert request.parameters["host"] == "south"
    again = await street.create("web2", 600)
    with pytest.raises(InsufficientCapacity, match="fits on none of 2 hosts"):
        await street.house.submit(again, O.MIGRATE, host="any")


async def test_any_once_more_is_the_migration_that_is_under_way(street: Street) -> None:
    vm = await street.create("web", 600)
    street.house.host.freeze(vm)
    first = admitted(await street.house.submit(vm, O.MIGRATE, host="any"))
    await street.create("more", 64, "south" if first.parameters["host"] == "north" else "north")
    again = await street.house.submit(vm, O.MIGRATE, host="any")
    assert isinstance(again.disposition, Redundant | Denied)
    if isinstance(again.disposition, Redundant):
        assert again.disposition.request is not None
        assert again.disposition.request.id == first.id
    street.house.host.thaw(vm)
    await street.house.ended(first)


async def test_any_needs_another_host(street: Street) -> None:
    vm = await street.create("web")
    for other in (street.north, street.south):
        await other.disconnect()
    assert refused(await street.house.submit(vm, O.MIGRATE, host="any")) == "no_other_host"


async def test_a_port_that_is_taken_there_is_refused_when_it_is_asked_for(street: Street) -> None:
    forwards = ({"host_port": 2222, "guest_port": 22},)
    await street.create("there", 64, "north", forwards=forwards)
    vm = await street.create("web", 64, forwards=forwards)
    with pytest.raises(InUse, match="Port 2222 of the host north"):
        await street.house.submit(vm, O.MIGRATE, host="north")
    assert (await street.house.carry_out(vm, O.MIGRATE, host="any")).parameters["host"] == "south"


async def test_what_is_unshelved_finds_room_on_its_host_or_is_refused(street: Street) -> None:
    vm = await street.create("web", 600, "north")
    await street.house.carry_out(vm, O.SHELVE)
    assert await street.free_mib("north") == 424  # shelved only, its room is its own
    await street.house.carry_out(vm, O.SHELVE_OFFLOAD)
    assert await street.free_mib("north") == 1024
    await street.create("other", 600, "north")
    with pytest.raises(InsufficientCapacity, match="web does not fit on the host north"):
        await street.house.submit(vm, O.UNSHELVE)


async def test_what_was_promised_is_started_also_where_the_limits_were_lowered(street: Street) -> None:
    vm = await street.create("web", 600, "north")
    await street.house.carry_out(vm, O.STOP)
    street.north.limits = Limits(memory_mib=100)
    await street.restart()
    assert await street.free_mib("north") == 0
    await street.house.carry_out(vm, O.START)
    with pytest.raises(InsufficientCapacity, match="0 MiB free"):
        await street.create("more", 64, "north")


async def test_its_disk_keeps_a_free_part_there_for_real(tmp_path: Path) -> None:
    house = Embedded(tmp_path / "data", SimulatedHost())
    await house.start()
    full = Neighbour("full", tmp_path / "full", Limits(disk_reserved_mib=1024), disk_free_mib=1000)
    await full.open()
    await full.connect(house)
    try:
        body = NewInstance(name="web", image=IMAGE.name, root_gib=1)
        made = admitted(await house.server.instances.create(house.caller, body))
        await house.ended(made)
        wish = NewRequest(operation=O.MIGRATE, parameters={"host": "full"})
        with pytest.raises(InsufficientCapacity, match="the host full: no space left on its disk: 1000 MiB free, 1024"):
            await house.server.instances.submit(house.caller, "web", wish)
    finally:
        await full.close()
        await house.server.close()


async def test_a_held_migration_keeps_its_room_until_it_is_given_up(
    street: Street, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostService, "sends_guests", lambda _self, _name: True)
    vm = await street.create("web", 600)
    await street.house.carry_out(vm, O.SUSPEND)
    wish = NewRequest(operation=O.LIVE_MIGRATE, parameters={"host": "north"}, hold="10m")
    answer = await street.house.server.instances.submit(street.house.caller, vm, wish)
    assert not isinstance(answer.disposition, Admitted | Denied | Redundant)
    assert await street.promised_mib("north") == 600
    await street.house.server.instances.cancel(street.house.caller, answer.disposition.request.id)
    assert await street.promised_mib("north") == 0
