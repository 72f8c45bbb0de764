"""What is due for an instance without anybody asking: a pure function of the instance and the settings.

Whether it is allowed is not here: what is due is asked of the gate, as everybody's wishes are.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from interlock.core import restarting
from interlock.core.operations import Operation
from interlock.core.records import Instance
from interlock.core.restart_policy import OnCrash
from interlock.core.states import VmState


class UpkeepTimes(msgspec.Struct, frozen=True, kw_only=True):
    """After how long in a state something is done by itself, in milliseconds; 0: never."""

    resize_confirm_window_ms: int
    reclaim_after_ms: int
    offload_after_ms: int


class Wish(msgspec.Struct, frozen=True):
    """One operation that would do."""

    operation: Operation
    parameters: dict[str, Any] = {}
    from_ms: int = 0
    """Not before that moment."""


class Due(msgspec.Struct, frozen=True):
    """What is to be asked for, and when. Two that are equal are the same thing."""

    at_ms: int
    wishes: tuple[Wish, ...]
    """The first that the policy admits is what is asked for."""


_RESTART: Final = (Wish(Operation.START), Wish(Operation.REBOOT, {"hard": True}))
_STOP: Final = (Wish(Operation.STOP, {"hard": True}),)
_CONFIRM: Final = (Wish(Operation.CONFIRM_RESIZE),)
_RECLAIM: Final = (Wish(Operation.DELETE),)
_OFFLOAD: Final = (Wish(Operation.SHELVE_OFFLOAD),)
STATES: Final = frozenset({VmState.RESIZED, VmState.SOFT_DELETED, VmState.SHELVED, VmState.ERROR, VmState.STOPPED})
"""The states in which something may be due."""


def due(instance: Instance, times: UpkeepTimes) -> Due | None:
    """What is due for the instance, now or later; None while somebody's request is outstanding, or if nothing is."""
    if instance.outstanding:
        return None
    match instance.vm_state:
        case VmState.RESIZED:
            confirm = _after(instance, times.resize_confirm_window_ms, _CONFIRM)
            return _otherwise(_restart(instance), confirm)
        case VmState.SOFT_DELETED:
            return _after(instance, times.reclaim_after_ms, _RECLAIM)
        case VmState.SHELVED:
            return _after(instance, times.offload_after_ms, _OFFLOAD)
        case _:
            return _restart(instance)


def _after(instance: Instance, length_ms: int, wishes: tuple[Wish, ...]) -> Due | None:
    since_ms = instance.state_since_ms or instance.updated_at_ms
    return Due(since_ms + length_ms, wishes) if length_ms else None


def _otherwise(first: Due | None, second: Due | None) -> Due | None:
    """The first, and in its place the second in its time: the policy may never admit the first."""
    if first is None or second is None:
        return first or second
    later = (msgspec.structs.replace(wish, from_ms=second.at_ms) for wish in second.wishes)
    return Due(first.at_ms, (*first.wishes, *later))


def _restart(instance: Instance) -> Due | None:
    wanted = restarting.pending(instance)
    if wanted is None or instance.restarts is None or instance.restarts.due_at_ms is None:
        return None
    return Due(instance.restarts.due_at_ms, _STOP if wanted is OnCrash.STOP else _RESTART)
