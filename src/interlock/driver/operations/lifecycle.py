"""Create, delete, soft delete and restore."""

from __future__ import annotations

import msgspec

from interlock.core.errors import OperationRejected
from interlock.core.operations import Operation
from interlock.core.records import InstanceUpdate
from interlock.core.states import PowerState
from interlock.driver.operation_context import Done, OperationContext
from interlock.driver.operations.boot_steps import bring_back, drop_shared_disks, remove_all, with_root


async def create(work: OperationContext) -> Done:
    """Create the instance's folder and disk, and boot it."""
    await work.hypervisor.define(work.permit, work.id, work.spec)
    await work.keep(InstanceUpdate(spec=with_root(work.spec)), phase="spawning")
    await work.hypervisor.power_on(work.permit, work.id, work.spec)
    return Done(power_state=PowerState.RUNNING)


async def delete(work: OperationContext) -> Done:
    """End the guest, remove everything of it including dumps, and release its volumes, which stay."""
    message = await _remove(work)
    work.permit.check()
    await work.dumps.remove(work.id)
    await work.release_volumes(kept=frozenset())
    if work.instance.shelved_image is not None:
        await work.images.remove(work.instance.shelved_image)
    # The record stays for the history, without the passwords and keys of the cloud-init seed.
    await work.keep_changed(lambda spec: msgspec.structs.replace(spec, seed=None))
    return Done(power_state=PowerState.NONE, message=message)


async def _remove(work: OperationContext) -> str | None:
    """Remove the instance from its host. A force delete succeeds even if the shared folder is missing.

    A fenced host is not waited for: no guest runs there, and it cleans up when it comes back.
    """
    host = work.instance.host
    fenced = not work.hosts.reachable(host)
    try:
        await (drop_shared_disks(work) if fenced else remove_all(work))
    except OperationRejected as error:
        if work.request.operation is not Operation.FORCE_DELETE:
            raise
        if not fenced:
            await work.hypervisor.undefine(work.permit, work.id)
        return f"Its root disk was not removed: {error.message}"
    return f"Host {host} is fenced; its data of the VM is removed when the host comes back." if fenced else None


async def soft_delete(work: OperationContext) -> Done:
    """End the guest and keep everything: disks, saved memory and attached volumes."""
    await work.hypervisor.power_off(work.permit, work.id)
    return Done(power_state=PowerState.NONE)


async def restore(work: OperationContext) -> Done:
    """Restore a soft-deleted instance to its state before."""
    return await bring_back(work)
