"""Checks of what a connection needs of its host. Each raises `OperationRejected`, which says what is in the way."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from ipaddress import ip_address

from interlock.core.errors import OperationRejected
from interlock.core.networks import Network, NetworkKind
from interlock.core.specs import Forward
from interlock.networks.connections import Connection, ranges
from interlock.networks.links import Link, UsedRange


def check_kind(link: Link, kind: str) -> None:
    """Check that a link with one of our names is of ours."""
    if link.kind != kind:
        raise OperationRejected(
            f"The name {link.name} is taken by a link of another kind ({link.kind or 'hardware'}).",
            remedy=f"Rename or remove it (`ip link show {link.name}`).",
        )


def checked_bridge(network: Network, bridge: Link | None) -> Link:
    """Return the bridge of a network of the kind `bridge`, which exists and can do what the network says."""
    if bridge is None:
        raise OperationRejected(
            f"The bridge {network.bridge} of the network {network.name} does not exist on this host.",
            remedy=f"Create it there (`ip link add {network.bridge} type bridge`), or choose another host.",
        )
    if bridge.kind != "bridge":
        raise OperationRejected(
            f"{network.bridge}, the bridge of the network {network.name}, is not a bridge of the kernel on this host, "
            f"but {bridge.kind or 'hardware'}."
        )
    if network.vlan is not None and not bridge.filters_vlans:
        raise OperationRejected(
            f"The bridge {bridge.name} does not filter VLANs, so that the network {network.name} cannot have VLAN "
            f"{network.vlan} on this host.",
            remedy=f"Set it there: `ip link set {bridge.name} type bridge vlan_filtering 1`.",
        )
    if network.mtu is not None and network.mtu > bridge.mtu:
        raise OperationRejected(
            f"The MTU of the network {network.name} is {network.mtu}, and that of its bridge {bridge.name} is only "
            f"{bridge.mtu} on this host."
        )
    return bridge


def check_subnets(network: Network, used: Iterable[UsedRange]) -> None:
    """Check that the host does not use addresses of a network."""
    wanted = [*ranges(network, 4), *ranges(network, 6)]
    for one in used:
        for found in wanted:
            if found.version == one.range.version and one.range.prefixlen and found.overlaps(one.range):
                raise OperationRejected(
                    f"The subnet {found} of the network {network.name} overlaps {one.what} of this host.",
                    remedy="Create the network with another subnet, or choose another host.",
                )


def check_forwards(one: Connection, before: Connection | None, others: Iterable[Connection]) -> None:
    """Check that the forwards of a connection can be made: their ports are free, and the guest has an address."""
    known = set() if before is None else set(before.forwards)
    taken = {_key(forward): other for other in others for forward in other.forwards}
    for forward in one.forwards:
        host = ip_address(forward.host_address)
        text = f"The forward of {forward.host_address} port {forward.host_port}/{forward.protocol}"
        if one.network.kind is not NetworkKind.MANAGED:
            raise OperationRejected(
                f"{text} cannot be made: a guest on a bridge of the host is reached at its own address."
            )
        if host.version == 6 and host.is_loopback:  # noqa: PLR2004
            raise OperationRejected(
                f"{text} cannot be made: the kernel forwards no IPv6 loopback.", remedy="Use 127.0.0.1."
            )
        if not one.addresses(host.version):
            raise OperationRejected(
                f"{text} cannot be made: the guest has no IPv{host.version} address in the network {one.network.name}."
            )
        if _key(forward) in taken:
            raise OperationRejected(f"{text} cannot be made: another VM has it.", remedy="Choose another port.")
        if forward not in known:
            _check_port(forward, text)


def _key(forward: Forward) -> tuple[str, int, str]:
    return forward.protocol, forward.host_port, forward.host_address


def _check_port(forward: Forward, text: str) -> None:
    """Check that no program of the host has the port: it would get no more connections."""
    family = socket.AF_INET if ip_address(forward.host_address).version == 4 else socket.AF_INET6  # noqa: PLR2004
    kind = socket.SOCK_STREAM if forward.protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(family, kind) as tried:
        if kind is socket.SOCK_STREAM:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # only a listener is in the way
        try:
            tried.bind((forward.host_address, forward.host_port))
        except OSError as error:
            remedies = {
                errno.EADDRINUSE: "Choose another port.",
                errno.EADDRNOTAVAIL: "Use an address of the host, 127.0.0.1, or 0.0.0.0 for all.",
            }
            remedy = remedies.get(error.errno or 0)
            raise OperationRejected(f"{text} cannot be made: {error.strerror}.", remedy=remedy) from error
