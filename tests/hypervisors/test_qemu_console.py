"""Consoles and guest agents of real guests: live and logged, typed into, cut while written; asked and frozen."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import small_guests
from benchmarks.nano_guest import GREETING, MEMORY_MIB, nano_guest
from conformance.hypervisor import GivenPermit, Told
from interlock.core.errors import GuestNotFound, OperationRejected
from interlock.core.records import GuestEvent, Spec
from interlock.hypervisors.qemu import guest_agent
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.console import console_log
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.ports import Stream
from waiting import PATIENCE_S

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]
PERMIT = GivenPermit()


async def until(stream: Stream, expected: bytes) -> bytes:
    """What came up to and including what was expected."""
    found = b""
    async with asyncio.timeout(PATIENCE_S):
        while expected not in found:
            more = await stream.read()
            assert more, f"the console ended without {expected!r}: {found[-500:]!r}"
            found += more
    return found


class Host:
    """A QEMU adapter with settings of the test's, one after another."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.hypervisor = QemuHypervisor(QemuSettings(folder=folder))
        self.told = Told()

    async def open(self, **settings: int) -> QemuHypervisor:
        self.hypervisor = QemuHypervisor(QemuSettings(folder=self._folder, **settings))  # type: ignore[arg-type]
        await self.hypervisor.open(self.told)
        return self.hypervisor

    async def boot(self, spec: Spec) -> Stream:
        await self.hypervisor.define(PERMIT, "one", spec)
        await self.hypervisor.power_on(PERMIT, "one", spec)
        return await self.hypervisor.open_console("one")

    @property
    def log(self) -> Path:
        return self.hypervisor.registry.folder("one").console

    async def close(self) -> None:
        for instance_id in await self.hypervisor.known():
            await self.hypervisor.undefine(PERMIT, instance_id)
        await self.hypervisor.close()


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    host = Host(tmp_path / "qemu")
    yield host
    await host.close()


@pytest.fixture
def nano(tmp_path: Path) -> Spec:
    return Spec(image=nano_guest(tmp_path), memory_mib=MEMORY_MIB)


@pytest.fixture(scope="module")
def small() -> Spec:
    if not all(map(shutil.which, ("apt-get", "apt-cache", "dpkg-deb"))):
        pytest.skip("apt is not on this system")
    return small_guests.small_spec()


async def test_the_console_is_logged_also_while_nobody_looks_on(host: Host, nano: Spec) -> None:
    hypervisor = await host.open()
    stream = await host.boot(nano)
    await until(stream, GREETING.encode())
    await stream.close()
    await hypervisor.reset(PERMIT, "one")
    again = await hypervisor.open_console("one")
    await hypervisor.reset(PERMIT, "one")
    await until(again, GREETING.encode())
    await hypervisor.power_off(PERMIT, "one")
    assert host.log.read_text(errors="replace").count(GREETING) >= 2
    with pytest.raises(GuestNotFound):
        await hypervisor.open_console("one")


async def test_a_console_ends_with_its_guest(host: Host, nano: Spec) -> None:
    hypervisor = await host.open()
    stream = await host.boot(nano)
    reading = asyncio.create_task(until(stream, b"never said"))
    await hypervisor.power_off(PERMIT, "one")
    with pytest.raises(AssertionError, match="ended without"):
        await reading


async def test_qemu_appends_to_the_log_so_that_it_can_be_cut_under_it(host: Host, nano: Spec) -> None:
    hypervisor = await host.open()
    stream = await host.boot(nano)
    await until(stream, b"started with")
    assert console_log.truncate(host.log, 1)
    await hypervisor.reset(PERMIT, "one")
    await until(stream, b"started with")
    await hypervisor.power_off(PERMIT, "one")
    said = host.log.read_bytes()
    assert GREETING.encode() in said
    assert b"\0" not in said


