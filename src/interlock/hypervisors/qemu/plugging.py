"""Disks plugged into a running guest and unplugged from it.

Each step looks at what is there first, so that a plugging that was cut short anywhere is completed by the next one.
The disks' files are made and removed elsewhere.
"""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

from interlock.core.errors import Refused
from interlock.core.records import Disk
from interlock.hypervisors.qemu.command_line import RESCUE, ROOT, device_arguments, device_name, node_name
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.hotplug import ask_back, free_port, require_guest
from interlock.hypervisors.qemu.nodes import add_node, remove_node, sizes
from interlock.hypervisors.qemu.opening import open_disk
from interlock.hypervisors.qemu.swapping import end_swaps
from interlock.ports import Permit


async def plug(guest: Guest, permit: Permit, disk: Disk) -> None:
    """Plug a disk into a running guest. Raises as `Hypervisor.attach_disk`."""
    await require_guest(guest)
    device_name(disk.id)
    if disk.id in await guest.disks():
        return
    port = await free_port(guest)
    device = await _free_name(guest, permit, disk.id)
    if node_name(disk.id) not in await sizes(guest):
        await add_node(guest, permit, open_disk(Path(disk.path), read_only=disk.read_only), disk)
    try:
        await guest.tell(permit, "device_add", {**device_arguments(disk, port), "id": device})
    except Refused:
        with contextlib.suppress(Refused):
            await guest.tell(permit, "blockdev-del", {"node-name": node_name(disk.id)})
        raise


async def _free_name(guest: Guest, permit: Permit, disk_id: str) -> str:
    """A name for the disk's device. Its own is taken if another disk was swapped in where it was."""
    device, taken = device_name(disk_id), await guest.devices()
    if device not in taken:
        return device
    permit.check()
    guest.folder.keep_node_names({node_name(disk_id): disk_id})
    names = (device_name(f"{number}-again") for number in itertools.count())
    return next(name for name in names if name not in taken)


async def unplug(guest: Guest, permit: Permit, disk_id: str) -> None:
    """Unplug a disk from a running guest. Raises as `Hypervisor.detach_disk`."""
    if disk_id in {ROOT, RESCUE}:
        raise Refused("The root disk cannot be detached.", remedy="Delete the instance instead.")
    device_name(disk_id)
    await require_guest(guest)
    await end_swaps(guest, permit, disk_id)
    device = (await guest.plugged()).get(disk_id)
    if device is not None:
        await ask_back(guest, permit, device, f"the disk {disk_id}")
    await remove_node(guest, permit, node_name(disk_id))
