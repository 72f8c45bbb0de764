"""Automatic restarts of guests that end on their own.

The count is stored with the instance, in the same change, so that a restarted server neither loses nor repeats a
restart. A state change that a user requests resets the count.
"""

from __future__ import annotations

from typing import Final

from interlock.core.operations import CATALOGUE, Operation
from interlock.core.records import GuestEvent, Instance, Outcome, Request
from interlock.core.request_queue import Draft, replace
from interlock.core.restart_policy import OnCrash, OnPowerOff, RestartPolicy, Restarts
from interlock.core.states import EXECUTING_STATES, PowerState, Target, VmState

SERVER_REQUESTER: Final = "interlock"
"""Requester name of server-initiated actions; no token may have this name."""

_TAKES_DOWN: Final = frozenset(
    operation
    for operation, entry in CATALOGUE.items()
    if not isinstance(entry.to, Target) and entry.to not in EXECUTING_STATES
)
"""The operations after which no guest runs."""


def on_guest_end(draft: Draft, before: Instance, event: GuestEvent) -> None:
    """Schedule a restart or stop of a guest that has just ended; `before` is the instance while it ran."""
    policy = before.restart
    if policy is None or not before.executing or event is GuestEvent.RESET:
        return
    asked_down = before.restarts is not None and before.restarts.asked_down
    if asked_down or any(request.operation in _TAKES_DOWN for request in before.outstanding):
        return
    if event is GuestEvent.LEASE_ENDED:
        # The host lost its lease, which is no fault of the guest: the end is not counted, and there is no delay.
        draft.instance = replace(draft.instance, restarts=None)
    if _wanted(policy, draft.instance) is not None:
        _plan(draft, policy)


def on_request_end(draft: Draft, request: Request, outcome: Outcome) -> None:
    """Retry a failed automatic restart; reset the count after a state change that a user requested."""
    instance = draft.instance
    policy = instance.restart
    if request.requested_by == SERVER_REQUESTER:
        restarts = instance.restarts is not None and request.operation in {Operation.START, Operation.REBOOT}
        failed = restarts and outcome is Outcome.FAILED
        if failed and policy is not None and _wanted(policy, instance) is not None:
            _plan(draft, policy)
    elif policy is not None and CATALOGUE[request.operation].to is not Target.SAME:
        half_down = request.operation in _TAKES_DOWN and outcome is not Outcome.SUCCEEDED
        draft.instance = replace(instance, restarts=Restarts(asked_down=True) if half_down else None)


def without_scheduled_restart(instance: Instance) -> Instance:
    """Return the instance without its scheduled restart, after a request for it to stay stopped."""
    due = instance.restarts is not None and instance.restarts.due_at_ms is not None
    return replace(instance, restarts=None) if due else instance


def pending(instance: Instance) -> OnCrash | None:
    """Return the action due at `restarts.due_at_ms`, restart or stop; None if there is none."""
    if instance.restart is None or instance.restarts is None or instance.restarts.due_at_ms is None:
        return None
    return _wanted(instance.restart, instance)


def noted(before: Instance, after: Instance) -> Instance:
    """Return `after`, in which the action due in `before` was submitted, with the restart counted."""
    wanted, restarts = pending(before), before.restarts
    if wanted is None or restarts is None:
        return after
    counted = restarts.count + (wanted is OnCrash.RESTART)
    return replace(after, restarts=replace(restarts, count=counted, due_at_ms=None))


def _wanted(policy: RestartPolicy, instance: Instance) -> OnCrash | None:
    """Return the owner's choice for the way in which its guest ended. A resized instance is never stopped: it would
    still be resized.
    """
    resized = instance.vm_state is VmState.RESIZED
    powered_off = instance.power_state is PowerState.SHUTDOWN if resized else instance.vm_state is VmState.STOPPED
    if powered_off:
        return OnCrash.RESTART if policy.on_power_off is OnPowerOff.RESTART else None
    if instance.vm_state is VmState.ERROR or (resized and policy.on_crash is OnCrash.RESTART):
        return None if policy.on_crash is OnCrash.LEAVE else policy.on_crash
    return None


def _plan(draft: Draft, policy: RestartPolicy) -> None:
    """Schedule the restart or stop, or give up after too many restarts."""
    instance, now_ms = draft.instance, draft.now_ms
    restarts = (instance.restarts or Restarts()).at_end(policy, now_ms)
    if _wanted(policy, instance) is OnCrash.STOP:
        draft.instance = replace(instance, restarts=replace(restarts, due_at_ms=now_ms))
    elif restarts.count < policy.restarts_max:
        due_at_ms = now_ms + restarts.put_off_ms(policy)
        draft.instance = replace(instance, restarts=replace(restarts, due_at_ms=due_at_ms))
        draft.emit("instance.restart_due", None, at_ms=due_at_ms, restarts=restarts.count)
    else:
        done = f"It was restarted {restarts.count} times within {policy.window_s} s; no more restarts."
        error = f"{instance.error or ''} {done}".strip() if instance.vm_state is VmState.ERROR else None
        draft.instance = replace(instance, restarts=restarts, error=error)
        draft.emit("instance.gave_up", None, restarts=restarts.count, window_s=policy.window_s)
