"""Links of a host by netlink: bridges, taps, their addresses, limits and settings."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from ipaddress import IPv4Network, IPv6Network, ip_interface, ip_network
from pathlib import Path
from typing import Any, Final

import msgspec
from pyroute2 import AsyncIPRoute
from pyroute2.netlink.core import CoreDatagramProtocol
from pyroute2.netlink.exceptions import NetlinkError

from interlock.core.errors import OperationRejected

TUN: Final = Path("/dev/net/tun")
_SYSCTL: Final = Path("/proc/sys/net")
_TUNSETIFF: Final = 0x400454CA
_IFF_TAP: Final = 0x0002
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_UP: Final = 1
_NODAD: Final = 0x02
_BUSY_TRIES: Final = 40
_BUSY_S: Final = 0.05
_ROOT: Final = 0xFFFFFFFF
_MAIN_TABLE: Final = 254
_UNICAST: Final = 1
_BY_ROUTER: Final = 9
_TBF_LATENCY: Final = "50ms"
_BURST_BYTES: Final = 65_536
_DEFAULT_VLAN: Final = 1
_MESSAGE_BYTES: Final = 256 * 1024


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A link as the kernel describes it."""

    index: int
    name: str
    kind: str
    """As in `bridge`, `tun` or `veth`; empty for hardware."""
    master: int | None
    """The index of the bridge that it is a port of."""
    mtu: int
    mac: str
    up: bool
    filters_vlans: bool
    """Of a bridge."""


class UsedRange(msgspec.Struct, frozen=True, kw_only=True):
    """A range of addresses that the host uses."""

    range: IPv4Network | IPv6Network
    what: str
    """For people: `the route 10.0.0.0/8 via eth0`."""
    index: int
    """Of its link."""


