"""A host in a namespace of its own, and networks of it."""

from __future__ import annotations

import copy
import itertools
import os
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from interlock.core.networks import Network, NetworkKind, Subnet
from interlock.core.specs import Forward, Image, Interface, Spec
from interlock.networks import router_settings
from interlock.networks.host_networks import HostNetworks
from networks.namespaces import Guest, Namespace, processes_with

if os.geteuid() != 0:
    collect_ignore_glob = ["test_*.py"]


TAGS = (f"t{number:05x}" for number in itertools.count(os.getpid() << 4 & 0xFFFFF))


def lab(number: int = 7, **fields: Any) -> Network:
    """Return a managed network, 10.NUMBER.0.0/24."""
    subnets = (Subnet(prefix=f"10.{number}.0.0/24", gateway=f"10.{number}.0.1"),)
    defaults: dict[str, Any] = {"subnets": subnets, "name": f"lab{number}", "domain": f"lab{number}.internal"}
    return Network(id=f"0191-{number}", kind=NetworkKind.MANAGED, **(defaults | fields))


def interface(number: int, network: Network, **fields: Any) -> Interface:
    """Return an interface with the address and MAC of a number, above 1."""
    subnets = [subnet.gateway[: -len("1")] for subnet in network.subnets]
    addresses = tuple(f"{beginning}{number:x}" if ":" in beginning else f"{beginning}{number}" for beginning in subnets)
    mac = f"52:54:00:00:00:{number:02x}"
    defaults: dict[str, Any] = {"id": "primary", "mac": mac, "network": network, "addresses": addresses}
    return Interface(**(defaults | fields))


def spec(primary: Interface, *interfaces: Interface, forwards: Sequence[Forward] = ()) -> Spec:
    image = Image(id="i", name="i", kind="kernel", path="/i", size_bytes=1, sha256="0" * 64)
    return Spec(image=image, primary=primary, interfaces=interfaces, forwards=tuple(forwards))


class Host:
    """A host in a namespace, with the uplink `up0` to one that stands for the internet.

    Tests run in its namespace. `internet` has 192.0.2.1, the host 192.0.2.2.
    """

    def __init__(self, namespace: Namespace, folder: Path) -> None:
        self.namespace = namespace
        self.tag = next(TAGS)
        self.folder = folder
        self.guests: list[Guest] = []
        self.networks = HostNetworks(self.tag, folder)
        self.internet = Namespace()
        namespace.ip("link add up0 type veth peer name eth0")
        namespace.ip(f"link set eth0 netns /proc/{os.getpid()}/fd/{self.internet.descriptor}")
        for here, link, address in ((namespace, "up0", "192.0.2.2/24"), (self.internet, "eth0", "192.0.2.1/24")):
            here.ip(f"addr add {address} dev {link}")
            here.ip(f"link set {link} up")
        namespace.ip("route add default via 192.0.2.1")

    @classmethod
    def beside(cls, other: Host, folder: Path) -> Host:
        """Return another data folder of the same host."""
        found = copy.copy(other)
        found.tag, found.folder, found.guests = next(TAGS), folder, []
        found.restarted()
        return found

    async def guest(
        self, instance_id: str, interface: Interface, forwards: Sequence[Forward] = (), *, configured: bool = True
    ) -> Guest:
        """Start a guest with one interface, and its addresses if it is `configured`."""
        guest = Guest(await self.networks.plug(instance_id, interface, forwards), interface.mac)
        self.guests.append(guest)
        if configured:
            assert interface.network is not None
            for address, subnet in zip(interface.addresses, interface.network.subnets, strict=False):
                guest.configure(f"{address}/{subnet.prefix.partition('/')[2]}", subnet.gateway)
        return guest

    def end(self, guest: Guest) -> None:
        """End a guest, as its QEMU does."""
        self.guests.remove(guest)
        guest.close()

    def restarted(self) -> HostNetworks:
        """Return the networks as a new server has them before it opens them."""
        self.networks = HostNetworks(self.tag, self.folder)
        return self.networks

    def left(self) -> dict[str, list[str]]:
        """Return what is left on the host that is ours."""
        links = [line.split()[0].partition("@")[0] for line in self.namespace.run("ip", "-br", "link").splitlines()]
        return {
            "links": [name for name in links if name.startswith("il")],
            "tables": self.namespace.run("nft", "list", "tables").splitlines(),
            "processes": [str(found) for found in processes_with(f"--interface=il{self.tag}")],
            "files": [str(path) for path in self.folder.rglob("*")],
            "forwarding": [] if Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "0" else ["ip_forward"],
        }

    async def close(self) -> None:
        await self.networks.close()
        for guest in self.guests:
            guest.close()
        for process in processes_with(f"--interface=il{self.tag}"):
            os.kill(process, signal.SIGKILL)
        self.internet.close()


NOTHING: dict[str, list[str]] = {"links": [], "tables": [], "processes": [], "files": [], "forwarding": []}


@pytest.fixture
def host_namespace() -> Iterator[Namespace]:
    """The test's thread, and what it starts, is in a network namespace of its own."""
    namespace = Namespace()
    with namespace.entered():
        yield namespace
    namespace.close()


@pytest.fixture
async def host(host_namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Host]:
    monkeypatch.setattr(router_settings, "_FOLDER", tmp_path / "forwarding")
    host = Host(host_namespace, tmp_path / "networks")
    yield host
    await host.close()
