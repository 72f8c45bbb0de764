"""Snapshot and backup: the root disk as it is at one moment, as an image that others can boot.

The image has the id of the request that makes it, so that whoever performs that again finds what was made already, and
a server that starts can tell whose a file was.
"""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from interlock.core.errors import Fenced, InterlockError, NameTaken, NotResponding, Refused
from interlock.core.records import Image
from interlock.driver.operations.bringing import make_disk
from interlock.driver.work import Done, Work
from interlock.ports import every_instance

_NAME_MAX = 63


async def snapshot(work: Work) -> Done:
    """Keep the root disk as an image of the project."""
    if not await _known(work):
        require_own_boot(work)
        await work.phase("image_snapshot_pending")
        image = await export(work, str(work.request.parameters["name"]), "image_pending_upload")
        await work.phase("image_uploading")
        await _keep(work, image, None)
    return Done()


async def backup(work: Work) -> Done:
    """Keep the root disk as an image of the project, then remove the oldest backups beyond those to keep."""
    backup_type = str(work.request.parameters["backup_type"])
    if not await _known(work):
        require_own_boot(work)
        image = await export(work, _backup_name(work, backup_type), None)
        await _keep(work, image, backup_type)
    kept = await _rotate(work, backup_type, int(work.request.parameters["rotation"]))
    return Done(message=f"{kept} of its older {backup_type} backups are in use, and were kept." if kept else None)


async def undo(work: Work) -> None:
    """Remove what was made of the image."""
    work.permit.check()
    await work.store.delete_image(work.request.id)
    await work.images.discard(work.request.id)


def require_own_boot(work: Work) -> None:
    """Raise `Refused` unless the instance boots from its root disk: a copy of another disk could not be booted."""
    if work.spec.image.kind != "disk":
        raise Refused(
            f"{work.instance.name} boots a kernel, and not from its disk, so that an image of its disk would not boot.",
            remedy="Copy what is on the disk from inside the guest.",
        )


async def export(work: Work, name: str, uploading: str | None) -> Image:
    """The image of the root disk, inspected and durable, but in no record; `uploading` is the phase after the copying.

    What fails leaves no file.
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


async def _known(work: Work) -> bool:
    """Whether the image was kept already."""
    return any(image.id == work.request.id for image in await work.store.images())


async def _keep(work: Work, image: Image, backup_type: str | None) -> None:
    kept = msgspec.structs.replace(
        image,
        created_at_ms=work.store.now_ms(),
        project=work.instance.project,
        source_instance=work.id,
        backup_type=backup_type,
    )
    work.permit.check()
    try:
        await work.store.put_image(kept)
    except NameTaken:
        await work.images.discard(image.id)
        raise


def _backup_name(work: Work, backup_type: str) -> str:
    """Such as `web-daily-20260301-120000-9f3c`; cut where an image's name ends."""
    at = datetime.fromtimestamp(work.request.admitted_at_ms // 1000, UTC)
    tail = f"-{backup_type}-{at:%Y%m%d-%H%M%S}-{work.request.id[-4:]}"
    return work.instance.name[: _NAME_MAX - len(tail)].rstrip("-") + tail


async def _rotate(work: Work, backup_type: str, rotation: int) -> int:
    """Remove the oldest backups of that type beyond `rotation` that nobody uses; how many are in use."""
    mine = [one for one in await work.store.images() if one.source_instance == work.id]
    mine = sorted((one for one in mine if one.backup_type == backup_type), key=lambda one: (one.created_at_ms, one.id))
    beyond = mine[:-rotation]
    if not beyond:
        return 0
    used: set[str] = set()
    async for instance in every_instance(work.store):
        used |= instance.image_ids
    for image in beyond:
        if image.id not in used:
            work.permit.check()
            await work.store.delete_image(image.id)
            await work.images.remove(image)
    return sum(image.id in used for image in beyond)