class Links:
    """An open netlink connection. Every method raises `OperationRejected`, which says what the kernel refused."""

    def __init__(self, netlink: AsyncIPRoute) -> None:
        self._netlink = netlink

    async def all(self) -> dict[str, Link]:
        """Return the links of the host by name."""
        found = [_link(message) async for message in await self._netlink.get_links()]
        return {link.name: link for link in found}

    async def named(self, name: str) -> Link | None:
        """Return a link; None if there is none of that name."""
        try:
            return _link((await self._netlink.link("get", ifname=name))[0])
        except NetlinkError as error:
            if error.code == errno.ENODEV:
                return None
            raise

    async def add_bridge(self, name: str, mac: str) -> Link:
        """Create a bridge, down."""
        with _explained(f"The bridge {name} cannot be made"):
            await self._netlink.link("add", ifname=name, kind="bridge", address=mac, br_mcast_snooping=0)
            return _link((await self._netlink.link("get", ifname=name))[0])

    async def prepare_bridge(self, bridge: Link, *, addresses: set[str], mtu: int | None, loopback: bool) -> None:
        """Bring a bridge of ours to its settings, and set it up.

        Args:
            bridge: the bridge.
            addresses: its addresses, with the lengths of their prefixes.
            mtu: in bytes.
            loopback: whether the host's loopback has connections over it.
        """
        self.set("ipv4", bridge.name, "send_redirects", "0")
        self.set("ipv4", bridge.name, "route_localnet", "1" if loopback else "0")
        self.set("ipv6", bridge.name, "accept_ra", "0")
        self.set("ipv6", bridge.name, "disable_ipv6", "0" if any(":" in text for text in addresses) else "1")
        if mtu is not None and bridge.mtu != mtu:
            await self.set_mtu(bridge, mtu)
        await self._set_addresses(bridge, addresses)
        if not bridge.up:
            await self.set_up(bridge)

    def silence(self, tap: Link) -> None:
        """Keep the host from sending anything of its own into a tap."""
        self.set("ipv6", tap.name, "disable_ipv6", "1")

    async def set_mtu(self, link: Link, mtu: int) -> None:
        """Set the MTU in bytes."""
        with _explained(f"The MTU of {link.name} cannot be set to {mtu}"):
            await self._netlink.link("set", index=link.index, mtu=mtu)

    async def set_up(self, link: Link) -> None:
        """Set a link up."""
        with _explained(f"The link {link.name} cannot be set up"):
            await self._netlink.link("set", index=link.index, state="up")

    async def set_master(self, link: Link, bridge: Link) -> None:
        """Make a tap a port of a bridge.

        A bridge has the lowest MAC address of its ports, unless it was given one: the tap gets a high one, so that the
        host keeps its own on the LAN.
        """
        with _explained(f"{link.name} cannot be connected to the bridge {bridge.name}"):
            await self._netlink.link("set", index=link.index, address=f"fe{link.mac[2:]}", master=bridge.index)

    async def remove(self, link: Link) -> None:
        """Remove a link; it may be gone."""
        with _explained(f"The link {link.name} cannot be removed", gone_is_fine=True):
            await self._netlink.link("del", index=link.index)

    async def _addresses(self, link: Link) -> set[str]:
        """Return the addresses of a link with the lengths of their prefixes, without link-local ones."""
        found = {
            f"{message.get_attr('IFA_LOCAL') or message.get_attr('IFA_ADDRESS')}/{message['prefixlen']}"
            async for message in await self._netlink.get_addr(index=link.index)
        }
        return {text for text in found if not ip_interface(text).is_link_local}

    async def _set_addresses(self, link: Link, wanted: set[str]) -> None:
        """Give a link these addresses with the lengths of their prefixes, and no others."""
        found = await self._addresses(link)
        with _explained(f"The addresses of {link.name} cannot be set"):
            for text, verb in [
                *((text, "del") for text in found - wanted),
                *((text, "add") for text in wanted - found),
            ]:
                address, _, length = text.partition("/")
                # Without it an IPv6 address cannot be listened at for a second.
                flags = {"flags": _NODAD} if verb == "add" and ":" in address else {}
                await self._netlink.addr(verb, index=link.index, address=address, prefixlen=int(length), **flags)

    async def limit(self, link: Link, kbit: int | None) -> None:
        """Limit what a link sends (for a tap: what its guest receives), in kbit/s; None: unlimited."""
        with _explained(f"The bandwidth of {link.name} cannot be limited"):
            if kbit is not None:
                burst = max(_BURST_BYTES, kbit * 1000 // 8 // 50)
                await self._netlink.tc(
                    "replace", "tbf", index=link.index, rate=f"{kbit}kbit", burst=burst, latency=_TBF_LATENCY
                )
                return
            async for message in await self._netlink.get_qdiscs(index=link.index):
                if message.get_attr("TCA_KIND") == "tbf":
                    await self._netlink.tc("del", index=link.index, parent=_ROOT)

    async def set_vlan(self, link: Link, vlan: int | None) -> None:
        """Make a port belong to a VLAN, untagged, and to no other; None: to the default of its bridge."""
        with _explained(f"The VLAN of {link.name} cannot be set to {vlan}"):
            wanted = _DEFAULT_VLAN if vlan is None else vlan
            found = await self._vlans(link)
            for other in found - {wanted}:
                await self._netlink.vlan_filter("del", index=link.index, vlan_info={"vid": other})
            if wanted not in found:
                flags = {"vid": wanted, "flags": 6}  # pvid, untagged
                await self._netlink.vlan_filter("add", index=link.index, vlan_info=flags)

    async def _vlans(self, link: Link) -> set[int]:
        found: set[int] = set()
        async for message in await self._netlink.get_vlans(index=link.index):
            spec = message.get_attr("IFLA_AF_SPEC")
            found |= {info["vid"] for info in (spec.get_attrs("IFLA_BRIDGE_VLAN_INFO") if spec else [])}
        return found

    async def used_ranges(self) -> list[UsedRange]:
        """Return the addresses and routes of the host, without default routes."""
        names = {link.index: name for name, link in (await self.all()).items()}
        used = []
        async for message in await self._netlink.get_addr():
            address = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            found, index = ip_interface(f"{address}/{message['prefixlen']}").network, message["index"]
            what = f"the address {address}/{message['prefixlen']} of {names.get(index, '?')}"
            used.append(UsedRange(range=found, what=what, index=index))
        async for message in await self._netlink.get_routes(table=_MAIN_TABLE):
            target = message.get_attr("RTA_DST")
            if target is None or message["type"] != _UNICAST:
                continue
            index = message.get_attr("RTA_OIF") or 0
            found = ip_network(f"{target}/{message['dst_len']}", strict=False)
            used.append(
                UsedRange(range=found, what=f"the route {found} by {names.get(index, 'several links')}", index=index)
            )
        return [one for one in used if not one.range.is_link_local and not one.range.is_multicast]

    async def advertised_routes(self) -> list[str]:
        """Return the links whose IPv6 routes a router advertised, and which the host loses once it forwards packets."""
        names = {link.index: name for name, link in (await self.all()).items()}
        routes = [
            message
            async for message in await self._netlink.get_routes(family=socket.AF_INET6)
            if message["proto"] == _BY_ROUTER
        ]
        found = {names[index] for route in routes if (index := route.get_attr("RTA_OIF")) in names}
        return sorted(name for name in found if (_SYSCTL / f"ipv6/conf/{name}/accept_ra").read_text().strip() == "1")

    def set(self, family: str, link: str, name: str, value: str) -> None:
        """Set a setting of a link in /proc/sys; one that this kernel does not have is left out."""
        path = _SYSCTL / family / "conf" / link / name
        try:
            if path.read_text().strip() != value:
                path.write_text(value)
        except FileNotFoundError:
            return
        except OSError as error:
            raise OperationRejected(f"{path} cannot be set to {value}: {error.strerror}.") from error


class _Reader:
    """Reads a netlink socket for pyroute2, in place of a transport of the event loop: uvloop has none for netlink."""

    def __init__(self, opened: socket.socket, protocol: CoreDatagramProtocol) -> None:
        self._socket = opened
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(opened.fileno(), self._read)

    def _read(self) -> None:
        try:
            message, sender = self._socket.recvfrom(_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self.abort()
            self._protocol.error_received(error)
            return
        self._protocol.datagram_received(message, sender)

    def abort(self) -> None:
        """Read no more."""
        self._loop.remove_reader(self._socket.fileno())

    def close(self) -> None:
        """Do nothing: it is called after `abort`."""


class _Netlink(AsyncIPRoute):  # type: ignore[misc]  # pyroute2 has no types
    """A netlink connection for every event loop."""

    async def setup_endpoint(self) -> None:
        """Begin to read, unless it has begun; see `AsyncNetlinkSocket`."""
        if getattr(self.local, "transport", None) is None:
            self.socket.setblocking(False)
            protocol = CoreDatagramProtocol(self.connection_lost, self.enqueue, self._error_event, self.status)
            self.local.transport, self.local.protocol = _Reader(self.socket, protocol), protocol


@asynccontextmanager
async def netlink() -> AsyncIterator[Links]:
    """Open a netlink connection."""
    async with _Netlink() as opened:
        yield Links(opened)


async def open_tap(name: str) -> int:
    """Create a tap, or take one that nobody has open, and return its descriptor.

    Raises:
        OperationRejected: it cannot be made, or another process has it open.
    """
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    for tried in range(_BUSY_TRIES):
        try:
            descriptor = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise OperationRejected(
                f"{TUN} cannot be opened: {error.strerror}.",
                remedy="Load the kernel's module tun, and give the server the device (in a container, pass it).",
            ) from error
        try:
            fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        except OSError as error:
            os.close(descriptor)
            # A process that has just ended may have it open for a moment.
            if error.errno != errno.EBUSY or tried == _BUSY_TRIES - 1:
                raise OperationRejected(
                    f"The tap {name} cannot be opened: {error.strerror}.", remedy=_of_tap(error)
                ) from error
            await asyncio.sleep(_BUSY_S)
        else:
            return descriptor
    raise AssertionError


def _of_tap(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "The server needs CAP_NET_ADMIN to make taps."
    return "See which process has it open, or which link has its name (`ip link`)."


@contextmanager
def _explained(what: str, *, gone_is_fine: bool = False) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        if gone_is_fine and error.code == errno.ENODEV:
            return
        remedy = "The server needs CAP_NET_ADMIN." if error.code == errno.EPERM else None
        raise OperationRejected(f"{what}: {os.strerror(error.code)}.", remedy=remedy) from error


def _link(message: Any) -> Link:
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        kind=message.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") or "",
        master=message.get_attr("IFLA_MASTER"),
        mtu=message.get_attr("IFLA_MTU"),
        mac=message.get_attr("IFLA_ADDRESS") or "",
        up=bool(message["flags"] & _UP),
        filters_vlans=bool(message.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA", "IFLA_BR_VLAN_FILTERING")),
    )
