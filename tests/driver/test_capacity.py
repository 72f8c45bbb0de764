"""What does not fit on a host is refused before anything is made, and what went gives its room back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from in_process.embedded import IMAGE, Embedded
from interlock.core.errors import InsufficientCapacity, InUse, Invalid, NameTaken
from interlock.core.operations import Operation
from interlock.core.records import Admitted, Change, Event, Instance
from interlock.hypervisors.simulated import SimulatedHost
from interlock.ports import Limits
from interlock.service.request_models import NewInstance, NewVolume
from interlock.service.submission_results import SubmissionResult

O = Operation  # noqa: E741
LIMITS = Limits(memory_mib=1024, vcpus=8, disk_mib=4096)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Embedded]:
    embedded = Limited(tmp_path / "data", SimulatedHost())
    await embedded.start()
    yield embedded
    await embedded.server.close()


class Limited(Embedded):
    """A server on a host with room for little."""

    async def start(self) -> None:
        await super().start()
        self.server.capacity._limits = LIMITS


async def create(house: Embedded, name: str, memory_mib: int = 256, **more: object) -> SubmissionResult:
    wish = msgspec.convert({"name": name, "image": IMAGE.name, "memory_mib": memory_mib, **more}, NewInstance)
    answer = await house.server.instances.create(house.caller, wish)
    if isinstance(answer.disposition, Admitted):
        await house.ended(answer.disposition.request)
    return answer


async def free_mib(house: Embedded) -> int | None:
    return (await house.server.capacity.occupancy()).free.memory_mib


async def test_what_does_not_fit_is_refused_with_what_is_free_and_nothing_is_made(house: Embedded) -> None:
    await create(house, "one", 768)
    with pytest.raises(InsufficientCapacity) as refusal:
        await create(house, "two", 512)
    assert refusal.value.message == ("two does not fit on the host here: needs 512 MiB of memory, 256 MiB free.")
    assert (refusal.value.needed, refusal.value.free) == ({"memory_mib": 512}, {"memory_mib": 256})
    assert await house.server.store.instance_named("default", "two") is None
    await create(house, "two", 256)


async def test_every_shortage_is_named(house: Embedded) -> None:
    with pytest.raises(InsufficientCapacity) as refusal:
        await create(house, "big", 2048, vcpus=9)
    assert refusal.value.needed == {"memory_mib": 2048, "vcpus": 9}


async def test_two_who_ask_at_once_do_not_both_get_the_last_room(house: Embedded) -> None:
    answers = await asyncio.gather(*(create(house, f"vm{n}", 200) for n in range(20)), return_exceptions=True)
    made = [answer for answer in answers if isinstance(answer, SubmissionResult)]
    refused = [answer for answer in answers if isinstance(answer, InsufficientCapacity)]
    assert (len(made), len(refused)) == (5, 15)
    assert await free_mib(house) == 24


async def test_what_is_deleted_gives_its_room_back_and_what_is_stopped_keeps_it(house: Embedded) -> None:
    vm = (await create(house, "one", 1024)).instance.id
    await house.carry_out(vm, O.STOP)
    assert await free_mib(house) == 0
    await house.carry_out(vm, O.DELETE)
    assert await free_mib(house) == 1024
    await create(house, "again", 1024)


async def test_a_creation_that_fails_for_another_reason_holds_no_room(house: Embedded) -> None:
    await create(house, "one", 256)
    for _ in range(5):
        with pytest.raises(NameTaken):
            await create(house, "one", 512)
    assert await free_mib(house) == 768


async def test_a_restarted_server_counts_what_there_is(house: Embedded) -> None:
    await create(house, "one", 768)
    await house.server.inventory.make_volume(house.caller, NewVolume(name="data", size_mib=100))
    await house.crash()
    await house.start()
    stands = await house.server.capacity.occupancy()
    assert (stands.claimed.memory_mib, stands.claimed.disk_mib, stands.guests) == (768, 100, 1)
    with pytest.raises(InsufficientCapacity):
        await create(house, "two", 512)


async def test_a_volume_takes_of_the_disk_and_gives_it_back(house: Embedded) -> None:
    inventory = house.server.inventory
    await inventory.make_volume(house.caller, NewVolume(name="data", size_mib=4000))
    with pytest.raises(InsufficientCapacity) as refusal:
        await inventory.make_volume(house.caller, NewVolume(name="more", size_mib=100))
    assert refusal.value.free == {"disk_mib": 96}
    assert [volume.name for volume in await inventory.volumes(house.caller)] == ["data"]
    await inventory.delete_volume(house.caller, "data")
    await inventory.make_volume(house.caller, NewVolume(name="more", size_mib=100))


async def test_the_disk_keeps_a_free_part_for_real(house: Embedded) -> None:
    house.server.capacity._limits = Limits(disk_reserved_mib=1 << 40)
    with pytest.raises(InsufficientCapacity) as refusal:
        await create(house, "one", 64, root_gib=1)
    assert "no space left" in refusal.value.message
    await create(house, "two", 64)


async def test_a_port_that_another_instance_has_is_refused_before_it_is_started(house: Embedded) -> None:
    forwards = ({"host_port": 2222, "guest_port": 22},)
    vm = (await create(house, "one", 64, forwards=forwards)).instance.id
    with pytest.raises(InUse) as refusal:
        await create(house, "two", 64, forwards=forwards)
    assert "2222" in refusal.value.message
    await house.carry_out(vm, O.DELETE)
    await create(house, "two", 64, forwards=forwards)


async def test_a_port_that_is_named_twice_is_refused_before_anything_is_made(house: Embedded) -> None:
    forwards = ({"host_port": 2222, "guest_port": 22}, {"host_port": 2222, "guest_port": 80})
    with pytest.raises(Invalid, match="duplicate host_port"):
        await create(house, "one", 64, forwards=forwards)
    assert await house.server.store.instance_named("default", "one") is None


async def test_what_moved_to_another_host_leaves_its_room(house: Embedded) -> None:
    vm = (await create(house, "one", 1024)).instance.id

    def moved(one: Instance, now_ms: int) -> Change[None]:
        away = msgspec.structs.replace(one, host="there", generation=one.generation + 1)
        event = Event(
            kind="instance.state",
            instance_id=one.id,
            at_ms=now_ms,
            generation=away.generation,
            data={"vm_state": "active", "before": "active"},
        )
        return Change(instance=away, events=(event,), answer=None)

    await house.server.store.change(vm, moved)
    assert await free_mib(house) == 1024
