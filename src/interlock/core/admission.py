"""The gate: evaluates one submission and applies the policy's verdict.

`admit` is the only way into the queue. The policy gives the verdict, and `lifecycle` has what happens to a request
afterwards.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from interlock.core import restarts
from interlock.core.evaluation import Effect, Evaluation, evaluate, ruling_on, would_admit
from interlock.core.operations import Lane, Operation
from interlock.core.outcomes import fail_overdue, fenced_for_limit_at_ms
from interlock.core.policy import (
    GONE,
    HOST_NOT_FENCED,
    NOT_PERFORMED,
    TO_BE_DELETED,
    Before,
    CompiledPolicy,
    MeasuredFrom,
    Rule,
    Verdict,
)
from interlock.core.preconditions import RULE, unmet
from interlock.core.record_operations import RECORD_OPERATIONS
from interlock.core.records import (
    SERVED,
    Admitted,
    Change,
    Denied,
    Disposition,
    Held,
    Instance,
    Redundant,
    Request,
    Status,
    Submission,
)
from interlock.core.request_queue import (
    Draft,
    because_of,
    blocker_of,
    foresee,
    is_judged,
    judge_again,
    latest_of,
    replace,
)
from interlock.core.states import VmState
from interlock.core.view_classes import callers


def judge(instance: Instance, submission: Submission, policy: CompiledPolicy, now_ms: int) -> Disposition:
    """Return the disposition that `admit` would give, without admitting."""
    return admit(instance, submission, policy, now_ms).answer


def admit(instance: Instance, submission: Submission, policy: CompiledPolicy, now_ms: int) -> Change[Disposition]:
    """Evaluate a submission, and enqueue it if it is admitted, or hold it.

    Every submission is recorded as an event with the facts it was evaluated on, so that the history can be replayed
    against another policy.

    Raises:
        Invalid: the id is that of an outstanding or held request, or the target of a `reset_state` is invalid.
    """
    evaluation = evaluate(instance, submission, policy, now_ms)
    effect, rule, about, foreseen = ruling_on(evaluation)
    match effect:
        case Effect.WAIT:
            return _before_threshold(evaluation, rule)
        case Effect.DENY:
            return _deny(evaluation, rule, foreseen=foreseen, blocked_by=about)
        case Effect.REDUNDANT:
            change = _redundant(evaluation, rule, about)
            is_down = rule.verdict is Verdict.REDUNDANT and foreseen is None
            return _stay_down(evaluation, change) if is_down and submission.operation is Operation.STOP else change
        case Effect.RECORD:
            return _check_preconditions(evaluation) or _record(evaluation, rule)
        case Effect.ENQUEUE:
            return _check_preconditions(evaluation) or _enqueue(evaluation, rule)


def admit_there(instance: Instance, submission: Submission, policy: CompiledPolicy, now_ms: int) -> Change[Disposition]:
    """As `admit`, but never admit the evacuation of an instance whose host is not fenced, whatever the policy says.

    A held evacuation is evaluated again before it is admitted.
    """
    change = admit(instance, submission, policy, now_ms)
    evacuated = submission.operation is Operation.EVACUATE and isinstance(change.answer, Admitted)
    if not evacuated or not submission.host_reachable:
        return change
    return _deny(evaluate(instance, submission, policy, now_ms), HOST_NOT_FENCED, looks_ahead=False)


def not_started(instance: Instance, creation: Submission, policy: CompiledPolicy, now_ms: int) -> Instance | Denied:
    """Return a new instance that is created without starting it, in the vm_state from which it can be started.

    That is `stopped`, or `building` if the policy admits a start only there (change 880: an instance starts once, and
    not again after it has stopped). Return a refusal if no caller could ever start it in either, since it could only
    be deleted.
    """
    stopped = replace(instance, vm_state=VmState.STOPPED)
    places = [replace(one, blocked_operations=()) for one in (stopped, instance)]
    others = callers([rule for rule in policy.rules if Operation.START in rule.operations])
    starts = [replace(creation, operation=Operation.START, **caller) for caller in ({}, *others)]
    for start in starts:
        for place, waiting in zip(places, (stopped, instance), strict=True):
            if would_admit(place, start, policy, now_ms):
                return waiting
    views = [policy.view(place, start, now_ms) for place in places for start in starts]
    if any(policy.changes_in_ms(view, now_ms) is not None for view in views):
        return stopped
    rule = policy.decide(views[0])
    return Denied(
        operation=Operation.CREATE,
        reason="never_started",
        rule=rule.id,
        because=f"The policy {policy.stamp['name']} would never admit a start of it: {rule.because}",
        vm_state=VmState.STOPPED,
        remedy="Create it without --no-start, and stop it then.",
    )


def _check_preconditions(evaluation: Evaluation) -> Change[Disposition] | None:
    """Return the refusal for an unmet precondition, or None. It is never held: no policy could admit it."""
    submission = evaluation.submission
    found = unmet(evaluation.draft.instance, submission.operation, submission.parameters, submission.facts)
    if found is None:
        return None
    rule = _verdict_on_record(evaluation, Verdict.DENY, found.reason, found.because)
    instance = evaluation.draft.instance
    answer = Denied(
        operation=submission.operation,
        reason=rule.code,
        rule=rule.id,
        because=because_of(rule, instance.host),
        vm_state=instance.vm_state,
        remedy=found.remedy,
    )
    return _unchanged(evaluation, "request.denied", rule, answer)


def _verdict_on_record(evaluation: Evaluation, verdict: Verdict, reason: str, because: str) -> Rule:
    """Return the rule that is reported for a verdict on the record, which holds under every policy."""
    operations = frozenset({evaluation.submission.operation})
    return Rule(id=RULE, operations=operations, verdict=verdict, reason=reason, because=because, fixed=True)


def _enqueue(evaluation: Evaluation, rule: Rule) -> Change[Disposition]:
    draft = evaluation.draft
    facts = evaluation.facts(rule)
    request = evaluation.request(rule)
    supersedes: tuple[str, ...] = ()
    cancels: tuple[str, ...] = ()
    if rule.verdict is Verdict.AFTER:
        request = replace(request, preempts=True)
        supersedes = draft.fence_off(request.id, f"Taken over by {request.operation.value} ({request.id}).")
    elif rule.verdict is Verdict.PREEMPT:
        request = replace(request, preempts=True)
        supersedes = _interrupt_all(draft, request.id, rule.grace_ms)
    draft.enqueue(request)
    if request.preempts or not is_judged(draft.instance, host_reachable=draft.host_reachable):
        cancels = judge_again(draft, evaluation.policy)
    facts["supersedes"] = supersedes
    facts["cancels"] = cancels
    draft.emit_facts("request.admitted", request.id, facts)
    return draft.change(
        Admitted(request=request, rule=rule.id, because=rule.because, supersedes=supersedes, cancels=cancels)
    )


def _interrupt_all(draft: Draft, by: str, grace_ms: int) -> tuple[str, ...]:
    """Ask every worker of the instance to stop; return the ids of their requests."""
    stopping = []
    for request in draft.instance.outstanding:
        if request.status in SERVED:
            deadline = draft.now_ms + grace_ms
            if request.interrupt_deadline_ms is not None:
                deadline = min(deadline, request.interrupt_deadline_ms)
            draft.put(
                replace(request, interrupt_at_ms=draft.now_ms, interrupt_deadline_ms=deadline, interrupted_for=by)
            )
            draft.emit("request.interrupting", request.id, by=by, deadline_ms=deadline)
            stopping.append(request.id)
    return tuple(stopping)


def _record(evaluation: Evaluation, rule: Rule) -> Change[Disposition]:
    """Perform an operation that changes only the record: it is done when it is admitted."""
    draft = evaluation.draft
    perform, holds_already = RECORD_OPERATIONS[evaluation.submission.operation]
    because = holds_already(draft.instance, evaluation.submission)
    if because is not None:
        return _redundant(evaluation, _verdict_on_record(evaluation, Verdict.REDUNDANT, "unchanged", because), None)
    request = evaluation.request(rule)
    draft.emit("request.admitted", request.id, **evaluation.facts(rule))
    supersedes, cancels = perform(draft, request, evaluation.policy)
    draft.end(request, Status.SUCCEEDED)
    kept = draft.requests[request.id]
    return draft.change(
        Admitted(request=kept, rule=rule.id, because=rule.because, supersedes=supersedes, cancels=cancels)
    )


class _Allowed(NamedTuple):
    """When a submission would be admitted, as `Denied` has it."""

    at_ms: int | None = None
    if_silent: bool = False
    latest_ms: int | None = None


_UNKNOWN: Final = _Allowed()


def _before_threshold(evaluation: Evaluation, rule: Rule) -> Change[Disposition]:
    allowed = _takes_over(evaluation, rule)
    if rule.before is Before.REDUNDANT:
        return _redundant(evaluation, rule, latest_of(evaluation.draft.instance, evaluation.view.operation), allowed)
    return _deny(evaluation, rule, allowed=allowed)


def _takes_over(evaluation: Evaluation, rule: Rule) -> _Allowed:
    """Return when the threshold of a rule will have passed.

    Progress moves a threshold that measures silence, but not the end of what may be served for a limited time only.
    """
    at_ms = _in_time_ms(evaluation) or evaluation.draft.now_ms + rule.until_threshold_ms(evaluation.view)
    if rule.measured_from is MeasuredFrom.TASK_STARTED:
        return _Allowed(at_ms)
    latest_ms = _after_limit_ms(evaluation)
    if latest_ms is not None and latest_ms <= at_ms:
        return _Allowed(latest_ms, latest_ms=latest_ms)
    return _Allowed(at_ms, if_silent=True, latest_ms=latest_ms)


def _after_limit_ms(evaluation: Evaluation) -> int | None:
    """Return when what is in flight is fenced at the latest, if the submission would be admitted then; else None."""
    instance, now_ms = evaluation.draft.instance, evaluation.draft.now_ms
    serving = instance.served(Lane.STATE) or instance.served(Lane.COMPONENT)
    fenced_at_ms = None if serving is None else fenced_for_limit_at_ms(serving, now_ms)
    if serving is None or fenced_at_ms is None:
        return None
    draft = Draft(instance, fenced_at_ms, host_reachable=evaluation.submission.host_reachable, recording=False)
    fail_overdue(draft, serving)
    judge_again(draft, evaluation.policy)
    admitted = would_admit(draft.conclude(), evaluation.submission, evaluation.policy, fenced_at_ms)
    return fenced_at_ms if admitted else None


def _deny(
    evaluation: Evaluation,
    rule: Rule,
    *,
    foreseen: VmState | None = None,
    blocked_by: Request | None = None,
    allowed: _Allowed = _UNKNOWN,
    looks_ahead: bool = True,
) -> Change[Disposition]:
    """Deny it, or hold it if it asked for that; `looks_ahead`: time may let it through, so say when."""
    instance = evaluation.draft.instance
    if allowed.at_ms is None and looks_ahead:
        allowed = _Allowed(_in_time_ms(evaluation))
    fenced_at_ms = _once_fenced_ms(evaluation) if allowed.at_ms is None else None
    answer = Denied(
        operation=evaluation.submission.operation,
        reason=rule.code,
        rule=rule.id,
        because=because_of(rule, instance.host) if fenced_at_ms is None else _not_fenced_yet(instance.host),
        vm_state=foreseen or instance.vm_state,
        foreseen=foreseen is not None,
        blocked_by=blocked_by or blocker_of(instance, rule),
        allowed_at_ms=fenced_at_ms if allowed.at_ms is None else allowed.at_ms,
        allowed_if_silent=allowed.if_silent,
        allowed_latest_at_ms=allowed.latest_ms,
        remedy=rule.remedy(evaluation.submission.requested_by),
    )
    awaited_ms = rule.approve_within_ms if rule.unless_approved_by and evaluation.submission.approvable else None
    hold_ms = awaited_ms if evaluation.submission.hold_ms is None else evaluation.submission.hold_ms
    permanent = rule is GONE or rule is TO_BE_DELETED or rule.id == NOT_PERFORMED
    if hold_ms is not None and not permanent and len(instance.held) < evaluation.policy.outstanding_max:
        return _check_preconditions(evaluation) or _hold(evaluation, rule, answer, hold_ms)
    return _unchanged(evaluation, "request.denied", rule, answer)


def _in_time_ms(evaluation: Evaluation) -> int | None:
    """Return when it is first admitted if nothing but time passes; None: never, or no time window or age matters."""
    policy, instance = evaluation.policy, evaluation.draft.instance
    if not policy.time_matters:
        return None
    submission = evaluation.submission
    at_ms = evaluation.draft.now_ms
    for _ in range(_CHANGES_MAX):
        views = [policy.view(instance, submission, at_ms)]
        if instance.outstanding:
            foreseen = foresee(instance, host_reachable=submission.host_reachable)
            views.append(foreseen.view(policy.timed(submission, at_ms), at_ms))
        if at_ms == evaluation.draft.now_ms and not any(map(policy.depends_on_time, views)):
            return None
        waits = [wait for view in views if (wait := policy.changes_in_ms(view, at_ms)) is not None]
        if not waits:
            return None
        at_ms += min(waits)
        if would_admit(instance, submission, policy, at_ms):
            return at_ms
    return None


_CHANGES_MAX: Final = 64
"""How many changes of the rules' answer are tried: more than there are in a week of time windows."""


