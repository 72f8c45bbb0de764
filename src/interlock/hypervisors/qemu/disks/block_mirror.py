"""Swap a disk of a running guest for another one, with QEMU's `blockdev-mirror`.

QEMU copies everything, then writes whatever the guest writes to both disks, and finally switches the guest's device to
the new one. It continues if the server ends; the next server resumes from what it finds. Until the switch the guest has
the old disk, and cancelling the mirror leaves it so.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Final

import msgspec

from interlock.core.errors import GuestNotFound, InterlockError, NotResponding, OperationRejected
from interlock.core.records import Disk
from interlock.hypervisors.qemu.command_line import RESCUE, ROOT, device_name, node_name
from interlock.hypervisors.qemu.disks import block_jobs
from interlock.hypervisors.qemu.disks.block_nodes import add_node, remove_node, sizes
from interlock.hypervisors.qemu.files.file_handles import open_disk
from interlock.hypervisors.qemu.guest import Guest
from interlock.ports import Permit, Report

_LENGTH: Final = 12


async def swap(guest: Guest, permit: Permit, old: Disk, new: Disk, report: Report) -> None:
    """See `ports.Hypervisor.swap_disk`."""
    await guest.require_running()
    if {old.id, new.id} & {ROOT, RESCUE}:
        raise OperationRejected("The root disk cannot be swapped.", remedy="Rebuild or resize the VM instead.")
    device_name(new.id)
    job = _job_name(old.id, new.id)
    found = await block_jobs.jobs(guest)
    await _remove_jobs(guest, permit, old.id, kept=job)
    if job in found and found[job].status == block_jobs.CONCLUDED:
        await block_jobs.remove(guest, permit, job)
        del found[job]
    devices = await guest.disk_devices()
    if new.id not in devices:
        if old.id not in devices:
            raise OperationRejected(f"VM {guest.instance_id} has no disk {old.id}.")
        try:
            if job not in found:
                await _start(guest, permit, old, new)
            await _complete(guest, permit, old, new, report)
        except OperationRejected:
            await _roll_back(guest, permit, old, new)
            raise
        except BaseException:
            with contextlib.suppress(InterlockError):
                await _roll_back(guest, permit, old, new)
            raise
    elif old.id in devices:
        raise OperationRejected(f"VM {guest.instance_id} has the disk {new.id} beside {old.id}.")
    await _clean_up(guest, permit, old, new)


async def cancel_swaps(guest: Guest, permit: Permit, disk_id: str) -> None:
    """Cancel all swaps of the disk that are in progress; the guest keeps the disk."""
    if await _remove_jobs(guest, permit, disk_id, kept=None):
        await _close_unused(guest, permit)


async def _start(guest: Guest, permit: Permit, old: Disk, new: Disk) -> None:
    await _close_unused(guest, permit)
    permit.check()
    guest.folder.add_node_names({node_name(new.id): new.id, _view_name(new.id): new.id})
    # The mirror writes to it, even if the guest may not.
    writable = msgspec.structs.replace(new, read_only=False)
    await add_node(guest, permit, open_disk(Path(new.path), read_only=False), writable)
    nodes = await sizes(guest)
    held, offered = nodes[node_name(old.id)], nodes[node_name(new.id)]
    if offered < held:
        raise OperationRejected(
            f"The disk {new.id} has {offered} bytes, and {old.id}, which it is to replace, has {held}.",
            remedy="Use one that is at least as large.",
        )
    target = node_name(new.id)
    if offered > held:
        # QEMU mirrors only between equal sizes: a raw node limits the new disk to the old size until the switch.
        target = _view_name(new.id)
        view = {"driver": "raw", "node-name": target, "file": node_name(new.id), "size": held}
        await guest.execute(permit, "blockdev-add", view)
    await block_jobs.start(
        guest,
        permit,
        "blockdev-mirror",
        _job_name(old.id, new.id),
        device=node_name(old.id),
        target=target,
        sync="full",
    )


async def _complete(guest: Guest, permit: Permit, old: Disk, new: Disk, report: Report) -> None:
    """Follow the mirror, and switch the guest's device to the new disk."""
    job, what = _job_name(old.id, new.id), f"Copying the disk {old.id} to {new.id}"
    await block_jobs.follow(guest, job, what, report, until=block_jobs.READY)
    # An earlier worker may have sent this already.
    with contextlib.suppress(OperationRejected):
        await guest.execute(permit, "job-complete", {"id": job})
    await block_jobs.follow(guest, job, what, report)
    await block_jobs.remove(guest, permit, job)
    if new.id not in await guest.disk_devices():
        raise OperationRejected(f"{what} ended, and the guest still uses {old.id}.", remedy="Try again.")


