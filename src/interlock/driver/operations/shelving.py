"""Shelve, offload and unshelve: the instance as an image of its disk, and back.

At every moment the content of its root disk is in one place at least: the disk is removed only once the image is
durable and known, and the image only once the instance is known by the disk that was made of it.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from interlock.core.errors import Refused
from interlock.core.records import Kept
from interlock.core.states import PowerState, VmState
from interlock.driver.operations.bringing import bring_back, bring_to, remove_all, settle_resize, shut_down
from interlock.driver.operations.copies import export
from interlock.driver.work import Done, Work

_NAME = "shelved"
"""What an instance's own image is called; it is in no list."""


async def shelve(work: Work) -> Done:
    """Power the guest off, and keep an image of its root disk if it has one."""
    message = None
    if work.instance.vm_state in {VmState.ACTIVE, VmState.PAUSED}:
        message = await shut_down(work)
    await settle_resize(work)
    if work.spec.has_root:
        await work.phase("shelving_image_pending_upload")
        image = await export(work, _NAME, "shelving_image_uploading")
        await work.keep(Kept(shelved_image=image))
    return Done(power_state=PowerState.NONE, message=message)


async def undo_shelve(work: Work) -> None:
    """Give up the image, and have the guest go on as it was."""
    if work.instance.shelved_image is not None:
        await work.keep(Kept(shelved_image=None))
    work.permit.check()
    await work.images.discard(work.request.id)
    await bring_to(work, work.instance.vm_state)
    work.brought_back = True


async def offload(work: Work) -> Done:
    """Remove everything of the instance from its host. Its volumes stay its own."""
    image = work.instance.shelved_image
    if work.spec.has_root and (image is None or not await work.images.holds(image)):
        raise Refused(
            f"The image of {work.instance.name}'s root disk is not there; nothing was removed.",
            remedy="Unshelve the instance, and shelve it again.",
        )
    await remove_all(work)
    if work.instance.prior_vm_state is VmState.SUSPENDED:
        # Its memory was on the host, and is given up with the rest.
        await work.keep(Kept(prior_vm_state=VmState.STOPPED))
    return Done(power_state=PowerState.NONE)


async def unshelve(work: Work) -> Done:
    """Bring back the state from before; where nothing is left on the host, with a root disk made of the image."""
    offloaded = work.instance.vm_state is VmState.SHELVED_OFFLOADED
    if offloaded:
        await _restore(work)
    done = await bring_back(work)
    if not offloaded:
        await _forget_image(work)
    return done


async def undo_unshelve(work: Work) -> None:
    """Have nothing run. A root disk that was made of the image already stays, and is what the next one finds."""
    await work.hypervisor.power_off(work.permit, work.id)
    if work.instance.vm_state is VmState.SHELVED_OFFLOADED and work.instance.shelved_image is not None:
        await remove_all(work)


async def _restore(work: Work) -> None:
    """Make the root disk of the image. Where there is no image any more, an earlier attempt came as far as that."""
    image = work.instance.shelved_image
    if image is None:
        return
    spec = msgspec.structs.replace(work.spec, root=work.spec.root + 1, root_is_whole=True)
    await work.hypervisor.drop_root_disks(work.permit, work.id, work.spec, frozenset())
    async with work.moving() as report:
        await work.hypervisor.root_disk_from(work.permit, work.id, spec, Path(image.path), report)
    await work.keep(Kept(spec=spec, shelved_image=None))
    await work.images.remove(image)


async def _forget_image(work: Work) -> None:
    image = work.instance.shelved_image
    if image is not None:
        await work.keep(Kept(shelved_image=None))
        await work.images.remove(image)
