"""Managed networks on a host in a namespace, with guests that are namespaces behind their taps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from pathlib import Path

import pytest
import uvloop

from interlock.core.networks import Network, NetworkKind, Subnet
from interlock.networks.host_networks import HostNetworks
from networks.conftest import NOTHING, TAGS, Host, interface, lab
from networks.namespaces import Namespace
from waiting import eventually

SO_RCVBUFFORCE = 33


async def test_a_guest_gets_its_leased_address_by_dhcp_and_reaches_its_gateway(host: Host) -> None:
    guest = await host.guest("web", interface(5, lab(), hostname="web"), configured=False)

    found = guest.asks_dhcp()

    assert socket.inet_ntoa(found[0]) == "10.7.0.5"
    assert socket.inet_ntoa(found[3]) == "10.7.0.1"
    assert found[15] == b"lab7.internal"
    guest.configure("10.7.0.5/24", "10.7.0.1")
    assert guest.pings("10.7.0.1")


async def test_a_guest_reaches_the_internet_through_translation(host: Host) -> None:
    guest = await host.guest("web", interface(5, lab()))

    with host.internet.serving(80, answer=b""):
        assert guest.reads("192.0.2.1", 80) == b"192.0.2.2"


async def test_nothing_is_left_after_the_last_interface_was_unplugged(host: Host) -> None:
    one = await host.guest("one", interface(5, lab()))
    two = await host.guest("two", interface(6, lab()))
    for instance_id, guest in (("one", one), ("two", two)):
        host.end(guest)
        assert host.left()["processes"]
        await host.networks.unplug(instance_id, "primary")

    assert host.left() == NOTHING


async def test_guests_of_a_network_reach_each_other_and_resolve_their_names(host: Host) -> None:
    one = await host.guest("one", interface(5, lab(), hostname="one"))
    two = await host.guest("two", interface(6, lab(), hostname="two"))

    assert one.resolves("two.lab7.internal", "10.7.0.1") == "10.7.0.6"
    with two.serving(80):
        assert one.reads("10.7.0.6", 80) == b"hello"


def test_networks_are_made_on_the_event_loop_that_a_server_uses(host_namespace: Namespace, tmp_path: Path) -> None:
    networks = HostNetworks(next(TAGS), tmp_path)

    async def make_and_remove() -> None:
        await networks.open({})
        tap = await networks.plug("one", interface(2, lab()))
        host_namespace.run("nft", "flush", "ruleset")
        await eventually(lambda: "masquerade" in host_namespace.run("nft", "list", "ruleset"))
        os.close(tap)
        await networks.unplug("one", "primary")
        await networks.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(make_and_remove())
    assert "il" not in host_namespace.run("ip", "-br", "link")


async def test_an_address_is_served_to_its_next_owner_although_the_former_one_had_a_lease(host: Host) -> None:
    network = lab()
    await host.guest("other", interface(9, network))
    former = await host.guest("former", interface(5, network), configured=False)
    assert former.asks_dhcp()
    host.end(former)
    await host.networks.unplug("former", "primary")

    guest = await host.guest("next", interface(5, network, mac="52:54:00:00:00:66"), configured=False)

    assert socket.inet_ntoa(guest.asks_dhcp()[0]) == "10.7.0.5"


async def test_a_guest_that_nothing_is_leased_to_gets_no_address(host: Host) -> None:
    guest = await host.guest("one", interface(5, lab(), addresses=()), configured=False)

    assert guest.asks_dhcp(within_s=0.5) == {}


async def test_a_name_is_changed_while_the_guest_runs(host: Host) -> None:
    guest = await host.guest("one", interface(5, lab(), hostname="before"))

    await host.networks.update("one", interface(5, lab(), hostname="after"))

    await eventually(lambda: guest.resolves("after.lab7.internal", "10.7.0.1") == "10.7.0.5")
    assert guest.resolves("before.lab7.internal", "10.7.0.1") == ""


async def test_a_name_with_other_characters_than_a_hostname_has_is_left_out(host: Host) -> None:
    guest = await host.guest("one", interface(5, lab(), hostname="a\n10.7.0.1 evil"), configured=False)

    assert guest.asks_dhcp()
    guest.configure("10.7.0.5/24")
    assert guest.resolves("evil", "10.7.0.1") == ""


async def test_the_mtu_of_a_network_is_that_of_bridge_and_taps_and_is_announced(host: Host) -> None:
    network = lab(mtu=1400)
    guest = await host.guest("one", interface(5, network), configured=False)

    links = [line for line in host.namespace.run("ip", "link").splitlines() if f": il{host.tag}" in line]
    assert [line.partition("mtu ")[2].partition(" ")[0] for line in links] == ["1400", "1400"]
    assert guest.asks_dhcp()[26] == (1400).to_bytes(2)
    await host.guest("two", interface(6, network))
    assert "mtu 1400" in host.namespace.run("ip", "link", "show", links[0].split()[1].rstrip(":"))


async def test_a_tap_has_the_mtu_of_its_bridge_so_that_the_bridge_keeps_it(host: Host) -> None:
    host.namespace.ip("link add br0 type bridge")
    host.namespace.ip("link set br0 mtu 9000")
    lan = Network(id="0191-lan", name="lan", kind=NetworkKind.BRIDGE, bridge="br0")

    await host.guest("one", interface(5, lan), configured=False)

    assert "mtu 9000" in host.namespace.run("ip", "link", "show", "br0")
    assert "mtu 9000" in host.namespace.run("ip", "link", "show", "master", "br0")


async def test_bandwidth_is_limited_in_both_directions_and_changed_while_the_guest_runs(host: Host) -> None:
    network = lab(open_outside=True)
    guest = await host.guest("one", interface(5, network, inbound_kbit=2000, outbound_kbit=2000))
    host.internet.ip("route add 10.7.0.0/24 via 192.0.2.2")
    payload = b"x" * 1000

    def burst(sender: socket.socket, receiver: socket.socket, target: str) -> int:
        """Return how many of 400 packets of 1000 bytes arrive."""
        receiver.bind((target, 5000))
        receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4_000_000)
        receiver.settimeout(0.3)
        for _ in range(400):
            sender.sendto(payload, (target, 5000))
        found = 0
        with contextlib.suppress(TimeoutError):
            while receiver.recv(2000):
                found += 1
        return found

    def both() -> tuple[int, int]:
        kind = socket.SOCK_DGRAM
        with guest.opened(kind=kind) as one, host.internet.opened(kind=kind) as other:
            sent = burst(one, other, "192.0.2.1")
        with guest.opened(kind=kind) as one, host.internet.opened(kind=kind) as other:
            return sent, burst(other, one, "10.7.0.5")

    sent, received = both()
    assert 30 < sent < 350
    assert 30 < received < 350
    await host.networks.update("one", interface(5, network))
    assert both() == (400, 400)


async def test_a_bridge_of_the_host_keeps_its_mac_address_when_a_guest_joins_it(host: Host) -> None:
    """Else machines on the LAN would not reach the host until they ask for it anew."""
    mac = "fa:ff:ff:ff:ff:02"
    host.namespace.ip("link add br0 type bridge")
    host.namespace.ip(f"link set up0 address {mac} master br0")
    lan = Network(id="0191-lan", name="lan", kind=NetworkKind.BRIDGE, bridge="br0")
    await host.guest("one", interface(5, lan), configured=False)
    assert mac in host.namespace.run("ip", "link", "show", "br0")


async def test_a_guest_gets_its_ipv6_address_and_its_router_from_the_network(host: Host) -> None:
    network = lab(subnets=(Subnet(prefix="fd00:7::/64", gateway="fd00:7::1"),))
    guest = await host.guest("one", interface(5, network), configured=False)

    assert guest.asks_dhcp6() == "fd00:7::5"
    await eventually(lambda: "default via fe80::" in guest.run("ip", "-6", "route"))


def resolvers_of_this_machine() -> list[str]:
    lines = Path("/etc/resolv.conf").read_text().splitlines()
    return [line.split()[1] for line in lines if line.startswith("nameserver") and ":" not in line]


@pytest.mark.parametrize("outbound", [True, False])
async def test_names_beyond_the_network_are_resolved_by_the_resolver_of_the_host_if_outbound_is_allowed(
    host: Host, outbound: bool
) -> None:
    resolvers = resolvers_of_this_machine()
    if not resolvers:
        pytest.skip("this machine has no resolver with an IPv4 address")
    host.namespace.ip(f"addr add {resolvers[0]}/32 dev lo")  # on the host itself, as systemd-resolved is
    guest = await host.guest("one", interface(5, lab(outbound=outbound)))
    with host.namespace.opened(kind=socket.SOCK_DGRAM) as resolver:
        resolver.bind((resolvers[0], 53))
        resolver.settimeout(0.3 if not outbound else 5)

        def answer() -> None:
            with contextlib.suppress(TimeoutError):
                question, asker = resolver.recvfrom(600)
                head = question[:2] + b"\x81\x80\0\x01\0\x01\0\0\0\0"
                end = question.index(b"\0", 12) + 5
                record = b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04" + socket.inet_aton("203.0.113.9")
                resolver.sendto(head + question[12:end] + record, asker)

        answering = threading.Thread(target=answer)
        answering.start()
        try:
            assert guest.resolves("example.org", "10.7.0.1") == ("203.0.113.9" if outbound else "")
        finally:
            answering.join()
