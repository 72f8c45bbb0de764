"""User networks of real guests: what is out of reach from inside, forwards, and a process that ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

import small_guests
from conformance.hypervisor import GivenPermit, Told
from interlock.core.errors import OperationRejected
from interlock.core.networks import mac_of
from interlock.core.records import Forward, Interface, Spec
from interlock.core.specs import PRIMARY
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.network import passt
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.ports import Stream
from waiting import PATIENCE_S, eventually

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
    pytest.mark.skipif(not passt.is_installed(), reason="passt is not installed"),
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt is not on this system"),
]
PERMIT = GivenPermit()
ONE = "one"
FIRST = Interface(id=PRIMARY, mac=mac_of(ONE))


@pytest.fixture(scope="module")
def spec() -> Spec:
    return small_guests.small_spec()


@pytest.fixture
async def hypervisor(tmp_path: Path) -> AsyncIterator[QemuHypervisor]:
    hypervisor = QemuHypervisor(QemuSettings(folder=tmp_path / "qemu"))
    await hypervisor.open(Told())
    yield hypervisor
    for instance_id in await hypervisor.known():
        await hypervisor.undefine(PERMIT, instance_id)
    await hypervisor.close()


class Shell:
    """The shell on a guest's serial console."""

    def __init__(self, console: Stream) -> None:
        self._console = console
        self._number = 0

    async def run(self, command: str) -> tuple[int, str]:
        """Run a command; return its exit status and what it said."""
        self._number += 1
        begin, end = f"begin-{self._number}", f"end-{self._number}"
        # The shell's echo of the line has quotes where its output has none.
        line = f"echo beg''in-{self._number}; {command} 2>&1; echo en''d-{self._number} $?\n"
        await self._console.write(line.encode())
        found = await self.until(rf"{begin}\r?\n(.*){end} (\d+)\r?\n")
        return int(found[2]), found[1]

    async def until(self, expected: str) -> re.Match[str]:
        found = ""
        async with asyncio.timeout(PATIENCE_S):
            while (match := re.search(expected, found, re.DOTALL)) is None:
                more = await self._console.read()
                assert more, f"the console ended without {expected!r}: {found[-500:]!r}"
                found += more.decode(errors="replace")
        return match

    async def enter(self) -> None:
        """Start the shell once the guest is up."""
        await self.until("interlock-guest: address 10.0.2.15")
        await self._console.write(b"\n")
        await self.until("# ")


async def booted(hypervisor: QemuHypervisor, spec: Spec) -> Shell:
    await hypervisor.define(PERMIT, ONE, spec)
    await hypervisor.power_on(PERMIT, ONE, spec)
    shell = Shell(await hypervisor.open_console(ONE))
    await shell.enter()
    return shell


@asynccontextmanager
async def http_server(address: str) -> AsyncIterator[int]:
    """A service of the host; yields its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nsecret of the host\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, address, 0) as server:
        yield server.sockets[0].getsockname()[1]


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


async def fetched(port: int) -> bytes:
    """What the guest's own HTTP server answers through a forwarded port."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.0\r\n\r\n")
    async with asyncio.timeout(PATIENCE_S):
        answer = await reader.read()
    writer.close()
    return answer


def process_of(hypervisor: QemuHypervisor) -> int:
    process = hypervisor.registry.folder(ONE).network_process(PRIMARY)
    assert process is not None
    return process.process_id


async def restored(hypervisor: QemuHypervisor, former: int, port: int) -> int:
    """Wait for the process that replaces another, and until the guest is reached through it; return its id."""
    await eventually(lambda: process_of(hypervisor) != former)
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(ConnectionError):
                if b"interlock is up" in await fetched(port):
                    return process_of(hypervisor)


async def test_a_guest_is_reached_by_its_forwards_and_reaches_nothing_on_the_hosts_loopback(
    hypervisor: QemuHypervisor, spec: Spec
) -> None:
    first, second = free_port(), free_port()
    forwards = (Forward(host_port=first, guest_port=80),)
    shell = await booted(hypervisor, msgspec.structs.replace(spec, forwards=forwards))
    assert b"interlock is up" in await fetched(first)
    async with http_server("127.0.0.1") as port:
        for address in ("10.0.2.2", "10.0.2.3"):
            status, answer = await shell.run(f"wget -T 2 -qO- http://{address}:{port}/")
            assert status, answer
            assert "secret" not in answer

    more = (*forwards, Forward(host_port=second, guest_port=80))
    for _ in range(2):
        await hypervisor.update_interface(PERMIT, ONE, FIRST, more)
    assert b"interlock is up" in await fetched(second)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = Forward(host_port=other.getsockname()[1], guest_port=80)
        with pytest.raises(OperationRejected, match=f"port {taken.host_port} cannot be forwarded"):
            await hypervisor.update_interface(PERMIT, ONE, FIRST, (*more, taken))
    assert b"interlock is up" in await fetched(second), "the former forwards are back"

    process = process_of(hypervisor)
    os.kill(process, signal.SIGKILL)
    process = await restored(hypervisor, process, first)

    await hypervisor.close()
    os.kill(process, signal.SIGKILL)
    await hypervisor.open(Told())
    process = await restored(hypervisor, process, first)

    await hypervisor.update_interface(PERMIT, ONE, FIRST, ())
    with pytest.raises(ConnectionRefusedError):
        await fetched(first)


async def test_a_guest_does_not_start_while_another_program_has_its_port(
    hypervisor: QemuHypervisor, spec: Spec
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        spec = msgspec.structs.replace(spec, forwards=(Forward(host_port=port, guest_port=80),))
        await hypervisor.define(PERMIT, ONE, spec)
        with pytest.raises(OperationRejected, match=f"port {port} cannot be forwarded") as refused:
            await hypervisor.power_on(PERMIT, ONE, spec)
        assert refused.value.remedy == f"End what listens on 127.0.0.1:{port}, or choose another port."
        assert hypervisor.guest(ONE) is None
