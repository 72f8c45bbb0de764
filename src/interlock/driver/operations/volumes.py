"""Attach, detach and swap volumes, beside whatever state change allows it.

The order of the steps keeps one promise: at every moment a volume that a guest could write to is claimed by that
instance in the record, so that no two guests ever have it.
"""

from __future__ import annotations

import msgspec

from interlock.core.errors import InUse, NotFound, NotThere, Refused
from interlock.core.records import Disk
from interlock.core.states import PowerState
from interlock.driver.work import Done, Work, starting
from interlock.ports import Volume


async def attach(work: Work) -> Done:
    """Claim the volume, plug it in if a guest runs, and keep it in the spec for the next start."""
    volume = await _volume(work)
    await require_no_memory(work)
    work.permit.check()
    if not await work.store.claim_volume(volume.id, work.id):
        raise InUse(f"The volume {volume.name} is attached to another instance.", remedy="Detach it there first.")
    disk = Disk(id=volume.id, path=volume.path)
    disks = (*(one for one in work.spec.disks if one.id != disk.id), disk)
    spec = msgspec.structs.replace(work.spec, disks=disks)
    try:
        while True:
            looked_at = await work.look()
            if await work.keep_spec(spec, looked_at, guest_has_it=await _plug(work, disk)):
                break
    except Refused:
        # Only a certain failure gives the volume back; what may be plugged in stays claimed.
        seen = await work.hypervisor.inspect(work.id)
        if seen.responsive and volume.id not in seen.disks:
            await work.store.release_volume(volume.id, work.id)
        raise
    return Done()


async def detach(work: Work) -> Done:
    """Unplug the volume if a guest runs, forget it for the next start, and only then let it go."""
    volume = await _volume(work)
    if volume.attached_to != work.id and not any(disk.id == volume.id for disk in work.spec.disks):
        if work.taken_up:
            return Done()
        raise NotFound(f"The volume {volume.name} is not attached to {work.instance.name}.")
    await require_no_memory(work)
    disks = tuple(one for one in work.spec.disks if one.id != volume.id)
    spec = msgspec.structs.replace(work.spec, disks=disks)
    while True:
        looked_at = await work.look()
        if await work.keep_spec(spec, looked_at, guest_has_it=await _unplug(work, volume.id)):
            break
    await work.store.release_volume(volume.id, work.id)
    return Done()


async def _plug(work: Work, disk: Disk) -> bool:
    """Plug the disk into the guest, if one runs or is about to; whether one did."""
    while True:
        try:
            await work.hypervisor.attach_disk(work.permit, work.id, disk)
        except NotThere:
            if not await runs_after_all(work):
                return False
        else:
            return True


async def _unplug(work: Work, disk_id: str) -> bool:
    """Unplug the disk from the guest, if one runs or is about to; whether one did."""
    while True:
        try:
            await work.hypervisor.detach_disk(work.permit, work.id, disk_id)
        except NotThere:
            if not await runs_after_all(work):
                return False
        else:
            return True


async def require_no_memory(work: Work) -> None:
    """Raise `Refused` if the guest is to go on from a saved memory, also where that is shelved with it.

    What is on its volumes goes with that memory: one that comes back after another guest had it is damaged by the
    first that resumes. A start that is in flight gives the memory up.
    """
    if (await work.hypervisor.inspect(work.id)).memory_saved and not starting(await work.look()):
        raise Refused(
            f"The memory of {work.instance.name}'s guest is saved, and what is on its volumes goes with it.",
            remedy="Bring the guest back, resume it, and ask again; or reboot it hard, which gives its memory up.",
        )


async def runs_after_all(work: Work) -> bool:
    """Whether the guest that was not there a moment ago runs once the start that is in flight has ended.

    Raises:
        Refused: no guest runs, but what held it is still there and has its disks open.
    """
    await work.until_start_has_ended()
    await work.refresh()
    state = (await work.hypervisor.inspect(work.id)).power_state
    if state in {PowerState.CRASHED, PowerState.SHUTDOWN}:
        raise Refused(
            "The guest does not run, and its machine still holds its disks.",
            remedy="Stop or reboot the instance first.",
        )
    return state is not PowerState.NONE


async def _volume(work: Work, parameter: str = "volume") -> Volume:
    volume = await work.store.volume(str(work.request.parameters[parameter]))
    if volume is None:
        raise NotFound("The volume was deleted before its turn came.")
    return volume
