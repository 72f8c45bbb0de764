"""Held requests: denied for now, and evaluated again whenever the result may have changed.

`admission` holds a submission; `lifecycle.expire` decides when held requests are evaluated again.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final, NamedTuple

from interlock.core.admission import admit_there
from interlock.core.conditions import CALLER
from interlock.core.policy import CompiledPolicy
from interlock.core.records import (
    Admitted,
    Approval,
    Change,
    Event,
    Instance,
    Redundant,
    Request,
    Status,
    Submission,
)
from interlock.core.request_queue import Draft, replace

COUNTED_EVERY_MS: Final = 5_000
"""How often a held request is evaluated again under a policy that looks at counts."""


class Counts(NamedTuple):
    """How many requests are outstanding around an instance."""

    project_outstanding: int = 0
    host_outstanding: int = 0


NOT_COUNTED: Final = Counts()


def judge_held(
    instance: Instance, policy: CompiledPolicy, now_ms: int, *, host_reachable: bool, counts: Counts = NOT_COUNTED
) -> Change[tuple[str, ...]]:
    """Evaluate held requests in order: admit what the policy allows now, and cancel those whose hold has expired.

    `counts` are the outstanding requests around the instance now. Return the ids of those no longer held.
    A request that has become redundant ends too.
    """
    before, requests, events, settled = instance, dict[str, Request](), list[Event](), list[str]()
    while True:
        for request in instance.held:
            change = _judge_one_held(instance, _submission(request, host_reachable, counts), request, policy, now_ms)
            if change is not None:
                break
        else:
            break
        instance = change.instance
        requests.update((one.id, one) for one in change.requests)
        events.extend(change.events)
        settled.append(request.id)
    due_ms = [
        _next_judged_ms(instance, _submission(request, host_reachable, counts), request, policy, now_ms)
        for request in instance.held
    ]
    generation = instance.generation if settled else before.generation + 1
    return Change(
        instance=replace(instance, held_due_ms=min(due_ms, default=None), generation=generation),
        requests=tuple(requests.values()),
        events=tuple(events),
        answer=tuple(settled),
    )


def refuse_name(
    instance: Instance,
    policy: CompiledPolicy,
    now_ms: int,
    because: str,
    *,
    host_reachable: bool,
    counts: Counts = NOT_COUNTED,
) -> Change[bool]:
    """Cancel the held request whose admission now would give the instance another name, since that name is taken.

    The answer is whether there is one.
    """
    state, held = instance, list(instance.held)
    while held:
        for request in held:
            change = _judge_one_held(state, _submission(request, host_reachable, counts), request, policy, now_ms)
            if change is not None:
                break
        else:
            break
        if change.instance.name != instance.name:
            draft = Draft(instance, now_ms)
            draft.end(request, Status.CANCELLED, "name_taken", because)
            return draft.change(True)
        state = change.instance
        held.remove(request)
    return Change(instance=instance, answer=False)


class ApprovalOutcome(StrEnum):
    """The result of approving a request."""

    APPROVED = "approved"
    ALREADY = "already"
    """Redundant: everything that the approver may approve is approved."""
    NOT_AWAITED = "not_awaited"
    """The request is not held, or no rule demands an approval of it."""
    OWN_REQUEST = "own_request"
    """Nobody approves their own request."""
    NOT_AN_APPROVER = "not_an_approver"
    """No rule about the operation names a role or group of the caller."""


def approve(
    instance: Instance,
    request_id: str,
    approval: Approval,
    policy: CompiledPolicy,
    *,
    host_reachable: bool,
    counts: Counts = NOT_COUNTED,
) -> Change[ApprovalOutcome]:
    """Approve a held request, and evaluate it again: it is admitted if nothing else forbids it, or stays held."""
    request = next((one for one in instance.held if one.id == request_id), None)
    demanded = frozenset[str]().union(
        *(rule.unless_approved_by or () for rule in policy.rules if request and request.operation in rule.operations)
    )
    if request is None or not demanded:
        return Change(instance=instance, answer=ApprovalOutcome.NOT_AWAITED)
    if approval.by == request.requested_by:
        return Change(instance=instance, answer=ApprovalOutcome.OWN_REQUEST)
    fitting = demanded.intersection(approval.belongs)
    if fitting <= set(request.approver):
        outcome = ApprovalOutcome.ALREADY if fitting else ApprovalOutcome.NOT_AN_APPROVER
        return Change(instance=instance, answer=outcome)
    approved = replace(
        request,
        approver=tuple(sorted(fitting.union(request.approver))),
        approvals=(*request.approvals, approval),
    )
    draft = Draft(instance, approval.at_ms, host_reachable=host_reachable)
    draft.requests[request.id] = approved
    held = tuple(approved if one.id == request.id else one for one in instance.held)
    draft.instance = replace(instance, held=held)
    draft.emit(
        "request.approved", request.id, by=approval.by, operation=request.operation.value, approver=sorted(fitting)
    )
    change = draft.change(ApprovalOutcome.APPROVED)
    judged = judge_held(change.instance, policy, approval.at_ms, host_reachable=host_reachable, counts=counts)
    latest = {one.id: one for one in (*change.requests, *judged.requests)}
    return Change(
        instance=judged.instance,
        requests=tuple(latest.values()),
        events=(*change.events, *judged.events),
        answer=ApprovalOutcome.APPROVED,
    )


def _judge_one_held(
    instance: Instance, submission: Submission, request: Request, policy: CompiledPolicy, now_ms: int
) -> Change[Any] | None:
    """Admit or end a held request; return None if it stays held."""
    alone = replace(instance, held=tuple(other for other in instance.held if other.id != request.id))
    change = admit_there(alone, submission, policy, now_ms)
    answer = change.answer
    if isinstance(answer, Admitted):
        return change
    draft = Draft(instance, now_ms)
    if isinstance(answer, Redundant) and answer.request is None:
        draft.end(request, Status.CANCELLED, answer.reason, answer.because)
    elif now_ms >= (request.held_until_ms or 0):
        draft.end(request, Status.CANCELLED, "hold_expired", "The hold expired before the policy admitted it.")
    else:
        return None
    return draft.change(None)


def _next_judged_ms(
    instance: Instance, submission: Submission, request: Request, policy: CompiledPolicy, now_ms: int
) -> int:
    """Return the next time at which it may be admitted without any other change, or expires."""
    alone = replace(instance, held=tuple(other for other in instance.held if other.id != request.id))
    wait_ms = policy.changes_in_ms(policy.view(alone, submission, now_ms), now_ms)
    until_ms = request.held_until_ms or now_ms
    if policy.counts:
        # No event of this instance says that requests elsewhere have ended.
        wait_ms = min(wait_ms or COUNTED_EVERY_MS, COUNTED_EVERY_MS)
    return until_ms if wait_ms is None else min(until_ms, now_ms + wait_ms)


def _submission(held: Request, host_reachable: bool, counts: Counts) -> Submission:
    asked = {condition.reads: getattr(held, condition.reads) for condition in CALLER}
    return Submission(
        request_id=held.id,
        operation=held.operation,
        parameters=held.parameters,
        **{**asked, **counts._asdict()},
        approvals=held.approvals,
        image=held.image,
        host_reachable=host_reachable,
    )
