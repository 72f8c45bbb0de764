"""Interfaces of guests on bridged and managed networks: taps, which are opened here and passed to QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from interlock.core.errors import OperationRejected
from interlock.core.networks import Network
from interlock.core.specs import Forward, Interface, Spec
from interlock.hypervisors.qemu.command_line import interfaces_of, is_user, network_arguments, network_name
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.process_registry import ProcessRegistry
from interlock.networks import host_abilities
from interlock.networks.connections import network_tag
from interlock.networks.host_networks import HostNetworks
from interlock.ports import Permit
from interlock.ports.hosts import NetworkAbility

_FOLDER: Final = "networks"


class Taps:
    """The taps of the guests of one host. QEMU has the only descriptor: a tap ends with its guest."""

    def __init__(self, registry: ProcessRegistry) -> None:
        self._registry = registry
        self._folder = registry.path / _FOLDER
        self._host: HostNetworks
        self.abilities: tuple[NetworkAbility, ...] = ()
        """What this host can do for each kind of network, from `open` on."""
        self._opening = asyncio.Lock()
        self._is_open = False
        self._plugged: dict[str, set[str]] = defaultdict(set)
        """The ids of the interfaces that have a tap, by instance id."""

    async def open(self) -> None:
        """Bring the host's networks to what the guests that run need; nothing is left of others."""
        self.abilities = await asyncio.to_thread(host_abilities.abilities)
        self._host = HostNetworks(network_tag(self._registry.home.host_id), self._folder)
        specs = {guest.instance_id: spec for guest in self._registry if (spec := guest.folder.spec()) is not None}
        for instance_id, spec in specs.items():
            self._plugged[instance_id] = {one.id for one in _tapped(instance_id, spec)}
        self._is_open = self._folder.exists()
        if self._is_open:
            await self._host.open(specs)

    async def check(self, instance_id: str, spec: Spec) -> None:
        """Check that this host has the bridges that a guest needs. Raises `OperationRejected`."""
        for interface in _tapped(instance_id, spec):
            if interface.network is not None:
                await self._host.check(interface.network)

    @asynccontextmanager
    async def plugged(self, permit: Permit, instance_id: str, spec: Spec) -> AsyncIterator[dict[str, int]]:
        """Connect the interfaces of a guest that is being started.

        Yields:
            The descriptors of the taps by interface id, which are closed after the body. If it fails, they are
            disconnected.

        Raises:
            OperationRejected: one of the networks cannot be made on this host.
        """
        taps: dict[str, int] = {}
        try:
            for interface in _tapped(instance_id, spec):
                forwards = spec.forwards_of(interface)
                taps[interface.id] = await self._plug(permit, instance_id, interface, forwards)
            yield taps
        except BaseException:
            await self.ended(instance_id)
            raise
        finally:
            for descriptor in taps.values():
                os.close(descriptor)

    async def add(self, permit: Permit, guest: Guest, interface: Interface) -> None:
        """Add the network of an interface to QEMU. Raises as `plugged`, and as `Guest.execute`."""
        name = network_name(interface.id)
        tap = await self._plug(permit, guest.instance_id, interface, ())
        try:
            await guest.execute(permit, "getfd", {"fdname": name}, attach=tap)
        finally:
            with contextlib.suppress(OSError):
                os.close(tap)
        await guest.execute(permit, "netdev_add", network_arguments(interface, name))

    async def update(
        self, permit: Permit, guest: Guest, before: Network | None, interface: Interface, forwards: Sequence[Forward]
    ) -> None:
        """Bring an interface to other rules, limits, addresses, forwards, or another network than `before`.

        A guest on another network sees that its link was down, and so asks for an address there.

        Raises:
            OperationRejected: the network cannot be made on this host; the interface is as before.
        """
        permit.check()
        await self._require_open()
        await self._host.update(guest.instance_id, interface, forwards)
        if before is not None and interface.network is not None and before.id != interface.network.id:
            for up in (False, True):
                await guest.execute(permit, "set_link", {"name": network_name(interface.id), "up": up})

    async def remove(self, instance_id: str, interface_id: str) -> None:
        """Disconnect an interface that QEMU no longer has. Idempotent."""
        if interface_id in self._plugged[instance_id]:
            await self._host.unplug(instance_id, interface_id)
            self._plugged[instance_id].discard(interface_id)

    async def ended(self, instance_id: str) -> None:
        """Disconnect all interfaces of a guest that has ended."""
        for interface_id in self._plugged.pop(instance_id, set()):
            await self._host.unplug(instance_id, interface_id)

    async def close(self) -> None:
        """Stop watching; guests keep their networks."""
        await self._host.close()

    async def _plug(self, permit: Permit, instance_id: str, interface: Interface, forwards: Sequence[Forward]) -> int:
        permit.check()
        await self._require_open()
        self._plugged[instance_id].add(interface.id)
        return await self._host.plug(instance_id, interface, forwards)

    async def _require_open(self) -> None:
        """Create the folder, by which a later server knows that there may be something to remove, and keep watch."""
        async with self._opening:
            if self._is_open:
                return
            try:
                self._folder.mkdir(mode=0o755, exist_ok=True)
            except OSError as error:
                raise OperationRejected(f"{self._folder} cannot be created: {error.strerror}.") from error
            await self._host.open({})
            self._is_open = True


def _tapped(instance_id: str, spec: Spec) -> list[Interface]:
    return [one for one in interfaces_of(instance_id, spec) if not is_user(one)]
