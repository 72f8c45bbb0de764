"""What an event of a guest says about its instance: the vm_state and power state after it, and the guest's faults."""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from interlock.core.records import GuestEvent, Instance
from interlock.core.states import HALTS, GuestTrouble, PowerState, VmState

STATE_UNCHANGED: Final = frozenset({GuestEvent.NOT_RESPONDING, GuestEvent.RESPONDING, GuestEvent.CHANGED}) | {
    GuestEvent.NO_SPACE,
    GuestEvent.IO_ERROR,
    GuestEvent.WENT_ON,
}
"""Events that do not change the vm_state, and are no sign of life."""


def after_event(instance: Instance, event: GuestEvent) -> tuple[VmState, PowerState, str | None]:
    """Return the vm_state, the power state and the error of a running instance after an event of its guest."""
    state, power, error = instance.vm_state, instance.power_state, None
    match event:
        case GuestEvent.STOPPED:
            state, power = VmState.STOPPED, PowerState.SHUTDOWN
        case GuestEvent.CRASHED:
            state, power, error = VmState.ERROR, PowerState.CRASHED, "The guest crashed."
        case GuestEvent.VANISHED:
            state, power, error = VmState.ERROR, PowerState.NONE, "The guest's QEMU process ended unexpectedly."
        case GuestEvent.LEASE_ENDED:
            error = f"The guest was ended because the lease of host {instance.host} expired: its agent lost the server."
            state, power = VmState.ERROR, PowerState.NONE
        case (
            GuestEvent.RESET
            | GuestEvent.NOT_RESPONDING
            | GuestEvent.RESPONDING
            | GuestEvent.NO_SPACE
            | GuestEvent.IO_ERROR
            | GuestEvent.WENT_ON
            | GuestEvent.CHANGED
        ):
            pass
    return state, power, error


def with_trouble_noted(instance: Instance, event: GuestEvent, now_ms: int) -> Instance:
    """Return the instance with the fault that the event begins or ends; the same object if it does neither."""
    trouble, power = instance.guest_trouble, instance.power_state
    match event:
        case GuestEvent.NOT_RESPONDING:
            begins = instance.executing and trouble is not GuestTrouble.NOT_RESPONDING
            return _with_trouble(instance, GuestTrouble.NOT_RESPONDING, power, now_ms) if begins else instance
        case GuestEvent.NO_SPACE | GuestEvent.IO_ERROR:
            begins = instance.executing and trouble is not GuestTrouble(event.value)
            halted = PowerState.PAUSED
            return _with_trouble(instance, GuestTrouble(event.value), halted, now_ms) if begins else instance
        case GuestEvent.RESPONDING:
            ends = trouble is GuestTrouble.NOT_RESPONDING
            return _with_trouble(instance, None, power, None) if ends else instance
        case GuestEvent.WENT_ON:
            power = power if instance.vm_state is VmState.PAUSED else PowerState.RUNNING
            return _with_trouble(instance, None, power, None) if trouble in HALTS else instance
        case (
            GuestEvent.CHANGED
            | GuestEvent.STOPPED
            | GuestEvent.RESET
            | GuestEvent.CRASHED
            | GuestEvent.VANISHED
            | GuestEvent.LEASE_ENDED
        ):
            return instance


def _with_trouble(
    instance: Instance, trouble: GuestTrouble | None, power: PowerState, since_ms: int | None
) -> Instance:
    return replace(instance, guest_trouble=trouble, guest_trouble_since_ms=since_ms, power_state=power)
