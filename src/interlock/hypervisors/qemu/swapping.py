"""Another disk put in the place of one that a running guest uses, by QEMU's mirror, without the guest's noticing.

QEMU copies everything, goes on to write whatever the guest writes to both, and then lets the guest's device use the
new disk. It does that also when we are gone: who comes after takes up what it finds. Until the device uses the new
disk the guest has the old one, and to end the mirror is to leave it so.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Final

import msgspec

from interlock.core.errors import InterlockError, NotResponding, NotThere, Refused
from interlock.core.records import Disk
from interlock.hypervisors.qemu import block_jobs
from interlock.hypervisors.qemu.command_line import RESCUE, ROOT, device_name, node_name
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.hotplug import require_guest
from interlock.hypervisors.qemu.nodes import add_node, remove_node, sizes
from interlock.hypervisors.qemu.opening import open_disk
from interlock.ports import Permit, Report

_LENGTH: Final = 12


async def swap(guest: Guest, permit: Permit, old: Disk, new: Disk, report: Report) -> None:
    """See `ports.Hypervisor.swap_disk`."""
    await require_guest(guest)
    if {old.id, new.id} & {ROOT, RESCUE}:
        raise Refused("The root disk cannot be swapped.", remedy="Rebuild or resize the instance instead.")
    device_name(new.id)
    job = _job_name(old.id, new.id)
    found = await block_jobs.jobs(guest)
    await _end_jobs(guest, permit, old.id, kept=job)
    if job in found and found[job].status == block_jobs.ENDED:
        await block_jobs.end(guest, permit, job)
        del found[job]
    has = await guest.plugged()
    if new.id not in has:
        if old.id not in has:
            raise Refused(f"The guest of instance {guest.instance_id} has no disk {old.id}.")
        try:
            if job not in found:
                await _begin(guest, permit, old, new)
            await _go_on(guest, permit, old, new, report)
        except Refused:
            await _give_up(guest, permit, old, new)
            raise
        except BaseException:
            with contextlib.suppress(InterlockError):
                await _give_up(guest, permit, old, new)
            raise
    elif old.id in has:
        raise Refused(f"The guest of instance {guest.instance_id} has the disk {new.id} beside {old.id}.")
    await _finish(guest, permit, old, new)


async def end_swaps(guest: Guest, permit: Permit, disk_id: str) -> None:
    """End every swap of the disk that is under way, so that the guest keeps the disk."""
    if await _end_jobs(guest, permit, disk_id, kept=None):
        await _close_strays(guest, permit)


async def _begin(guest: Guest, permit: Permit, old: Disk, new: Disk) -> None:
    await _close_strays(guest, permit)
    permit.check()
    guest.folder.keep_node_names({node_name(new.id): new.id, _view_name(new.id): new.id})
    # It is written to while it is filled, whatever the guest may do with it.
    writable = msgspec.structs.replace(new, read_only=False)
    await add_node(guest, permit, open_disk(Path(new.path), read_only=False), writable)
    there = await sizes(guest)
    held, offered = there[node_name(old.id)], there[node_name(new.id)]
    if offered < held:
        raise Refused(
            f"The disk {new.id} has {offered} bytes, and {old.id}, whose place it is to take, has {held}.",
            remedy="Use one that is at least as large.",
        )
    target = node_name(new.id)
    if offered > held:
        # QEMU mirrors only what is of the same size: the new disk is seen as being so until it is in its place.
        target = _view_name(new.id)
        view = {"driver": "raw", "node-name": target, "file": node_name(new.id), "size": held}
        await guest.tell(permit, "blockdev-add", view)
    await block_jobs.begin(
        guest,
        permit,
        "blockdev-mirror",
        _job_name(old.id, new.id),
        device=node_name(old.id),
        target=target,
        sync="full",
    )


async def _go_on(guest: Guest, permit: Permit, old: Disk, new: Disk, report: Report) -> None:
    """Follow the mirror until the guest's device uses the new disk."""
    job, what = _job_name(old.id, new.id), f"Copying the disk {old.id} to {new.id}"
    await block_jobs.follow(guest, job, what, report, until=block_jobs.READY)
    # It may be on its way already, at the word of who was here before us.
    with contextlib.suppress(Refused):
        await guest.tell(permit, "job-complete", {"id": job})
    await block_jobs.follow(guest, job, what, report)
    await block_jobs.end(guest, permit, job)
    if new.id not in await guest.plugged():
        raise Refused(f"{what} ended, and the guest still uses {old.id}.", remedy="Ask again.")


async def _finish(guest: Guest, permit: Permit, old: Disk, new: Disk) -> None:
    """Close what is left over once the guest's device uses the new disk."""
    device = (await guest.plugged())[new.id]
    if (await guest.drives()).get(device) == _view_name(new.id):
        place = f"/machine/peripheral/{device}"
        await guest.tell(permit, "qom-set", {"path": place, "property": "drive", "value": node_name(new.id)})
    there = await sizes(guest)
    if _view_name(new.id) in there:
        await remove_node(guest, permit, _view_name(new.id))
        # Tells the guest that its disk has become larger.
        size = there[node_name(new.id)]
        await guest.tell(permit, "block_resize", {"node-name": node_name(new.id), "size": size})
    await remove_node(guest, permit, node_name(old.id))


async def _give_up(guest: Guest, permit: Permit, old: Disk, new: Disk) -> None:
    """Leave the guest with the old disk, and close the new one; who comes after us finds what cannot be undone now.

    Raises:
        NotResponding: QEMU has the new disk still, and may write to it.
    """
    # A process that has ended has nothing any more.
    with contextlib.suppress(NotThere):
        await block_jobs.end(guest, permit, _job_name(old.id, new.id))
        await _close_strays(guest, permit)
        if node_name(new.id) in await sizes(guest):
            raise NotResponding(
                f"QEMU does not let go of the disk {new.id}, which instance {guest.instance_id} was to have.",
                remedy="The host's storage probably does not answer; look at it.",
            )


async def _end_jobs(guest: Guest, permit: Permit, disk_id: str, *, kept: str | None) -> bool:
    """End the swaps of the disk, whatever it was to be swapped for; whether there were any."""
    beginning = _job_name(disk_id, "")
    mine = [job for job in await block_jobs.jobs(guest) if job.startswith(beginning) and job != kept]
    for job in mine:
        await block_jobs.end(guest, permit, job)
    return bool(mine)


async def _close_strays(guest: Guest, permit: Permit) -> None:
    """Close the disks that were opened to be swapped in, and that neither the guest nor a swap under way uses."""
    used = set((await guest.drives()).values())
    there = await sizes(guest)
    names = [name for name in guest.folder.node_names() if name in there and name not in used]
    # Whoever looks through another comes first.
    for name in sorted(names, key=lambda name: not name.startswith(_VIEW_PREFIX)):
        # One that is still used in the end is what a swap of another disk is at work with.
        with contextlib.suppress(NotResponding):
            await remove_node(guest, permit, name)


_VIEW_PREFIX: Final = "view-"


def _view_name(disk_id: str) -> str:
    return _VIEW_PREFIX + _short(disk_id)


def _job_name(old_id: str, new_id: str) -> str:
    """What the job is called that swaps one for the other; with no new one, how all those are called that swap it."""
    return f"swap-{_short(old_id)}-{_short(new_id) if new_id else ''}"


def _short(disk_id: str) -> str:
    return hashlib.sha256(disk_id.encode()).hexdigest()[:_LENGTH]
