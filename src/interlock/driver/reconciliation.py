"""Reconciliation of an idle guest with its record; `core.reconciliation` compares them.

The guest is changed first, then the record, then volume claims: after a crash in between, the same difference is found
again, and a volume that a guest can write to is always claimed by its instance.
"""

from __future__ import annotations

import structlog

from interlock.core import reconciliation
from interlock.core.errors import Fenced, HypervisorError, NotResponding
from interlock.core.operations import Lane
from interlock.core.reconciliation import Difference
from interlock.core.records import Change, Disk, Instance, Interface
from interlock.core.states import PowerState
from interlock.driver.operation_context import DriverDependencies, FencePermit
from interlock.driver.operations.interfaces import interface_of
from interlock.policies.active_policy import PolicyInForce
from interlock.ports import Hypervisor, Observation
from interlock.ports.migration import MigrationPort

_LOG = structlog.get_logger(__name__)


def compared(instance: Instance, seen: Observation) -> Difference:
    """Return how an inspected guest differs from its record."""
    if not seen.responsive:
        return Difference()
    return reconciliation.difference(instance, seen.power_state, seen.disks, seen.interfaces, paused=seen.paused)


async def reconcile(means: DriverDependencies, policy: PolicyInForce, instance_id: str) -> bool:
    """Inspect an idle guest, and record the difference.

    Return False if it did not respond and no event will follow: call this again later.
    """
    instance = await means.store.instance(instance_id)
    if instance is None or not instance.executing:
        return True
    hypervisor = means.hosts.of(instance.host)
    permit = FencePermit(means.store, instance_id, instance.fence)
    try:
        seen = await _look(hypervisor, permit, instance)
        found = compared(instance, seen)
        if found.any:
            await _apply(means, policy, hypervisor, permit, instance, found)
        answered = seen.responsive
        if answered:
            await _release_unattached(means, instance_id, seen)
    except NotResponding:
        answered = False
    except (HypervisorError, Fenced) as error:
        # A remaining difference is found after the next event of the guest.
        _LOG.warning("guest not reconciled with its record", instance=instance_id, why=error.message)
        answered = True
    # A guest that is recorded as not responding is compared when it responds again, and one on a disconnected host when
    # that is back.
    return answered or instance.guest_trouble is not None or not means.hosts.linked(instance.host)


async def _look(hypervisor: Hypervisor, permit: FencePermit, instance: Instance) -> Observation:
    """Inspect the guest, after resuming it if an abandoned operation left it paused."""
    seen = await hypervisor.inspect(instance.id)
    if seen.power_state is PowerState.PAUSED and seen.responsive and isinstance(hypervisor, MigrationPort):
        await hypervisor.resume_source(permit, instance.id)
        seen = await hypervisor.inspect(instance.id)
    return seen


async def _apply(
    means: DriverDependencies,
    policy: PolicyInForce,
    hypervisor: Hypervisor,
    permit: FencePermit,
    looked_at: Instance,
    found: Difference,
) -> None:
    plugged = await _own(means, looked_at, found)
    assert looked_at.spec is not None
    for disk in looked_at.spec.disks:
        if disk.id in found.detached:
            await hypervisor.detach_disk(permit, looked_at.id, disk.id)  # closes its file
    for interface in looked_at.spec.interfaces:
        if interface.id in found.detached:
            await hypervisor.detach_interface(permit, looked_at.id, interface.id)

    def decide(instance: Instance, now_ms: int) -> Change[bool]:
        in_force = policy.for_waiting(instance)
        return reconciliation.settle(instance, looked_at, found, plugged, in_force, now_ms)

    if not await means.store.change(looked_at.id, decide):
        return
    _LOG.info("late change recorded", instance=looked_at.id, detached=found.detached)
    for one in found.detached:
        await means.store.volumes.release(one, looked_at.id)


async def _own(means: DriverDependencies, instance: Instance, found: Difference) -> tuple[Disk | Interface, ...]:
    """Return those unrecorded devices that belong to the instance; any other would be a bug."""
    own: list[Disk | Interface] = []
    for volume_id in found.volumes:
        volume = await means.store.volumes.get(volume_id)
        if volume is not None and volume.attached_to == instance.id:
            own.append(Disk(id=volume.id, path=volume.path))
        else:
            _LOG.error("guest has a foreign volume", instance=instance.id, volume=volume_id)
    for interface_id in found.interfaces:
        request = await means.store.request(interface_id)
        if request is not None and request.instance_id == instance.id:
            own.append(await interface_of(means.store, request))
    return tuple(own)


async def release_strays(means: DriverDependencies) -> None:
    """Release claimed volumes that are neither recorded as attached nor plugged in.

    A server that is killed between the record of a late detach and the release leaves them.
    """
    claimed = {volume.attached_to for volume in await means.store.volumes.all()}
    for instance_id in sorted(one for one in claimed if one is not None):
        instance = await means.store.instance(instance_id)
        if instance is not None and not instance.outstanding and await _unattached(means, instance):
            seen = await means.hosts.of(instance.host).inspect(instance.id)
            await _release_unattached(means, instance_id, seen)


async def _unattached(means: DriverDependencies, instance: Instance) -> list[str]:
    """Return the ids of claimed volumes that are not attached in the record."""
    if instance.spec is None:
        return []
    attached = {disk.id for disk in instance.spec.disks}
    volumes = await means.store.volumes.all(instance.project)
    return [one.id for one in volumes if one.attached_to == instance.id and one.id not in attached]


async def _release_unattached(means: DriverDependencies, instance_id: str, seen: Observation) -> None:
    """Release volumes that were claimed for a failed attachment."""
    instance = await means.store.instance(instance_id)
    # The QEMU process of an ended guest still has its disks open, and does not list them.
    lists_disks = seen.power_state in {PowerState.NONE, PowerState.RUNNING, PowerState.PAUSED}
    if instance is None or instance.served(Lane.COMPONENT) is not None or not (seen.responsive and lists_disks):
        return
    for volume_id in await _unattached(means, instance):
        if volume_id not in seen.disks:
            _LOG.info("unattached volume released", instance=instance.id, volume=volume_id)
            await means.store.volumes.release(volume_id, instance.id)


async def release_detached(means: DriverDependencies, before: Instance) -> None:
    """Release the volumes that were being detached from a guest that has ended."""
    for one in before.detaching:
        await means.store.volumes.release(one, before.id)
