"""A real Linux goes to another host as it runs: it is the same one there, with its disk and its network."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from conformance.hypervisor import GivenPermit
from conformance.qemu_workbench import QemuWorkbench, opened, two_benches
from interlock.core.errors import HypervisorError
from interlock.core.records import Forward, Spec
from interlock.core.states import PowerState
from interlock.guests.small_guest import build
from interlock.images.image_folder import ImageFolder
from small_guests import packages_folder
from waiting import PATIENCE_S

NEEDED = ("qemu-system-x86_64", "apt-get", "apt-cache", "dpkg-deb")
pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not all(map(shutil.which, NEEDED)), reason="QEMU or apt is not on this system"),
]
PERMIT = GivenPermit()
STALL_MS = 2_000


@pytest.fixture
def benches(tmp_path: Path) -> Iterator[tuple[QemuWorkbench, QemuWorkbench]]:
    with two_benches(tmp_path) as pair:
        for bench in pair:
            bench.settings = replace(bench.settings, memory_stall_timeout_ms=STALL_MS, copy_silence_timeout_ms=STALL_MS)
        yield pair


class Journey:
    """A small guest that runs on the first host and is awaited on the second, where another port leads to it.

    Both hosts are one machine here, and its loopback address has each port once.
    """

    def __init__(self, benches: tuple[QemuWorkbench, QemuWorkbench], spec: Spec, ports: tuple[int, int]) -> None:
        self.benches = benches
        self.ports = ports
        self.specs = [replace(spec, forwards=(Forward(host_port=port, guest_port=80),)) for port in ports]
        self.moved = asyncio.Event()
        """Set once some of it was sent."""

    async def begin(self) -> None:
        self.here, self.there = [await opened(bench) for bench in self.benches]
        await self.here.define(PERMIT, "one", self.specs[0])
        await self.here.power_on(PERMIT, "one", self.specs[0])
        await self.ask("status")

    async def awaited(self) -> None:
        await self.there.define(PERMIT, "one", self.specs[1])
        kind = await self.here.machine_kind("one")
        self.passage = await self.there.receive_guest(PERMIT, "one", self.specs[1], kind)

    async def send(self) -> None:
        await self.here.send_guest(PERMIT, "one", self.passage, 0, self._report)

    def _report(
        self, done: int, total: int | None = None, *, detail: str | None = None, warning: str | None = None
    ) -> None:
        self.moved.set()

    async def ask(self, path: str, host: int = 0) -> httpx.Response:
        """What the guest answers on that host's port, as soon as it does."""
        async with asyncio.timeout(PATIENCE_S), httpx.AsyncClient(timeout=5) as client:
            while True:
                try:
                    return await client.get(f"http://127.0.0.1:{self.ports[host]}/cgi-bin/{path}")
                except httpx.TransportError:
                    await asyncio.sleep(0.1)  # it boots

    async def status(self, host: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = (await self.ask("status", host)).json()
        return found


@pytest.fixture
async def journey(
    benches: tuple[QemuWorkbench, QemuWorkbench], tmp_path: Path, unused_tcp_port_factory: Any
) -> AsyncIterator[Journey]:
    image = await ImageFolder(tmp_path / "images", small_guest=partial(build, packages_folder())).build_small(
        "small", "small"
    )
    spec = Spec(image=image, memory_mib=128, root_gib=1)
    made = Journey(benches, spec, (unused_tcp_port_factory(), unused_tcp_port_factory()))
    await made.begin()
    yield made
    for hypervisor in (made.here, made.there):
        await hypervisor.undefine(PERMIT, "one")
        await hypervisor.close()


async def test_it_is_the_same_guest_with_its_disk_and_its_network(journey: Journey) -> None:
    before = await journey.status()
    await journey.ask("write?precious")
    await journey.awaited()
    await journey.send()
    await journey.there.await_guest("one")
    await journey.there.complete_incoming(PERMIT, "one")
    await journey.here.undefine(PERMIT, "one")
    after = await journey.status(1)
    assert after["boot_id"] == before["boot_id"]
    assert after["counter"] > before["counter"]
    assert before["uptime_s"] < after["uptime_s"]
    assert (await journey.ask("read", 1)).text.strip() == "precious"
    await journey.ask("write?later", 1)
    assert (await journey.ask("read", 1)).text.strip() == "later"
    await journey.there.power_off(PERMIT, "one")
    await journey.there.power_on(PERMIT, "one", journey.specs[1])
    assert (await journey.ask("read", 1)).text.strip() == "later"


async def test_one_that_dirties_its_memory_arrives_when_it_is_hurried(journey: Journey) -> None:
    before = await journey.status()
    await journey.ask("dirty-memory")
    await journey.awaited()
    sending = asyncio.create_task(journey.send())
    async with asyncio.timeout(PATIENCE_S):
        await journey.moved.wait()
    await journey.here.force_converge(PERMIT, "one")
    async with asyncio.timeout(PATIENCE_S):
        await sending
    await journey.there.await_guest("one")
    await journey.there.complete_incoming(PERMIT, "one")
    await journey.here.undefine(PERMIT, "one")
    assert (await journey.status(1))["boot_id"] == before["boot_id"]


@pytest.mark.parametrize(
    ("when", "why"),
    [
        ("at the beginning", "did not respond within 1000 ms"),
        # Which of the two limits is over first depends on what was being asked of it at that moment.
        ("on the way", f"made no progress for {STALL_MS} ms|did not respond"),
    ],
)
async def test_a_target_that_stalls_leaves_the_guest_running_here(journey: Journey, when: str, why: str) -> None:
    """It is given up by the limit that has its name."""
    before = await journey.status()
    await journey.awaited()
    target = journey.benches[1].process_id("one")
    if when == "on the way":
        await journey.ask("dirty-memory")
    else:
        os.kill(target, signal.SIGSTOP)
    sending = asyncio.create_task(journey.send())
    try:
        if when == "on the way":
            async with asyncio.timeout(PATIENCE_S):
                await journey.moved.wait()
            os.kill(target, signal.SIGSTOP)
        with pytest.raises(HypervisorError, match=why):
            async with asyncio.timeout(PATIENCE_S):
                await sending
        await journey.here.resume_source(PERMIT, "one")
        assert (await journey.here.inspect("one")).power_state is PowerState.RUNNING
        after = await journey.status()
        assert after["boot_id"] == before["boot_id"]
    finally:
        os.kill(target, signal.SIGCONT)
