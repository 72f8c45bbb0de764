"""What the packet filter lets pass, with guests that are namespaces behind their taps."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator

import msgspec
import pytest

from interlock.core.networks import IngressRule, Network, NetworkKind, Subnet
from interlock.core.specs import Forward
from networks.conftest import Host, interface, lab
from networks.namespaces import Guest, Namespace
from waiting import eventually

GUEST, NEIGHBOR, GATEWAY = "10.7.0.5", "10.7.0.6", "10.7.0.1"
BROADCAST = b"\xff" * 6


def octets(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def udp(source: str, target: str, source_port: int, target_port: int, data: bytes = b"spoof") -> bytes:
    """Return an IPv4 packet without checksum of UDP."""
    body = struct.pack("!HHHH", source_port, target_port, 8 + len(data), 0) + data
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, 17, 0) + addresses
    total = sum(struct.unpack("!10H", head))
    total = (total >> 16) + (total & 0xFFFF)
    return head[:10] + struct.pack("!H", ~total & 0xFFFF) + head[12:] + body


def arp(mac: bytes, address: str, target: str = NEIGHBOR) -> bytes:
    return (
        struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
        + mac
        + socket.inet_aton(address)
        + bytes(6)
        + socket.inet_aton(target)
    )


def icmp6(kind: int, source: str, rest: bytes) -> bytes:
    """Return an ICMPv6 message to all nodes, with its checksum."""
    target = socket.inet_pton(socket.AF_INET6, "ff02::1")
    addresses = socket.inet_pton(socket.AF_INET6, source) + target
    body = struct.pack("!BBH", kind, 0, 0) + rest
    words = addresses + struct.pack("!II", len(body), 58) + body
    total = sum(struct.unpack(f"!{len(words) // 2}H", words))
    while total >> 16:
        total = (total >> 16) + (total & 0xFFFF)
    body = struct.pack("!BBH", kind, 0, ~total & 0xFFFF) + rest
    return struct.pack("!IHBB", 6 << 28, len(body), 58, 255) + addresses + body


OWN, OTHER = octets("52:54:00:00:00:05"), octets("52:54:00:00:00:09")
LINK_LOCAL = socket.inet_pton(socket.AF_INET6, "fe80::5054:ff:fe00:5")
ROUTER = socket.inet_pton(socket.AF_INET6, "fe80::1")

ALLOWED = {
    "an ARP request of its own": (OWN, 0x0806, arp(OWN, GUEST)),
    "an ARP probe": (OWN, 0x0806, arp(OWN, "0.0.0.0")),
    "RARP, by which QEMU announces it": (OWN, 0x8035, arp(OWN, "0.0.0.0")),
    "UDP from its address": (OWN, 0x0800, udp(GUEST, NEIGHBOR, 1000, 1000)),
    "a neighbor advertisement of its own": (
        *(OWN, 0x86DD),
        icmp6(136, "fe80::5054:ff:fe00:5", bytes(4) + LINK_LOCAL + b"\x02\x01" + OWN),
    ),
}
SPOOFED = {
    "another MAC address": (OTHER, 0x0800, udp(GUEST, NEIGHBOR, 1000, 1000)),
    "another IPv4 address": (OWN, 0x0800, udp("10.7.0.9", NEIGHBOR, 1000, 1000)),
    "the gateway's address": (OWN, 0x0800, udp(GATEWAY, NEIGHBOR, 1000, 1000)),
    "another MAC address in ARP": (OWN, 0x0806, arp(OTHER, GUEST)),
    "another address in ARP": (OWN, 0x0806, arp(OWN, GATEWAY)),
    "answers of a DHCP server": (OWN, 0x0800, udp(GUEST, "255.255.255.255", 67, 68)),
    "frames of a VLAN": (OWN, 0x8100, struct.pack("!HH", 5, 0x0800) + udp(GUEST, NEIGHBOR, 1000, 1000)),
    "other protocols": (OWN, 0x88CC, b"spoof" * 10),
    "another IPv6 address": (OWN, 0x86DD, icmp6(128, "fe80::9", b"spoof!!!")),
    "advertisements of a router": (OWN, 0x86DD, icmp6(134, "fe80::5054:ff:fe00:5", bytes(12))),
    "a neighbor advertisement of another": (
        *(OWN, 0x86DD),
        icmp6(136, "fe80::5054:ff:fe00:5", bytes(4) + ROUTER + b"\x02\x01" + OWN),
    ),
}


@contextlib.contextmanager
def watched(guest: Guest) -> Iterator[socket.socket]:
    with guest.frames("eth0") as seen:
        yield seen


def arrived(seen: socket.socket, last: bytes) -> list[bytes]:
    """Return the frames until the last one."""
    found: list[bytes] = []
    while not found or found[-1] != last:
        found.append(seen.recv(2000))
    return found


async def test_a_guest_cannot_send_with_addresses_or_as_a_server_that_it_is_not(host: Host) -> None:
    guest = await host.guest("one", interface(5, lab()))
    neighbor = await host.guest("two", interface(6, lab()))
    last = BROADCAST + OWN + struct.pack("!H", 0x0800) + udp(GUEST, NEIGHBOR, 2000, 2000)

    with guest.frames("eth0") as sender, watched(neighbor) as seen:
        for source, kind, packet in [*SPOOFED.values(), *ALLOWED.values()]:
            sender.send(BROADCAST + source + struct.pack("!H", kind) + packet)
        sender.send(last)
        frames = arrived(seen, last)

    def passed(source: bytes, kind: int, packet: bytes) -> bool:
        return BROADCAST + source + struct.pack("!H", kind) + packet in [frame[: 14 + len(packet)] for frame in frames]

    assert [name for name, frame in SPOOFED.items() if passed(*frame)] == []
    assert [name for name, frame in ALLOWED.items() if not passed(*frame)] == []


async def test_a_guest_reaches_of_its_host_only_the_services_of_its_gateway(host: Host) -> None:
    guest = await host.guest("one", interface(5, lab(), hostname="one"))
    await host.guest("two", interface(6, lab(8)))
    host.namespace.ip("addr add 169.254.169.254/32 dev lo")
    host.namespace.ip("route add 100.64.0.0/10 via 192.0.2.1")

    assert guest.pings(GATEWAY)
    assert guest.resolves("one.lab7.internal", GATEWAY) == GUEST
    with host.namespace.serving(7420):
        for address in (GATEWAY, "10.8.0.1", "192.0.2.2", "169.254.169.254"):
            assert guest.reads(address, 7420, within_s=0.15) == b"", address
    assert not guest.pings("10.8.0.1", within_s=0.15)
    assert not guest.pings("192.0.2.2", within_s=0.15)
    with host.namespace.serving(7421, "127.0.0.1"):
        guest.ip("route add 127.0.0.2/32 via 10.7.0.1")
        guest.run("sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
        assert guest.reads("127.0.0.2", 7421, within_s=0.15) == b""


async def test_two_networks_do_not_see_each_other(host: Host) -> None:
    one = await host.guest("one", interface(5, lab(7, open_outside=True)))
    two = await host.guest("two", interface(5, lab(8, open_outside=True, project="other"), mac="52:54:00:00:08:05"))

    with two.serving(80):
        assert one.reads("10.8.0.5", 80, within_s=0.2) == b""
    assert not two.pings(GUEST, within_s=0.2)


async def test_without_outbound_a_guest_reaches_its_neighbors_only(host: Host) -> None:
    network = lab(outbound=False)
    one = await host.guest("one", interface(5, network))
    await host.guest("two", interface(6, network))

    assert one.pings(NEIGHBOR)
    assert not one.pings("192.0.2.1", within_s=0.2)


async def test_a_guest_is_reached_from_outside_by_the_rules_of_its_interface(host: Host) -> None:
    rules = (
        IngressRule(protocol="tcp", first_port=80, last_port=81, source="192.0.2.0/24"),
        IngressRule(protocol="tcp", first_port=82, source="198.51.100.0/24"),
        IngressRule(protocol="icmp"),
    )
    guest = await host.guest("one", interface(5, lab(), ingress=rules))
    await host.guest("two", interface(6, lab()))
    host.internet.ip("route add 10.7.0.0/24 via 192.0.2.2")

    assert host.internet.pings(GUEST)
    assert not host.internet.pings(NEIGHBOR, within_s=0.2)
    for port, answer in ((81, b"hello"), (82, b""), (83, b"")):
        with guest.serving(port):
            assert host.internet.reads(GUEST, port, within_s=0.2) == answer
    await host.networks.update("one", interface(5, lab()))
    assert not host.internet.pings(GUEST, within_s=0.2)
    await host.networks.update("one", interface(5, lab(open_outside=True)))
    assert host.internet.pings(GUEST)


async def test_a_network_that_is_closed_inside_lets_pass_what_rules_allow_and_answers(host: Host) -> None:
    network = lab(closed_inside=True)
    one = await host.guest("one", interface(5, network))
    rules = (IngressRule(protocol="tcp", first_port=80, source="10.7.0.0/24"),)
    two = await host.guest("two", interface(6, network, ingress=rules))

    with two.serving(80), two.serving(81), one.serving(80):
        assert one.reads(NEIGHBOR, 80) == b"hello"
        assert one.reads(NEIGHBOR, 81, within_s=0.2) == b""
        assert two.reads(GUEST, 80, within_s=0.2) == b""
    assert not one.pings(NEIGHBOR, within_s=0.2)
    # Nor by way of the gateway, which routes.
    one.ip(f"route add {NEIGHBOR}/32 via {GATEWAY}")
    with two.serving(80), two.serving(81):
        assert one.reads(NEIGHBOR, 80) == b"hello"
        assert one.reads(NEIGHBOR, 81, within_s=0.2) == b""


@pytest.mark.parametrize("address", ["127.0.0.1", "192.0.2.2", "0.0.0.0"])
async def test_a_forward_reaches_a_guest_and_other_guests_do_not_reach_the_forward(host: Host, address: str) -> None:
    guest = await host.guest("one", interface(5, lab(outbound=False)))
    other = await host.guest("two", interface(5, lab(8), mac="52:54:00:00:08:05"))
    forward = Forward(host_port=8080, guest_port=80, host_address=address)

    await host.networks.update("one", interface(5, lab(outbound=False)), [forward])

    with guest.serving(80):
        here = "127.0.0.1" if address == "0.0.0.0" else address
        assert host.namespace.reads(here, 8080) == b"hello"
        assert host.internet.reads("192.0.2.2", 8080, within_s=0.2) == (b"" if address == "127.0.0.1" else b"hello")
        for at in ("192.0.2.2", "10.8.0.1"):
            assert other.reads(at, 8080, within_s=0.15) == b""
        await host.networks.update("one", interface(5, lab(outbound=False)), [])
        assert host.namespace.reads(here, 8080, within_s=0.2) == b""


async def test_a_guest_keeps_its_connections_while_forwards_and_other_guests_change(host: Host) -> None:
    network = lab(closed_inside=True)
    guest = await host.guest("one", interface(5, network))
    with host.internet.opened() as listener, guest.opened() as caller:
        listener.bind(("192.0.2.1", 9000))
        listener.listen()
        caller.connect(("192.0.2.1", 9000))
        peer, _ = listener.accept()
        with peer:
            await host.guest("two", interface(6, network))
            await host.networks.update("one", interface(5, network), [Forward(host_port=8080, guest_port=80)])
            peer.sendall(b"still here")
            assert caller.recv(100) == b"still here"


def outer(host: Host) -> Namespace:
    """Return a machine on the bridge `br0` of the host, which the host gets, with the address 198.51.100.1."""
    machine = Namespace()
    host.namespace.ip("link add br0 type bridge")
    host.namespace.ip("addr add 198.51.100.2/24 dev br0")
    host.namespace.ip("link add port0 type veth peer name eth0")
    host.namespace.ip(f"link set eth0 netns /proc/{os.getpid()}/fd/{machine.descriptor}")
    for link in ("br0", "port0"):
        host.namespace.ip(f"link set {link} up")
    host.namespace.ip("link set port0 master br0")
    machine.ip("addr add 198.51.100.1/24 dev eth0")
    machine.ip("link set eth0 up")
    return machine


LAN = Network(
    id="0191-lan",
    name="lan",
    kind=NetworkKind.BRIDGE,
    bridge="br0",
)


async def test_a_guest_on_a_bridge_of_the_host_is_closed_from_outside_and_open_inside(host: Host) -> None:
    machine = outer(host)
    rules = (IngressRule(protocol="tcp", first_port=22),)
    fields = {"ingress": rules, "addresses": ("198.51.100.5",)}
    guest = await host.guest("one", interface(5, LAN, **fields), configured=False)
    neighbor = await host.guest("two", interface(6, LAN), configured=False)
    guest.configure("198.51.100.5/24")
    neighbor.configure("198.51.100.6/24")

    with machine.serving(80), guest.serving(22), guest.serving(23), host.namespace.serving(7420):
        assert guest.reads("198.51.100.1", 80) == b"hello"
        assert guest.pings("198.51.100.1")
        assert machine.reads("198.51.100.5", 22) == b"hello"
        assert machine.reads("198.51.100.5", 23, within_s=0.2) == b""
        assert neighbor.reads("198.51.100.5", 23) == b"hello"
        assert guest.reads("198.51.100.2", 7420, within_s=0.2) == b""
        assert machine.reads("198.51.100.2", 7420) == b"hello"
    assert not machine.pings("198.51.100.6", within_s=0.2)
    guest.ip("addr add 198.51.100.9/24 dev eth0")
    guest.ip("addr del 198.51.100.5/24 dev eth0")
    assert not guest.pings("198.51.100.1", within_s=0.2)
    machine.close()


async def test_an_ipv6_guest_reaches_gateway_neighbor_and_internet(host: Host) -> None:
    network = lab(subnets=(Subnet(prefix="fd00:7::/64", gateway="fd00:7::1"),))
    guest = await host.guest("one", interface(5, network))
    await host.guest("two", interface(6, network))
    host.namespace.ip("addr add 2001:db8::2/64 dev up0 nodad")
    host.internet.ip("addr add 2001:db8::1/64 dev eth0 nodad")

    assert guest.pings("fd00:7::1", within_s=2)
    assert guest.pings("fd00:7::6", within_s=2)
    assert guest.pings("2001:db8::1", within_s=2)
    with host.namespace.serving(7420, "::"):
        assert guest.reads("fd00:7::1", 7420, within_s=0.2) == b""
        assert guest.reads("2001:db8::2", 7420, within_s=0.2) == b""


@pytest.mark.parametrize(
    ("flags", "from_outside", "from_inside"),
    [
        ({}, False, True),
        ({"open_outside": True}, True, True),
        ({"closed_inside": True}, False, False),
        ({"open_outside": True, "closed_inside": True}, True, False),
    ],
)
async def test_a_bridge_is_closed_and_open_as_its_network_says(
    host: Host, flags: dict[str, bool], from_outside: bool, from_inside: bool
) -> None:
    machine = outer(host)
    network = msgspec.structs.replace(LAN, **flags)
    guest = await host.guest("one", interface(5, network), configured=False)
    neighbor = await host.guest("two", interface(6, network), configured=False)
    guest.configure("198.51.100.5/24")
    neighbor.configure("198.51.100.6/24")

    assert machine.pings("198.51.100.5", within_s=1 if from_outside else 0.2) == from_outside
    assert neighbor.pings("198.51.100.5", within_s=1 if from_inside else 0.2) == from_inside
    assert guest.pings("198.51.100.1", within_s=1)
    machine.close()


async def test_a_bridge_that_is_made_again_gets_its_guests_back(host: Host) -> None:
    outer(host).close()
    await host.networks.open({})
    guest = await host.guest("one", interface(5, LAN), configured=False)
    guest.configure("198.51.100.5/24")
    host.namespace.ip("link del br0")

    machine = outer(host)

    await eventually(lambda: guest.pings("198.51.100.1", within_s=0.3))
    machine.close()
