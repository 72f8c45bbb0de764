"""A detach that a real guest does not acknowledge in time, and everything by which it lets go after all.

This nano guest ignores that it is to let go: it does so when the machine is reset, or ends.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from qemu.qmp import QMPClient

from benchmarks.nano_guest import GREETING, Act, nano_guest
from conformance.hypervisor import GivenPermit
from in_process.trusting_verifier import TrustingProver
from interlock.config import Config, DriverConfig
from interlock.core.errors import NotResponding
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder
from interlock.hypervisors.qemu.process.qemu_process import find_in
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.server import Server
from interlock.stores.clock import SystemClock
from waiting import PATIENCE_S

pytestmark = pytest.mark.qemu


async def until(so: Callable[[], bool]) -> None:
    """Return when something holds of which nothing tells."""
    async with asyncio.timeout(PATIENCE_S):
        while not so():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


class House:
    """One server after the other in this process, on one folder, and a client of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.guests = folder / "data" / "guests"
        self.id = ""

    async def open(self) -> None:
        driver = DriverConfig(guest_shutdown_timeout_ms=2_000, guest_shutdown_retry_ms=500, drain_ms=1)
        self.hypervisor = QemuHypervisor(
            QemuSettings(folder=self.guests, detach_timeout_ms=400, qmp_timeout_ms=1_000, display=False)
        )
        config = Config(data_dir=str(self.folder / "data"), driver=driver)
        self.server = Server(config, self.hypervisor, SystemClock(), TrustingProver())
        await self.server.open()
        token = (self.server.folder / "admin.token").read_text().strip()
        transport = httpx.ASGITransport(self.server.app())
        headers = {"Authorization": f"Bearer {token}", "Prefer": "wait=60"}
        self.client = httpx.AsyncClient(
            transport=transport, base_url="http://interlock.test", headers=headers, timeout=PATIENCE_S
        )

    async def close(self) -> None:
        await self.client.aclose()
        await self.server.close()

    async def create(self, name: str) -> dict[str, Any]:
        wish = {"name": name, "image": "nano-ignore", "memory_mib": 64}
        made = (await self.client.post("/v1/instances", json=wish)).json()
        assert made["request"]["status"] == "succeeded", made
        return dict(made["instance"])

    async def carry_out(self, vm: str, operation: str, **parameters: object) -> dict[str, Any]:
        body = {"operation": operation, "parameters": parameters}
        answer = (await self.client.post(f"/v1/instances/{vm}/requests", json=body)).json()
        request: dict[str, Any] = (
            await self.client.get(f"/v1/requests/{answer['request']['id']}", params={"wait": "60s"})
        ).json()
        return request

    async def show(self, vm: str) -> dict[str, Any]:
        return dict((await self.client.get(f"/v1/instances/{vm}")).json())

    async def until_detached(self, vm: str) -> None:
        await self.until(vm, volumes=[], detaching=[])
        events = (await self.client.get(f"/v1/instances/{vm}/events", params={"limit": 500})).json()["items"]
        assert [one["data"] for one in events if one["kind"] == "guest.changed"] == [{"detached": [self.volume]}]

    async def until(self, vm: str, **fields: object) -> None:
        """Return when the VM has these values."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                shown = await self.show(vm)
                if all(shown[name] == value for name, value in fields.items()):
                    return
                query = {"after_generation": shown["generation"], "wait": "5s"}
                await self.client.get(f"/v1/instances/{vm}", params=query)

    def process(self, instance_id: str) -> int | None:
        return find_in(self.guests / "vms" / instance_id / "inside")

    def has_open(self, instance_id: str, path: str) -> bool:
        process = self.process(instance_id)
        places = [] if process is None else list(Path(f"/proc/{process}/fd").iterdir())
        return any(os.path.realpath(place) == os.path.realpath(path) for place in places)

    async def refuse_to_let_go(self) -> None:
        """Have the guest of `web` hold on to a volume."""
        made = (await self.client.post("/v1/volumes", json={"name": "data", "size_mib": 8})).json()
        self.volume: str = made["id"]
        found = await self.server.store.volumes.get(self.volume)
        assert found is not None
        self.path = found.path
        console = self.guests / "vms" / self.id / "console.log"
        await until(lambda: GREETING in console.read_text(errors="replace"))
        assert (await self.carry_out("web", "attach_volume", volume="data"))["status"] == "succeeded"
        ended = await self.carry_out("web", "detach_volume", volume="data")
        assert ended["status"] == "failed", ended
        shown = await self.show("web")
        assert (shown["volumes"], shown["detaching"]) == ([self.volume], [self.volume])
        assert self.has_open(self.id, self.path)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    with tempfile.TemporaryDirectory(prefix="interlock-late-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # noqa: ASYNC240 - QEMU runs as another user if we are root
        one = House(folder)
        await one.open()
        await one.server.store.images.put(nano_guest(folder, Act.IGNORE))
        one.id = (await one.create("web"))["id"]
        try:
            yield one
        finally:
            await one.close()
            for place in (one.guests / "vms").glob("*"):
                process = find_in(place / "inside")
                if process is not None:
                    os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize("restarted", [False, True], ids=["at once", "after a restart"])
@pytest.mark.parametrize("how", ["reset", "stop", "killed"])
async def test_the_record_follows_a_guest_that_lets_go_late(house: House, how: str, restarted: bool) -> None:
    await house.refuse_to_let_go()
    if restarted:
        await house.close()
        await house.open()
    match how:
        case "reset":
            assert (await house.carry_out("web", "reboot", hard=True))["status"] == "succeeded"
        case "stop":
            assert (await house.carry_out("web", "stop"))["status"] == "succeeded"
        case _:
            process = house.process(house.id)
            assert process is not None
            os.kill(process, signal.SIGKILL)
    await house.until_detached("web")
    assert not house.has_open(house.id, house.path)
    if how != "reset":
        assert (await house.carry_out("web", "start"))["status"] == "succeeded"
        assert not house.has_open(house.id, house.path), "the next start plugged it in again"
    await house.create("other")
    assert (await house.carry_out("other", "attach_volume", volume="data"))["status"] == "succeeded"


async def test_a_guest_that_lets_go_while_no_server_is_there_is_followed(house: House) -> None:
    await house.refuse_to_let_go()
    await house.close()
    process = house.process(house.id)
    assert process is not None
    # QEMU takes the disk away as it is reset, and tells nobody but the journal.
    client = QMPClient("web")
    await client.connect(InstanceFolder(house.guests / "vms" / house.id).connect_monitor())
    await client.execute("system_reset")
    await client.disconnect()
    await house.open()
    await house.until_detached("web")
    assert not house.has_open(house.id, house.path)
    assert house.process(house.id) == process


async def test_a_paused_guest_is_not_asked(house: House) -> None:
    await house.client.post("/v1/volumes", json={"name": "data", "size_mib": 8})
    await house.carry_out("web", "attach_volume", volume="data")
    await house.carry_out("web", "pause")
    asked = {"operation": "detach_volume", "parameters": {"volume": "data"}}
    refused = await house.client.post("/v1/instances/web/requests", json=asked)
    assert (refused.status_code, refused.json()["reason"]) == (409, "paused")


async def test_a_command_that_a_frozen_machine_carries_out_late_is_taken_into_the_record(house: House) -> None:
    """QEMU was sent a stop just before it froze, and nobody waits for the answer any more."""
    guest = house.hypervisor.guest(house.id)
    process = house.process(house.id)
    assert guest is not None
    assert process is not None
    os.kill(process, signal.SIGSTOP)
    with pytest.raises(NotResponding):
        await guest.execute(GivenPermit(), "stop")
    os.kill(process, signal.SIGCONT)
    await house.until("web", vm_state="paused")
    assert (await house.carry_out("web", "unpause"))["status"] == "succeeded"
