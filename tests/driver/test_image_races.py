"""An image that is deleted while it is given to an instance: one of the two is refused, in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from interlock.config import Config
from interlock.core.errors import InUse, NotFound
from interlock.core.records import Image
from interlock.hypervisors.simulated import SimulatedHost, SimulatedHypervisor
from interlock.ports import Role
from interlock.service.callers import Caller
from interlock.stores.schema import upgrade
from interlock.wiring import DATABASE, Server

ADMIN = Caller(token_id="t", name="admin", role=Role.ADMIN, project="default")
IMAGE = Image(id="im-1", name="debian", kind="disk", path="/nowhere", size_bytes=1 << 20, sha256="0" * 64)


async def test_of_giving_and_deleting_one_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upgrade(tmp_path / DATABASE)
    config = Config(data_dir=str(tmp_path), hypervisor="simulated", host="here")
    server = Server(config, SimulatedHypervisor(SimulatedHost()))
    await server.open()
    store, inventory = server.store, server.inventory
    try:
        await store.put_image(IMAGE)
        async with inventory.giving(IMAGE.id), inventory.giving(IMAGE.id):
            with pytest.raises(InUse, match="being given"):
                await inventory.delete_image(ADMIN, "debian")
        assert (await inventory.find_image(ADMIN, "debian")).id == IMAGE.id

        async def give_meanwhile(image_id: str) -> bool:
            with pytest.raises(NotFound, match="being deleted"):
                await inventory.giving(image_id).__aenter__()
            return await deleting(image_id)

        deleting = store.delete_image
        monkeypatch.setattr(store, "delete_image", give_meanwhile)
        await inventory.delete_image(ADMIN, "debian")
        assert await inventory.images(ADMIN) == ()
        with pytest.raises(NotFound):
            await inventory.giving(IMAGE.id).__aenter__()
    finally:
        await server.close()
