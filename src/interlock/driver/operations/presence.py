"""Create and delete: bring an instance into being, and remove everything of it."""

from __future__ import annotations

from interlock.core.states import PowerState
from interlock.driver.work import Done, Work


async def create(work: Work) -> Done:
    """Make the instance's folder and disk, and boot it."""
    await work.hypervisor.define(work.permit, work.id, work.spec)
    await work.phase("spawning")
    await work.hypervisor.power_on(work.permit, work.id, work.spec)
    return Done(power_state=PowerState.RUNNING)


async def delete(work: Work) -> Done:
    """End the guest, remove everything of it, and let go of its volumes, which stay."""
    await work.hypervisor.undefine(work.permit, work.id)
    await work.release_volumes(kept=frozenset())
    return Done(power_state=PowerState.NONE)
