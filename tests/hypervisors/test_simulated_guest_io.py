"""What a simulated guest says, echoes and keeps to itself."""

from __future__ import annotations

import struct
import zlib

import pytest

from conformance.hypervisor import GivenPermit, Told
from conformance.simulated_host import IMAGE
from interlock.core.errors import GuestNotFound, OperationRejected
from interlock.core.records import Spec
from interlock.hypervisors.simulated import SimulatedHypervisor
from interlock.hypervisors.simulated.guest import hashed

SPEC = Spec(image=IMAGE)
PERMIT = GivenPermit()


async def running() -> SimulatedHypervisor:
    hypervisor = SimulatedHypervisor()
    await hypervisor.open(Told())
    await hypervisor.define(PERMIT, "one", SPEC)
    await hypervisor.power_on(PERMIT, "one", SPEC)
    return hypervisor


async def test_a_console_echoes_while_the_guest_runs_and_says_what_it_does() -> None:
    hypervisor = await running()
    console = await hypervisor.open_console("one")
    await console.write(b"hello")
    assert await console.read() == b"hello"
    await hypervisor.pause(PERMIT, "one")
    assert await console.read() == b"The guest is paused.\r\n"
    await console.write(b"later")
    await hypervisor.unpause(PERMIT, "one")
    assert await console.read() == b"The guest is running.\r\n"
    assert await console.read() == b"later"
    await hypervisor.reset(PERMIT, "one")
    assert await console.read() == b"The guest starts again.\r\n"
    await hypervisor.power_off(PERMIT, "one")
    assert await console.read() == b"The guest is none.\r\n"
    assert await console.read() == b""
    with pytest.raises(GuestNotFound):
        await console.write(b"anybody?")


async def test_a_console_that_is_closed_ends_for_its_reader_only() -> None:
    hypervisor = await running()
    first, second = await hypervisor.open_console("one"), await hypervisor.open_console("one")
    await first.close()
    assert await first.read() == b""
    await second.write(b"still here")
    assert await second.read() == b"still here"
    hypervisor.crash()
    assert await second.read() == b""


async def test_a_screenshot_is_a_whole_png_and_shows_whether_the_guest_runs() -> None:
    hypervisor = await running()
    picture = await hypervisor.screenshot("one")
    assert struct.unpack(">II", picture[16:24]) == (64, 48)
    data = picture[picture.index(b"IDAT") + 4 :]
    assert len(zlib.decompressobj().decompress(data)) == 48 * (1 + 64 * 3)
    await hypervisor.pause(PERMIT, "one")
    assert await hypervisor.screenshot("one") != picture


async def test_a_password_is_kept_as_a_system_keeps_it() -> None:
    hypervisor = await running()
    await hypervisor.set_password(PERMIT, "one", "ada", "word")
    guest = hypervisor.host.guests["one"]
    assert guest.passwords == {"ada": hashed("one", "ada", "word")}
    assert "word" not in guest.passwords["ada"]
    guest.has_agent = False
    assert not await hypervisor.agent_answers("one")
    with pytest.raises(OperationRejected, match="agent"):
        await hypervisor.set_password(PERMIT, "one", "ada", "other")
