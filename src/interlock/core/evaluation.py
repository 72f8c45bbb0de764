"""Evaluation of one submission: what it is judged by, and what follows from the policy's verdict.

`admission` applies what follows, and records it.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

from interlock.core.errors import Invalid
from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.policy import GONE, QUEUE_FULL, CompiledPolicy, Rule, Verdict
from interlock.core.preconditions import unmet
from interlock.core.record_operations import MAY_CHANGE_NOTHING, RECORD_OPERATIONS, changes_nothing, reset_target
from interlock.core.records import Instance, Request, Submission
from interlock.core.request_queue import (
    Draft,
    cause_of,
    foresee,
    judge_in,
    last_state_change,
    latest_of,
    permits,
    preempting,
)
from interlock.core.states import VmState
from interlock.core.views import View, build_view, recorded


def would_admit(instance: Instance, submission: Submission, policy: CompiledPolicy, now_ms: int) -> bool:
    """Whether `admit` would admit a submission; quicker, since it builds neither the answer nor the record of it."""
    evaluation = evaluate(instance, submission, policy, now_ms)
    effect = ruling_on(evaluation).effect
    if effect is not Effect.ENQUEUE and effect is not Effect.RECORD:
        return False
    operation = submission.operation
    if unmet(instance, operation, submission.parameters, submission.facts) is not None:
        return False
    return effect is Effect.ENQUEUE or RECORD_OPERATIONS[operation].holds_already(instance, submission) is None


class Evaluation(NamedTuple):
    """One submission during its evaluation."""

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
            project=submission.project,
            groups=submission.groups,
            windows=submission.windows,
            image=submission.image,
            approver=submission.approver,
            approvals=submission.approvals,
            project_outstanding=submission.project_outstanding,
            host_outstanding=submission.host_outstanding,
            rule=rule.id,
            admitted_at_ms=self.draft.now_ms,
            in_turn=rule.in_turn,
            served_at_most_ms=self.policy.limit_ms(rule, submission.operation),
        )

    def facts(self, rule: Rule) -> dict[str, Any]:
        """Return the facts of the evaluation, complete enough to replay it against another policy."""
        instance = self.draft.instance
        facts: dict[str, Any] = {
            "operation": self.view.operation.value,
            "parameters": self.submission.parameters,
            "by": self.submission.requested_by,
            "rule": rule.id,
            "policy": self.policy.stamp,
            "view": recorded(self.view),
        }
        if instance.outstanding:
            facts["foreseen"] = foresee(instance, host_reachable=self.submission.host_reachable).recorded()
            facts["waiting"] = len(instance.outstanding)
        if self.view.operation in MAY_CHANGE_NOTHING:
            facts["unchanged"] = self.view.operation in changes_nothing(instance, self.submission)
        return facts


class Effect(enum.Enum):
    """What follows from the policy's verdict on one submission, before its preconditions are looked at."""

    WAIT = enum.auto()
    """It is not admitted before a threshold has passed."""
    DENY = enum.auto()
    REDUNDANT = enum.auto()
    RECORD = enum.auto()
    """It changes the record, at once."""
    ENQUEUE = enum.auto()


class Ruling(NamedTuple):
    effect: Effect
    rule: Rule
    about: Request | None = None
    """The outstanding request because of which it is denied or redundant."""
    foreseen: VmState | None = None
    """The vm_state after what is outstanding, if that decided, and not the present one."""


_NOT_KEPT = QUEUE_FULL
"""Placeholder rule of a request that is built only for its evaluation."""


def evaluate(instance: Instance, submission: Submission, policy: CompiledPolicy, now_ms: int) -> Evaluation:
    for request in (*instance.outstanding, *instance.held):
        if request.id == submission.request_id:
            raise Invalid(
                f"The request id {submission.request_id!r} is that of an outstanding request.",
                remedy="Use a new id for each submission.",
            )
    if submission.operation is Operation.RESET_STATE:
        reset_target(submission.parameters)
    submission = policy.timed(submission, now_ms)
    draft = Draft(instance, now_ms, host_reachable=submission.host_reachable)
    return Evaluation(draft, build_view(instance, submission, now_ms), submission, policy)


def ruling_on(evaluation: Evaluation) -> Ruling:
    instance, view, policy = evaluation.draft.instance, evaluation.view, evaluation.policy
    rule = GONE if view.vm_state is VmState.DELETED else policy.decide(view)
    verdict = rule.verdict
    if verdict is Verdict.AFTER and rule.until_threshold_ms(view) > 0:
        return Ruling(Effect.WAIT, rule)
    if verdict is Verdict.DENY:
        return Ruling(Effect.DENY, rule)
    if verdict is Verdict.REDUNDANT:
        return Ruling(Effect.REDUNDANT, rule, latest_of(instance, view.operation))
    if CATALOGUE[view.operation].lane is Lane.RECORD:
        return Ruling(Effect.RECORD, rule)
    if verdict is Verdict.PREEMPT and (waiting := preempting(instance, view)) is not None:
        return Ruling(Effect.REDUNDANT, rule, waiting)
    if verdict is Verdict.ADMIT:
        if len(instance.outstanding) >= policy.outstanding_max:
            return Ruling(Effect.DENY, QUEUE_FULL)
        if rule.in_turn and instance.outstanding:
            return _foreseen_ruling(evaluation) or Ruling(Effect.ENQUEUE, rule)
    return Ruling(Effect.ENQUEUE, rule)


def _foreseen_ruling(evaluation: Evaluation) -> Ruling | None:
    """Return what refuses it in the foreseen state; None if it is permitted there too (law 2)."""
    instance = evaluation.draft.instance
    blocker = last_state_change(instance)
    if blocker is None:
        return None
    foreseen = foresee(instance, host_reachable=evaluation.submission.host_reachable)
    rule = judge_in(evaluation.policy, evaluation.request(_NOT_KEPT), foreseen)
    if permits(rule):
        return None
    if rule.verdict is Verdict.REDUNDANT:
        return Ruling(Effect.REDUNDANT, rule, cause_of(foreseen, instance) or blocker, foreseen.vm_state)
    return Ruling(Effect.DENY, rule, blocker, foreseen.vm_state)
