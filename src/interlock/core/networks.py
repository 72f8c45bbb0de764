"""Networks of instances: what a network is, and what an interface has of it.

The core does not interpret them.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


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
