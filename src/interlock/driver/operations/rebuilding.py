"""Rebuild: the same instance with a new root disk, from the same image or another.

The order of the steps keeps two promises. Until the new disk is there the instance has its old one, so that a rebuild
that fails can be answered with a start. And from the moment that the instance is known by its new disk, which is the
phase `rebuild_spawning`, whoever performs the rebuild again goes on from there and throws nothing away.
"""

from __future__ import annotations

import msgspec

from interlock.core.errors import Refused
from interlock.core.records import Image, Kept
from interlock.core.states import PowerState, VmState
from interlock.driver.operations.bringing import boot, settle_resize
from interlock.driver.work import Done, Work

_GIB = 1 << 30


async def rebuild(work: Work) -> Done:
    """Give the instance a new root disk, and run its guest unless the instance was stopped."""
    runs = work.instance.vm_state is not VmState.STOPPED
    if work.request.phase != "rebuild_spawning":
        await _renew(work)
    if runs:
        await boot(work)
    await settle_resize(work)
    return Done(power_state=PowerState.RUNNING if runs else PowerState.NONE)


async def _renew(work: Work) -> None:
    image = await _image(work)
    await work.hypervisor.power_off(work.permit, work.id)
    await work.release_strays()
    await settle_resize(work)
    await work.phase("rebuild_block_device_mapping")
    spec = msgspec.structs.replace(
        work.spec, image=image, rescue_image=None, root=work.spec.root + 1, root_is_whole=False
    )
    await work.hypervisor.define(work.permit, work.id, spec)
    await work.keep(Kept(spec=spec), phase="rebuild_spawning")


async def _image(work: Work) -> Image:
    """What it is rebuilt from. Raises `Refused`, while nothing has been changed yet, if that cannot be."""
    image: Image | None = work.spec.image
    wanted = work.request.parameters.get("image")
    if wanted is not None:
        image = next((one for one in await work.store.images() if one.id == wanted), None)
    if image is None or not await work.images.holds(image):
        raise Refused(
            f"The image {wanted if image is None else image.name} is not there any more; nothing was changed.",
            remedy="Start the instance to go on with the disk that it has, or rebuild it from another image.",
        )
    if image.kind == "disk" and 0 < work.spec.root_gib * _GIB < image.size_bytes:
        raise Refused(
            f"The image {image.name} needs a root disk of {image.size_bytes} bytes, and the instance has "
            f"{work.spec.root_gib} GiB; nothing was changed.",
            remedy="Resize the instance first, or use a smaller image.",
        )
    return image
