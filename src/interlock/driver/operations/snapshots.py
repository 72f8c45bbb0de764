"""Snapshot and backup: a point-in-time copy of the root disk as an image.

The image has the id of its request, so that a repeated attempt finds it, and a restarted server can attribute its file.
"""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from interlock.core.errors import Fenced, InterlockError, NameTaken, NotResponding
from interlock.core.records import Image
from interlock.driver.operation_context import Done, OperationContext
from interlock.driver.operations.boot_steps import make_disk
from interlock.ports import Tally

_NAME_MAX = 63


async def snapshot(work: OperationContext) -> Done:
    """Export the root disk as an image of the project."""
    if not await _known(work):
        await work.phase("image_snapshot_pending")
        image = await export(work, str(work.request.parameters["name"]), "image_pending_upload")
        await work.phase("image_uploading")
        await _keep(work, image, None)
    return Done()


async def backup(work: OperationContext) -> Done:
    """Export the root disk as an image of the project, then remove the oldest backups beyond `rotation`."""
    backup_type = str(work.request.parameters["backup_type"])
    if not await _known(work):
        image = await export(work, _backup_name(work, backup_type), None)
        await _keep(work, image, backup_type)
    kept = await _rotate(work, backup_type, int(work.request.parameters["rotation"]))
    return Done(message=f"{kept} older {backup_type} backups are in use, and were kept." if kept else None)


async def undo(work: OperationContext) -> None:
    """Remove the image."""
    work.permit.check()
    await work.store.images.delete(work.request.id)
    await work.images.discard(work.request.id)


async def export(work: OperationContext, name: str, uploading: str | None) -> Image:
    """Export the root disk as an image, inspected and durable, but not recorded; a failure leaves no file.

    `uploading` is the phase after the copy.
    """
    image_id = work.request.id
    try:
        await make_disk(work)
        async with work.moving() as report:
            target = work.images.draft_path(image_id)
            await work.hypervisor.export_root_disk(work.permit, work.id, work.spec, target, report)
        if uploading is not None:
            await work.phase(uploading)
        work.permit.check()
        return await work.images.adopt_export(image_id, name)
    except (Fenced, NotResponding):
        raise
    except InterlockError:
        work.permit.check()
        await work.images.discard(image_id)
        raise


async def _known(work: OperationContext) -> bool:
    """Whether the image was recorded already."""
    return any(image.id == work.request.id for image in await work.store.images.all())


async def _keep(work: OperationContext, image: Image, backup_type: str | None) -> None:
    kept = msgspec.structs.replace(
        image,
        created_at_ms=work.store.now_ms(),
        project=work.instance.project,
        source_instance=work.id,
        backup_type=backup_type,
        min_memory_mib=work.spec.image.min_memory_mib,
    )
    work.permit.check()
    try:
        await work.store.images.put(kept)
    except NameTaken:
        await work.images.discard(image.id)
        raise


def _backup_name(work: OperationContext, backup_type: str) -> str:
    """Return a name such as `web-daily-20260301-120000-9f3c`, truncated to the maximum length."""
    at = datetime.fromtimestamp(work.store.shown_ms(work.request.admitted_at_ms) // 1000, UTC)
    tail = f"-{backup_type}-{at:%Y%m%d-%H%M%S}-{work.request.id[-4:]}"
    return work.instance.name[: _NAME_MAX - len(tail)].rstrip("-") + tail


async def _rotate(work: OperationContext, backup_type: str, rotation: int) -> int:
    """Remove the oldest unused backups of that type beyond `rotation`; return how many of them are in use."""
    mine = [one for one in await work.store.images.all() if one.source_instance == work.id]
    mine = sorted((one for one in mine if one.backup_type == backup_type), key=lambda one: (one.created_at_ms, one.id))
    used = 0
    for image in mine[:-rotation]:
        if work.store.tally(Tally.IMAGES, image.id):
            used += 1
            continue
        work.permit.check()
        await work.store.images.delete(image.id)
        await work.images.remove(image)
    return used
