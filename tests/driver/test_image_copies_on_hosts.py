"""Copies of images on other hosts go when nobody needs them any more, and not before."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from in_process.embedded import IMAGE, Embedded, admitted
from in_process.in_memory_agent import Neighbour
from interlock.core.operations import Operation
from interlock.core.records import Image
from interlock.driver.image_copies import ImageCopies
from interlock.hypervisors.remote.file_cache import FileCache
from interlock.hypervisors.simulated import SimulatedHost
from interlock.service.request_models import NewInstance
from waiting import PATIENCE_S

O = Operation  # noqa: E741
HOUR_MS = 3_600_000


class Yard:
    """A server with one other host, and images by name."""

    def __init__(self, folder: Path) -> None:
        self.house = Embedded(folder / "data", SimulatedHost())
        self.north = Neighbour("north", folder / "north")

    async def image(self, name: str) -> Image:
        image = msgspec.structs.replace(IMAGE, id=name, name=name)
        return await self.house.put_image(image)

    async def create(self, name: str, image: str, host: str = "north") -> str:
        wish = NewInstance(name=name, image=image, host=host)
        answer = await self.house.server.instances.create(self.house.caller, wish)
        assert (await self.house.ended(admitted(answer))).status == "succeeded"
        return answer.instance.id

    def copies(self) -> list[str]:
        return sorted(copy.name.split("-", 1)[1] for copy in self.north.copies.iterdir())

    def age(self, hours: float) -> None:
        """Have all copies been used last so long ago."""
        for copy in self.north.copies.iterdir():
            at = copy.stat().st_mtime - hours * 3600
            os.utime(copy, (at, at))

    async def sweep(self, unused_ms: int = 24 * HOUR_MS) -> None:
        await ImageCopies(self.house.server.store, self.house.server.hosts, unused_ms).sweep()

    async def until(self, so: Callable[[], bool]) -> None:
        """Return when the server's own looking has come to it."""
        async with asyncio.timeout(PATIENCE_S):
            while not so():
                await self.house.server.hosts.remote("north").image_copies()


@pytest.fixture
async def yard(tmp_path: Path) -> AsyncIterator[Yard]:
    one = Yard(tmp_path)
    await one.house.start()
    await one.north.open()
    await one.north.connect(one.house)
    yield one
    await one.north.close()
    await one.house.server.close()


async def test_the_copy_of_a_deleted_image_goes_without_being_told_to(yard: Yard) -> None:
    for name in ("one", "two"):
        await yard.image(name)
        await yard.house.carry_out(await yard.create(name, name), O.DELETE)
    assert yard.copies() == ["one.kernel", "two.kernel"]
    await yard.house.server.inventory.delete_image(yard.house.caller, "one")
    await yard.until(lambda: yard.copies() == ["two.kernel"])


async def test_an_image_that_was_deleted_while_the_host_was_away_goes_when_it_is_back(yard: Yard) -> None:
    await yard.image("one")
    await yard.house.carry_out(await yard.create("vm", "one"), O.DELETE)
    await yard.north.disconnect()
    await yard.house.server.inventory.delete_image(yard.house.caller, "one")
    assert yard.copies() == ["one.kernel"]
    await yard.north.connect(yard.house)
    await yard.until(lambda: yard.copies() == [])


async def test_a_copy_that_no_instance_there_needs_stays_for_its_time_and_then_goes(yard: Yard) -> None:
    await yard.image("one")
    vm = await yard.create("vm", "one")
    yard.age(hours=30)
    await yard.sweep()
    assert yard.copies() == ["one.kernel"], "an instance there needs it, however old it is"
    await yard.house.carry_out(vm, O.DELETE)
    await yard.sweep(unused_ms=0)
    assert yard.copies() == ["one.kernel"], "0: for as long as the server has the image"
    await yard.sweep(unused_ms=31 * HOUR_MS)
    assert yard.copies() == ["one.kernel"]
    await yard.sweep(unused_ms=29 * HOUR_MS)
    assert yard.copies() == []
    await yard.create("again", "one")
    assert yard.copies() == ["one.kernel"], "it is sent again"


async def test_the_instances_of_another_host_do_not_keep_it(yard: Yard) -> None:
    await yard.image("one")
    await yard.create("here", "one", "here")
    await yard.house.carry_out(await yard.create("vm", "one"), O.DELETE)
    yard.age(hours=30)
    await yard.sweep()
    assert yard.copies() == []


async def test_what_comes_to_a_host_keeps_its_image_there(yard: Yard) -> None:
    await yard.image("one")
    await yard.house.carry_out(await yard.create("vm", "one"), O.DELETE)
    vm = await yard.create("here", "one", "here")
    yard.house.host.freeze(vm)
    request = admitted(await yard.house.submit(vm, O.MIGRATE, host="north"))
    yard.age(hours=30)
    await yard.sweep()
    assert yard.copies() == ["one.kernel"]
    yard.house.host.thaw(vm)
    await yard.house.ended(request)


async def test_what_a_guest_there_boots_or_a_disk_is_a_layer_over_never_goes(yard: Yard) -> None:
    """Not even when the server has forgotten all about it."""
    await yard.image("one")
    await yard.house.carry_out(await yard.create("vm", "one"), O.DELETE)
    (copy,) = yard.north.copies.iterdir()
    yard.north.images_in_use = frozenset({str(copy)})
    await yard.house.server.store.images.delete("one")
    yard.age(hours=1000)
    await yard.sweep()
    assert yard.copies() == ["one.kernel"]
    yard.north.images_in_use = frozenset()
    await yard.sweep()
    assert yard.copies() == []


async def test_a_use_begins_the_time_afresh(yard: Yard) -> None:
    await yard.image("one")
    first = await yard.create("vm", "one")
    yard.age(hours=30)
    await yard.create("vm2", "one")
    await yard.house.carry_out(first, O.DELETE)
    await yard.house.carry_out("vm2", O.DELETE)
    await yard.sweep()
    assert yard.copies() == ["one.kernel"]


async def test_what_a_guest_used_until_now_counts_as_used_now(tmp_path: Path) -> None:
    copy = tmp_path / "images" / "copy"
    used = {str(copy)}
    cache = FileCache(tmp_path, None, lambda: used)
    cache.open()
    copy.touch()
    os.utime(copy, (0, 0))
    assert await cache.image_copies() == {}
    used.clear()
    assert (await cache.image_copies())["copy"] < HOUR_MS


async def test_what_is_asked_for_between_listing_and_removing_stays(yard: Yard) -> None:
    """The instance that it is for may be younger than what the server looked at."""
    await yard.image("one")
    await yard.house.carry_out(await yard.create("vm", "one"), O.DELETE)
    host = yard.house.server.hosts.remote("north")
    names = list(await host.image_copies())
    await yard.create("again", "one")
    assert await host.drop_image_copies(names) == ()
    assert yard.copies() == ["one.kernel"]
    names = list(await host.image_copies())
    assert len(await host.drop_image_copies(names)) == 1
