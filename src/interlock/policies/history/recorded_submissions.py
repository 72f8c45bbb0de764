"""Recorded submissions: the recorded view and answer of one, and the answer of another policy.

Everything that rules can see is recorded. `judge_again` decides from it as `core.admission.admit` decides from an
instance; a property test compares the two.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, assert_never

import msgspec

from interlock.core import views
from interlock.core.operations import BIT, CATALOGUE, Lane, Operation
from interlock.core.policy import GONE, QUEUE_FULL, TO_BE_DELETED, Before, CompiledPolicy, Rule, Verdict
from interlock.core.preconditions import RULE
from interlock.core.record_operations import MAY_CHANGE_NOTHING
from interlock.core.states import EXECUTING_STATES, PowerState, VmState
from interlock.core.views import View

_STATE_BITS: Final = sum(BIT[entry.operation] for entry in CATALOGUE.values() if entry.lane is Lane.STATE)
_NOT_PERFORMED: Final = "not-performed"
"""The rule for operations that the hypervisor cannot perform, under any policy."""


class RecordedAnswer(msgspec.Struct, frozen=True, gc=False):
    """The answer to a submission."""

    disposition: str
    """`admitted`, `redundant`, `denied` or `held`."""
    rule: str
    reason: str | None = None
    """The code that the caller sees; None if it was admitted."""


class Untold(StrEnum):
    """Why the answer cannot be determined from the history."""

    FORESEEN_NOT_RECORDED = "foreseen_not_recorded"
    """It would be queued, and the event, of an older version, has no foreseen state."""
    EARLIER_NOT_KNOWN = "earlier_not_known"
    """It would preempt, and the same is outstanding: whether that had preempted too is not recorded."""
    LAUNCHED_NOT_RECORDED = "launched_not_recorded"
    """The answer depends on `launched`, which the event, of an older version, does not have."""
    UNCHANGED_NOT_RECORDED = "unchanged_not_recorded"
    """It would be admitted if it changes anything, and the event, of an older version, does not say whether it does."""


class Foreseen(msgspec.Struct, frozen=True, gc=False):
    """The foreseen state."""

    vm_state: VmState
    launched: bool = True
    host_reachable: bool = True
    power_state: PowerState | None = None
    """None in events of older versions, as for `moved`: what belongs to the vm_state."""
    moved: bool | None = None
    """Whether the state changes before it change the vm_state."""

    def view(self, view: View) -> View:
        """Return the view in this state, from the one at the submission."""
        state = views.Foreseen(self.vm_state, (), self.launched, self.host_reachable, view.tags)
        moved = self.vm_state is not view.vm_state if self.moved is None else self.moved
        return msgspec.structs.replace(
            state.view(view),
            power_state=self.power_state or state.power_state,
            age_ms=view.age_ms,
            in_state_ms=0 if moved else view.in_state_ms,
            failures=0 if view.outstanding & _STATE_BITS & BIT[view.operation] else view.failures,
        )


class Met(msgspec.Struct, frozen=True, gc=False):
    """A recorded submission: its view and its answer."""

    view: View
    recorded: RecordedAnswer
    foreseen: Foreseen | None = None
    """None if nothing was outstanding, or if it was not recorded."""
    waiting: int | None = None
    """How many requests were outstanding; None as for `foreseen`."""
    launched_recorded: bool = True
    unchanged: bool | None = None
    """Whether what an operation of `MAY_CHANGE_NOTHING` sets held already; None if it was not recorded."""


def judge_again(met: Met, policy: CompiledPolicy) -> RecordedAnswer | Untold:
    """Return what `policy` would have answered, as `admit` does."""
    if met.recorded.rule == _NOT_PERFORMED:
        return met.recorded
    answer = _by_policy(met, policy)
    if met.recorded.rule == RULE and isinstance(answer, RecordedAnswer) and answer.disposition == "admitted":
        # A required parameter or resource was missing, which does not depend on the policy.
        return met.recorded
    return answer


def _by_policy(met: Met, policy: CompiledPolicy) -> RecordedAnswer | Untold:
    if met.launched_recorded or met.view.vm_state in EXECUTING_STATES:
        return _judge(met, met.view, policy)
    answers = {_judge(met, msgspec.structs.replace(met.view, launched=launched), policy) for launched in (False, True)}
    return answers.pop() if len(answers) == 1 else Untold.LAUNCHED_NOT_RECORDED


def _judge(met: Met, view: View, policy: CompiledPolicy) -> RecordedAnswer | Untold:
    rule = GONE if view.vm_state is VmState.DELETED else policy.decide(view)
    match rule.verdict:
        case Verdict.DENY:
            return _denied(met, rule)
        case Verdict.REDUNDANT:
            return _redundant(rule)
        case Verdict.AFTER:
            if rule.until_threshold_ms(view) > 0:
                return _redundant(rule) if rule.before is Before.REDUNDANT else _denied(met, rule)
        case Verdict.PREEMPT:
            if CATALOGUE[view.operation].lane is not Lane.RECORD:
                return _preempting(met, view, rule)
        case Verdict.ADMIT:
            if CATALOGUE[view.operation].lane is not Lane.RECORD and view.outstanding:
                return _in_turn(met, view, rule, policy)
        case _:
            assert_never(rule.verdict)
    return _on_record(met, view, rule) if view.operation in MAY_CHANGE_NOTHING else RecordedAnswer("admitted", rule.id)


def _on_record(met: Met, view: View, rule: Rule) -> RecordedAnswer | Untold:
    """Decide an operation that is redundant if it changes nothing."""
    unchanged = met.unchanged
    if met.recorded.disposition == "admitted" or met.recorded.rule == RULE:
        unchanged = False  # it did change something, or `judge_again` returns what was recorded
    elif unchanged is None and view.operation is Operation.LOCK and (view.locked_above or not view.locked):
        unchanged = view.locked_above
    if unchanged is None:
        return Untold.UNCHANGED_NOT_RECORDED
    return RecordedAnswer("redundant", RULE, "unchanged") if unchanged else RecordedAnswer("admitted", rule.id)


def _denied(met: Met, rule: Rule) -> RecordedAnswer:
    """Return denied; or held, if it was held then: its hold applies to any denial."""
    held = met.recorded.disposition == "held" and rule not in (GONE, TO_BE_DELETED)
    return RecordedAnswer("held" if held else "denied", rule.id, rule.code)


def _redundant(rule: Rule) -> RecordedAnswer:
    return RecordedAnswer("redundant", rule.id, rule.reason or "already")


def _preempting(met: Met, view: View, rule: Rule) -> RecordedAnswer | Untold:
    """Decide a preempting request: a repeated one is redundant while the first is queued, which the view does not show.

    If the same rule decided then, its recorded answer holds.
    """
    if not view.outstanding & BIT[view.operation]:
        return RecordedAnswer("admitted", rule.id)
    if met.recorded.rule == rule.id and met.recorded.disposition == "admitted":
        return RecordedAnswer("admitted", rule.id)
    if met.recorded.rule == rule.id and met.recorded.disposition == "redundant":
        return _redundant(rule)
    return Untold.EARLIER_NOT_KNOWN


def _in_turn(met: Met, view: View, rule: Rule, policy: CompiledPolicy) -> RecordedAnswer | Untold:
    """Decide a queued request: admitted if the queue has room and the foreseen state permits it."""
    room = _has_room(met, view, policy)
    if room is False:
        return _denied(met, QUEUE_FULL)
    if rule.in_turn and view.outstanding & _STATE_BITS:
        there = met.foreseen
        if there is None:
            return Untold.FORESEEN_NOT_RECORDED
        then = TO_BE_DELETED if there.vm_state is VmState.DELETED else policy.decide(there.view(view))
        if then.verdict is Verdict.REDUNDANT:
            return _redundant(then)
        if then.verdict is not Verdict.ADMIT and then.verdict is not Verdict.PREEMPT:
            return _denied(met, then)
    return Untold.FORESEEN_NOT_RECORDED if room is None else RecordedAnswer("admitted", rule.id)


def _has_room(met: Met, view: View, policy: CompiledPolicy) -> bool | None:
    """Return whether the queue has room; None if it is unknown."""
    if met.waiting is not None:
        return met.waiting < policy.outstanding_max
    # Each operation in the mask stands for at least one request.
    return False if view.outstanding.bit_count() >= policy.outstanding_max else None