async def test_a_guest_that_floods_its_console_neither_fills_the_disk_nor_stops(host: Host, small: Spec) -> None:
    hypervisor = await host.open(
        console_bytes_max=65_536, console_check_interval_ms=100, console_reader_bytes_max=9_000
    )
    stream = await host.boot(small)
    await until(stream, b"agent listens")
    await stream.write(b"\n")
    await until(stream, b"# ")
    await stream.write(
        b"i=0; while [ $i -lt 12000 ]; do i=$((i+1)); echo line $i of the flood; done; echo it is $((6*7))\n"
    )
    slow = await hypervisor.open_console("one")
    largest = 0
    said = b""
    async with asyncio.timeout(PATIENCE_S * 2):
        while b"it is 42" not in said[-1000:]:
            said += await stream.read()
            older = host.log.with_name("console.log.1")
            kept = host.log.stat().st_size + (older.stat().st_size if older.exists() else 0)
            largest = max(largest, kept)
    # 65,536 bytes and half of that beside it, and what is written between two looks: less than 1 MB/s.
    assert 65_536 < largest < 65_536 * 1.5 + 200_000
    assert len(said) > 200_000
    assert b"bytes of the console were dropped here" in await slow.read()


async def test_what_is_typed_reaches_the_guest_and_what_many_see_is_the_same(host: Host, small: Spec) -> None:
    hypervisor = await host.open()
    stream = await host.boot(small)
    other = await hypervisor.open_console("one")
    await until(stream, b"agent listens")
    await stream.write(b"\n")
    await until(other, b"# ")
    await other.write(b"echo $((6 * 7)) is what was typed\n")
    await until(stream, b"42 is what was typed")
    await until(other, b"42 is what was typed")


async def test_the_agent_of_a_real_guest_is_asked(host: Host, small: Spec) -> None:
    hypervisor = await host.open()
    stream = await host.boot(small)
    assert not await hypervisor.agent_answers("two")
    await until(stream, b"agent listens")
    assert await hypervisor.agent_answers("one")
    await hypervisor.set_password(PERMIT, "one", "root", "secret")
    await until(stream, b"password of root set")
    with pytest.raises(OperationRejected, match="no such user"):
        await hypervisor.set_password(PERMIT, "one", "nobody", "secret")
    guest = hypervisor.guest("one")
    assert guest is not None
    async with guest_agent.frozen(guest, PERMIT) as still:
        assert still
        await until(stream, b"guest: frozen")
    await until(stream, b"guest: thawed")
    await hypervisor.ask_shutdown(PERMIT, "one")
    await until(stream, b"agent powerdown")
    async with asyncio.timeout(PATIENCE_S):
        await hypervisor.wait_powered_off("one")
    assert host.told.events[-1].kind is GuestEvent.STOPPED


async def test_a_guest_that_was_frozen_when_we_were_killed_is_thawed_by_the_next(host: Host, small: Spec) -> None:
    hypervisor = await host.open()
    stream = await host.boot(small)
    await until(stream, b"agent listens")
    guest = hypervisor.guest("one")
    assert guest is not None
    # As it is left by a kill in the midst: frozen, noted, and nobody there to thaw.
    guest.folder.note_frozen()
    _, writer = await asyncio.open_unix_connection(sock=guest.folder.connect("agent"))
    writer.write(b'{"execute": "guest-fsfreeze-freeze"}\n')
    await until(stream, b"guest: frozen")
    writer.close()
    await hypervisor.close()
    later = await host.open()
    found = await later.open_console("one")
    await found.write(b"\n")
    await until(found, b"# ")
    await found.write(b"while [ -e /run/frozen ]; do sleep 0.1; done; echo $((6 * 7)) is thawed\n")
    await until(found, b"42 is thawed")
    async with asyncio.timeout(PATIENCE_S):
        await later.agent_answers("one")
    assert not guest.folder.is_noted_frozen()


async def test_a_guest_without_an_agent_is_asked_by_its_power_button_at_once(host: Host, nano: Spec) -> None:
    hypervisor = await host.open(agent_timeout_ms=60_000)
    stream = await host.boot(nano)
    await until(stream, b"started with")
    async with asyncio.timeout(PATIENCE_S):
        assert not await hypervisor.agent_answers("one")
        await hypervisor.ask_shutdown(PERMIT, "one")
        await hypervisor.wait_powered_off("one")
    await hypervisor.reset(PERMIT, "one")
    with pytest.raises(OperationRejected, match="No guest agent"):
        await hypervisor.set_password(PERMIT, "one", "root", "secret")
