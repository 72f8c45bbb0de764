"""The bridges, taps, rules and DHCP servers of a data folder on this host."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import structlog

from interlock.core.errors import OperationRejected
from interlock.core.networks import Network, NetworkKind
from interlock.core.specs import Forward, Interface, Spec
from interlock.networks import host_checks, nftables
from interlock.networks.connections import Connection, Names, bridge_mac, connection, connections_of, managed_networks
from interlock.networks.dnsmasq import DhcpServers, Lease
from interlock.networks.host_abilities import abilities
from interlock.networks.host_watch import HostWatch
from interlock.networks.links import Link, Links, netlink, open_tap
from interlock.networks.packet_filter import bridge_table, inet_table, is_local
from interlock.networks.router_settings import RouterSettings
from interlock.ports.hosts import NetworkAbility

_LOG = structlog.get_logger(__name__)
_TABLES: Final = {"bridge": bridge_table, "inet": inet_table}


class HostNetworks:
    """The bridges, taps, rules and DHCP servers of a data folder on this host. Converges from whatever is found.

    A tap exists as long as it is open: it ends with its guest. Rules are complete before a tap is connected.

    Args:
        tag: six characters of the data folder's identity.
        folder: for files of DHCP servers.
    """

    def __init__(self, tag: str, folder: Path) -> None:
        self._names = Names(tag)
        self._dhcp = DhcpServers(folder, self._names.bridges)
        self._router = RouterSettings()
        self._connections: dict[tuple[str, str], Connection] = {}
        self._tables: dict[str, nftables.Table | None] = {}
        """By family, as applied last; missing: unknown."""
        self._failures: dict[str, str] = {}
        """What was logged last, by network."""
        self._watch = HostWatch(self._check)
        self._lock = asyncio.Lock()

    def abilities(self) -> tuple[NetworkAbility, ...]:
        """Return what this host can do for each kind of network. Blocks for some milliseconds."""
        return abilities()

    async def open(self, wanted: Mapping[str, Spec]) -> None:
        """Make what the guests that run need, and remove what is left of others.

        What cannot be made is logged, and does not hinder the rest.

        Args:
            wanted: the specs of the guests that run, by instance id.
        """
        async with self._lock:
            self._connections = {(one.instance_id, one.interface.id): one for one in connections_of(wanted)}
            self._tables.clear()
            await self._converge()
        self._watch.open()

    async def plug(self, instance_id: str, interface: Interface, forwards: Sequence[Forward] = ()) -> int:
        """Connect a guest's interface to its bridge, which is made if it is managed.

        Returns:
            The descriptor of its tap (with IFF_NO_PI and IFF_VNET_HDR), which the caller closes.

        Raises:
            OperationRejected: it cannot be connected on this host; nothing is left of it.
        """
        one = connection(instance_id, interface, forwards)
        if one is None:
            raise OperationRejected(f"The interface {interface.id} is on a user network, which has no tap.")
        async with self._lock, self._changed(one):
            descriptor = await open_tap(self._tap(one))
            try:
                await self._settle(one.network, changed=one)
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor

    async def check(self, network: Network) -> None:
        """Check that this host has the bridge of a network of the kind `bridge`, as the network needs it.

        Raises:
            OperationRejected: it has not, or has another one.
        """
        if network.kind is NetworkKind.BRIDGE:
            async with netlink() as links:
                host_checks.checked_bridge(network, await links.named(self._names.bridge(network)))

    async def update(self, instance_id: str, interface: Interface, forwards: Sequence[Forward] = ()) -> None:
        """Bring an interface to other rules, limits, addresses, forwards, or another network; its tap stays.

        Raises:
            OperationRejected: it cannot be; it is as before.
        """
        one = connection(instance_id, interface, forwards)
        if one is None:
            await self.unplug(instance_id, interface.id)
            return
        async with self._lock:
            async with self._changed(one) as before:
                await self._settle(one.network, changed=one)
            if before is not None and before.network.id != one.network.id:
                await self._converge()

    async def unplug(self, instance_id: str, interface_id: str) -> None:
        """Remove the tap of an interface and its rules; with the last of a managed network, its bridge. Idempotent."""
        async with self._lock:
            self._connections.pop((instance_id, interface_id), None)
            await self._converge()

    async def close(self) -> None:
        """Stop watching; guests keep their networks."""
        await self._watch.close()

    # ------------------------------------------------------------------------------------------------ convergence

    @contextlib.asynccontextmanager
    async def _changed(self, one: Connection) -> AsyncIterator[Connection | None]:
        """Take a connection into what is wanted, or leave that as it was if the body fails; yield what it replaces."""
        key = one.instance_id, one.interface.id
        before = self._connections.get(key)
        host_checks.check_forwards(one, before, [other for other in self._connections.values() if other is not before])
        # The last one has the newest record of its network.
        self._connections.pop(key, None)
        self._connections[key] = one
        try:
            yield before
        except BaseException:
            if before is None:
                del self._connections[key]
            else:
                self._connections[key] = before
            await self._converge()
            raise

    async def _converge(self) -> None:
        """Make what is wanted, and remove what is not; log what fails."""
        networks = {one.network.id: one.network for one in self._connections.values()}
        for network in networks.values():
            with self._logged(network.name):
                await self._settle(network)
        with self._logged(""):
            await self._remove_unwanted()

    async def _check(self, *, rules: bool) -> None:
        """Repair what somebody has changed on the host: links, DHCP servers, and rules if they may be changed too."""
        async with self._lock:
            for family, table in list(self._tables.items()):
                if table is None or not rules:
                    continue
                if await nftables.is_changed(family, self._names.table, table):
                    _LOG.warning("rules of networks changed by others", table=f"{family} {self._names.table}")
                    del self._tables[family]
            await self._converge()

    async def _settle(self, network: Network, changed: Connection | None = None) -> None:
        """Make what the connections of a network need: bridge, rules, DHCP server, taps that are open.

        Args:
            network: the network.
            changed: the connection whose limits and VLAN are set anew; None: those of all.

        Raises:
            OperationRejected: it cannot be made on this host.
        """
        members = [one for one in self._connections.values() if one.network.id == network.id]
        async with netlink() as links:
            bridge = await links.named(self._names.bridge(network))
            is_new = bridge is None
            if network.kind is NetworkKind.BRIDGE:
                bridge = host_checks.checked_bridge(network, bridge)
                await self._filter()
            else:
                bridge = await self._managed_bridge(links, network, bridge, members)
            if changed is None or is_new:
                taps = await links.all()
            else:
                tap = await links.named(self._tap(changed))
                taps = {} if tap is None else {tap.name: tap}
            for one in members:
                if tap := taps.get(self._tap(one)):
                    await self._attach(links, tap, one, bridge, anew=is_new or changed is None or one == changed)

    async def _managed_bridge(
        self, links: Links, network: Network, found: Link | None, members: Sequence[Connection]
    ) -> Link:
        """Make the bridge of a managed network, unless it was found, with its services; return it."""
        name = self._names.bridge(network)
        bridge = found
        if bridge is None:
            host_checks.check_subnets(network, await links.used_ranges())
            bridge = await links.add_bridge(name, bridge_mac(network))
        host_checks.check_kind(bridge, "bridge")
        await self._filter()
        lengths = {subnet.gateway: subnet.prefix.partition("/")[2] for subnet in network.subnets}
        await links.prepare_bridge(
            bridge,
            addresses={f"{gateway}/{length}" for gateway, length in lengths.items()},
            mtu=network.mtu,
            loopback=any(is_local(forward) for one in members for forward in one.forwards),
        )
        await self._router.need(network, members, links)
        leases = [
            Lease(mac=one.interface.mac.lower(), addresses=one.interface.addresses, hostname=one.interface.hostname)
            for one in members
        ]
        self._watch.follow(await self._dhcp.serve(name, network, leases, anew=found is None))
        return bridge

    async def _attach(self, links: Links, tap: Link, one: Connection, bridge: Link, *, anew: bool) -> None:
        """Connect an open tap to its bridge."""
        host_checks.check_kind(tap, "tun")
        # A port of a smaller MTU would lower that of a bridge of the host.
        is_managed = one.network.kind is NetworkKind.MANAGED
        mtu = (one.network.mtu if is_managed else None) or bridge.mtu
        if tap.mtu != mtu:
            await links.set_mtu(tap, mtu)
        moved = tap.master != bridge.index
        if moved:
            links.silence(tap)
            await links.set_master(tap, bridge)
        if moved or anew:
            if bridge.filters_vlans:
                await links.set_vlan(tap, one.network.vlan)
            await links.limit(tap, one.interface.inbound_kbit)
        if not tap.up:
            await links.set_up(tap)

    async def _filter(self) -> None:
        """Bring the packet filter to what the connections need. Raises `OperationRejected`."""
        connections = list(self._connections.values())
        wanted = {family: table_of(self._names, connections) for family, table_of in _TABLES.items()}
        before = {family: self._tables.pop(family, None) for family in wanted}
        known = [family for family in wanted if before[family] is not None]
        commands = self._changes(before, wanted)
        if commands:
            try:
                await nftables.apply(commands)
            except OperationRejected:
                if not known:
                    raise
                # It is not as it was left: somebody changed it.
                await nftables.apply(self._changes({}, wanted))
            self._watch.expect_rules()
        self._tables |= wanted

    def _changes(
        self, before: Mapping[str, nftables.Table | None], wanted: Mapping[str, nftables.Table | None]
    ) -> list[dict[str, Any]]:
        """Return the commands of one transaction for the tables of all families."""
        name, families = self._names.table, [family for family in wanted if before.get(family) != wanted[family]]
        return [
            command
            for family in families
            for command in nftables.changes(family, name, before.get(family), wanted[family])
        ]

    async def _remove_unwanted(self) -> None:
        """Remove what is this data folder's, and not wanted."""
        networks = managed_networks(self._connections.values())
        bridges = {self._names.bridge(network) for network in networks.values()}
        wanted = bridges | {self._tap(one) for one in self._connections.values()}
        async with netlink() as links:
            found = await links.all()
            ours = {name for name in found if name.startswith(self._names.links)}
            for name in sorted(ours - wanted, reverse=True):  # taps before bridges
                await links.remove(found[name])
        for name in await self._dhcp.found() - bridges:
            await self._dhcp.remove(name)
        if self._connections:
            await self._filter()
        else:
            await self._remove_tables()
        if not networks:
            self._router.restore(set(found) - ours)

    async def _remove_tables(self) -> None:
        """Remove the tables, if they exist: without networks, a host needs no nftables."""
        for family in _TABLES:
            if await nftables.exists(family, self._names.table):
                await nftables.apply([{"delete": {"table": {"family": family, "name": self._names.table}}}])
                self._watch.expect_rules()
            self._tables[family] = None

    def _tap(self, one: Connection) -> str:
        return self._names.tap(one.instance_id, one.interface.id)

    @contextlib.contextmanager
    def _logged(self, network: str) -> Iterator[None]:
        """Log a failure of the body, unless it is the same as before."""
        try:
            yield
        except OperationRejected as error:
            if self._failures.get(network) != error.message:
                _LOG.error("network not converged", network=network, error=error.message, remedy=error.remedy)
            self._failures[network] = error.message
        else:
            self._failures.pop(network, None)
