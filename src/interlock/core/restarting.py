"""When a guest that ended by itself is started again, and when that is given up.

The count is kept with the instance, in the change that it belongs to: a server that is restarted neither forgets what
was done nor does it again. Whatever somebody else does to the instance begins the count afresh.
"""

from __future__ import annotations

from typing import Final

from interlock.core.operations import CATALOGUE, Landing, Lane, Operation
from interlock.core.records import GuestEvent, Instance, Outcome, Request
from interlock.core.request_queue import Draft, replace
from interlock.core.restart_policy import OnCrash, OnPowerOff, RestartPolicy, Restarts
from interlock.core.states import EXECUTING_STATES, PowerState, VmState

UPKEEP: Final = "interlock"
"""By whom that is asked for which nobody asked for; no token may have this name."""

_TAKES_DOWN: Final = frozenset(
    operation
    for operation, entry in CATALOGUE.items()
    if entry.lane is Lane.STATE and not isinstance(entry.to, Landing) and entry.to not in EXECUTING_STATES
)
"""What leads to where no guest runs."""


def heed_end(draft: Draft, before: Instance, event: GuestEvent) -> None:
    """Plan what is to be done about a guest that has just ended; `before` is the instance while it ran."""
    policy = before.restart
    if policy is None or not before.executing or event is GuestEvent.RESET:
        return
    asked_down = before.restarts is not None and before.restarts.asked_down
    if asked_down or any(request.operation in _TAKES_DOWN for request in before.outstanding):
        return
    if _wanted(policy, draft.instance) is not None:
        _plan(draft, policy)


def heed_request(draft: Draft, request: Request, outcome: Outcome) -> None:
    """Note the end of a state change: a restart that failed is tried again, and anybody else's deed counts afresh."""
    instance = draft.instance
    policy = instance.restart
    if request.requested_by == UPKEEP:
        restarts = instance.restarts is not None and request.operation in {Operation.START, Operation.REBOOT}
        failed = restarts and outcome is Outcome.FAILED
        if failed and policy is not None and _wanted(policy, instance) is not None:
            _plan(draft, policy)
    elif policy is not None and CATALOGUE[request.operation].to is not Landing.SAME:
        half_down = request.operation in _TAKES_DOWN and outcome is not Outcome.SUCCEEDED
        draft.instance = replace(instance, restarts=Restarts(asked_down=True) if half_down else None)


def called_off(instance: Instance) -> Instance:
    """The instance once somebody has asked for it to stay as it is: nothing is due any more."""
    due = instance.restarts is not None and instance.restarts.due_at_ms is not None
    return replace(instance, restarts=None) if due else instance


def pending(instance: Instance) -> OnCrash | None:
    """What is to be done about its guest at `restarts.due_at_ms`: restart or stop; None if nothing is."""
    if instance.restart is None or instance.restarts is None or instance.restarts.due_at_ms is None:
        return None
    return _wanted(instance.restart, instance)


def noted(before: Instance, after: Instance) -> Instance:
    """`after`, in which that was asked for which was due in `before`, with the restart counted."""
    wanted, restarts = pending(before), before.restarts
    if wanted is None or restarts is None:
        return after
    counted = restarts.count + (wanted is OnCrash.RESTART)
    return replace(after, restarts=replace(restarts, count=counted, due_at_ms=None))


def _wanted(policy: RestartPolicy, instance: Instance) -> OnCrash | None:
    """What its owner wants, by how its guest has ended. What was resized is not stopped: that would settle nothing."""
    resized = instance.vm_state is VmState.RESIZED
    powered_off = instance.power_state is PowerState.SHUTDOWN if resized else instance.vm_state is VmState.STOPPED
    if powered_off:
        return OnCrash.RESTART if policy.on_power_off is OnPowerOff.RESTART else None
    if instance.vm_state is VmState.ERROR or (resized and policy.on_crash is OnCrash.RESTART):
        return None if policy.on_crash is OnCrash.LEAVE else policy.on_crash
    return None


def _plan(draft: Draft, policy: RestartPolicy) -> None:
    """Say when it is restarted or stopped, or that it was restarted often enough."""
    instance, now_ms = draft.instance, draft.now_ms
    restarts = (instance.restarts or Restarts()).at_end(policy, now_ms)
    if _wanted(policy, instance) is OnCrash.STOP:
        draft.instance = replace(instance, restarts=replace(restarts, due_at_ms=now_ms))
    elif restarts.count < policy.restarts_max:
        due_at_ms = now_ms + restarts.put_off_ms(policy)
        draft.instance = replace(instance, restarts=replace(restarts, due_at_ms=due_at_ms))
        draft.tell("instance.restart_due", None, at_ms=due_at_ms, restarts=restarts.count)
    else:
        done = f"It was restarted {restarts.count} times within {policy.window_s} s, and is now left as it is."
        error = f"{instance.error or ''} {done}".strip() if instance.vm_state is VmState.ERROR else None
        draft.instance = replace(instance, restarts=restarts, error=error)
        draft.tell("instance.gave_up", None, restarts=restarts.count, window_s=policy.window_s)
