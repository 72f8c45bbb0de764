"""The disks of a guest: made, opened for QEMU, plugged into a running guest and unplugged from it.

Each step looks at what is there first, so that a plugging that was cut short anywhere is completed by the next one.
Volumes' files are made and removed elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
from pathlib import Path
from typing import Any

from interlock.core.errors import NotResponding, NotThere, Refused
from interlock.core.records import Disk, Spec
from interlock.core.states import PowerState
from interlock.hypervisors.commands import run
from interlock.hypervisors.qemu.command_line import (
    ROOT,
    device_arguments,
    device_name,
    is_port,
    node_arguments,
    node_name,
)
from interlock.hypervisors.qemu.guest import ENDED_STATES, Guest
from interlock.hypervisors.qemu.instance_folder import InstanceFolder
from interlock.hypervisors.qemu.process import Account
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.ports import Permit

_GIB = 1024**3
_ATTEMPTS = itertools.count()
_READ_BY_OTHERS = 0o004
_LOOK_AGAIN_S = 0.02
_READ_BY_GROUP = 0o040


async def make_root_disk(permit: Permit, folder: InstanceFolder, spec: Spec, settings: QemuSettings) -> None:
    """Make the instance's root disk, an empty layer over its image; does nothing where it is there.

    Raises:
        Refused: it could not be made; the message is the image tool's.
        NotResponding: the image tool took too long.
    """
    if spec.image.kind != "disk" or folder.root_disk.exists():
        return
    # A worker that was cancelled may have left its image tool at work: no two of them share a name.
    fresh = folder.root_disk.with_suffix(f".{os.getpid()}-{next(_ATTEMPTS)}.new")
    size_bytes = spec.root_gib * _GIB or spec.image.size_bytes
    # -u: the image is not opened here, so that nothing in it is believed.
    command = [settings.image_tool_binary, "create", "-q", "-u", "-f", "qcow2"]
    command += ["-b", spec.image.path, "-F", spec.image.format, str(fresh), str(size_bytes)]
    permit.check()
    ended = await asyncio.to_thread(run, command, timeout_s=settings.image_tool_timeout_ms / 1000)
    if ended.status != 0:
        fresh.unlink(missing_ok=True)
        raise Refused(
            f"The root disk of {folder.path.name} could not be made: {ended.complaint}",
            remedy=f"Check the room and the permissions in {folder.path}.",
        )
    await asyncio.to_thread(_make_durable, fresh)
    permit.check()
    fresh.replace(folder.root_disk)
    await asyncio.to_thread(_make_durable, folder.path)


def _make_durable(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_disk(path: Path, *, read_only: bool) -> int:
    """Open a disk for QEMU. Raises `Refused` with what is wrong with it."""
    return _open(path, os.O_RDONLY if read_only else os.O_RDWR)


def open_kernel(path: Path, account: Account | None) -> int:
    """Open a kernel or initial file system so that QEMU's user, who opens it once more, may read it too."""
    descriptor = _open(path, os.O_RDONLY)
    mode = os.fstat(descriptor).st_mode
    if account is not None and not mode & _READ_BY_OTHERS:
        os.fchown(descriptor, -1, account.group_id)
        os.fchmod(descriptor, mode | _READ_BY_GROUP)
    return descriptor


def _open(path: Path, access: int) -> int:
    try:
        return os.open(path, access | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        remedy = "Free some descriptors." if error.errno in {errno.EMFILE, errno.ENFILE} else "Put the file back."
        raise Refused(f"{path} cannot be opened: {error.strerror}.", remedy=remedy) from error


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
    if disk_id == ROOT:
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
