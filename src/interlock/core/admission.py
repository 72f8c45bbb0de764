"""The gate: what becomes of one submission.

`admit` is the only way in. What the policy's verdicts mean is here, once; which verdict a submission gets is the
policy's, and what happens to a request afterwards is in `lifecycle`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from interlock.core import restarting
from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.policy import GONE, NOT_PERFORMED, QUEUE_FULL, Before, CompiledPolicy, Rule, Verdict, View
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
    Foreseen,
    at_present,
    foresee,
    judge_again,
    judge_in,
    kinds,
    permits,
    replace,
)
from interlock.core.states import NO_TASK, VmState


def look(instance: Instance, submission: Submission, now_ms: int) -> View:
    """What the rules see of a submission. Ages never come out negative, so a clock that jumps back only delays."""
    serving = task_state = None
    outstanding = 0
    if instance.outstanding:
        serving = instance.served(Lane.STATE) or instance.served(Lane.COMPONENT)
        task_state, outstanding = instance.task_state, kinds(instance.outstanding)
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
        instance.launched,
        kinds(instance.held) if instance.held else 0,
    )


def judge(instance: Instance, submission: Submission, policy: CompiledPolicy, now_ms: int) -> Disposition:
    """The disposition that `admit` would give, without admitting."""
    return admit(instance, submission, policy, now_ms).answer


def admit(instance: Instance, submission: Submission, policy: CompiledPolicy, now_ms: int) -> Change[Disposition]:
    """Judge a submission, and keep it if it is admitted, or held.

    The answer is one of the four dispositions. Every submission is told as an event with what it was judged on, so
    that the history can be judged again by another policy.
    """
    view = look(instance, submission, now_ms)
    asked = _Asked(Draft(instance, now_ms), view, submission, policy)
    rule = GONE if view.vm_state is VmState.DELETED else policy.decide(view)
    verdict = rule.verdict
    if verdict is Verdict.AFTER and view.age_ms(rule.measured_from) < (rule.threshold_ms or 0):
        return _too_early(asked, rule)
    if verdict is Verdict.DENY:
        return _deny(asked, rule)
    if verdict is Verdict.REDUNDANT:
        change = _redundant(asked, rule, _latest(instance, submission.operation))
        return _stay_down(asked, change) if submission.operation is Operation.STOP else change
    if CATALOGUE[submission.operation].lane is Lane.RECORD:
        return _record(asked, rule)
    if verdict is Verdict.PREEMPT and (waiting := _preempting(instance, view)) is not None:
        return _redundant(asked, rule, waiting)
    if verdict is Verdict.ADMIT:
        if len(instance.outstanding) >= policy.outstanding_max:
            return _deny(asked, QUEUE_FULL)
        if rule.in_turn and instance.outstanding:
            refused = _judge_foreseen(asked)
            if refused is not None:
                return refused
    return _keep(asked, rule)


class _Asked(NamedTuple):
    """One submission while it is judged."""

    draft: Draft
    view: View
    submission: Submission
    policy: CompiledPolicy

    def request(self, rule: Rule) -> Request:
        submission = self.submission
        return Request(
            id=submission.request_id,
            instance_id=self.draft.instance.id,
            operation=submission.operation,
            parameters=submission.parameters,
            requested_by=submission.requested_by,
            role=submission.role,
            rule=rule.id,
            admitted_at_ms=self.draft.now_ms,
            in_turn=rule.in_turn,
        )

    def facts(self, rule: Rule) -> dict[str, Any]:
        """What it was judged on, complete enough to judge it again by another policy."""
        instance = self.draft.instance
        facts: dict[str, Any] = {
            "operation": self.view.operation.value,
            "parameters": self.submission.parameters,
            "by": self.submission.requested_by,
            "rule": rule.id,
            "policy": self.policy.stamp,
            "view": msgspec.structs.asdict(self.view),
        }
        if instance.outstanding:
            there = foresee(instance)
            facts["foreseen"] = {"vm_state": there.vm_state.value, "launched": there.launched}
            facts["waiting"] = len(instance.outstanding)
        return facts


def _judge_foreseen(asked: _Asked) -> Change[Disposition] | None:
    """The refusal in the foreseen state, or None if it is permitted there too (law 2)."""
    instance = asked.draft.instance
    blocker = _last_state_change(instance)
    if blocker is None:
        return None
    there = foresee(instance)
    rule = judge_in(asked.policy, asked.request(NOT_KEPT), there, instance.tags)
    if permits(rule):
        return None
    if rule.verdict is Verdict.REDUNDANT:
        return _redundant(asked, rule, _brings_about(instance, there) or blocker)
    return _deny(asked, rule, foreseen=there.vm_state, blocked_by=blocker)


def _brings_about(instance: Instance, foreseen: Foreseen) -> Request | None:
    """The last outstanding request that leads to the foreseen state from another; None if it holds already."""
    there = at_present(instance)
    found = None
    for request in instance.outstanding:
        if request.lane is Lane.STATE:
            before, there = there.vm_state, there.after(request.operation)
            if there.vm_state is foreseen.vm_state and before is not foreseen.vm_state:
                found = request
    return found


def _keep(asked: _Asked, rule: Rule) -> Change[Disposition]:
    draft = asked.draft
    facts = asked.facts(rule)
    request = asked.request(rule)
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
        cancels = judge_again(draft, asked.policy)
    draft.tell("request.admitted", request.id, **facts, supersedes=supersedes, cancels=cancels)
    return draft.change(
        Admitted(request=request, rule=rule.id, because=rule.because, supersedes=supersedes, cancels=cancels)
    )


def _ask_to_stop(draft: Draft, by: str, grace_ms: int) -> tuple[str, ...]:
    """Ask every worker of the instance to stop half-way; the ids of what they serve."""
    stopping = []
    for request in draft.instance.outstanding:
        if request.status in SERVED:
            deadline = draft.now_ms + grace_ms
            if request.interrupt_deadline_ms is not None:
                deadline = min(deadline, request.interrupt_deadline_ms)
            draft.put(
                replace(request, interrupt_at_ms=draft.now_ms, interrupt_deadline_ms=deadline, interrupted_for=by)
            )
            draft.tell("request.interrupting", request.id, by=by, deadline_ms=deadline)
            stopping.append(request.id)
    return tuple(stopping)


def _record(asked: _Asked, rule: Rule) -> Change[Disposition]:
    """Carry out an operation that changes only the record: it is done when it is admitted."""
    draft, submission = asked.draft, asked.submission
    instance = draft.instance
    request = asked.request(rule)
    supersedes: tuple[str, ...] = ()
    cancels: tuple[str, ...] = ()
    draft.tell("request.admitted", request.id, **asked.facts(rule))
    match submission.operation:
        case Operation.LOCK:
            draft.instance = replace(instance, locked_by=submission.requested_by)
        case Operation.UNLOCK:
            draft.instance = replace(instance, locked_by=None)
        case Operation.SET_METADATA:
            draft.instance = replace(instance, metadata=_noted(instance.metadata, submission.parameters))
        case Operation.LIVE_MIGRATE_ABORT | Operation.LIVE_MIGRATE_FORCE_COMPLETE:
            _tell_migration(draft, submission)
        case _:
            supersedes = draft.fence_off(request.id, f"The state was reset by {submission.requested_by}.")
            target = VmState(submission.parameters.get("vm_state", VmState.ERROR))
            message = str(submission.parameters.get("reason", "reset")) if target is VmState.ERROR else None
            there = draft.instance.come_to(target, instance.memory)
            draft.instance = replace(restarting.called_off(there), error=message)
            draft.alive()
            draft.tell("instance.state", request.id, vm_state=target.value, before=instance.vm_state.value)
            cancels = judge_again(draft, asked.policy)
    draft.end(request, Status.SUCCEEDED)
    kept = draft.requests[request.id]
    return draft.change(
        Admitted(request=kept, rule=rule.id, because=rule.because, supersedes=supersedes, cancels=cancels)
    )


def _tell_migration(draft: Draft, submission: Submission) -> None:
    """Ask the live migration in flight to stop, or to end whatever that costs; without one, nothing happens."""
    migration = draft.instance.served(Lane.STATE)
    if migration is None or migration.operation is not Operation.LIVE_MIGRATE:
        return
    if submission.operation is Operation.LIVE_MIGRATE_ABORT:
        draft.put(replace(migration, interrupt_at_ms=draft.now_ms))
        draft.tell("request.interrupting", migration.id, by=submission.requested_by)
    else:
        draft.put(replace(migration, parameters={**migration.parameters, "force_complete": True}))


def _noted(metadata: dict[str, str], parameters: dict[str, Any]) -> dict[str, str]:
    removed = frozenset(parameters.get("remove", ()))
    return {key: value for key, value in {**metadata, **parameters.get("set", {})}.items() if key not in removed}


def _too_early(asked: _Asked, rule: Rule) -> Change[Disposition]:
    draft, view = asked.draft, asked.view
    allowed_at_ms = draft.now_ms - view.age_ms(rule.measured_from) + (rule.threshold_ms or 0)
    if rule.before is Before.REDUNDANT:
        earlier = _latest(draft.instance, view.operation)
        return _redundant(asked, rule, earlier, allowed_at_ms)
    return _deny(asked, rule, allowed_at_ms=allowed_at_ms)


def _deny(
    asked: _Asked,
    rule: Rule,
    *,
    foreseen: VmState | None = None,
    blocked_by: Request | None = None,
    allowed_at_ms: int | None = None,
) -> Change[Disposition]:
    instance = asked.draft.instance
    answer = Denied(
        operation=asked.submission.operation,
        reason=rule.code,
        rule=rule.id,
        because=rule.because,
        vm_state=foreseen or instance.vm_state,
        foreseen=foreseen is not None,
        blocked_by=blocked_by or _blocker(instance, rule),
        allowed_at_ms=allowed_at_ms,
    )
    hold_ms = asked.submission.hold_ms
    hopeless = rule is GONE or rule.id == NOT_PERFORMED
    if hold_ms is not None and not hopeless and len(instance.held) < asked.policy.outstanding_max:
        return _hold(asked, rule, answer, hold_ms)
    return _unchanged(asked, "request.denied", rule, answer)


def _hold(asked: _Asked, rule: Rule, denied: Denied, hold_ms: int) -> Change[Disposition]:
    """Keep what was refused, until the policy admits it (see `lifecycle.expire`) or its time is over."""
    draft = asked.draft
    until_ms = draft.now_ms + hold_ms
    request = replace(asked.request(rule), status=Status.HELD, held_until_ms=until_ms)
    draft.requests[request.id] = request
    draft.instance = replace(draft.instance, held=(*draft.instance.held, request))
    draft.tell("request.held", request.id, **asked.facts(rule), reason=denied.reason, until_ms=until_ms)
    return draft.change(Held(request=request, denied=denied))


def _redundant(
    asked: _Asked, rule: Rule, earlier: Request | None, allowed_at_ms: int | None = None
) -> Change[Disposition]:
    answer = Redundant(
        rule=rule.id,
        # An `after` rule that answers so before its threshold has a code of its own for the takeover.
        reason=rule.reason or "already",
        because=rule.because,
        request=earlier,
        allowed_at_ms=allowed_at_ms,
    )
    return _unchanged(asked, "request.redundant", rule, answer)


def _stay_down(asked: _Asked, change: Change[Disposition]) -> Change[Disposition]:
    """A stop of what is stopped changes nothing, except that it is not restarted any more if that was due."""
    instance = change.instance
    staying = restarting.called_off(instance)
    if staying is instance or asked.submission.requested_by == restarting.UPKEEP:
        return change
    after = instance.generation + 1
    events = tuple(replace(event, generation=after) for event in change.events)
    return replace(change, instance=replace(staying, generation=after), events=events)


def _unchanged(asked: _Asked, kind: str, rule: Rule, answer: Denied | Redundant) -> Change[Disposition]:
    """A submission that changes nothing is still told, and leaves the generation as it was."""
    draft = asked.draft
    draft.generation = draft.instance.generation
    draft.tell(kind, None, **asked.facts(rule), reason=answer.reason)
    return Change(instance=draft.instance, events=tuple(draft.events), answer=answer)


NOT_KEPT = QUEUE_FULL
"""Stands for the rule of a request that is built only to be judged."""


def _latest(instance: Instance, operation: Operation) -> Request | None:
    known = (*instance.held, *instance.outstanding)
    return next((request for request in reversed(known) if request.operation is operation), None)


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
