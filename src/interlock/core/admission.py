"""The gate: what becomes of one submission.

`admit` is the only way in. What the policy's verdicts mean is here, once; which verdict a submission gets is the
policy's, and what happens to a request afterwards is in `lifecycle`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from interlock.core.operations import CATALOGUE, Lane, Operation, land
from interlock.core.policy import QUEUE_FULL, Before, CompiledPolicy, Rule, Verdict, View
from interlock.core.records import (
    SERVED,
    Admitted,
    Change,
    Denied,
    Disposition,
    Instance,
    Redundant,
    Request,
    Status,
    Submission,
)
from interlock.core.request_queue import Draft, foresee, judge_again, judge_in, kinds, permits, replace
from interlock.core.states import NO_TASK, VmState


def look(instance: Instance, submission: Submission, now_ms: int) -> View:
    """What the rules see of a submission. Ages never come out negative, so a clock that jumps back only delays."""
    serving = task_state = None
    outstanding = 0
    if instance.outstanding:
        serving = instance.served(Lane.STATE) or instance.served(Lane.COMPONENT)
        task_state, outstanding = instance.task_state, kinds(instance)
    if serving is None:
        silent_since = running_since = instance.updated_at_ms
    else:
        running_since = serving.taken_at_ms or 0
        silent_since = serving.last_progress_at_ms or running_since
    return View(
        submission.operation,
        instance.vm_state,
        task_state or NO_TASK,
        outstanding,
        submission.role,
        instance.locked_by is not None,
        submission.operation in instance.blocked_operations,
        instance.tags,
        submission.host_reachable,
        submission.parameters.get("hard") is True,
        max(0, now_ms - silent_since),
        max(0, now_ms - running_since),
    )


def judge(instance: Instance, submission: Submission, policy: CompiledPolicy, now_ms: int) -> Disposition:
    """The disposition that `admit` would give, without admitting."""
    return admit(instance, submission, policy, now_ms).answer


def admit(instance: Instance, submission: Submission, policy: CompiledPolicy, now_ms: int) -> Change[Disposition]:
    """Judge a submission, and keep it if it is admitted.

    The answer is one of the three dispositions. Every submission is told as an event with what it was judged on, so
    that the history can be judged again by another policy.
    """
    view = look(instance, submission, now_ms)
    rule = policy.decide(view)
    draft = Draft(instance, now_ms)
    verdict = rule.verdict
    if verdict is Verdict.AFTER and view.age_ms(rule.measured_from) < (rule.threshold_ms or 0):
        return _too_early(draft, view, submission, rule)
    if verdict is Verdict.DENY:
        return _deny(draft, view, submission, rule)
    if verdict is Verdict.REDUNDANT:
        return _redundant(draft, view, submission, rule, _latest(instance, submission.operation))
    if CATALOGUE[submission.operation].lane is Lane.RECORD:
        return _record(draft, view, submission, rule, policy)
    if verdict is Verdict.PREEMPT and (waiting := _preempting(instance, view)) is not None:
        return _redundant(draft, view, submission, rule, waiting)
    if verdict is Verdict.ADMIT:
        if len(instance.outstanding) >= policy.outstanding_max:
            return _deny(draft, view, submission, QUEUE_FULL)
        if rule.in_turn and instance.outstanding:
            refused = _judge_foreseen(draft, view, submission, policy)
            if refused is not None:
                return refused
    return _keep(draft, view, submission, rule, policy)


def _judge_foreseen(
    draft: Draft, view: View, submission: Submission, policy: CompiledPolicy
) -> Change[Disposition] | None:
    """The refusal in the foreseen state, or None if it is permitted there too (law 2)."""
    instance = draft.instance
    blocker = _last_state_change(instance)
    if blocker is None:
        return None
    foreseen = foresee(instance)
    rule = judge_in(policy, _request(submission, NOT_KEPT, draft.now_ms, instance.id), foreseen, instance.tags)
    if permits(rule):
        return None
    if rule.verdict is Verdict.REDUNDANT:
        return _redundant(draft, view, submission, rule, _brings_about(instance, foreseen) or blocker)
    return _deny(draft, view, submission, rule, foreseen=foreseen, blocked_by=blocker)


def _brings_about(instance: Instance, foreseen: VmState) -> Request | None:
    """The last outstanding request that leads to the foreseen state from another; None if it holds already."""
    state, prior = instance.vm_state, instance.prior_vm_state
    found = None
    for request in instance.outstanding:
        if request.lane is Lane.STATE:
            before = state
            state, prior = land(request.operation, state, prior)
            if state is foreseen and before is not foreseen:
                found = request
    return found


def _keep(draft: Draft, view: View, submission: Submission, rule: Rule, policy: CompiledPolicy) -> Change[Disposition]:
    instance = draft.instance
    request = _request(submission, rule, draft.now_ms, instance.id)
    supersedes: tuple[str, ...] = ()
    cancels: tuple[str, ...] = ()
    if rule.verdict is Verdict.AFTER:
        request = replace(request, preempts=True)
        supersedes = draft.fence_off(request.id, f"Taken over by {request.operation.value} ({request.id}).")
    elif rule.verdict is Verdict.PREEMPT:
        request = replace(request, preempts=True)
        supersedes = _ask_to_stop(draft, request.id, rule.grace_ms)
    draft.enqueue(request)
    if request.preempts:
        cancels = judge_again(draft, policy)
    draft.tell("request.admitted", request.id, **_facts(view, submission, rule), supersedes=supersedes, cancels=cancels)
    return draft.change(
        Admitted(request=request, rule=rule.id, because=rule.because, supersedes=supersedes, cancels=cancels)
    )


def _ask_to_stop(draft: Draft, by: str, grace_ms: int) -> tuple[str, ...]:
    """Ask every worker of the instance to stop half-way; the ids of what they serve."""
    asked = []
    for request in draft.instance.outstanding:
        if request.status in SERVED:
            deadline = draft.now_ms + grace_ms
            if request.interrupt_deadline_ms is not None:
                deadline = min(deadline, request.interrupt_deadline_ms)
            draft.put(
                replace(request, interrupt_at_ms=draft.now_ms, interrupt_deadline_ms=deadline, interrupted_for=by)
            )
            draft.tell("request.interrupting", request.id, by=by, deadline_ms=deadline)
            asked.append(request.id)
    return tuple(asked)


def _record(
    draft: Draft, view: View, submission: Submission, rule: Rule, policy: CompiledPolicy
) -> Change[Disposition]:
    """Carry out an operation that changes only the record: it is done when it is admitted."""
    instance = draft.instance
    request = _request(submission, rule, draft.now_ms, instance.id)
    supersedes: tuple[str, ...] = ()
    cancels: tuple[str, ...] = ()
    draft.tell("request.admitted", request.id, **_facts(view, submission, rule))
    match submission.operation:
        case Operation.LOCK:
            draft.instance = replace(instance, locked_by=submission.requested_by)
        case Operation.UNLOCK:
            draft.instance = replace(instance, locked_by=None)
        case _:
            supersedes = draft.fence_off(request.id, f"The state was reset by {submission.requested_by}.")
            target = VmState(submission.parameters.get("vm_state", VmState.ERROR))
            message = str(submission.parameters.get("reason", "reset")) if target is VmState.ERROR else None
            draft.instance = replace(draft.instance, vm_state=target, error=message)
            draft.alive()
            draft.tell("instance.state", request.id, vm_state=target.value, before=instance.vm_state.value)
            cancels = judge_again(draft, policy)
    draft.end(request, Status.SUCCEEDED)
    kept = draft.requests[request.id]
    return draft.change(
        Admitted(request=kept, rule=rule.id, because=rule.because, supersedes=supersedes, cancels=cancels)
    )


def _too_early(draft: Draft, view: View, submission: Submission, rule: Rule) -> Change[Disposition]:
    allowed_at_ms = draft.now_ms - view.age_ms(rule.measured_from) + (rule.threshold_ms or 0)
    if rule.before is Before.REDUNDANT:
        earlier = _latest(draft.instance, submission.operation)
        return _redundant(draft, view, submission, rule, earlier, allowed_at_ms)
    return _deny(draft, view, submission, rule, allowed_at_ms=allowed_at_ms)


def _deny(
    draft: Draft,
    view: View,
    submission: Submission,
    rule: Rule,
    *,
    foreseen: VmState | None = None,
    blocked_by: Request | None = None,
    allowed_at_ms: int | None = None,
) -> Change[Disposition]:
    instance = draft.instance
    answer = Denied(
        operation=submission.operation,
        reason=rule.code,
        rule=rule.id,
        because=rule.because,
        vm_state=foreseen or instance.vm_state,
        foreseen=foreseen is not None,
        blocked_by=blocked_by or _blocker(instance, rule),
        allowed_at_ms=allowed_at_ms,
    )
    return _unchanged(draft, "request.denied", _facts(view, submission, rule), answer)


def _redundant(
    draft: Draft,
    view: View,
    submission: Submission,
    rule: Rule,
    earlier: Request | None,
    allowed_at_ms: int | None = None,
) -> Change[Disposition]:
    answer = Redundant(
        rule=rule.id,
        # An `after` rule that answers so before its threshold has a code of its own for the takeover.
        reason=rule.reason or "already",
        because=rule.because,
        request=earlier,
        allowed_at_ms=allowed_at_ms,
    )
    return _unchanged(draft, "request.redundant", _facts(view, submission, rule), answer)


def _unchanged(draft: Draft, kind: str, facts: dict[str, Any], answer: Denied | Redundant) -> Change[Disposition]:
    """A submission that changes nothing is still told, and leaves the generation as it was."""
    draft.generation = draft.instance.generation
    draft.tell(kind, None, **facts, reason=answer.reason)
    return Change(instance=draft.instance, events=tuple(draft.events), answer=answer)


def _facts(view: View, submission: Submission, rule: Rule) -> dict[str, Any]:
    """What a submission was judged on, complete enough to judge it again."""
    return {
        "operation": view.operation.value,
        "parameters": submission.parameters,
        "by": submission.requested_by,
        "rule": rule.id,
        "view": msgspec.structs.asdict(view),
    }


def _request(submission: Submission, rule: Rule, now_ms: int, instance_id: str) -> Request:
    return Request(
        id=submission.request_id,
        instance_id=instance_id,
        operation=submission.operation,
        parameters=submission.parameters,
        requested_by=submission.requested_by,
        role=submission.role,
        rule=rule.id,
        admitted_at_ms=now_ms,
        in_turn=rule.in_turn,
    )


NOT_KEPT = QUEUE_FULL
"""Stands for the rule of a request that is built only to be judged."""


def _latest(instance: Instance, operation: Operation) -> Request | None:
    return next((request for request in reversed(instance.outstanding) if request.operation is operation), None)


def _preempting(instance: Instance, view: View) -> Request | None:
    """The same request, if it waits at the front already. What preempts knows no limit, so it must not pile up."""
    for request in instance.outstanding:
        waits = request.preempts and request.status is Status.QUEUED
        if waits and request.operation is view.operation and request.hard is view.hard:
            return request
    return None


def _last_state_change(instance: Instance) -> Request | None:
    return next((request for request in reversed(instance.outstanding) if request.lane is Lane.STATE), None)


def _blocker(instance: Instance, rule: Rule) -> Request | None:
    """The outstanding request that a refusal names: the one the rule is about, or what is being served."""
    if rule.outstanding:
        for request in reversed(instance.outstanding):
            if request.operation in rule.outstanding:
                return request
    return instance.served(Lane.STATE) or (instance.outstanding[0] if instance.outstanding else None)
