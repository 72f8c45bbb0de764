"""Hotplug: disks and network interfaces plugged into a running guest, unplugged from it, and swapped.

Each step looks at what is there first, so that a plug or unplug that was interrupted is completed by the next one. The
spec on record follows, for a reset that has to start another process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from pathlib import Path
from typing import TypeVar

import msgspec

from interlock.core.errors import NotResponding, OperationRejected
from interlock.core.records import Disk, Forward, Interface, Spec
from interlock.core.specs import PRIMARY
from interlock.hypervisors.qemu.command_line import (
    RESCUE,
    ROOT,
    device_arguments,
    device_name,
    interface_arguments,
    interface_device,
    interfaces_of,
    is_port,
    is_user,
    network_name,
    node_name,
)
from interlock.hypervisors.qemu.disks import block_mirror
from interlock.hypervisors.qemu.disks.block_nodes import add_node, remove_node, sizes
from interlock.hypervisors.qemu.disks.root_disks import require_volume
from interlock.hypervisors.qemu.files.file_handles import open_disk
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.network.taps import Taps
from interlock.hypervisors.qemu.network.user_networks import UserNetworks
from interlock.hypervisors.qemu.process_registry import ProcessRegistry
from interlock.ports import Permit, Report

PluggedT = TypeVar("PluggedT", bound=Disk | Interface)


class Hotplug:
    """Changes the devices of running guests. See `ports.Hypervisor` for the methods."""

    def __init__(self, registry: ProcessRegistry, networks: UserNetworks, taps: Taps) -> None:
        self._registry = registry
        self._networks = networks
        self._taps = taps

    async def attach_disk(self, permit: Permit, instance_id: str, disk: Disk) -> None:
        guest = self._registry.require(instance_id)
        await guest.require_running()
        device_name(disk.id)
        if disk.id not in await guest.disks():
            await _plug_disk(guest, permit, disk)
        _record_disk(permit, guest.folder, disk.id, disk)

    async def detach_disk(self, permit: Permit, instance_id: str, disk_id: str) -> None:
        guest = self._registry.require(instance_id)
        if disk_id in {ROOT, RESCUE}:
            raise OperationRejected("The root disk cannot be detached.", remedy="Delete the VM instead.")
        device_name(disk_id)
        await guest.require_running()
        await block_mirror.cancel_swaps(guest, permit, disk_id)
        device = (await guest.disk_devices()).get(disk_id)
        if device is not None:
            await _unplug(guest, permit, device, f"the disk {disk_id}")
        await remove_node(guest, permit, node_name(disk_id))
        _record_disk(permit, guest.folder, disk_id, None)

    async def swap_disk(self, permit: Permit, instance_id: str, old: Disk, new: Disk, report: Report) -> None:
        guest = self._registry.require(instance_id)
        with guest.folder.os_errors_rejected():
            await block_mirror.swap(guest, permit, old, new, report)
        _record_disk(permit, guest.folder, old.id, new)

    async def attach_interface(self, permit: Permit, instance_id: str, interface: Interface) -> None:
        guest = self._registry.require(instance_id)
        await guest.require_running()
        if interface_device(interface.id) not in await guest.devices():
            await self._plug_interface(guest, permit, interface)
        _record_interface(permit, guest.folder, interface.id, interface)

    async def detach_interface(self, permit: Permit, instance_id: str, interface_id: str) -> None:
        guest, device = self._registry.require(instance_id), interface_device(interface_id)
        await guest.require_running()
        if device in await guest.devices():
            await _unplug(guest, permit, device, f"the interface {interface_id}")
        await self._remove_network(guest, permit, interface_id)
        _record_interface(permit, guest.folder, interface_id, None)

    async def _plug_interface(self, guest: Guest, permit: Permit, interface: Interface) -> None:
        device = interface_arguments(interface, await _free_port(guest))
        # An interrupted plug, or a guest that released its device after the timeout, left the network.
        await self._remove_network(guest, permit, interface.id)
        await (self._networks if is_user(interface) else self._taps).add(permit, guest, interface)
        try:
            await guest.execute(permit, "device_add", device)
        except OperationRejected:
            await self._remove_network(guest, permit, interface.id)
            raise

    async def _remove_network(self, guest: Guest, permit: Permit, interface_id: str) -> None:
        """Remove a network without a device; QEMU has no query for whether it exists."""
        with contextlib.suppress(OperationRejected):
            await guest.execute(permit, "netdev_del", {"id": network_name(interface_id)})
        await self._networks.end(guest.folder, interface_id)
        await self._taps.remove(guest.instance_id, interface_id)

    async def update_interface(
        self, permit: Permit, instance_id: str, interface: Interface, forwards: tuple[Forward, ...]
    ) -> None:
        guest = self._registry.require(instance_id)
        await guest.require_running()
        spec = guest.folder.spec()
        interfaces = () if spec is None else interfaces_of(instance_id, spec)
        before = next((one for one in interfaces if one.id == interface.id), None)
        if spec is None or before is None:
            raise OperationRejected(f"VM {instance_id} has no interface {interface.id}.")
        if is_user(before) is not is_user(interface):
            raise OperationRejected(
                f"The interface {interface.id} of VM {instance_id} cannot be moved between a user network and one of "
                "another kind while the VM runs.",
                remedy="Detach it and attach another, or stop the VM first.",
            )
        if is_user(interface):
            await self._networks.update(permit, guest, interface, forwards)
        else:
            of_it = forwards if interface.id == PRIMARY else ()
            await self._taps.update(permit, guest, before.network, interface, of_it)
        if interface.id == PRIMARY:
            _write_spec(permit, guest.folder, spec, msgspec.structs.replace(spec, primary=interface, forwards=forwards))
        else:
            _record_interface(permit, guest.folder, interface.id, interface)


# ----------------------------------------------------------------------------------------------------------- in QEMU


async def _plug_disk(guest: Guest, permit: Permit, disk: Disk) -> None:
    port = await _free_port(guest)
    device = await _free_device_name(guest, permit, disk.id)
    if node_name(disk.id) not in await sizes(guest):
        require_volume(disk)
        await add_node(guest, permit, open_disk(Path(disk.path), read_only=disk.read_only), disk)
    try:
        await guest.execute(permit, "device_add", {**device_arguments(disk, port), "id": device})
    except OperationRejected:
        with contextlib.suppress(OperationRejected):
            await guest.execute(permit, "blockdev-del", {"node-name": node_name(disk.id)})
        raise


async def _free_device_name(guest: Guest, permit: Permit, disk_id: str) -> str:
    """Return a name for the disk's device. Its own is in use if another disk was swapped in for it."""
    device, used = device_name(disk_id), await guest.devices()
    if device not in used:
        return device
    permit.check()
    guest.folder.add_node_names({node_name(disk_id): disk_id})
    names = (device_name(f"{number}-again") for number in itertools.count())
    return next(name for name in names if name not in used)


