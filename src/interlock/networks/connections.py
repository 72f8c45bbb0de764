"""What is connected on a host, and the names of its links and tables."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

import msgspec

from interlock.core.networks import Network, NetworkKind
from interlock.core.specs import Forward, Interface, Spec

_OWN_DIGITS: Final = 6
MANAGED_BRIDGES: Final = "il*"
"""What the names of the bridges of managed networks match, of any data folder."""
BRIDGE_OF_ANY: Final = re.compile(r"il[a-z0-9]{6}b[a-z2-7]{6}\Z")
"""The name of the bridge of a managed network, of any data folder."""

_TAG_DIGITS: Final = 6


def network_tag(host_id: str) -> str:
    """Return the six characters that mark what is of a host's data folder."""
    return hashlib.sha256(host_id.encode()).hexdigest()[:_TAG_DIGITS]


class Names(msgspec.Struct, frozen=True):
    """The names of a data folder's links (at most 15 characters) and tables on its host.

    Args:
        tag: six characters of the data folder's identity.
    """

    tag: str

    @property
    def links(self) -> str:
        """The beginning of the names of links."""
        return f"il{self.tag}"

    @property
    def taps(self) -> str:
        """The beginning of the names of taps."""
        return f"{self.links}t"

    @property
    def bridges(self) -> str:
        """The beginning of the names of bridges."""
        return f"{self.links}b"

    @property
    def table(self) -> str:
        """The name of the tables of nftables."""
        return f"interlock_{self.tag}"

    def bridge(self, network: Network) -> str:
        """Return the name of the bridge of a network."""
        if network.kind is NetworkKind.BRIDGE:
            return network.bridge
        return self.bridges + _digest(network.id)

    def tap(self, instance_id: str, interface_id: str) -> str:
        """Return the name of the tap of an interface."""
        return self.taps + _digest(f"{instance_id}/{interface_id}")


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """An interface that is connected to a bridge."""

    instance_id: str
    interface: Interface
    network: Network
    """That of the interface, of the kind `bridge` or `managed`."""
    forwards: tuple[Forward, ...] = ()

    def addresses(self, version: int) -> tuple[str, ...]:
        """Return its addresses of an IP version, 4 or 6."""
        return tuple(text for text in self.interface.addresses if ip_address(text).version == version)

    @property
    def is_filtered(self) -> bool:
        """Whether the bridge decides what reaches the guest."""
        if self.network.kind is NetworkKind.MANAGED:
            return self.network.closed_inside
        return self.network.closed_inside or not self.network.open_outside


def connection(instance_id: str, interface: Interface, forwards: Iterable[Forward] = ()) -> Connection | None:
    """Return the connection of an interface to a bridge; None if it is on a user network."""
    network = interface.network
    if network is None or network.kind is NetworkKind.USER:
        return None
    return Connection(instance_id=instance_id, interface=interface, network=network, forwards=tuple(forwards))


def connections_of(wanted: Mapping[str, Spec]) -> list[Connection]:
    """Return the connections of guests to bridges, by instance id."""
    return [
        one
        for instance_id, spec in wanted.items()
        for interface in spec.all_interfaces
        if (one := connection(instance_id, interface, spec.forwards_of(interface)))
    ]


def managed_networks(connections: Iterable[Connection]) -> dict[str, Network]:
    """Return the managed networks of connections, by id."""
    return {one.network.id: one.network for one in connections if one.network.kind is NetworkKind.MANAGED}


def ranges(network: Network, version: int) -> tuple[IPv4Network | IPv6Network, ...]:
    """Return the subnets of an IP version."""
    return tuple(found for subnet in network.subnets if (found := ip_network(subnet.prefix)).version == version)


def gateways(network: Network, version: int) -> tuple[str, ...]:
    """Return the addresses of the bridge of an IP version."""
    return tuple(subnet.gateway for subnet in network.subnets if ip_address(subnet.gateway).version == version)


def bridge_mac(network: Network) -> str:
    """Return the MAC address of the bridge of a managed network.

    It is the same on each host, so that a guest that migrates finds its gateway.
    """
    return "02:" + hashlib.sha256(network.id.encode()).digest()[:5].hex(":")


def link_local(mac: str) -> str:
    """Return the link-local address that is formed of a MAC address (RFC 4291, appendix A)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    identifier = bytes([octets[0] ^ 2, *octets[1:3], 0xFF, 0xFE, *octets[3:]])
    return str(IPv6Address(bytes.fromhex("fe80000000000000") + identifier))


def _digest(text: str) -> str:
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode().lower()[:_OWN_DIGITS]
