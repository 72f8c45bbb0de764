"""Guests that go from host to host keep their networks: two hosts in network namespaces, and a LAN that they share."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import pytest

from interlock.guests.small_guest import build
from networks.namespaces import Namespace
from processes.real_fleet import Fleet
from processes.real_server import guests_in
from processes.slow_link import SlowLink
from small_guests import packages_folder
from waiting import until

NEEDED = ("qemu-system-x86_64", "apt-get", "apt-cache", "dpkg-deb", "dnsmasq", "nft")
pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces"),
    pytest.mark.skipif(not all(map(shutil.which, NEEDED)), reason="QEMU, apt, dnsmasq or nft is missing"),
]
MAC: Final = "52:54:00:00:00:32"
ON_LAN: Final = "192.0.2.50"
IN_LAB: Final = "10.7.0.50"
RARP: Final = 0x8035
_ECHO_EVERY_S: Final = 0.02
_LOST_MAX: Final = 50
NOTHING: Final[dict[str, list[str]]] = {"links": [], "tables": [], "dhcp": [], "guests": []}


def path_of(namespace: Namespace) -> str:
    return f"/proc/{os.getpid()}/fd/{namespace.descriptor}"


def processes_in(namespace: Namespace) -> dict[int, str]:
    """Return the names of the processes in a namespace, by their ids."""
    inside, found = os.fstat(namespace.descriptor).st_ino, {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and (entry / "ns/net").stat().st_ino == inside:
                found[int(entry.name)] = (entry / "comm").read_text().strip()
    return found


class Lan(Namespace):
    """A switch with an address and a DHCP server of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.run("sh", "-c", "echo 0 0 >/proc/sys/net/ipv4/ping_group_range")
        self.ip("link add br0 type bridge")
        self.ip("addr add 192.0.2.1/24 dev br0")
        self.ip("link set br0 up")
        ranges = ("--dhcp-range=192.0.2.0,static", f"--dhcp-host={MAC},{ON_LAN}")
        words = ("dnsmasq", "-k", "-C/dev/null", "--port=0", "-ibr0", "--pid-file=", "--leasefile-ro", *ranges)
        with self.entered():
            self._dhcp = subprocess.Popen(words)

    def connect(self, number: int) -> Namespace:
        """Return a host on the LAN; its bridge is still missing."""
        host = Namespace()
        host.ip(f"link add eth0 type veth peer name lan{number}")
        host.ip(f"link set lan{number} netns {path_of(self)}")
        self.ip(f"link set lan{number} master br0 up")
        host.ip(f"addr add 192.0.2.{number}/24 dev eth0")
        host.ip(f"link set eth0 address fa:00:00:00:00:0{number} up")
        return host

    def announcements(self) -> socket.socket:
        """Return a socket that receives the announcements of guests that have migrated."""
        with self.entered():
            made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(RARP))
            made.bind(("br0", RARP))
        made.settimeout(3)
        return made

    def close(self) -> None:
        self._dhcp.kill()
        self._dhcp.wait()
        super().close()


def add_bridge(host: Namespace, number: int) -> None:
    """Put the host's link to the LAN into the bridge br0."""
    host.ip("link add br0 type bridge")
    host.ip(f"addr del 192.0.2.{number}/24 dev eth0")
    host.ip("link set eth0 master br0")
    host.ip(f"addr add 192.0.2.{number}/24 dev br0")
    host.ip("link set br0 up")


