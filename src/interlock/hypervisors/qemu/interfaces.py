"""Network interfaces beyond the first, plugged into a running guest and unplugged from it."""

from __future__ import annotations

import contextlib

from interlock.core.errors import Refused
from interlock.core.records import Interface
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.hotplug import ask_back, free_port, require_guest
from interlock.hypervisors.qemu.networks import interface_arguments, interface_device, network_arguments
from interlock.ports import Permit


async def plug(guest: Guest, permit: Permit, interface: Interface) -> None:
    """Plug an interface into a running guest. Raises as `Hypervisor.attach_interface`."""
    await require_guest(guest)
    if interface_device(interface.id) in await guest.devices():
        return
    device = interface_arguments(interface, await free_port(guest))
    network = network_arguments(interface.id)
    # One that was cut short, or whose guest let go of it when nobody waited any more, left its network.
    await _remove_network(guest, permit, network["id"])
    await guest.tell(permit, "netdev_add", network)
    try:
        await guest.tell(permit, "device_add", device)
    except Refused:
        await _remove_network(guest, permit, network["id"])
        raise


async def unplug(guest: Guest, permit: Permit, interface_id: str) -> None:
    """Unplug an interface from a running guest. Raises as `Hypervisor.detach_interface`."""
    device = interface_device(interface_id)
    await require_guest(guest)
    if device in await guest.devices():
        await ask_back(guest, permit, device, f"the interface {interface_id}")
    await _remove_network(guest, permit, network_arguments(interface_id)["id"])


async def _remove_network(guest: Guest, permit: Permit, name: str) -> None:
    """Remove a network to which nothing is plugged; QEMU has no way to ask whether it is there."""
    with contextlib.suppress(Refused):
        await guest.tell(permit, "netdev_del", {"id": name})
