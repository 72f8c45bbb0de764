"""Shelve, offload and unshelve.

The content of the root disk always exists at least once: the disk is removed only after the image is durable and
recorded, and the image only after the disk created from it is recorded.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from interlock.core.errors import OperationRejected
from interlock.core.records import InstanceUpdate
from interlock.core.states import PowerState, VmState
from interlock.driver.operation_context import Done, OperationContext
from interlock.driver.operations.boot_steps import bring_back, bring_to, remove_all, settle_resize, shut_down
from interlock.driver.operations.snapshots import export

_NAME = "shelved"
"""The name of a shelved image; it is in no list."""


async def shelve(work: OperationContext) -> Done:
    """Shut the guest down, and export its root disk as an image, if it has one."""
    message = None
    if work.instance.vm_state in {VmState.ACTIVE, VmState.PAUSED}:
        message = await shut_down(work)
    await settle_resize(work)
    if work.spec.has_root:
        await work.phase("shelving_image_pending_upload")
        image = await export(work, _NAME, "shelving_image_uploading")
        await work.keep(InstanceUpdate(shelved_image=image))
    return Done(power_state=PowerState.NONE, message=message)


async def undo_shelve(work: OperationContext) -> None:
    """Discard the image, and start the guest again if it ran."""
    if work.instance.shelved_image is not None:
        await work.keep(InstanceUpdate(shelved_image=None))
    work.permit.check()
    await work.images.discard(work.request.id)
    await bring_to(work, work.instance.vm_state)
    work.brought_back = True


async def offload(work: OperationContext) -> Done:
    """Remove the instance from its host. It keeps its volumes."""
    image = work.instance.shelved_image
    if work.spec.has_root and (image is None or not await work.images.holds(image)):
        raise OperationRejected(
            f"The shelved image of {work.instance.name} was not found; nothing was removed.",
            remedy="Unshelve the VM, and shelve it again.",
        )
    await remove_all(work)
    if work.instance.prior_vm_state is VmState.SUSPENDED:
        # Its saved memory was on the host, and is removed with the rest.
        await work.keep(InstanceUpdate(prior_vm_state=VmState.STOPPED))
    return Done(power_state=PowerState.NONE)


async def unshelve(work: OperationContext) -> Done:
    """Restore the state before; after an offload, create the root disk from the image."""
    offloaded = work.instance.vm_state is VmState.SHELVED_OFFLOADED
    if offloaded:
        await _restore(work)
    done = await bring_back(work)
    if not offloaded:
        await _forget_image(work)
    return done


async def undo_unshelve(work: OperationContext) -> None:
    """Power off. A root disk that was already created from the image stays."""
    await work.hypervisor.power_off(work.permit, work.id)
    if work.instance.vm_state is VmState.SHELVED_OFFLOADED and work.instance.shelved_image is not None:
        await remove_all(work)


async def _restore(work: OperationContext) -> None:
    """Create the root disk from the image; without an image, an earlier attempt has done so."""
    image = work.instance.shelved_image
    if image is None:
        return
    spec = msgspec.structs.replace(work.spec, root=work.spec.root + 1, root_is_whole=True)
    await work.hypervisor.drop_root_disks(work.permit, work.id, work.spec, frozenset())
    async with work.moving() as report:
        await work.hypervisor.root_disk_from(work.permit, work.id, spec, Path(image.path), report)
    await work.keep(InstanceUpdate(spec=spec, shelved_image=None))
    await work.images.remove(image)


async def _forget_image(work: OperationContext) -> None:
    image = work.instance.shelved_image
    if image is not None:
        await work.keep(InstanceUpdate(shelved_image=None))
        await work.images.remove(image)
