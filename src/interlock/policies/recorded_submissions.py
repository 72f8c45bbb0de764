"""One recorded submission: what it met when it came, and what a policy would have answered to it.

All that the rules could see was recorded. `judge_again` judges by it as `core.admission.admit` judges by an instance; a
property test holds the two together. Whole histories are judged in `replaying`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

from interlock.core.operations import BIT, CATALOGUE, Lane
from interlock.core.policy import GONE, QUEUE_FULL, Before, CompiledPolicy, Rule, Verdict, View
from interlock.core.states import EXECUTING_STATES, NO_TASK, VmState

_STATE_BITS: Final = sum(BIT[entry.operation] for entry in CATALOGUE.values() if entry.lane is Lane.STATE)
_NOT_PERFORMED: Final = "not-performed"
"""The rule that stands for what a server's hypervisor cannot do. No policy changes that."""


class Answer(msgspec.Struct, frozen=True, gc=False):
    """What became of a submission, or would have."""

    disposition: str
    """`admitted`, `redundant`, `denied` or `held`."""
    rule: str
    reason: str | None = None
    """The code that the caller sees; None if it was admitted."""


class Untold(StrEnum):
    """Why history does not tell what would have been answered."""

    FORESEEN_NOT_RECORDED = "foreseen_not_recorded"
    """It would wait behind something, and the event, of an older version, does not say where that leads."""
    EARLIER_NOT_KNOWN = "earlier_not_known"
    """It would preempt, and the same is outstanding already: whether that had preempted too is not recorded."""
    LAUNCHED_NOT_RECORDED = "launched_not_recorded"
    """The answer depends on whether the instance had ever run, and the event, of an older version, does not say so."""


class Foreseen(msgspec.Struct, frozen=True, gc=False):
    """Where everything outstanding would have led."""

    vm_state: VmState
    launched: bool = True


class Met(msgspec.Struct, frozen=True, gc=False):
    """What a submission met when it came, and what became of it."""

    view: View
    recorded: Answer
    foreseen: Foreseen | None = None
    """None if nothing was outstanding, or if that was not recorded."""
    waiting: int | None = None
    """How many requests were outstanding; None as for `foreseen`."""
    launched_recorded: bool = True


def judge_again(met: Met, policy: CompiledPolicy) -> Answer | Untold:
    """What `policy` would have answered, as `admit` answers."""
    if met.recorded.rule == _NOT_PERFORMED:
        return met.recorded
    if met.launched_recorded or met.view.vm_state in EXECUTING_STATES:
        return _judge(met, met.view, policy)
    answers = {_judge(met, msgspec.structs.replace(met.view, launched=launched), policy) for launched in (False, True)}
    return answers.pop() if len(answers) == 1 else Untold.LAUNCHED_NOT_RECORDED


def _judge(met: Met, view: View, policy: CompiledPolicy) -> Answer | Untold:
    rule = GONE if view.vm_state is VmState.DELETED else policy.decide(view)
    match rule.verdict:
        case Verdict.DENY:
            return _denied(met, rule)
        case Verdict.REDUNDANT:
            return _redundant(rule)
        case Verdict.AFTER if view.age_ms(rule.measured_from) < (rule.threshold_ms or 0):
            return _redundant(rule) if rule.before is Before.REDUNDANT else _denied(met, rule)
        case Verdict.PREEMPT if CATALOGUE[view.operation].lane is not Lane.RECORD:
            return _preempting(met, view, rule)
        case Verdict.ADMIT if CATALOGUE[view.operation].lane is not Lane.RECORD and view.outstanding:
            return _in_turn(met, view, rule, policy)
        case _:
            return Answer("admitted", rule.id)


def _denied(met: Met, rule: Rule) -> Answer:
    """Refused; or held, where it was held: it asked for that, and another refusal holds it as well."""
    held = met.recorded.disposition == "held" and rule is not GONE
    return Answer("held" if held else "denied", rule.id, rule.code)


def _redundant(rule: Rule) -> Answer:
    return Answer("redundant", rule.id, rule.reason or "already")


def _preempting(met: Met, view: View, rule: Rule) -> Answer | Untold:
    """The same preempting request twice is redundant while the first waits, which the view does not show.

    Where the very rule was asked then, its answer is what was recorded.
    """
    if not view.outstanding & BIT[view.operation]:
        return Answer("admitted", rule.id)
    if met.recorded.rule == rule.id and met.recorded.disposition == "admitted":
        return Answer("admitted", rule.id)
    if met.recorded.rule == rule.id and met.recorded.disposition == "redundant":
        return _redundant(rule)
    return Untold.EARLIER_NOT_KNOWN


def _in_turn(met: Met, view: View, rule: Rule, policy: CompiledPolicy) -> Answer | Untold:
    """Admitted behind something: if there is room, and it is permitted where that leads."""
    room = _has_room(met, view, policy)
    if room is False:
        return _denied(met, QUEUE_FULL)
    if rule.in_turn and view.outstanding & _STATE_BITS:
        there = met.foreseen
        if there is None:
            return Untold.FORESEEN_NOT_RECORDED
        settled = View(
            view.operation,
            there.vm_state,
            NO_TASK,
            role=view.role,
            tags=view.tags,
            hard=view.hard,
            launched=there.launched,
        )
        then = GONE if there.vm_state is VmState.DELETED else policy.decide(settled)
        if then.verdict is Verdict.REDUNDANT:
            return _redundant(then)
        if then.verdict is not Verdict.ADMIT and then.verdict is not Verdict.PREEMPT:
            return _denied(met, then)
    return Untold.FORESEEN_NOT_RECORDED if room is None else Answer("admitted", rule.id)


def _has_room(met: Met, view: View, policy: CompiledPolicy) -> bool | None:
    """Whether one more may be outstanding; None if how many were is not recorded, and could have been too many."""
    if met.waiting is not None:
        return met.waiting < policy.outstanding_max
    # Each kind stands for at least one request.
    return False if view.outstanding.bit_count() >= policy.outstanding_max else None
