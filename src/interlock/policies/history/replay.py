"""Replay recorded history under another policy: judge every submission again, and count the differences.

Everything that rules can see is recorded. `judge_again` decides from it as `core.admission.admit` decides from an
instance; a property test compares the two.

Consequences of another answer are not replayed: every submission meets the state that was recorded. One that was held
and admitted later is judged at both times. Whether a denied one would have been held is unknown, unless it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeVar, assert_never, cast

import msgspec

from interlock.core import views
from interlock.core.operations import BIT, CATALOGUE, Lane, Operation
from interlock.core.policy import GONE, QUEUE_FULL, TO_BE_DELETED, Before, CompiledPolicy, Rule, Verdict
from interlock.core.preconditions import RULE
from interlock.core.record_operations import MAY_CHANGE_NOTHING
from interlock.core.states import EXECUTING_STATES, PowerState, VmState
from interlock.core.time_windows import Calendar
from interlock.core.views import View
from interlock.policies.time_windows import calendar

_KeyT = TypeVar("_KeyT")

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


RecordedRow = tuple[int, int, str, str, int, str]
"""A recorded submission: sequence number, instance number, project, event kind, time in ms, and data as JSON."""

DISPOSITIONS: Final = {
    "request.admitted": "admitted",
    "request.redundant": "redundant",
    "request.denied": "denied",
    "request.held": "held",
}
"""The events of submissions, and the disposition of each."""

_DAY_MS: Final = 86_400_000
_REMEMBERED_MAX: Final = 200_000
"""The size of the cache of answers to distinct submissions."""


class Totals(msgspec.Struct):
    """Counts of submissions by the difference of their answers."""

    submissions: int = 0
    same: int = 0
    """The same disposition, for the same reason."""
    other_reason: int = 0
    """The same disposition, for another reason."""
    admitted: int = 0
    """Admitted, which it was not."""
    refused: int = 0
    """Refused, which it was not."""
    redundant: int = 0
    """Redundant, which it was not."""
    cannot_be_told: int = 0


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """The first of several submissions with the same answer."""

    sequence: int
    instance: str
    project: str
    at_ms: int


class ReplayDifference(msgspec.Struct, frozen=True, kw_only=True):
    """Submissions of one operation that one rule decided then, and another would now."""

    operation: str
    effect: str
    """`admitted`, `refused`, `redundant` or `other_reason`, as in `Totals`."""
    recorded: RecordedAnswer
    candidate: RecordedAnswer
    submissions: int
    projects: dict[str, int]
    """How many of each project, the most first."""
    example: Example


class Stamp(msgspec.Struct, frozen=True, gc=False):
    """A policy as recorded in a decision."""

    name: str = ""
    digest: str = ""


class Decided(msgspec.Struct, frozen=True, kw_only=True):
    """How many submissions a policy had decided."""

    name: str
    digest: str
    submissions: int


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a replay."""

    policy: str
    digest: str
    """As recorded in decisions."""
    decided_by: tuple[Decided, ...]
    """The policies that had decided, the most used first; with an empty name where it was not recorded."""
    first_at_ms: int | None
    last_at_ms: int | None
    totals: Totals
    untold: dict[str, int]
    """The number of submissions whose new answer is unknown, by reason (see `Untold`)."""
    unreadable: int
    """Events that cannot be parsed as submissions. Not part of the totals."""
    operations: dict[str, Totals]
    projects: dict[str, Totals]
    differences: tuple[ReplayDifference, ...]
    """The most submissions first."""


def replay(rows: Iterable[RecordedRow], policy: CompiledPolicy, instance_of: Callable[[int], str] = str) -> Replay:
    """Judge recorded submissions by `policy`. `instance_of` maps an instance's number to its id.

    Streams: no row is kept.
    """
    replaying = _Replaying(policy)
    for row in rows:
        replaying.add(row)
    return replaying.result(instance_of)


if TYPE_CHECKING:
    RecordedView = View
else:
    RecordedView = msgspec.defstruct(
        "RecordedView", [("launched", bool | None, None)], bases=(View,), frozen=True, kw_only=True, gc=False
    )
    """A view as recorded: `launched` is None in events of older versions."""


class _Facts(msgspec.Struct, gc=False):
    rule: str
    view: RecordedView
    reason: str | None = None
    foreseen: Foreseen | None = None
    waiting: int | None = None
    unchanged: bool | None = None
    policy: Stamp = Stamp()


_decode: Final = msgspec.json.Decoder(_Facts).decode


class _Tally:
    """Submissions with the same recorded and the same new answer."""

    __slots__ = ("answer", "example", "operation", "projects", "recorded")

    def __init__(
        self, operation: str, recorded: RecordedAnswer, answer: RecordedAnswer | Untold, row: RecordedRow
    ) -> None:
        self.operation = operation
        self.recorded = recorded
        self.answer = answer
        self.example = row
        self.projects: dict[str, int] = {}

    @property
    def effect(self) -> str:
        """The field of `Totals` in which these are counted."""
        if isinstance(self.answer, Untold):
            return "cannot_be_told"
        if self.answer.disposition != self.recorded.disposition:
            return "refused" if self.answer.disposition == "denied" else self.answer.disposition
        return "same" if self.answer.reason == self.recorded.reason else "other_reason"


