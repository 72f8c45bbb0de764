"""Real guests and their networks, on a host in a network namespace."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

import small_guests
from conformance.hypervisor import GivenPermit, Told
from interlock.core.errors import OperationRejected
from interlock.core.networks import Network, NetworkKind, mac_of
from interlock.core.records import Spec
from interlock.core.specs import PRIMARY, Forward, Interface
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.process.qemu_process import has_ended
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.networks.connections import Names, network_tag
from networks.conftest import NOTHING, Host, host, host_namespace, interface, lab
from networks.namespaces import Namespace
from waiting import eventually

__all__ = ["host", "host_namespace"]
pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces"),
    pytest.mark.skipif(not all(map(shutil.which, ("qemu-system-x86_64", "apt-get"))), reason="QEMU or apt is missing"),
]
PERMIT = GivenPermit()
ONE = "one"


@pytest.fixture(scope="module")
def small_spec() -> Spec:
    return small_guests.small_spec()


class Machine:
    """A hypervisor on the host, and what its guest says."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host = host
        self.settings = QemuSettings(folder=folder / "qemu", accelerator="tcg")
        self.hypervisor = QemuHypervisor(self.settings)
        self.asked = 0

    async def open(self) -> None:
        """Start, as a server does after the end of the one before."""
        self.hypervisor = QemuHypervisor(self.settings)
        await self.hypervisor.open(Told())

    async def start(self, spec: Spec) -> None:
        """Start a guest with another spec; return when it has an address."""
        console = self.settings.folder / "vms" / ONE / "console.log"
        before = console.read_text().count("interlock-guest: address") if console.exists() else 0
        await self.hypervisor.define(PERMIT, ONE, spec)
        await self.hypervisor.power_on(PERMIT, ONE, spec)
        await self.said("interlock-guest: address", before + 1)

    async def said(self, text: str, times: int = 1) -> None:
        console = self.settings.folder / "vms" / ONE / "console.log"
        await eventually(lambda: console.read_text(errors="replace").count(text) >= times)

    async def run(self, command: str) -> bool:
        """Run a command in the guest's shell; return whether it succeeded."""
        self.asked += 1
        console = await self.hypervisor.open_console(ONE)
        # The echo of the line has quotes where the output has none.
        await console.write(f"\n{command}; echo en''d-{self.asked}-$?.\n".encode())
        await self.said(f"end-{self.asked}-")
        await console.close()
        text = (self.settings.folder / "vms" / ONE / "console.log").read_text(errors="replace")
        return f"end-{self.asked}-0." in text

    def left(self) -> dict[str, list[str]]:
        namespace = self.host.namespace
        links = [line.split()[0] for line in namespace.run("ip", "-br", "link").splitlines()]
        return {
            "links": [name for name in links if name.startswith("il")],
            "tables": namespace.run("nft", "list", "tables").splitlines(),
            "files": [str(path) for path in (self.settings.folder / "networks").rglob("*")],
        }


@pytest.fixture
async def machine(host: Host, tmp_path: Path) -> AsyncIterator[Machine]:
    made = Machine(host, tmp_path)
    await made.open()
    yield made
    for instance_id in await made.hypervisor.known():
        await made.hypervisor.undefine(PERMIT, instance_id)
    await made.hypervisor.close()


async def test_a_guest_has_its_leased_address_and_reaches_the_internet_until_it_is_deleted(
    machine: Machine, small_spec: Spec
) -> None:
    spec = msgspec.structs.replace(small_spec, primary=interface(5, lab()))
    await machine.hypervisor.define(PERMIT, ONE, spec)
    await machine.hypervisor.power_on(PERMIT, ONE, spec)
    await machine.said("interlock-guest: address 10.7.0.5")
    with machine.host.internet.serving(80):
        assert await machine.run("nc 192.0.2.1 80 | grep hello")

        await machine.hypervisor.close()
        await machine.open()
        assert await machine.run("nc 192.0.2.1 80 | grep hello"), "a server that starts again keeps the network"

    await move_an_interface(machine)

    await machine.hypervisor.undefine(PERMIT, ONE)
    await eventually(lambda: machine.left() == {name: NOTHING[name] for name in machine.left()})