def _once_fenced_ms(evaluation: Evaluation) -> int | None:
    """Return when the lost host is fenced, if the request would be admitted then; else None."""
    submission = evaluation.submission
    if submission.host_fenced_at_ms is None or not submission.host_reachable:
        return None
    then = replace(submission, host_reachable=False, host_fenced_at_ms=None)
    admitted = would_admit(evaluation.draft.instance, then, evaluation.policy, evaluation.draft.now_ms)
    return submission.host_fenced_at_ms if admitted else None


def _not_fenced_yet(host: str) -> str:
    return f"Host {host} does not respond, and the guest may run there until the host's lease expires and it is fenced."


def _hold(evaluation: Evaluation, rule: Rule, denied: Denied, hold_ms: int) -> Change[Disposition]:
    """Hold a denied request until the policy admits it (see `lifecycle.expire`) or the hold expires."""
    draft = evaluation.draft
    until_ms = draft.now_ms + hold_ms
    request = replace(evaluation.request(rule), status=Status.HELD, held_until_ms=until_ms)
    draft.requests[request.id] = request
    draft.instance = replace(draft.instance, held=(*draft.instance.held, request))
    draft.emit("request.held", request.id, **evaluation.facts(rule), reason=denied.reason, until_ms=until_ms)
    return draft.change(Held(request=request, denied=denied))


