"""Rebuild: a new root disk for an instance, from the same image or another.

Until the new disk exists the instance keeps its old one, so that it can be started after a failed rebuild. Once the
record has the new disk (phase `rebuild_spawning`), a repeated rebuild continues with it.
"""

from __future__ import annotations

import msgspec

from interlock.core.errors import OperationRejected
from interlock.core.records import Image, InstanceUpdate
from interlock.core.states import PowerState, VmState
from interlock.driver.operation_context import Done, OperationContext
from interlock.driver.operations.boot_steps import boot, settle_resize, with_root

_GIB = 1 << 30


async def rebuild(work: OperationContext) -> Done:
    """Give the instance a new root disk, and run its guest unless the instance was stopped."""
    runs = work.instance.vm_state is not VmState.STOPPED
    if work.request.phase != "rebuild_spawning":
        await _renew(work)
    if runs:
        await boot(work)
    await settle_resize(work)
    return Done(power_state=PowerState.RUNNING if runs else PowerState.NONE)


async def _renew(work: OperationContext) -> None:
    image = await _image(work)
    await work.hypervisor.power_off(work.permit, work.id)
    await work.release_strays()
    await settle_resize(work)
    await work.phase("rebuild_block_device_mapping")
    spec = msgspec.structs.replace(
        work.spec, image=image, rescue_image=None, root=work.spec.root + 1, root_is_whole=False, root_made=False
    )
    await work.hypervisor.define(work.permit, work.id, spec)
    await work.keep(InstanceUpdate(spec=with_root(spec)), phase="rebuild_spawning")


async def _image(work: OperationContext) -> Image:
    """Return the image to rebuild from. Raises `OperationRejected`, before anything is changed, if it is unusable."""
    image: Image | None = work.spec.image
    wanted = work.request.parameters.get("image")
    if wanted is not None:
        image = next((one for one in await work.store.images.all() if one.id == wanted), None)
    if image is None or not await work.images.holds(image):
        raise OperationRejected(
            f"Image not found: {wanted if image is None else image.name}; nothing was changed.",
            remedy="Start the VM with its present disk, or rebuild it from another image.",
        )
    if image.kind == "disk" and 0 < work.spec.root_gib * _GIB < image.size_bytes:
        raise OperationRejected(
            f"The image {image.name} needs a root disk of {image.size_bytes} bytes, and the VM has "
            f"{work.spec.root_gib} GiB; nothing was changed.",
            remedy="Resize the VM first, or use a smaller image.",
        )
    return image
