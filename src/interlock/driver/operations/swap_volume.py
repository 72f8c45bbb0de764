"""Swap volume: replace an attached volume by another, with its content.

It runs concurrently with a start, a stop or a reboot, so that the guest may start and end at any moment. The new volume
is claimed before it is used, and the old one is released only when no guest has it and none can still get it.
"""

from __future__ import annotations

import asyncio
import contextlib

import msgspec

from interlock.core.errors import GuestNotFound, InUse, NotFound, OperationRejected
from interlock.core.records import Disk, InstanceUpdate, Spec
from interlock.core.states import PowerState
from interlock.driver.operation_context import Done, OperationContext, starting
from interlock.driver.operations.volumes import require_no_memory, runs_after_start
from interlock.ports import Observation, Volume


async def swap(work: OperationContext) -> Done:
    """Replace the old volume by the new one, in the guest if one runs, and release the old one."""
    old_id, new = str(work.request.parameters["old"]), await _new(work)
    attached = {disk.id: disk for disk in work.spec.disks}
    if new.id not in attached or old_id in attached:
        await require_no_memory(work)
        await _claim(work, attached, old_id, new)
        old = attached[old_id]
        replaced = msgspec.structs.replace(old, id=new.id, path=new.path)
        disks = tuple(replaced if disk.id == old.id else disk for disk in work.spec.disks)
        spec = msgspec.structs.replace(work.spec, disks=disks)
        try:
            if work.request.parameters.get("copy", True):
                await _with_content(work, spec, old, replaced)
            else:
                await _as_it_is(work, spec)
        except OperationRejected:
            seen = await work.hypervisor.inspect(work.id)
            if seen.responsive and new.id not in seen.disks:
                await work.store.volumes.release(new.id, work.id)
            raise
    await _until_no_guest_has(work, old_id)
    await work.store.volumes.release(old_id, work.id)
    return Done()


async def _new(work: OperationContext) -> Volume:
    volume = await work.store.volumes.get(str(work.request.parameters["new"]))
    if volume is None:
        raise NotFound("The new volume was deleted while the request was queued.")
    return volume


async def _claim(work: OperationContext, attached: dict[str, Disk], old_id: str, new: Volume) -> None:
    old = await work.store.volumes.get(old_id)
    if old is None or old_id not in attached:
        raise NotFound(f"The volume {old.name if old else old_id} is not attached to {work.instance.name}.")
    if new.id in attached:
        raise InUse(f"The volume {new.name} is already attached to {work.instance.name}.", remedy="Detach it first.")
    work.permit.check()
    if not await work.store.volumes.claim(new.id, work.id):
        raise InUse(f"The volume {new.name} is attached to another VM.", remedy="Detach it there first.")


async def _with_content(work: OperationContext, spec: Spec, old: Disk, new: Disk) -> None:
    """Copy the old volume to the new one, online by mirroring or offline."""
    while True:
        await work.refresh()
        looked_at = work.instance
        if await work.keep_spec(spec, looked_at, guest_has_it=await _exchange(work, old, new)):
            return


async def _exchange(work: OperationContext, old: Disk, new: Disk) -> bool:
    """Switch a running or starting guest to the new disk, else copy offline; return whether a guest has it."""
    while True:
        try:
            async with work.moving() as report:
                await work.hypervisor.swap_disk(work.permit, work.id, old, new, report)
        except GuestNotFound:
            if not await runs_after_start(work):
                break
        else:
            return True
    async with work.moving() as report:
        await work.hypervisor.copy_disk(work.permit, work.id, old, new, report)
    return False


async def _as_it_is(work: OperationContext, spec: Spec) -> None:
    """Replace the volume without copying, such as when the old one is unreadable.

    A start that the old one blocks continues with the new one, see `_until_no_guest_has`.
    """
    seen = await work.hypervisor.inspect(work.id)
    if seen.power_state is not PowerState.NONE:
        raise OperationRejected(
            "The guest uses the old volume, and would lose the data on it.",
            remedy="Stop the VM first, or have the content copied.",
        )
    await work.keep(InstanceUpdate(spec=spec))


async def _until_no_guest_has(work: OperationContext, old_id: str) -> None:
    """Return when no guest has the old disk, and none that is being started can have it.

    Raises:
        OperationRejected: a guest has the old disk and keeps it.
    """
    while True:
        await work.refresh()
        seen = await work.hypervisor.inspect(work.id)
        latest = await work.look()
        if latest.host != work.instance.host:
            continue
        beside = starting(latest)
        if _was_never_run(seen) and beside and not seen.responsive:
            # Its QEMU process is blocked on the old disk; once it is gone, the start is retried with the new disk.
            await work.hypervisor.power_off(work.permit, work.id)
            continue
        if old_id in seen.disks:
            await _take_away(work, old_id)
            continue
        if not (beside and _was_never_run(seen)):
            return
        work.wakeup.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(work.config.inspect_retry_ms / 1000):
                await work.wakeup.wait()


def _was_never_run(seen: Observation) -> bool:
    return seen.power_state is PowerState.NONE


async def _take_away(work: OperationContext, old_id: str) -> None:
    """Swap again, in a guest that was started with the old disk while the new one was being recorded."""
    new = next(disk for disk in work.spec.disks if disk.id == work.request.parameters["new"])
    volume = await work.store.volumes.get(old_id)
    assert volume is not None
    old = msgspec.structs.replace(new, id=volume.id, path=volume.path)
    with contextlib.suppress(GuestNotFound):
        async with work.moving() as report:
            await work.hypervisor.swap_disk(work.permit, work.id, old, new, report)
