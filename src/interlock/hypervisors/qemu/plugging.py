"""Disks plugged into a running guest and unplugged from it.

Each step looks at what is there first, so that a plugging that was cut short anywhere is completed by the next one.
The disks' files are made and removed elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any

from interlock.core.errors import NotResponding, NotThere, Refused
from interlock.core.records import Disk
from interlock.core.states import PowerState
from interlock.hypervisors.qemu.command_line import (
    RESCUE,
    ROOT,
    device_arguments,
    device_name,
    is_port,
    node_arguments,
    node_name,
)
from interlock.hypervisors.qemu.guest import ENDED_STATES, Guest
from interlock.hypervisors.qemu.opening import open_disk
from interlock.ports import Permit

_LOOK_AGAIN_S = 0.02


async def plug(guest: Guest, permit: Permit, disk: Disk) -> None:
    """Plug a disk into a running guest. Raises as `Hypervisor.attach_disk`."""
    device = device_name(disk.id)
    await _require_guest(guest)
    if device in await guest.devices():
        return
    port = await _free_port(guest)
    if not await _has_node(guest, disk.id):
        await _add_node(guest, permit, disk)
    try:
        await guest.tell(permit, "device_add", device_arguments(disk, port))
    except Refused:
        with contextlib.suppress(Refused):
            await guest.tell(permit, "blockdev-del", {"node-name": node_name(disk.id)})
        raise


async def _add_node(guest: Guest, permit: Permit, disk: Disk) -> None:
    descriptor = open_disk(Path(disk.path), read_only=disk.read_only)
    try:
        handed_over = await guest.tell(permit, "add-fd", attach=descriptor)
    finally:
        os.close(descriptor)
    number = handed_over["fdset-id"]
    try:
        await guest.tell(permit, "blockdev-add", node_arguments(disk, number))
    finally:
        # What uses the descriptor has a copy of its own.
        with contextlib.suppress(Refused, NotThere, NotResponding):
            await guest.tell(permit, "remove-fd", {"fdset-id": number})


async def unplug(guest: Guest, permit: Permit, disk_id: str) -> None:
    """Unplug a disk from a running guest. Raises as `Hypervisor.detach_disk`."""
    if disk_id in {ROOT, RESCUE}:
        raise Refused("The root disk cannot be detached.", remedy="Delete the instance instead.")
    device = device_name(disk_id)
    await _require_guest(guest)
    if device in await guest.devices():
        await _ask_back(guest, permit, disk_id, device)
    if await _has_node(guest, disk_id):
        await _remove_node(guest, permit, disk_id)


async def _remove_node(guest: Guest, permit: Permit, disk_id: str) -> None:
    """Close the disk. QEMU goes on using it for a moment after the device is gone, and does not tell when it ends."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + guest.settings.detach_timeout_ms / 1000
    while True:
        try:
            await guest.tell(permit, "blockdev-del", {"node-name": node_name(disk_id)})
        except Refused as error:
            if loop.time() >= deadline:
                raise NotResponding(error.message, remedy=error.remedy) from error
            await asyncio.sleep(_LOOK_AGAIN_S)
        else:
            return


async def _ask_back(guest: Guest, permit: Permit, disk_id: str, device: str) -> None:
    let_go = guest.expect_let_go(device)
    try:
        try:
            await guest.tell(permit, "device_del", {"id": device})
        except Refused:
            # It was asked back before and is still in use, or the guest let go of it a moment ago.
            if device not in await guest.devices():
                return
        async with asyncio.timeout(guest.settings.detach_timeout_ms / 1000):
            gone = await let_go
    except TimeoutError:
        gone = False
    finally:
        let_go.cancel()
    if guest.process.ended.is_set():
        raise NotThere(f"The guest of instance {guest.instance_id} has ended.")
    if not gone and device in await guest.devices():
        raise NotResponding(
            f"The guest of instance {guest.instance_id} did not let go of the disk {disk_id}.",
            remedy="Unmount it in the guest and ask again; it is detached in any case when the guest is reset or ends.",
        )


async def _require_guest(guest: Guest) -> None:
    state: PowerState = await guest.look()
    if state in ENDED_STATES:
        raise NotThere(f"No guest of instance {guest.instance_id} runs.")


async def _free_port(guest: Guest) -> str:
    for bus in await guest.ask("query-pci"):
        for bridge in sorted(bus["devices"], key=lambda device: str(device["qdev_id"])):
            if is_port(bridge["qdev_id"]) and not bridge.get("pci_bridge", {}).get("devices"):
                return str(bridge["qdev_id"])
    raise Refused(
        f"The guest of instance {guest.instance_id} has no free place for another disk.",
        remedy="Detach a volume, or raise hotplug_ports for guests started from then on.",
    )


async def _has_node(guest: Guest, disk_id: str) -> bool:
    nodes: list[dict[str, Any]] = await guest.ask("query-named-block-nodes", flat=True)
    return any(node["node-name"] == node_name(disk_id) for node in nodes)
