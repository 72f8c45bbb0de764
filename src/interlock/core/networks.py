"""Networks of instances: what a network is, which are valid, and which of their addresses are free."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Iterable, Iterator
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from itertools import count, islice
from typing import Final

import msgspec

from interlock.core.errors import InsufficientCapacity, InUse, Invalid


class NetworkKind(StrEnum):
    """How guests are connected."""

    USER = "user"
    """By a process in user space, through the host's own connections."""
    BRIDGE = "bridge"
    """To a bridge that the host has, with its addresses."""
    MANAGED = "managed"
    """To a bridge of Interlock on each host, with DHCP, DNS and address translation."""


class Subnet(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One range of addresses of a managed network, IPv4 or IPv6."""

    prefix: str
    """As in `10.7.0.0/24` or `fd00:7::/64`."""
    gateway: str
    """The address of the bridge, the same on each host."""


class IngressRule(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Connections to a guest that are allowed from outside of its network."""

    protocol: str = "any"
    """`tcp`, `udp`, `icmp` or `any`."""
    first_port: int | None = None
    last_port: int | None = None
    """None: all ports."""
    source: str = ""
    """A prefix, as in `10.0.0.0/8`; empty: anywhere."""


class Network(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A network."""

    id: str
    name: str
    kind: NetworkKind
    project: str | None = None
    """None: shared by all projects."""
    bridge: str = ""
    """Of the kind `bridge`: the name of the bridge on each host."""
    vlan: int | None = None
    """Of the kind `bridge`: the VLAN, 1 to 4094, of a bridge that filters VLANs."""
    mtu: int | None = None
    outbound: bool = True
    """Whether guests reach addresses beyond the network; of the kinds `user` and `managed`."""
    subnets: tuple[Subnet, ...] = ()
    """Of the kind `managed`: at most one of each address family."""
    domain: str = ""
    """Of the kind `managed`: the DNS domain of its guests."""
    closed_inside: bool = False
    """Whether guests of the network are reached by each other only as the rules of their interfaces allow."""
    open_outside: bool = False
    """Whether guests are reached from outside of the network without a rule; of the kinds `bridge` and `managed`."""
    created_at_ms: int = 0
    created_by: str = ""


class SecurityGroup(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Rules on who may connect, which interfaces of a project's instances share."""

    id: str
    name: str
    project: str
    ingress: tuple[IngressRule, ...] = ()
    created_at_ms: int = 0
    created_by: str = ""


Range = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address

_BRIDGE: Final = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,15}\Z")
"""A name that the kernel accepts (`IFNAMSIZ`), of characters that no program misreads."""
_DOMAIN: Final = re.compile(r"(?=.{1,200}\Z)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
_VLAN_MAX: Final = 4094
_MTU: Final = {4: (576, 9216), 6: (1280, 9216)}
"""The smallest and the greatest MTU, by the IP version that needs it."""
_V4_PREFIX: Final = range(8, 31)
_V6_PREFIX: Final = 64
"""The only length with which guests can form addresses of their own (RFC 4862)."""
_RESERVED: Final[tuple[tuple[Range, str], ...]] = tuple(
    (ip_network(prefix), what)
    for prefix, what in (
        ("0.0.0.0/8", "this network"),
        ("127.0.0.0/8", "the loopback"),
        ("169.254.0.0/16", "link-local addresses"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "future use"),
        ("10.0.2.0/24", "the kind `user`"),
        ("::/8", "the loopback and embedded IPv4 addresses"),
        ("fe80::/10", "link-local addresses"),
        ("ff00::/8", "multicast"),
    )
)
_OF_KINDS: Final = {
    "bridge": {NetworkKind.BRIDGE},
    "vlan": {NetworkKind.BRIDGE},
    "mtu": {NetworkKind.BRIDGE, NetworkKind.MANAGED},
    "subnets": {NetworkKind.MANAGED},
    "domain": {NetworkKind.MANAGED},
    "closed_inside": {NetworkKind.BRIDGE, NetworkKind.MANAGED},
    "open_outside": {NetworkKind.BRIDGE, NetworkKind.MANAGED},
    "outbound": {NetworkKind.USER, NetworkKind.MANAGED},
}
"""The kinds of network that each field is for."""
_POOL: Final = ip_network("10.128.0.0/9")
"""From where the subnet of a managed network is chosen if none is given."""


def check_network(network: Network) -> None:
    """Raise `Invalid` if the fields of a network contradict its kind or each other; the message begins with the field.

    Its subnets are valid by themselves (`subnet_of`).
    """
    defaults = Network(id="", name="", kind=network.kind)
    for field, kinds in _OF_KINDS.items():
        if network.kind not in kinds and getattr(network, field) != getattr(defaults, field):
            named = " and ".join(sorted(kinds))
            raise Invalid(f"{field}: only for networks of the kind {named}, not {network.kind.value}.")
    if network.kind is NetworkKind.BRIDGE and _BRIDGE.match(network.bridge) is None:
        raise Invalid(
            f"bridge: {network.bridge[:80]!r} is not the name of a bridge: 1 to 15 letters, digits, dots, hyphens and "
            "underscores.",
            remedy="Give the name of a bridge that the hosts have; `ip link show type bridge` lists them there.",
        )
    if network.vlan is not None and not 1 <= network.vlan <= _VLAN_MAX:
        raise Invalid(f"vlan: {network.vlan} is not a VLAN, which is 1 to {_VLAN_MAX}.")
    if network.kind is NetworkKind.MANAGED and not network.subnets:
        raise Invalid("subnets: a managed network needs at least one subnet.")
    versions = [_range_of(subnet).version for subnet in network.subnets]
    if len(set(versions)) < len(versions):
        raise Invalid("subnets: at most one IPv4 and one IPv6 subnet.")
    least, most = _MTU[max(versions, default=4)]
    if network.mtu is not None and not least <= network.mtu <= most:
        raise Invalid(f"mtu: {network.mtu} is not from {least} to {most}.")
    if network.domain and _DOMAIN.fullmatch(network.domain) is None:
        raise Invalid(
            f"domain: {network.domain[:80]!r} is not a DNS domain: lower-case letters, digits and hyphens, in labels "
            "separated by dots."
        )


def subnet_of(prefix: str, gateway: str | None = None) -> Subnet:
    """Return a valid subnet in its shortest notation; the gateway is its first address by default.

    Raises:
        Invalid: the prefix or the gateway is invalid, reserved, too small or too large.
    """
    try:
        found = ip_network(prefix, strict=False)
    except ValueError:
        raise Invalid(
            f"subnet: {prefix[:80]!r} is not a range of addresses such as 10.7.0.0/24 or fd00:7::/64."
        ) from None
    if "/" not in prefix or str(found.network_address) != str(ip_address(prefix.partition("/")[0])):
        raise Invalid(f"subnet: {prefix} is an address, not a range.", remedy=f"Did you mean {found}?")
    for reserved, what in _RESERVED:
        if found.version == reserved.version and found.overlaps(reserved):
            raise Invalid(f"subnet: {found} overlaps {reserved}, which is reserved for {what}.")
    if isinstance(found, IPv4Network) and found.prefixlen not in _V4_PREFIX:
        raise Invalid(f"subnet: {found} has {found.num_addresses} addresses; expected a prefix from /8 to /30.")
    if isinstance(found, IPv6Network) and found.prefixlen != _V6_PREFIX:
        raise Invalid(f"subnet: {found} has the prefix /{found.prefixlen}; an IPv6 subnet has /{_V6_PREFIX}.")
    if gateway is None:
        return Subnet(prefix=str(found), gateway=str(found[1]))
    return Subnet(prefix=str(found), gateway=str(_checked_gateway(found, gateway)))


def _checked_gateway(subnet: Range, text: str) -> Address:
    try:
        address = ip_address(text)
    except ValueError:
        raise Invalid(f"gateway: {text[:80]!r} is not an IP address.") from None
    if not _is_of_host(subnet, address):
        raise Invalid(f"gateway: {address} is not an address for a host in {subnet}.")
    return address


def _range_of(subnet: Subnet) -> Range:
    return ip_network(subnet.prefix)


def _is_of_host(subnet: Range, address: Address) -> bool:
    outer = {subnet.network_address} | ({subnet.broadcast_address} if subnet.version == 4 else set())  # noqa: PLR2004
    return address.version == subnet.version and address in subnet and address not in outer


def overlapping(subnet: Subnet, networks: Iterable[Network]) -> Network | None:
    """Return a network with a subnet that overlaps; None if there is none."""
    wanted = _range_of(subnet)
    for network in networks:
        for other in map(_range_of, network.subnets):
            if other.version == wanted.version and other.overlaps(wanted):
                return network
    return None


def free_subnet(networks: Iterable[Network]) -> Subnet:
    """Return a subnet of 254 addresses that overlaps none of the networks. Raises `Invalid` if there is none."""
    taken = [_range_of(subnet) for network in networks for subnet in network.subnets]
    for candidate in _POOL.subnets(new_prefix=24):
        if not any(other.version == candidate.version and other.overlaps(candidate) for other in taken):
            return subnet_of(str(candidate))
    raise Invalid(f"subnet: no free range is left in {_POOL}.", remedy="Give one.")


def domain_of(name: str) -> str:
    """Return the default DNS domain of a managed network."""
    labels = map(_label, name.split("."))
    return ".".join((*(label for label in labels if label), "internal"))


def hostname_in(network: Network, name: str, project: str) -> str:
    """Return the name of a VM in the DNS of a network: of a shared one with its project, since names are unique there.

    Empty for a network without DNS of its own.
    """
    if network.kind is not NetworkKind.MANAGED:
        return ""
    words = _label(name) if network.project is not None else f"{_label(name)}-{_label(project)}"
    return words[:63].strip("-")


def _label(text: str) -> str:
    """Return a text as a label of a DNS name, as far as it can be one."""
    return re.sub("[^a-z0-9-]", "-", text.lower()).strip("-")


def lease(network: Network, taken: Container[str], wanted: Iterable[str] = ()) -> tuple[str, ...]:
    """Return an address of each subnet that is not taken: the wanted ones, or else the first free ones.

    Args:
        network: one of another kind than `managed` has no addresses to lease.
        taken: what is leased, in the shortest notation.
        wanted: addresses as text.

    Raises:
        Invalid: a wanted address is none, or is not in the network.
        InUse: a wanted address is taken.
        InsufficientCapacity: no address is free.
    """
    asked = {address.version: address for address in (_wanted_address(network, text) for text in wanted)}
    leased = []
    for subnet in network.subnets:
        found = _range_of(subnet)
        address = asked.get(found.version)
        if address is None:
            address = next((one for one in _hosts(found, subnet.gateway) if str(one) not in taken), None)
            if address is None:
                raise InsufficientCapacity(
                    f"The network {network.name} has no free address left in {subnet.prefix}.",
                    needed={"addresses": 1},
                    free={"addresses": 0},
                    remedy="Delete or detach what is not needed, or create a larger network.",
                )
        elif str(address) in taken:
            raise InUse(
                f"The address {address} of the network {network.name} is in use.",
                remedy=_with_free_ones(found, subnet.gateway, taken),
            )
        leased.append(str(address))
    return tuple(leased)


def _wanted_address(network: Network, text: str) -> Address:
    try:
        address = ip_address(text)
    except ValueError:
        raise Invalid(f"address: {text[:80]!r} is not an IP address.") from None
    ranges = {_range_of(subnet): subnet.gateway for subnet in network.subnets}
    for found, gateway in ranges.items():
        if _is_of_host(found, address) and str(address) != gateway:
            return address
    where = " and ".join(f"{found} (without {gateway}, the gateway)" for found, gateway in ranges.items())
    raise Invalid(
        f"address: {address} cannot be leased from the network {network.name}"
        + (f", which has {where}." if where else f": one of the kind {network.kind.value} has no addresses of its own.")
    )


def _hosts(subnet: Range, gateway: str) -> Iterator[Address]:
    """Yield the addresses for guests. Those of IPv6 are counted from 16 on: smaller ones are for routers."""
    found = subnet.hosts() if isinstance(subnet, IPv4Network) else (subnet[number] for number in count(16))
    return (one for one in found if str(one) != gateway)


def _with_free_ones(subnet: Range, gateway: str, taken: Container[str]) -> str:
    some = ", ".join(islice((str(one) for one in _hosts(subnet, gateway) if str(one) not in taken), 3))
    return f"Choose another, or omit it: {some} are free." if some else "No address is free."


_RULE: Final = re.compile(r"(tcp|udp|icmp|any)(?: (\d{1,5})(?:-(\d{1,5}))?)?(?: from (\S{1,64}))?")
_PORT_MAX: Final = 65_535


def ingress_of(text: str) -> tuple[IngressRule, ...]:
    """Return the rules in a text such as `tcp 22 from 10.0.0.0/8, icmp`; none for an empty one.

    Raises:
        Invalid: says which rule, and what was expected.
    """
    return tuple(_rule(" ".join(one.split())) for one in text.split(",") if one.strip())


def _rule(text: str) -> IngressRule:
    found = _RULE.fullmatch(text)
    if found is None:
        raise Invalid(
            f"allow: {text[:80]!r} is not a rule.",
            remedy="Write tcp, udp, icmp or any; then a port or a range of ports; then from and a prefix: "
            "`tcp 22 from 10.0.0.0/8`, `udp 5000-5010`, `icmp`.",
        )
    protocol, first, last, source = found.groups()
    ports = None if first is None else (int(first), int(last or first))
    if first is not None and protocol not in {"tcp", "udp"}:
        raise Invalid(f"allow: {text!r}: only tcp and udp have ports.")
    if ports is not None and not 1 <= ports[0] <= ports[1] <= _PORT_MAX:
        raise Invalid(f"allow: {text!r}: ports are 1 to {_PORT_MAX}, the smaller one first.")
    try:
        prefix = "" if source is None else str(ip_network(source))
    except ValueError:
        raise Invalid(f"allow: {source!r} is not a range of addresses such as 10.0.0.0/8.") from None
    first_port, last_port = ports or (None, None)
    return IngressRule(protocol=protocol, first_port=first_port, last_port=last_port, source=prefix)


def rule_text(rule: IngressRule) -> str:
    """Return a rule as `ingress_of` reads it."""
    ports = "" if rule.first_port is None else f" {rule.first_port}"
    if rule.last_port != rule.first_port:
        ports += f"-{rule.last_port}"
    return f"{rule.protocol}{ports}" + (f" from {rule.source}" if rule.source else "")


def mac_of(text: str, taken: Container[str] = ()) -> str:
    """Return a MAC address in QEMU's range (52:54:00), derived from an id, that is not taken."""
    for number in count():
        tail = hashlib.sha256(f"{text}{number or ''}".encode()).digest()[:3]
        mac = "52:54:00:" + tail.hex(":")
        if mac not in taken:
            return mac
    raise AssertionError
