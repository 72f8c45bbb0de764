"""Wire types of networks, and of interfaces in them."""

from __future__ import annotations

from interlock.api.schemas.wire import Timestamp, Wire
from interlock.core.networks import NetworkKind


class Subnet(Wire, frozen=True, kw_only=True):
    """A range of addresses of a managed network."""

    prefix: str
    gateway: str
    """The address of each host in it."""


class Network(Wire, frozen=True, kw_only=True):
    """A network."""

    id: str
    name: str
    kind: NetworkKind
    project: str | None
    """The owning project; null: every project may use it."""
    subnets: tuple[Subnet, ...] = ()
    """Of the kind `managed`."""
    domain: str = ""
    """Of the kind `managed`: the DNS domain of its guests."""
    bridge: str = ""
    """Of the kind `bridge`: the bridge on the hosts."""
    vlan: int | None = None
    mtu: int | None = None
    """Null: that of the bridge."""
    outbound: bool = True
    """Whether guests reach addresses beyond the network."""
    closed_inside: bool = False
    """Whether its guests reach each other only as security groups allow."""
    open_outside: bool = False
    """Whether its guests are reached from outside without a security group that allows it."""
    instances: int | None = None
    """Number of instances with an interface in it; null for a shared network, unless to an admin."""
    created_at: Timestamp
    created_by: str


class Interface(Wire, frozen=True, kw_only=True):
    """A network interface of an instance."""

    id: str
    mac: str
    network: str | None = None
    """The name of its network; null: the default user network."""
    addresses: tuple[str, ...] = ()
    """What is leased to it. What the guest uses is up to the guest."""
    inbound_kbit: int | None = None
    """The limit of what the guest receives; null: none."""
    outbound_kbit: int | None = None
    """The limit of what the guest sends; null: none."""
    allow: tuple[str, ...] = ()
    """Which connections from outside of the network are allowed, by its own rules and its security groups."""
    security_groups: tuple[str, ...] = ()


class SecurityGroup(Wire, frozen=True, kw_only=True):
    """Rules on who may connect, which interfaces of a project's instances share."""

    id: str
    name: str
    project: str
    allow: tuple[str, ...] = ()
    """Which connections are allowed, such as `tcp 22 from 10.0.0.0/8`."""
    instances: int
    """Number of instances that have it."""
    created_at: Timestamp
    created_by: str


class SecurityGroupList(Wire, frozen=True, kw_only=True):
    """The security groups of the project; to an admin, all."""

    items: tuple[SecurityGroup, ...]


class InterfaceAddresses(Wire, frozen=True, kw_only=True):
    """The addresses of a network interface of an instance."""

    id: str
    mac: str
    network: str | None = None
    """The name of its network; null: the default user network."""
    leased: tuple[str, ...] = ()
    """What the server leased to it."""
    reported: tuple[str, ...] = ()
    """What the guest agent says that the guest uses. It is not verified."""


class AddressList(Wire, frozen=True, kw_only=True):
    """The addresses of an instance: those that are leased, and those that its guest reports."""

    items: tuple[InterfaceAddresses, ...]
    detail: str = ""
    """Why the guest reports nothing; empty if its agent answered."""


class NetworkList(Wire, frozen=True, kw_only=True):
    """The networks of the project and the shared ones; to an admin, all."""

    items: tuple[Network, ...]