class Pings:
    """Pings an address every 20 ms in the body of a `with`, and counts those that are not answered."""

    def __init__(self, sender: Namespace, address: str) -> None:
        self._address = address
        self._socket = sender.opened(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
        self._socket.setblocking(False)
        self.sent = 0
        self.answered: set[int] = set()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        self._socket.close()

    @property
    def lost(self) -> int:
        return self.sent - len(self.answered)

    def _run(self) -> None:
        while not self._ending.is_set():
            with contextlib.suppress(OSError):  # the address is not resolved
                self._socket.sendto(struct.pack("!BBHHH", 8, 0, 0, 0, self.sent), (self._address, 0))
            self.sent += 1
            self._ending.wait(_ECHO_EVERY_S)
            self._receive()
        time.sleep(0.5)  # the last ones may still be answered
        self._receive()

    def _receive(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.answered.add(struct.unpack("!H", self._socket.recv(100)[6:8])[0])


class Site:
    """A server, and the agents north and south, each in a host of the LAN."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.lan = Lan()
        self.hosts = {"north": self.lan.connect(2), "south": self.lan.connect(3)}
        self._links = contextlib.ExitStack()
        for number, (name, host) in enumerate(self.hosts.items(), start=2):
            url = fleet.server.client.base_url
            listening = host.opened()
            listening.bind(("127.0.0.1", url.port))
            listening.listen()
            self._links.enter_context(SlowLink(str(url), 10**9, listening=listening))
            settings = {
                "INTERLOCK_QEMU_MIGRATION_ADDRESS": f"192.0.2.{number}",
                "INTERLOCK_QEMU_MIGRATION_BYTES_PER_S": str(16 * 1024**2),
            }
            fleet.add(name, settings=settings, namespace=path_of(host))

    def prepare(self) -> None:
        """Add the small guest, a network on the bridge br0 of the hosts, and a managed one."""
        built = build(packages_folder())
        client = self.fleet.server.client
        with built.kernel.open("rb") as kernel, built.initrd.open("rb") as initrd:
            form = {"name": "small", "kind": "kernel", "cmdline": built.cmdline}
            client.post("/v1/images", data=form, files={"kernel": kernel, "initrd": initrd}).raise_for_status()
        lab = {"name": "lab", "subnets": [{"prefix": "10.7.0.0/24"}], "outbound": False}
        for network in ({"name": "lan", "kind": "bridge", "bridge": "br0", "open_outside": True}, lab):
            client.post("/v1/networks", json=network).raise_for_status()

    def left(self, name: str) -> dict[str, list[str]]:
        """Return what a host has of guests and their networks."""
        host, folder = self.hosts[name], self.fleet.agents[name].folder
        links = [line.split()[0] for line in host.run("ip", "-br", "link").splitlines()]
        return {
            "links": [link for link in links if link.startswith("il")],
            "tables": host.run("nft", "list", "tables").splitlines(),
            "dhcp": [name for name in processes_in(host).values() if name == "dnsmasq"],
            "guests": [str(one) for one in guests_in(folder)],
        }

    def until_nothing_is_left(self, name: str) -> None:
        until(lambda: self.left(name) == NOTHING, lambda: self.left(name))

    def boot(self) -> None:
        """Start a guest on the host north; return when it has its addresses."""
        networks = [{"network": "lan", "mac": MAC}, {"network": "lab", "addresses": [IN_LAB]}]
        self.fleet.create("one", "north", image="small", memory_mib=128, networks=networks)
        until(lambda: self.lan.pings(ON_LAN) and self.hosts["north"].pings(IN_LAB))

    def sending(self, target: str) -> str:
        """Begin a live migration; return the id of its request when memory is being sent."""
        request = self.fleet.server.submit("one", "live_migrate", host=target).json()["request"]["id"]
        until(lambda: self.fleet.server.get(f"/v1/requests/{request}")["progress"])
        return str(request)

    def failed(self, operation: str, host: str) -> dict[str, Any]:
        """Ask for a migration that is admitted and fails; return how it ended."""
        answer = self.fleet.server.submit("one", operation, host=host)
        ended = self.fleet.server.ended(answer.json()["request"]["id"])
        assert ended["status"] == "failed", ended
        return ended

    def close(self) -> None:
        for agent in self.fleet.agents.values():
            agent.clear()
        for host in self.hosts.values():
            for process in processes_in(host):
                os.kill(process, signal.SIGKILL)
        self._links.close()
        for namespace in (*self.hosts.values(), self.lan):
            namespace.close()


@pytest.fixture
def site(fleet: Fleet) -> Iterator[Site]:
    made = Site(fleet)
    try:
        made.prepare()
        yield made
    finally:
        made.close()


def test_a_guest_keeps_its_networks_on_another_host_and_its_neighbours_notice_little(site: Site) -> None:
    """Nor does it lose them by a migration that is refused or cancelled."""
    fleet, lan, (north, south) = site.fleet, site.lan, site.hosts.values()
    add_bridge(north, 2)
    site.boot()
    with Pings(lan, ON_LAN) as pings:
        for operation in ("live_migrate", "migrate"):
            message = site.failed(operation, "south")["message"]
            assert "The bridge br0 of the network lan does not exist" in message
        assert site.left("south") == NOTHING
        add_bridge(south, 3)

        request = site.sending("south")
        fleet.server.submit("one", "live_migrate_abort").raise_for_status()
        assert fleet.server.ended(request)["status"] == "cancelled"
        site.until_nothing_is_left("south")
    assert pings.lost == 0, "it was reached all the while"

    with Pings(lan, ON_LAN) as pings, lan.announcements() as announcements:
        fleet.carry_out("one", "live_migrate", host="south")
        announced = announcements.recv(100)
        until(lambda: lan.pings(ON_LAN))
    assert pings.lost <= _LOST_MAX, f"of {pings.sent}"
    assert announced[6:12].hex(":") == MAC
    assert south.pings(IN_LAB)
    site.until_nothing_is_left("north")
    assert len(site.left("south")["links"]) == 3, "two taps, and the bridge of the managed network"


@pytest.mark.long
def test_a_guest_stays_when_its_target_fails_and_has_its_addresses_after_each_way_to_another_host(site: Site) -> None:
    fleet, lan = site.fleet, site.lan
    for number, host in enumerate(site.hosts.values(), start=2):
        add_bridge(host, number)
    site.boot()
    with Pings(lan, ON_LAN) as pings:
        request = site.sending("south")
        for process in fleet.agents["south"].guests():
            os.kill(process, signal.SIGKILL)
        assert fleet.server.ended(request)["status"] == "failed"
        site.until_nothing_is_left("south")
    assert pings.lost == 0, "it was reached all the while"

    ways = (("live_migrate", "south", "north"), ("live_migrate", "north", "south"), ("migrate", "south", "north"))
    for operation, target, source in ways:
        fleet.carry_out("one", operation, host=target)
        until(lambda: lan.pings(ON_LAN))
        until(partial(site.hosts[target].pings, IN_LAB))
        site.until_nothing_is_left(source)
