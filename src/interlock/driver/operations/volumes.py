"""Attach and detach volumes, concurrently with compatible state changes.

Invariant: a volume that a guest can write to is claimed by its instance in the record, so that no two guests ever have
it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import msgspec

from interlock.core.errors import GuestNotFound, InUse, NotFound, NotResponding, OperationRejected
from interlock.core.records import Disk, InstanceUpdate
from interlock.core.states import PowerState
from interlock.driver.operation_context import Done, OperationContext, starting
from interlock.ports import Volume


async def attach(work: OperationContext) -> Done:
    """Claim the volume, hot-plug it if a guest runs, and add it to the spec."""
    volume = await _volume(work)
    await require_no_memory(work)
    work.permit.check()
    if not await work.store.volumes.claim(volume.id, work.id):
        raise InUse(f"The volume {volume.name} is attached to another VM.", remedy="Detach it there first.")
    if volume.id in (await work.look()).detaching:
        raise OperationRejected(
            f"The volume {volume.name} is still being detached: the guest has not released it yet.",
            remedy="Wait for the guest, or hard-reboot it, and retry.",
        )
    disk = Disk(id=volume.id, path=volume.path)
    disks = (*(one for one in work.spec.disks if one.id != disk.id), disk)
    spec = msgspec.structs.replace(work.spec, disks=disks)
    try:
        while True:
            looked_at = await work.look()
            if await work.keep_spec(spec, looked_at, guest_has_it=await _plug(work, disk)):
                break
    except OperationRejected:
        # The volume is released only after a certain failure; one that may be plugged in stays claimed.
        seen = await work.hypervisor.inspect(work.id)
        if seen.responsive and volume.id not in seen.disks:
            await work.store.volumes.release(volume.id, work.id)
        raise
    return Done()


async def detach(work: OperationContext) -> Done:
    """Unplug the volume if a guest runs, remove it from the spec, and only then release it."""
    volume = await _volume(work)
    if volume.attached_to != work.id and not any(disk.id == volume.id for disk in work.spec.disks):
        if work.taken_up:
            return Done()
        raise NotFound(f"The volume {volume.name} is not attached to {work.instance.name}.")
    await require_no_memory(work)
    await require_releasable(work, volume.id, f"the volume {volume.name}")
    disks = tuple(one for one in work.spec.disks if one.id != volume.id)
    spec = msgspec.structs.replace(work.spec, disks=disks)
    while True:
        looked_at = await work.look()
        if await work.keep_spec(spec, looked_at, guest_has_it=await _unplug(work, volume.id)):
            break
    await work.store.volumes.release(volume.id, work.id)
    return Done()


async def _plug(work: OperationContext, disk: Disk) -> bool:
    """Hot-plug the disk if a guest runs or is being started; return whether one did."""
    while True:
        try:
            await work.hypervisor.attach_disk(work.permit, work.id, disk)
        except GuestNotFound:
            if not await runs_after_start(work):
                return False
        else:
            return True


async def require_releasable(work: OperationContext, device: str, what: str) -> None:
    """Raise `OperationRejected` if the guest is paused: it cannot release the device before it runs again."""
    seen = await work.hypervisor.inspect(work.id)
    if seen.responsive and seen.power_state is PowerState.PAUSED and device in {*seen.disks, *seen.interfaces}:
        raise OperationRejected(
            f"The guest of {work.instance.name} is paused, and cannot release {what}.",
            remedy="Unpause it, and retry.",
        )


@contextlib.asynccontextmanager
async def detaching_on_timeout(work: OperationContext, device: str) -> AsyncIterator[None]:
    """Record a device as `detaching` if its unplug times out: the guest may release it later."""
    try:
        yield
    except NotResponding:
        if (await work.hypervisor.inspect(work.id)).responsive:
            others = (one for one in (await work.look()).detaching if one != device)
            await work.keep(InstanceUpdate(detaching=(*others, device)))
        raise


async def _unplug(work: OperationContext, disk_id: str) -> bool:
    """Unplug the disk if a guest runs or is being started; return whether one did."""
    while True:
        try:
            async with detaching_on_timeout(work, disk_id):
                await work.hypervisor.detach_disk(work.permit, work.id, disk_id)
        except GuestNotFound:
            if not await runs_after_start(work):
                return False
        else:
            return True


async def require_no_memory(work: OperationContext) -> None:
    """Raise `OperationRejected` if the guest has saved memory, unless a start in flight discards it.

    Its volumes must not change until the memory is restored: the resumed guest would corrupt a volume that another
    guest has written to.
    """
    if (await work.hypervisor.inspect(work.id)).memory_saved and not starting(await work.look()):
        raise OperationRejected(
            f"The memory of {work.instance.name}'s guest is saved: its volumes must not change until it is restored.",
            remedy="Resume the VM first; or hard-reboot it, which discards the saved memory.",
        )


async def runs_after_start(work: OperationContext) -> bool:
    """Wait for a start in flight to end; return whether a guest runs then.

    Raises:
        OperationRejected: no guest runs, but its QEMU process still has its disks open.
    """
    await work.until_start_has_ended()
    await work.refresh()
    state = (await work.hypervisor.inspect(work.id)).power_state
    if state in {PowerState.CRASHED, PowerState.SHUTDOWN}:
        raise OperationRejected(
            "The guest does not run, but its QEMU process still has its disks open.",
            remedy="Stop or reboot the VM first.",
        )
    return state is not PowerState.NONE


async def _volume(work: OperationContext, parameter: str = "volume") -> Volume:
    volume = await work.store.volumes.get(str(work.request.parameters[parameter]))
    if volume is None:
        raise NotFound("The volume was deleted while the request was queued.")
    return volume
