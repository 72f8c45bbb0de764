"""Reconciliation: compare an idle guest with its record, and update the record.

An operation that timed out may take effect later: the guest releases a disk after all, or a QEMU that did not respond
executes a queued command. The effect is found by comparing the guest with the record.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from interlock.core.operations import Lane
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Change, Disk, Instance, Interface
from interlock.core.request_queue import Draft, judge_again, replace
from interlock.core.states import PowerState, VmState

_OWN = frozenset({"root", "rescue"})
"""Ids of disks that are not volumes."""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """How a guest differs from its record."""

    detached: tuple[str, ...] = ()
    """Ids of recorded volumes and interfaces that the guest does not have."""
    volumes: tuple[str, ...] = ()
    """Ids of volumes that the guest has and that are not recorded."""
    interfaces: tuple[str, ...] = ()
    """Ids of interfaces that the guest has and that are not recorded."""
    power_state: PowerState | None = None
    """Whether it is running or paused, if the recorded vm_state differs."""

    @property
    def any(self) -> bool:
        return self != _NONE


_NONE = Difference()


def difference(
    instance: Instance,
    power_state: PowerState,
    disks: Collection[str],
    interfaces: Collection[str],
    *,
    paused: bool,
) -> Difference:
    """Compare a running or paused guest with its record.

    Args:
        instance: the record.
        power_state: as reported by the hypervisor.
        disks: the ids of the attached disks.
        interfaces: the ids of the attached interfaces beyond the first.
        paused: whether it was paused by request, and not halted for another reason.
    """
    served = instance.served(Lane.STATE) or instance.served(Lane.COMPONENT)
    if instance.spec is None or not instance.executing or served or power_state not in _IN_MEMORY:
        return _NONE
    recorded = [disk.id for disk in instance.spec.disks], [plugged.id for plugged in instance.spec.interfaces]
    gone = [disk for disk in recorded[0] if disk not in disks]
    gone += [interface for interface in recorded[1] if interface not in interfaces]
    other = None
    if (instance.vm_state is VmState.PAUSED and power_state is PowerState.RUNNING) or (
        instance.vm_state is VmState.ACTIVE and power_state is PowerState.PAUSED and paused
    ):
        other = power_state
    return Difference(
        detached=tuple(gone),
        volumes=tuple(disk for disk in disks if disk not in recorded[0] and disk not in _OWN),
        interfaces=tuple(interface for interface in interfaces if interface not in recorded[1]),
        power_state=other,
    )


_IN_MEMORY = frozenset({PowerState.RUNNING, PowerState.PAUSED})


def settle(
    instance: Instance,
    looked_at: Instance,
    found: Difference,
    plugged: tuple[Disk | Interface, ...],
    policy: CompiledPolicy,
    now_ms: int,
) -> Change[bool]:
    """Apply a difference to the record, and re-evaluate the queue.

    Args:
        instance: the record as it is now.
        looked_at: the record with which the guest was compared.
        found: how the guest differs.
        plugged: those of `found.volumes` and `found.interfaces` that belong to the instance.
        policy: evaluates the queued requests.
        now_ms: the store's clock.

    The answer is False, and nothing is applied, if the record has changed meanwhile or a request is in flight.
    """
    served = instance.served(Lane.STATE) or instance.served(Lane.COMPONENT)
    same = (instance.spec, instance.vm_state, instance.host) == (looked_at.spec, looked_at.vm_state, looked_at.host)
    if served or not same or instance.spec is None:
        return Change(instance=instance, answer=False)
    draft = Draft(without_devices(instance, found.detached), now_ms)
    assert draft.instance.spec is not None
    disks = tuple(one for one in plugged if isinstance(one, Disk))
    interfaces = tuple(one for one in plugged if isinstance(one, Interface))
    spec = draft.instance.spec
    spec = replace(spec, disks=(*spec.disks, *disks), interfaces=(*spec.interfaces, *interfaces))
    draft.instance = replace(draft.instance, spec=spec)
    draft.alive()
    data: dict[str, object] = {"detached": list(found.detached), "attached": [one.id for one in plugged]}
    if found.power_state is not None:
        data["power_state"] = found.power_state.value
    draft.emit("guest.changed", None, **{name: value for name, value in data.items() if value})
    if found.power_state is not None:
        _run_or_pause(draft, found.power_state)
    judge_again(draft, policy)
    return draft.change(True)


def _run_or_pause(draft: Draft, power_state: PowerState) -> None:
    before = draft.instance
    vm_state = VmState.ACTIVE if power_state is PowerState.RUNNING else VmState.PAUSED
    after = replace(before.come_to(vm_state, before.state_stack), power_state=power_state)
    draft.instance = replace(after, state_since_ms=draft.now_ms)
    draft.emit("instance.state", None, vm_state=vm_state.value, before=before.vm_state.value)


def without_devices(instance: Instance, devices: Collection[str]) -> Instance:
    """Return the instance without those volumes and interfaces."""
    if instance.spec is None:
        return instance
    spec = replace(
        instance.spec,
        disks=tuple(one for one in instance.spec.disks if one.id not in devices),
        interfaces=tuple(one for one in instance.spec.interfaces if one.id not in devices),
    )
    detaching = tuple(one for one in instance.detaching if one not in devices)
    return replace(instance, spec=spec, detaching=detaching)
