"""Swap: another volume in the place of an attached one, with its content.

Served also beside a start, a stop or a reboot, which may not be able to end before: so the guest may come and go at any
moment here. The new volume is claimed before anything has it, and the old one is let go of only when no guest has it
and none can be given it any more.
"""

from __future__ import annotations

import asyncio
import contextlib

import msgspec

from interlock.core.errors import InUse, NotFound, NotThere, Refused
from interlock.core.records import Disk, Kept, Spec
from interlock.core.states import PowerState
from interlock.driver.operations.volumes import require_no_memory, runs_after_all
from interlock.driver.work import Done, Work, starting
from interlock.ports import Observation, Volume


async def swap(work: Work) -> Done:
    """Put the new volume in the place of the old one, in the guest if one runs, and let the old one go."""
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
        except Refused:
            seen = await work.hypervisor.inspect(work.id)
            if seen.responsive and new.id not in seen.disks:
                await work.store.release_volume(new.id, work.id)
            raise
    await _until_no_guest_has(work, old_id)
    await work.store.release_volume(old_id, work.id)
    return Done()


async def _new(work: Work) -> Volume:
    volume = await work.store.volume(str(work.request.parameters["new"]))
    if volume is None:
        raise NotFound("The new volume was deleted before its turn came.")
    return volume


async def _claim(work: Work, attached: dict[str, Disk], old_id: str, new: Volume) -> None:
    old = await work.store.volume(old_id)
    if old is None or old_id not in attached:
        raise NotFound(f"The volume {old.name if old else old_id} is not attached to {work.instance.name}.")
    if new.id in attached:
        raise InUse(f"The volume {new.name} is attached to {work.instance.name} itself.", remedy="Detach it first.")
    if new.size_bytes < old.size_bytes:
        raise Refused(
            f"The volume {new.name} has {new.size_bytes} bytes, and {old.name}, whose place it is to take, has "
            f"{old.size_bytes}."
        )
    work.permit.check()
    if not await work.store.claim_volume(new.id, work.id):
        raise InUse(f"The volume {new.name} is attached to another instance.", remedy="Detach it there first.")


async def _with_content(work: Work, spec: Spec, old: Disk, new: Disk) -> None:
    """Copy what is on the old volume to the new one, in the guest's back or while there is none."""
    while True:
        await work.refresh()
        looked_at = work.instance
        if await work.keep_spec(spec, looked_at, guest_has_it=await _exchange(work, old, new)):
            return


async def _exchange(work: Work, old: Disk, new: Disk) -> bool:
    """Have the guest use the new disk, if one runs or is about to; whether one did."""
    while True:
        try:
            async with work.moving() as report:
                await work.hypervisor.swap_disk(work.permit, work.id, old, new, report)
        except NotThere:
            if not await runs_after_all(work):
                break
        else:
            return True
    async with work.moving() as report:
        await work.hypervisor.copy_disk(work.permit, work.id, old, new, report)
    return False


async def _as_it_is(work: Work, spec: Spec) -> None:
    """Take the new volume with what is on it: the old one cannot be read, or is not worth it.

    A start that cannot end because of the old one goes on with the new one, see `_until_no_guest_has`.
    """
    seen = await work.hypervisor.inspect(work.id)
    if seen.power_state is not PowerState.NONE:
        raise Refused(
            "The guest uses the old volume, and would lose what is on it.",
            remedy="Stop the instance first, or let the content be copied.",
        )
    await work.keep(Kept(spec=spec))


async def _until_no_guest_has(work: Work, old_id: str) -> None:
    """Return when no guest has the old disk, and none that is being started can have been given it.

    Raises:
        Refused: a guest was given the old disk and keeps it.
    """
    while True:
        await work.refresh()
        seen = await work.hypervisor.inspect(work.id)
        latest = await work.look()
        if latest.host != work.instance.host:
            continue
        beside = starting(latest)
        if _was_never_run(seen) and beside and not seen.responsive:
            # What holds it waits for the old disk; without it the start begins anew, with the disk that is kept now.
            await work.hypervisor.power_off(work.permit, work.id)
            continue
        if old_id in seen.disks:
            await _take_away(work, old_id)
            continue
        if not (beside and _was_never_run(seen)):
            return
        work.news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(work.config.inspect_retry_ms / 1000):
                await work.news.wait()


def _was_never_run(seen: Observation) -> bool:
    return seen.power_state is PowerState.NONE


async def _take_away(work: Work, old_id: str) -> None:
    """Swap once more, in a guest that was started with the old disk while the new one was being kept."""
    new = next(disk for disk in work.spec.disks if disk.id == work.request.parameters["new"])
    volume = await work.store.volume(old_id)
    assert volume is not None
    old = msgspec.structs.replace(new, id=volume.id, path=volume.path)
    with contextlib.suppress(NotThere):
        async with work.moving() as report:
            await work.hypervisor.swap_disk(work.permit, work.id, old, new, report)