async def move_an_interface(machine: Machine) -> None:
    """Attach an interface, move it to another network, and detach it; the guest asks for its addresses."""
    hypervisor = machine.hypervisor
    first = interface(9, lab(8), id="second")
    await hypervisor.attach_interface(PERMIT, ONE, first)
    await machine.said("interlock-guest: address 10.8.0.9")
    other = msgspec.structs.replace(interface(9, lab(9)), id="second", mac=first.mac)
    await hypervisor.update_interface(PERMIT, ONE, other, ())
    assert await machine.run("ip addr flush dev eth1; udhcpc -n -q -i eth1 -s /bin/leased")
    await machine.said("interlock-guest: address 10.9.0.9")
    with pytest.raises(OperationRejected, match="cannot be moved between a user network"):
        await hypervisor.update_interface(PERMIT, ONE, Interface(id="second", mac=first.mac), ())
    await hypervisor.detach_interface(PERMIT, ONE, "second")
    assert len(machine.left()["links"]) == 2, "the bridge of the first interface, and its tap"


async def test_a_guest_that_cannot_be_connected_is_not_started_and_leaves_nothing(
    machine: Machine, small_spec: Spec
) -> None:
    machine.host.namespace.ip("addr add 10.7.0.99/24 dev up0")
    spec = msgspec.structs.replace(small_spec, primary=interface(5, lab()))
    await machine.hypervisor.define(PERMIT, ONE, spec)
    with pytest.raises(OperationRejected, match=r"10\.7\.0\.0/24"):
        await machine.hypervisor.power_on(PERMIT, ONE, spec)
    assert not (await machine.hypervisor.inspect(ONE)).disks
    assert machine.left()["links"] == []


async def test_the_network_of_a_guest_that_ended_while_no_server_ran_is_removed(
    machine: Machine, small_spec: Spec
) -> None:
    spec = msgspec.structs.replace(small_spec, primary=interface(5, lab()))
    await machine.hypervisor.define(PERMIT, ONE, spec)
    await machine.hypervisor.power_on(PERMIT, ONE, spec)
    guest = machine.hypervisor.guest(ONE)
    assert guest is not None
    process = guest.process.process_id
    await machine.hypervisor.close()
    os.kill(process, 9)
    await eventually(lambda: has_ended(process))
    taps = Names(network_tag(machine.hypervisor.registry.home.host_id)).taps
    await eventually(lambda: not any(link.startswith(taps) for link in machine.left()["links"]))
    await machine.open()
    await eventually(lambda: machine.left()["links"] == [] and machine.left()["tables"] == [])


async def test_a_guest_on_a_user_network_reaches_the_internet_and_no_address_of_its_host(
    machine: Machine, small_spec: Spec
) -> None:
    """Nor the internet, once its network is closed; its forwards work all the same."""
    forward = Forward(host_port=18_123, guest_port=80)
    closed = Interface(
        id=PRIMARY, mac=mac_of(ONE), network=Network(id="c", name="c", kind=NetworkKind.USER, outbound=False)
    )
    spec = msgspec.structs.replace(small_spec, forwards=(forward,))
    machine.host.namespace.ip("addr add 169.254.169.254/32 dev lo")
    with machine.host.internet.serving(80), machine.host.namespace.serving(80):
        await machine.start(spec)
        assert await machine.run("nc 192.0.2.1 80 | grep hello")
        assert not await machine.run(
            "for one in 192.0.2.2 10.0.2.2 169.254.169.254; do nc -w 1 $one 80 </dev/null; done | grep hello"
        )
        machine.host.namespace.run("nft", "flush", "ruleset")
        await eventually(lambda: "skuid" in machine.host.namespace.run("nft", "list", "ruleset"))
        await machine.hypervisor.power_off(PERMIT, ONE)
        await machine.start(msgspec.structs.replace(spec, primary=closed))
        assert not await machine.run("nc -w 1 192.0.2.1 80 </dev/null | grep hello")
        request = b"GET / HTTP/1.0\r\n\r\n"
        assert b"200 OK" in await asyncio.to_thread(answered, machine.host.namespace, forward.host_port, request)
    await machine.hypervisor.undefine(PERMIT, ONE)
    await eventually(lambda: machine.left()["tables"] == [])


def answered(namespace: Namespace, port: int, request: bytes) -> bytes:
    with namespace.opened() as caller:
        caller.connect(("127.0.0.1", port))
        caller.sendall(request)
        return caller.recv(100)
