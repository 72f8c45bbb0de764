"""Which scheduled action is due for an instance, and when, given the settings.

Scheduled actions are submitted to the gate like every other request.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from interlock.core import restarts
from interlock.core.operations import Operation
from interlock.core.records import Instance
from interlock.core.restart_policy import OnCrash
from interlock.core.states import VmState


class UpkeepTimes(msgspec.Struct, frozen=True, kw_only=True):
    """How long an instance stays in a state before a scheduled action, in milliseconds; 0: forever."""

    resize_confirm_window_ms: int
    reclaim_after_ms: int
    offload_after_ms: int
    not_before_ms: int = 0
    """No scheduled action but a restart is taken before this time, because the clock is not trusted until then."""


class ScheduledAction(msgspec.Struct, frozen=True):
    """One operation to submit."""

    operation: Operation
    parameters: dict[str, Any] = {}
    from_ms: int = 0
    """Not before this time."""


class Due(msgspec.Struct, frozen=True):
    """A scheduled action and its time. Equal values are the same action."""

    at_ms: int
    alternatives: tuple[ScheduledAction, ...]
    """Alternatives, in order of preference: the first that the policy admits is submitted."""


_RESTART: Final = (ScheduledAction(Operation.START), ScheduledAction(Operation.REBOOT, {"hard": True}))
_STOP: Final = (ScheduledAction(Operation.STOP, {"hard": True}),)
_CONFIRM: Final = (ScheduledAction(Operation.CONFIRM_RESIZE),)
_RECLAIM: Final = (ScheduledAction(Operation.DELETE),)
_OFFLOAD: Final = (ScheduledAction(Operation.SHELVE_OFFLOAD),)
STATES: Final = frozenset({VmState.RESIZED, VmState.SOFT_DELETED, VmState.SHELVED, VmState.ERROR, VmState.STOPPED})
"""The states in which an action may be due."""


def concerns(instance: Instance) -> bool:
    """Whether an action may be due for the instance, now or later, under any settings."""
    if instance.vm_state in {VmState.ERROR, VmState.STOPPED}:
        return instance.restarts is not None
    return instance.vm_state in STATES


def due(instance: Instance, times: UpkeepTimes) -> Due | None:
    """Return the instance's next scheduled action; None if there is none, or while a request is outstanding."""
    if instance.outstanding:
        return None
    match instance.vm_state:
        case VmState.RESIZED:
            confirm = _after(instance, times, times.resize_confirm_window_ms, _CONFIRM)
            return _otherwise(_restart(instance), confirm)
        case VmState.SOFT_DELETED:
            return _after(instance, times, times.reclaim_after_ms, _RECLAIM)
        case VmState.SHELVED:
            return _after(instance, times, times.offload_after_ms, _OFFLOAD)
        case (
            VmState.BUILDING
            | VmState.ACTIVE
            | VmState.PAUSED
            | VmState.SUSPENDED
            | VmState.STOPPED
            | VmState.RESCUED
            | VmState.SHELVED_OFFLOADED
            | VmState.DELETED
            | VmState.MIGRATED_OUT
            | VmState.ERROR
        ):
            return _restart(instance)


def _after(instance: Instance, times: UpkeepTimes, length_ms: int, actions: tuple[ScheduledAction, ...]) -> Due | None:
    since_ms = instance.state_since_ms or instance.updated_at_ms
    return Due(max(since_ms + length_ms, times.not_before_ms), actions) if length_ms else None


def _otherwise(first: Due | None, second: Due | None) -> Due | None:
    """Return the first, with the second as its alternative from its own time on: the policy may never admit it."""
    if first is None or second is None:
        return first or second
    later = (msgspec.structs.replace(action, from_ms=second.at_ms) for action in second.alternatives)
    return Due(first.at_ms, (*first.alternatives, *later))


def _restart(instance: Instance) -> Due | None:
    wanted = restarts.pending(instance)
    if wanted is None or instance.restarts is None or instance.restarts.due_at_ms is None:
        return None
    return Due(instance.restarts.due_at_ms, _STOP if wanted is OnCrash.STOP else _RESTART)