async def _clean_up(guest: Guest, permit: Permit, old: Disk, new: Disk) -> None:
    """Close the old disk and the size limit once the guest's device uses the new disk."""
    device = (await guest.disk_devices())[new.id]
    if (await guest.device_nodes()).get(device) == _view_name(new.id):
        path = f"/machine/peripheral/{device}"
        await guest.execute(permit, "qom-set", {"path": path, "property": "drive", "value": node_name(new.id)})
    nodes = await sizes(guest)
    if _view_name(new.id) in nodes:
        await remove_node(guest, permit, _view_name(new.id))
        # This notifies the guest that its disk is larger.
        size = nodes[node_name(new.id)]
        await guest.execute(permit, "block_resize", {"node-name": node_name(new.id), "size": size})
    await remove_node(guest, permit, node_name(old.id))


async def _roll_back(guest: Guest, permit: Permit, old: Disk, new: Disk) -> None:
    """Leave the guest with the old disk, and close the new one.

    Raises:
        NotResponding: QEMU still has the new disk open, and may write to it.
    """
    # A process that has ended has nothing open.
    with contextlib.suppress(GuestNotFound):
        await block_jobs.remove(guest, permit, _job_name(old.id, new.id))
        await _close_unused(guest, permit)
        if node_name(new.id) in await sizes(guest):
            raise NotResponding(
                f"QEMU of VM {guest.instance_id} does not close the disk {new.id}, which was being copied to.",
                remedy="Check the host's storage.",
            )


async def _remove_jobs(guest: Guest, permit: Permit, disk_id: str, *, kept: str | None) -> bool:
    """Cancel the swaps of the disk but for the job `kept`; return whether there were any."""
    prefix = _job_name(disk_id, "")
    mine = [job for job in await block_jobs.jobs(guest) if job.startswith(prefix) and job != kept]
    for job in mine:
        await block_jobs.remove(guest, permit, job)
    return bool(mine)


async def _close_unused(guest: Guest, permit: Permit) -> None:
    """Close the disks that were opened for a swap, and that neither the guest nor another swap uses."""
    used = set((await guest.device_nodes()).values())
    nodes = await sizes(guest)
    names = [name for name in guest.folder.node_names() if name in nodes and name not in used]
    # A size limit uses the node below it, and comes first.
    for name in sorted(names, key=lambda name: not name.startswith(_VIEW_PREFIX)):
        # A node in use belongs to a swap of another disk.
        with contextlib.suppress(NotResponding):
            await remove_node(guest, permit, name)


_VIEW_PREFIX: Final = "view-"


def _view_name(disk_id: str) -> str:
    return _VIEW_PREFIX + _short(disk_id)


def _job_name(old_id: str, new_id: str) -> str:
    """Return the name of the job that swaps one for the other; with an empty new id, the prefix of all its swaps."""
    return f"swap-{_short(old_id)}-{_short(new_id) if new_id else ''}"


def _short(disk_id: str) -> str:
    return hashlib.sha256(disk_id.encode()).hexdigest()[:_LENGTH]
