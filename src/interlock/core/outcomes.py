"""Outcomes of requests: how each ends and which vm_state it leads to, and the end of what was served too long."""

from __future__ import annotations

from typing import Final

from interlock.core import restarts
from interlock.core.durations import spelled_time
from interlock.core.operations import CATALOGUE, Lane
from interlock.core.policy import DEFAULT_GRACE_MS
from interlock.core.records import SERVED, Instance, Outcome, Request, Status
from interlock.core.request_queue import Draft, replace
from interlock.core.state_stack import ARRIVES, Memory, remembered_in, resolve_target
from interlock.core.states import VmState

SERVED_TOO_LONG: Final = "served_too_long"
"""The reason of a request that failed because it was served for longer than it may."""


def end_of(request: Request, outcome: Outcome, message: str | None) -> tuple[Status, str | None, str | None]:
    """Return the final status, reason and message of a request."""
    match outcome:
        case Outcome.SUCCEEDED:
            return Status.SUCCEEDED, None, message
        case Outcome.INTERRUPTED if request.interrupted_for is not None:
            return Status.SUPERSEDED, "superseded", message or f"Interrupted by request {request.interrupted_for}."
        case Outcome.INTERRUPTED | Outcome.FAILED | Outcome.UNTOUCHED if request.overdue:
            return Status.FAILED, SERVED_TOO_LONG, message or _too_long(request)
        case Outcome.INTERRUPTED:
            return Status.CANCELLED, "interrupted", message or "Interrupted and rolled back."
        case Outcome.FAILED | Outcome.UNTOUCHED | Outcome.UNKNOWN:
            return Status.FAILED, "failed", message


def settle(draft: Draft, request: Request, outcome: Outcome, message: str | None, *, arrived: bool) -> None:
    """Set the vm_state that the outcome leads to."""
    before = draft.instance
    state, memory = before.vm_state, before.state_stack
    if outcome is Outcome.SUCCEEDED and not (arrived and request.operation in ARRIVES):
        state, memory = resolve_target(request.operation, state, memory)
    elif outcome is Outcome.FAILED:
        state = CATALOGUE[request.operation].on_failure or state
    move(draft, state, memory, message if outcome is Outcome.FAILED else None, request.id)


def move(draft: Draft, state: VmState, memory: Memory, error: str | None, request_id: str | None = None) -> None:
    """Set the vm_state and the state stack."""
    before = draft.instance
    in_error = VmState.ERROR in (state, *remembered_in(state, memory))
    draft.instance = before.come_to(
        state,
        memory,
        error=(error or before.error) if in_error else None,
        state_since_ms=before.state_since_ms if state is before.vm_state else draft.now_ms,
    )
    if state is not before.vm_state:
        draft.emit("instance.state", request_id, vm_state=state.value, before=before.vm_state.value)


def limit_at_ms(request: Request) -> int | None:
    """Return when a request in flight has been served for as long as it may; None if it may be for any time."""
    if request.status not in SERVED or request.taken_at_ms is None or request.served_at_most_ms is None:
        return None
    return request.taken_at_ms + request.served_at_most_ms


def next_limit_ms(instance: Instance) -> int | None:
    """Return when a request has next to be interrupted because it was served for as long as it may; None if none."""
    next_ms = None
    for request in instance.outstanding:
        at_ms = limit_at_ms(request) if request.interrupt_deadline_ms is None else None
        if at_ms is not None and (next_ms is None or at_ms < next_ms):
            next_ms = at_ms
    return next_ms


def fenced_for_limit_at_ms(request: Request, now_ms: int) -> int | None:
    """Return when the worker of a request in flight is fenced at the latest if it does not end; None if never."""
    if request.overdue and request.interrupted_for is None:
        return request.interrupt_deadline_ms
    limit_ms = limit_at_ms(request)
    if limit_ms is None or request.interrupt_deadline_ms is not None:
        return None
    return max(limit_ms, now_ms) + DEFAULT_GRACE_MS


def interrupt_overdue(draft: Draft) -> None:
    """Ask the workers to stop whose requests were served for as long as they may; they have a grace period."""
    for request in draft.instance.outstanding:
        limit_ms = limit_at_ms(request)
        if limit_ms is None or limit_ms > draft.now_ms or request.interrupt_deadline_ms is not None:
            continue
        deadline_ms = draft.now_ms + DEFAULT_GRACE_MS
        asked_ms = draft.now_ms if request.interrupt_at_ms is None else request.interrupt_at_ms
        draft.put(replace(request, interrupt_at_ms=asked_ms, interrupt_deadline_ms=deadline_ms, overdue=True))
        by = restarts.SERVER_REQUESTER
        draft.emit("request.interrupting", request.id, by=by, deadline_ms=deadline_ms, reason=SERVED_TOO_LONG)


def fail_overdue(draft: Draft, request: Request) -> tuple[str, ...]:
    """Fence the worker of a request that was served too long, which fails; return the ids of the requests that ended.

    What its worker did is found out afterwards, as with every fenced worker.
    """
    message = _too_long(request)
    if request.lane is Lane.STATE:
        settle(draft, request, Outcome.FAILED, message, arrived=False)
        restarts.on_request_end(draft, request, Outcome.FAILED)
    draft.end(request, Status.FAILED, SERVED_TOO_LONG, message)
    together = draft.fence_off(None, f"Fenced together with {request.operation.value} ({request.id}). {message}")
    return (request.id, *together)


def _too_long(request: Request) -> str:
    most = spelled_time(request.served_at_most_ms or 0)
    return f"The {request.operation.value} was served for {most} without an end, its limit (served_at_most)."
