"""Create and delete: bring an instance into being, and remove everything of it; or for its owner only, for a while."""

from __future__ import annotations

import msgspec

from interlock.core.errors import Refused
from interlock.core.operations import Operation
from interlock.core.states import PowerState
from interlock.driver.operations.bringing import bring_back, remove_all
from interlock.driver.work import Done, Work


async def create(work: Work) -> Done:
    """Make the instance's folder and disk, and boot it."""
    await work.hypervisor.define(work.permit, work.id, work.spec)
    await work.phase("spawning")
    await work.hypervisor.power_on(work.permit, work.id, work.spec)
    return Done(power_state=PowerState.RUNNING)


async def delete(work: Work) -> Done:
    """End the guest, remove everything of it, its dumps too, and let go of its volumes, which stay."""
    message = await _remove(work)
    work.permit.check()
    await work.dumps.remove(work.id)
    await work.release_volumes(kept=frozenset())
    if work.instance.shelved_image is not None:
        await work.images.remove(work.instance.shelved_image)
    # The record stays for the history; passwords and keys in what the guest was told have no use in it.
    await work.keep_changed(lambda spec: msgspec.structs.replace(spec, seed=None))
    return Done(power_state=PowerState.NONE, message=message)


async def _remove(work: Work) -> str | None:
    """Remove what hosts have of it. What is in a shared folder that is gone keeps none from being deleted by force."""
    try:
        await remove_all(work)
    except Refused as error:
        if work.request.operation is not Operation.FORCE_DELETE:
            raise
        await work.hypervisor.undefine(work.permit, work.id)
        return f"Its root disk stays where it is: {error.message}"
    return None


async def soft_delete(work: Work) -> Done:
    """End the guest and keep everything: its disks, its memory if that is saved, and its volumes stay its own."""
    await work.hypervisor.power_off(work.permit, work.id)
    return Done(power_state=PowerState.NONE)


async def restore(work: Work) -> Done:
    """Bring back what was soft-deleted, as it was."""
    return await bring_back(work)
