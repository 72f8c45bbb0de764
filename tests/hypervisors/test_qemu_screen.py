"""A guest's screen on real QEMU: a picture, VNC, and words where there is none."""

from __future__ import annotations

import asyncio
import shutil
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from conformance.hypervisor import GivenPermit, Told
from conformance.qemu_workbench import QemuWorkbench
from interlock.core.errors import GuestNotFound, OperationRejected
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.ports import Stream
from waiting import PATIENCE_S

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]

PERMIT = GivenPermit()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[QemuWorkbench]:
    host = QemuWorkbench(tmp_path)
    host.settings = msgspec.structs.replace(host.settings, display=True)
    yield host
    host.end_everything()


@pytest.fixture
async def hypervisor(host: QemuWorkbench) -> AsyncIterator[QemuHypervisor]:
    hypervisor = host.make()
    assert isinstance(hypervisor, QemuHypervisor)
    await hypervisor.open(Told())
    await hypervisor.define(PERMIT, "one", host.spec())
    await hypervisor.power_on(PERMIT, "one", host.spec())
    yield hypervisor
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()


async def read_bytes(stream: Stream, count: int) -> bytes:
    found = b""
    async with asyncio.timeout(PATIENCE_S):
        while len(found) < count:
            piece = await stream.read()
            assert piece, "the connection ended"
            found += piece
    return found


async def test_a_screenshot_is_a_png(hypervisor: QemuHypervisor) -> None:
    for _ in range(2):
        picture = await hypervisor.screenshot("one")
        assert picture.startswith(b"\x89PNG\r\n\x1a\n")
        assert picture.endswith(b"IEND\xaeB`\x82")
        width, height = struct.unpack(">II", picture[16:24])
        assert width >= 640
        assert height >= 400
    guest = hypervisor.guest("one")
    assert guest is not None
    before = await guest.query("query-fdsets")
    for _ in range(5):
        await hypervisor.screenshot("one")
    assert await guest.query("query-fdsets") == before, "what was handed over must not pile up"


async def test_vnc_is_spoken_with_any_number_at_once(hypervisor: QemuHypervisor) -> None:
    streams = [await hypervisor.open_display("one") for _ in range(2)]
    for stream in streams:
        assert await read_bytes(stream, 12) == b"RFB 003.008\n"
        await stream.write(b"RFB 003.008\n")
        assert await read_bytes(stream, 2) == b"\x01\x01", "no password: whoever may open it is judged elsewhere"
        await stream.write(b"\x01")
        assert await read_bytes(stream, 4) == bytes(4)
        await stream.write(b"\x01")
        width, height = struct.unpack(">HH", (await read_bytes(stream, 24))[:4])
        assert (width, height) >= (640, 400)
    await streams[0].close()
    await hypervisor.power_off(PERMIT, "one")
    async with asyncio.timeout(PATIENCE_S):
        while await streams[1].read():
            pass
    await streams[1].close()


async def test_a_guest_without_a_screen_says_so(host: QemuWorkbench) -> None:
    host.settings = msgspec.structs.replace(host.settings, display=False)
    hypervisor = host.make()
    await hypervisor.open(Told())
    try:
        with pytest.raises(GuestNotFound):
            await hypervisor.screenshot("one")
        await hypervisor.define(PERMIT, "one", host.spec())
        with pytest.raises(GuestNotFound):
            await hypervisor.open_display("one")
        await hypervisor.power_on(PERMIT, "one", host.spec())
        with pytest.raises(OperationRejected, match="no display"):
            await hypervisor.screenshot("one")
        with pytest.raises(OperationRejected, match="no display"):
            await hypervisor.open_display("one")
    finally:
        await hypervisor.undefine(PERMIT, "one")
        await hypervisor.close()