async def _free_port(guest: Guest) -> str:
    """Return the first port without a device. Raises `OperationRejected`."""
    used = set((await guest.device_ports()).values())
    for port in sorted(name for name in await guest.devices() if is_port(name)):
        if port not in used:
            return port
    raise OperationRejected(
        f"VM {guest.instance_id} has no free port for another disk or interface.",
        remedy="Detach something, or raise hotplug_ports for VMs started from then on.",
    )


async def _unplug(guest: Guest, permit: Permit, device: str, what: str) -> None:
    """Have the guest release a device. `what` names it for people.

    Raises:
        GuestNotFound: the guest has ended.
        NotResponding: it did not release the device in time.
    """
    unplugged = guest.unplugs.expect(device)
    try:
        try:
            await guest.execute(permit, "device_del", {"id": device})
        except OperationRejected:
            # An earlier unplug is pending, or the guest released the device a moment ago.
            if device not in await guest.devices():
                return
        async with asyncio.timeout(guest.settings.detach_timeout_ms / 1000):
            released = await unplugged
    except TimeoutError:
        released = False
    finally:
        unplugged.cancel()
    guest.require_process()
    if not released and device in await guest.devices():
        raise NotResponding(
            f"VM {guest.instance_id} did not release {what} in time.",
            remedy="Have the guest stop using it and try again; it is detached in any case when the guest is reset or "
            "ends.",
        )


# ------------------------------------------------------------------------------------------------------- on record


def _record_disk(permit: Permit, folder: InstanceFolder, disk_id: str, disk: Disk | None) -> None:
    spec = folder.spec()
    if spec is not None:
        _write_spec(permit, folder, spec, msgspec.structs.replace(spec, disks=_replaced(spec.disks, disk_id, disk)))


def _record_interface(permit: Permit, folder: InstanceFolder, interface_id: str, interface: Interface | None) -> None:
    spec = folder.spec()
    if spec is not None:
        interfaces = _replaced(spec.interfaces, interface_id, interface)
        _write_spec(permit, folder, spec, msgspec.structs.replace(spec, interfaces=interfaces))


def _write_spec(permit: Permit, folder: InstanceFolder, recorded: Spec, spec: Spec) -> None:
    if spec != recorded:
        permit.check()
        with folder.os_errors_rejected():
            folder.write_spec(spec)


def _replaced(devices: tuple[PluggedT, ...], device_id: str, by: PluggedT | None) -> tuple[PluggedT, ...]:
    """Return the devices with that one replaced, removed, or added at the end."""
    if not any(one.id == device_id for one in devices):
        return devices if by is None or by in devices else (*devices, by)
    changed = ((by if one.id == device_id else one) for one in devices)
    return tuple(one for one in changed if one is not None)
