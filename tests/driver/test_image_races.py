"""An image that is deleted while it is given to an instance: one of the two is refused, in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from in_process.embedded import IMAGE as IMAGE_OF_ALL
from in_process.embedded import Embedded, admitted
from interlock.config import Config
from interlock.core.errors import InUse, NotFound
from interlock.core.operations import Operation
from interlock.core.records import Image
from interlock.core.roles import Role
from interlock.hypervisors.simulated import SimulatedHost, SimulatedHypervisor
from interlock.server import DATABASE, Server
from interlock.service.auth import Caller
from interlock.stores.schema import upgrade

ADMIN = Caller(token_id="t", name="admin", role=Role.ADMIN, project="default")
IMAGE = Image(id="im-1", name="debian", kind="disk", path="/nowhere", size_bytes=1 << 20, sha256="0" * 64)


async def test_of_giving_and_deleting_one_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upgrade(tmp_path / DATABASE)
    config = Config(data_dir=str(tmp_path), hypervisor="simulated", host="here")
    server = Server(config, SimulatedHypervisor(SimulatedHost()))
    await server.open()
    store, inventory = server.store, server.inventory
    try:
        await store.images.put(IMAGE)
        async with inventory.giving(IMAGE.id), inventory.giving(IMAGE.id):
            with pytest.raises(InUse, match="in use by a new VM"):
                await inventory.delete_image(ADMIN, "debian")
        assert (await inventory.find_image(ADMIN, "debian")).id == IMAGE.id

        async def give_meanwhile(image_id: str) -> bool:
            with pytest.raises(NotFound, match="being deleted"):
                await inventory.giving(image_id).__aenter__()
            return await deleting(image_id)

        deleting = store.images.delete
        monkeypatch.setattr(store.images, "delete", give_meanwhile)
        await inventory.delete_image(ADMIN, "debian")
        assert await inventory.images(ADMIN) == ()
        with pytest.raises(NotFound):
            await inventory.giving(IMAGE.id).__aenter__()
    finally:
        await server.close()


DISK = Image(id="disk-image", name="disk", kind="disk", path="/nowhere", size_bytes=1 << 30, sha256="0" * 64)


async def test_only_what_ended_requests_have_left_is_swept(house: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an image that an instance is shelved as, nor one that is being made, nor what is younger than the record."""
    await house.put_image(DISK)
    shelved = await house.create("shelved", image="disk")
    kept = await house.carry_out(shelved, Operation.SHELVE)
    left = await house.carry_out(await house.create("left"), Operation.STOP)
    vm = await house.create("busy")
    house.host.freeze(vm)
    busy = admitted(await house.submit(vm, Operation.PAUSE))
    inventory, discarded = house.server.inventory, list[str]()

    async def ids() -> set[str]:
        return {DISK.id, kept.id, left.id, busy.id, "unknown"}

    async def discard(image_id: str) -> None:
        discarded.append(image_id)

    monkeypatch.setattr(inventory._image_files, "ids", ids)
    monkeypatch.setattr(inventory._image_files, "discard", discard)
    monkeypatch.setattr("interlock.service.inventory.every_instance", None)  # a fleet is not read for this
    await inventory.sweep()
    assert discarded == [left.id]
    house.host.thaw(vm)


async def test_an_image_goes_when_the_last_that_needs_it_has_gone(
    house: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.put_image(DISK)
    inventory, vm = house.server.inventory, await house.create("web", image="disk")
    other = await house.create("rescued")
    await house.carry_out(other, Operation.RESCUE, image="disk")
    await house.carry_out(vm, Operation.DELETE)
    with pytest.raises(InUse, match="in use by the VM rescued"):
        await inventory.delete_image(ADMIN, "disk")
    await house.carry_out(other, Operation.UNRESCUE)
    monkeypatch.setattr("interlock.service.inventory.every_instance", None)  # a fleet is not read for this
    await inventory.delete_image(ADMIN, "disk")
    assert [image.id for image in await inventory.images(ADMIN)] == [IMAGE_OF_ALL.id]