class _Replaying:
    """One pass over a history. Equal submissions are judged once."""

    def __init__(self, policy: CompiledPolicy) -> None:
        self._policy = policy
        self._class_of = policy.class_of
        self._outstanding_max = policy.outstanding_max
        self._known: dict[tuple[object, ...], _Tally] = {}
        self._tallies: dict[tuple[str, RecordedAnswer, RecordedAnswer | Untold], _Tally] = {}
        self._decided_by: dict[Stamp, int] = {}
        self._unreadable = 0
        self._day: int | None = None
        self._calendar = Calendar({})
        """The policy's time windows around that day."""
        self._first_at_ms: int | None = None
        self._last_at_ms: int | None = None

    def add(self, row: RecordedRow) -> None:
        _sequence, _number, project, kind, at_ms, data = row
        try:
            facts = _decode(data)
        except msgspec.DecodeError:
            self._unreadable += 1
            return
        view, there = self._timed(facts.view, at_ms), facts.foreseen
        key = (
            kind,
            facts.rule,
            facts.reason,
            view.outstanding,
            view.launched,
            self._class_of(view),
            None if facts.waiting is None else facts.waiting < self._outstanding_max,
            there,
            facts.unchanged,
        )
        tally = self._known.get(key)
        if tally is None:
            disposition = DISPOSITIONS[kind]
            recorded = RecordedAnswer(disposition, facts.rule, None if disposition == "admitted" else facts.reason)
            launched = cast("bool | None", view.launched)
            known = msgspec.structs.replace(view, launched=launched is not False)
            met = Met(known, recorded, there, facts.waiting, launched is not None, facts.unchanged)
            tally = self._judge(key, row, met)
        tally.projects[project] = tally.projects.get(project, 0) + 1
        stamp = facts.policy
        self._decided_by[stamp] = self._decided_by.get(stamp, 0) + 1
        if self._first_at_ms is None:
            self._first_at_ms = at_ms
        self._last_at_ms = at_ms

    def _timed(self, view: RecordedView, at_ms: int) -> RecordedView:
        """Return the view with those time windows of the policy that were open then."""
        if not self._policy.windows:
            return view
        day = at_ms // _DAY_MS
        if day != self._day:
            self._day, self._calendar = day, calendar(self._policy.windows, at_ms, 0)
        return msgspec.structs.replace(view, windows=self._calendar.open_at(at_ms))

    def _judge(self, key: tuple[object, ...], row: RecordedRow, met: Met) -> _Tally:
        answer = judge_again(met, self._policy)
        operation = met.view.operation.value
        group = (operation, met.recorded, answer)
        tally = self._tallies.get(group)
        if tally is None:
            tally = self._tallies[group] = _Tally(operation, met.recorded, answer, row)
        if len(self._known) >= _REMEMBERED_MAX:
            self._known.clear()
        self._known[key] = tally
        return tally

    def result(self, instance_of: Callable[[int], str]) -> Replay:
        totals, operations, projects = Totals(), dict[str, Totals](), dict[str, Totals]()
        untold: dict[str, int] = {}
        for tally in self._tallies.values():
            for project, count in tally.projects.items():
                for each in (
                    totals,
                    operations.setdefault(tally.operation, Totals()),
                    projects.setdefault(project, Totals()),
                ):
                    each.submissions += count
                    setattr(each, tally.effect, getattr(each, tally.effect) + count)
            if isinstance(tally.answer, Untold):
                untold[tally.answer.value] = untold.get(tally.answer.value, 0) + sum(tally.projects.values())
        return Replay(
            policy=self._policy.policy.name,
            digest=self._policy.stamp["digest"],
            decided_by=tuple(
                Decided(name=stamp.name, digest=stamp.digest, submissions=count)
                for stamp, count in _most_first(self._decided_by)
            ),
            first_at_ms=self._first_at_ms,
            last_at_ms=self._last_at_ms,
            totals=totals,
            untold=untold,
            unreadable=self._unreadable,
            operations=dict(sorted(operations.items())),
            projects=dict(sorted(projects.items())),
            differences=self._differences(instance_of),
        )

    def _differences(self, instance_of: Callable[[int], str]) -> tuple[ReplayDifference, ...]:
        found = []
        for tally in self._tallies.values():
            if isinstance(tally.answer, Untold) or tally.effect == "same":
                continue
            sequence, number, project, _kind, at_ms, _data = tally.example
            found.append(
                ReplayDifference(
                    operation=tally.operation,
                    effect=tally.effect,
                    recorded=tally.recorded,
                    candidate=tally.answer,
                    submissions=sum(tally.projects.values()),
                    projects=dict(_most_first(tally.projects)),
                    example=Example(sequence=sequence, instance=instance_of(number), project=project, at_ms=at_ms),
                )
            )
        return tuple(sorted(found, key=lambda one: (-one.submissions, one.operation, one.example.sequence)))


def _most_first(counts: dict[_KeyT, int]) -> Sequence[tuple[_KeyT, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])