def _redundant(
    evaluation: Evaluation, rule: Rule, earlier: Request | None, allowed: _Allowed = _UNKNOWN
) -> Change[Disposition]:
    answer = Redundant(
        rule=rule.id,
        # The code of an `after` rule is for the takeover.
        reason=rule.reason or "already",
        because=rule.because,
        request=earlier,
        allowed_at_ms=allowed.at_ms,
        allowed_if_silent=allowed.if_silent,
        allowed_latest_at_ms=allowed.latest_ms,
    )
    return _unchanged(evaluation, "request.redundant", rule, answer)


def _stay_down(evaluation: Evaluation, change: Change[Disposition]) -> Change[Disposition]:
    """Cancel a scheduled restart when a stop is redundant."""
    instance = change.instance
    staying = restarts.without_scheduled_restart(instance)
    if staying is instance or evaluation.submission.requested_by == restarts.SERVER_REQUESTER:
        return change
    after = instance.generation + 1
    events = tuple(replace(event, generation=after) for event in change.events)
    return replace(change, instance=replace(staying, generation=after), events=events)


def _unchanged(evaluation: Evaluation, kind: str, rule: Rule, answer: Denied | Redundant) -> Change[Disposition]:
    """Record a submission that changes nothing as an event, with the generation unchanged."""
    draft = evaluation.draft
    draft.generation = draft.instance.generation
    facts = evaluation.facts(rule)
    facts["reason"] = answer.reason
    draft.emit_facts(kind, None, facts)
    return Change(instance=draft.instance, events=tuple(draft.events), answer=answer)
