"""Evacuation: which data of an instance is lost with its host."""

from __future__ import annotations

from interlock.core.operations import Operation
from interlock.core.records import Instance
from interlock.core.state_stack import resolve_target, rests
from interlock.core.states import EXECUTING_STATES, VmState


def image_only(instance: Instance) -> bool:
    """Whether the evacuation keeps only the shelved image, and drops the root disk that its host may still have."""
    after, memory = resolve_target(Operation.EVACUATE, instance.vm_state, instance.state_stack)
    if after is VmState.SOFT_DELETED:
        after = memory[0] if memory else after
    # An incomplete unshelve may already have created a root disk.
    has_disk = instance.spec is not None and instance.spec.has_root and instance.shelved_image is None
    return after is VmState.SHELVED_OFFLOADED and not has_disk


def loses_root(instance: Instance) -> bool:
    """Whether a root disk that the guest may have written to is lost with the host."""
    spec = instance.spec
    if spec is None or not spec.has_root or spec.shared is not None:
        return False
    return instance.launched and not image_only(instance)


def losses(instance: Instance, *, from_image: bool) -> tuple[str, ...]:
    """Return what an evacuation of the instance loses, as sentences for people; empty if nothing is lost."""
    state, memory, host = instance.vm_state, instance.state_stack, instance.host
    spec = instance.spec
    found = []
    if spec is not None and spec.has_root and not image_only(instance):
        if loses_root(instance):
            found.append(f"Its root disk was on host {host} and is lost: it is created from its image again.")
        elif from_image and instance.launched:
            found.append("The data on its root disk is discarded: it is created from its image again.")
    if state is VmState.SUSPENDED:
        found.append(f"Its saved memory was on host {host} and is lost: it is stopped.")
    elif VmState.SUSPENDED in memory:
        found.append(f"Its saved memory was on host {host} and is lost: it is stopped once it is restored.")
    if VmState.RESIZED in (state, *memory):
        found.append("Its resize is confirmed and can no longer be reverted.")
    if state is VmState.RESCUED:
        found.append("The data on its rescue disk is lost.")
    if state in EXECUTING_STATES and not rests(state, memory):
        again = "it boots again and is paused at once" if state is VmState.PAUSED else "it boots again"
        found.append(f"The memory of its guest is lost: {again}.")
    return tuple(found)
