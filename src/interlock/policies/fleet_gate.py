"""The gate for a whole fleet at once: which of a million instances would admit which operation now.

It answers as `admission.judge` does, and holds no rule of its own: the rules of a cell are asked of the compiled
policy, and the order of questions is the gate's, kept equal by a test. It is fast because it does not look at instances
but at situations (see `fleet_situations`), of which a fleet has few: an instance's answer is its situation's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from interlock.core.operations import BIT, CATALOGUE, Lane, Operation
from interlock.core.policy import GONE, NO_RULE, QUEUE_FULL, Before, CompiledPolicy, MeasuredFrom, Rule, Verdict
from interlock.core.request_queue import permits
from interlock.core.states import VmState
from interlock.policies.fleet_situations import Marks, Places, Situations, marks, parts, situations, tag_table
from interlock.policies.fleets import NOT_FORESEEN, TASKS, VM_STATE_CODE, VM_STATES, Codes, Flags, Fleet, Numbers, Times

SITUATIONS_AT_ONCE: Final = 65_536
"""How many situations are judged at a time, so that a fleet without two instances alike needs little more memory."""


_CODE: Final = {verdict: code for code, verdict in enumerate(Verdict)}
"""A verdict, as the arrays hold it."""


class Answered(IntEnum):
    """A disposition, as the arrays hold it."""

    ADMITTED = 0
    REDUNDANT = 1
    DENIED = 2


_LEADS_TO: Final = np.array(
    [
        {Verdict.REDUNDANT: Answered.REDUNDANT, Verdict.DENY: Answered.DENIED}.get(verdict, Answered.ADMITTED)
        for verdict in Verdict
    ],
    dtype=np.uint8,
)
"""What each verdict leads to where nothing else is in the way."""


class FleetAnswer(NamedTuple):
    """What one instance answers to one operation."""

    disposition: Answered
    rule: Rule
    reason: str | None
    """The code that a caller would see; None for what is admitted."""
    foreseen: bool
    """Whether the rule decided on the foreseen state."""
    allowed_in_ms: int | None
    """After how long without a sign of life it would take over."""


class FleetAnswers(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What a policy answers to each operation, for each instance of a fleet.

    Kept by situation; the methods that take an operation give one value for each instance.
    """

    operations: tuple[Operation, ...]
    rules: tuple[Rule, ...]
    """What the numbers of rules stand for: the policy's rules as asked, then those of the gate itself."""
    fleet: Fleet
    situation: Places
    """Which situation each instance is in."""
    by_disposition: Codes
    """`Answered`, one row for each operation, one column for each situation, as those that follow."""
    by_rule: Numbers
    by_foreseen: Flags
    by_threshold_ms: Times
    """The threshold of an `after` rule whose time has not come; -1 for any other answer."""

    def dispositions(self, operation: Operation) -> Codes:
        """`Answered` for each instance."""
        found: Codes = self.by_disposition[self._at(operation)].take(self.situation)
        return found

    def deciding(self, operation: Operation) -> Numbers:
        """The place in `rules` of the rule that decided, for each instance."""
        found: Numbers = self.by_rule[self._at(operation)].take(self.situation)
        return found

    def allowed_in_ms(self, operation: Operation) -> Times:
        """After how long without a sign of life each would take over; -1 where time alone changes nothing."""
        at = self._at(operation)
        found = np.full(len(self.situation), -1, dtype=np.int64)
        waits = self.by_threshold_ms[at] >= 0
        if waits.any():
            rows = np.flatnonzero(waits.take(self.situation))
            there = self.situation[rows]
            started = _from_start(self.rules)[self.by_rule[at, there]]
            age = np.where(started, self.fleet.running_ms[rows], self.fleet.silent_ms[rows])
            found[rows] = self.by_threshold_ms[at, there] - age
        return found

    def answer(self, operation: Operation, row: int) -> FleetAnswer:
        """What one instance answers."""
        at, there = self._at(operation), self.situation[row]
        disposition, rule = Answered(self.by_disposition[at, there]), self.rules[self.by_rule[at, there]]
        allowed_in_ms = None
        if (threshold_ms := int(self.by_threshold_ms[at, there])) >= 0:
            aged = self.fleet.silent_ms if rule.measured_from is MeasuredFrom.LAST_PROGRESS else self.fleet.running_ms
            allowed_in_ms = threshold_ms - int(aged[row])
        foreseen = bool(self.by_foreseen[at, there])
        return FleetAnswer(disposition, rule, reason_of(disposition, rule), foreseen, allowed_in_ms)

    def counts(self) -> dict[Operation, dict[Answered, int]]:
        """For each operation, how many instances give which disposition."""
        found, instances = {}, self._instances()
        for operation, codes in zip(self.operations, self.by_disposition, strict=True):
            numbers = np.bincount(codes, weights=instances, minlength=len(Answered))
            found[operation] = {answered: round(numbers[answered]) for answered in Answered}
        return found

    def reasons(self, operation: Operation) -> dict[tuple[Answered, str], int]:
        """How many instances do not admit an operation, by disposition and code; the most frequent first."""
        at = self._at(operation)
        found: dict[tuple[Answered, str], int] = {}
        instances = self._instances()
        pair = self.by_rule[at].astype(np.int64) * len(Answered) + self.by_disposition[at]
        for value in np.unique(pair).tolist():
            number, code = divmod(value, len(Answered))
            reason = reason_of(Answered(code), self.rules[number])
            if reason is not None:
                key = (Answered(code), reason)
                found[key] = found.get(key, 0) + int(instances[pair == value].sum())
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def _at(self, operation: Operation) -> int:
        return self.operations.index(operation)

    def _instances(self) -> Places:
        return np.bincount(self.situation, minlength=self.by_rule.shape[1])


def reason_of(disposition: Answered, rule: Rule) -> str | None:
    """The code that goes with an answer, as `admission` gives it."""
    match disposition:
        case Answered.ADMITTED:
            return None
        case Answered.REDUNDANT:
            return rule.reason or "already"
        case Answered.DENIED:
            return rule.code


def judge_fleet(
    fleet: Fleet,
    policy: CompiledPolicy,
    role: str = "member",
    operations: Iterable[Operation] | None = None,
    *,
    hard: bool = False,
) -> FleetAnswers:
    """What `policy` answers to each operation, or to those named, for each instance. Nothing is changed, or held."""
    return FleetGate(policy).judge(fleet, role, operations, hard=hard)


def which(fleet: Fleet, policy: CompiledPolicy, role: str = "member", *, hard: bool = False) -> dict[Operation, Flags]:
    """For each operation, which instances would admit it now."""
    answers = judge_fleet(fleet, policy, role, hard=hard)
    return {operation: answers.dispositions(operation) == Answered.ADMITTED for operation in answers.operations}


class FleetGate:
    """A policy made ready for fleets: worth keeping for who judges by it more than once."""

    def __init__(self, policy: CompiledPolicy) -> None:
        self.policy = policy
        self.rules = (*policy.rules, NO_RULE, GONE, QUEUE_FULL)
        self.marks: Marks = marks(policy)
        self._numbers = {id(rule): number for number, rule in enumerate(self.rules)}
        self._cells: dict[tuple[Operation, int, int], tuple[int, ...]] = {}
        self.verdict = _by_rule(self.rules, lambda rule: _CODE[rule.verdict], np.uint8)
        self.threshold_ms = _by_rule(self.rules, lambda rule: rule.threshold_ms or 0, np.int64)
        self.from_start = _from_start(self.rules)
        self.redundant_before = _by_rule(self.rules, lambda rule: rule.before is Before.REDUNDANT, np.bool_)
        self.in_turn = _by_rule(self.rules, lambda rule: rule.in_turn, np.bool_)
        self.permits = _by_rule(self.rules, permits, np.bool_)

    def number(self, rule: Rule) -> int:
        """The place of a rule in `rules`."""
        return self._numbers[id(rule)]

    def cell(self, operation: Operation, vm_state: int, task_state: int) -> tuple[int, ...]:
        """The numbers of the rules that are asked there, in order."""
        key = (operation, vm_state, task_state)
        found = self._cells.get(key)
        if found is None:
            asked = self.policy.cell(operation, VM_STATES[vm_state], TASKS[task_state])
            found = self._cells[key] = tuple(self.number(rule) for rule in asked)
        return found

    def judge(
        self,
        fleet: Fleet,
        role: str = "member",
        operations: Iterable[Operation] | None = None,
        *,
        hard: bool = False,
    ) -> FleetAnswers:
        """As `judge_fleet`."""
        asked = tuple(Operation) if operations is None else tuple(operations)
        caller = _Caller(role, hard)
        found = situations(fleet, self.marks)
        count = len(found.rows)
        shape = (len(asked), count)
        answers = FleetAnswers(
            operations=asked,
            rules=self.rules,
            fleet=fleet,
            situation=found.of,
            by_disposition=np.empty(shape, dtype=np.uint8),
            by_rule=np.empty(shape, dtype=np.uint32),
            by_foreseen=np.zeros(shape, dtype=np.bool_),
            by_threshold_ms=np.full(shape, -1, dtype=np.int64),
        )
        for start in range(0, count, SITUATIONS_AT_ONCE):
            part = slice(start, min(count, start + SITUATIONS_AT_ONCE))
            judging = _Judging(self, found.rows.rows(part), caller)
            for at, operation in enumerate(asked):
                decided = judging.decide(operation)
                answers.by_disposition[at, part] = decided.disposition
                answers.by_rule[at, part] = decided.rule
                answers.by_foreseen[at, part] = decided.foreseen
                answers.by_threshold_ms[at, part] = decided.threshold_ms
        return answers


class _Caller(NamedTuple):
    role: str
    hard: bool


class _Decided(NamedTuple):
    """One operation, decided for every row."""

    disposition: Codes
    rule: Numbers
    foreseen: Flags
    threshold_ms: Times


class _Judging:
    """Some situations, while they are judged by the order of questions of `admission.admit`."""

    def __init__(self, gate: FleetGate, rows: Fleet, caller: _Caller) -> None:
        self.gate = gate
        self.rows = rows
        self.caller = caller
        self.asked = _Asked(gate, rows, caller)
        self.gone = rows.vm_state == VM_STATE_CODE[VmState.DELETED]
        self.full = rows.outstanding_count >= gate.policy.outstanding_max
        self.behind = np.flatnonzero(rows.foreseen_vm_state != NOT_FORESEEN)
        self.ahead, self.ahead_of = _ahead(rows.rows(self.behind), gate.marks)
        self.asked_ahead = _Asked(gate, self.ahead, caller)

    def decide(self, operation: Operation) -> _Decided:
        gate, rows = self.gate, self.rows
        rule = self.asked.first(operation)
        rule[self.gone] = gate.number(GONE)
        verdict = gate.verdict[rule]
        disposition = _LEADS_TO[verdict]
        foreseen = np.zeros(len(rows), dtype=np.bool_)
        threshold_ms = np.full(len(rows), -1, dtype=np.int64)
        after = verdict == _CODE[Verdict.AFTER]
        if after.any():
            limit = gate.threshold_ms[rule]
            early = after & (np.where(gate.from_start[rule], rows.running_ms, rows.silent_ms) < limit)
            threshold_ms[early] = limit[early]
            disposition[early] = np.where(gate.redundant_before[rule[early]], Answered.REDUNDANT, Answered.DENIED)
        if CATALOGUE[operation].lane is not Lane.RECORD:
            waiting = rows.preempting_hard if self.caller.hard else rows.preempting
            again = (verdict == _CODE[Verdict.PREEMPT]) & ((waiting & np.uint64(BIT[operation])) != 0)
            disposition[again] = Answered.REDUNDANT
            admitted = verdict == _CODE[Verdict.ADMIT]
            full = admitted & self.full
            disposition[full] = Answered.DENIED
            in_turn = admitted & ~full & gate.in_turn[rule]
            rule[full] = gate.number(QUEUE_FULL)
            self._look_ahead(operation, in_turn, _Decided(disposition, rule, foreseen, threshold_ms))
        return _Decided(disposition, rule, foreseen, threshold_ms)

    def _look_ahead(self, operation: Operation, in_turn: Flags, decided: _Decided) -> None:
        """Refuse what is admitted in turn and would not be permitted where everything outstanding leads (law 2)."""
        asks = in_turn[self.behind]
        if not asks.any():
            return
        there = self.asked_ahead.first(operation)
        there[self.ahead.vm_state == VM_STATE_CODE[VmState.DELETED]] = self.gate.number(GONE)
        rule = there[self.ahead_of]
        refused = asks & ~self.gate.permits[rule]
        rows, rule = self.behind[refused], rule[refused]
        redundant = self.gate.verdict[rule] == _CODE[Verdict.REDUNDANT]
        decided.rule[rows] = rule
        decided.disposition[rows] = np.where(redundant, Answered.REDUNDANT, Answered.DENIED)
        decided.foreseen[rows] = ~redundant


class _Asked:
    """Some rows, ordered by vm_state and task_state, and what each rule says of each of them."""

    def __init__(self, gate: FleetGate, rows: Fleet, caller: _Caller) -> None:
        self.gate = gate
        self.rows = rows
        self.caller = caller
        self.parts = tuple(parts(rows))
        self._holds: dict[tuple[int, Operation | None], Flags | bool] = {}

    def first(self, operation: Operation) -> Numbers:
        """The number of the first rule that matches each row."""
        found = np.empty(len(self.rows), dtype=np.uint32)
        for vm_state, task_state, part in self.parts:
            place = found[part]
            asked: list[tuple[int, Flags]] = []
            for number in self.gate.cell(operation, vm_state, task_state):
                holds = self.holds(number, operation)
                if holds is True:
                    place[:] = number
                    break
                if holds is not False:
                    asked.append((number, holds[part]))
            for number, flags in reversed(asked):
                np.copyto(place, number, where=flags)
        return found

    def holds(self, number: int, operation: Operation) -> Flags | bool:
        """Where the further conditions of a rule hold: for each row, or one answer for all of them."""
        rule = self.gate.rules[number]
        key = (number, None if rule.blocked is None else operation)
        found = self._holds.get(key)
        if found is None:
            found = self._holds[key] = self._look(rule, operation)
        return found

    def _look(self, rule: Rule, operation: Operation) -> Flags | bool:
        if rule.roles is not None and self.caller.role not in rule.roles:
            return False
        if rule.hard is not None and rule.hard is not self.caller.hard:
            return False
        rows, flags = self.rows, list[Flags]()
        for mask, kinds in ((rows.outstanding, rule.outstanding), (rows.held, rule.held)):
            if kinds is not None:
                flags.append((mask & _mask(kinds)) != 0 if kinds else mask == 0)
        for column, wanted in (
            (rows.locked, rule.locked),
            (rows.host_reachable, rule.host_reachable),
            (rows.launched, rule.launched),
        ):
            if wanted is not None:
                flags.append(column if wanted else ~column)
        if rule.blocked is not None:
            flags.append(((rows.blocked & np.uint64(BIT[operation])) != 0) == rule.blocked)
        if rule.tags is not None:
            flags.append(tag_table(rows.tag_sets, rule)[rows.tags])
        if rule.silent_ms_min is not None:
            flags.append(rows.silent_ms >= rule.silent_ms_min)
        return np.logical_and.reduce(flags) if flags else True


def _ahead(rows: Fleet, marked: Marks) -> Situations:
    """The same instances where everything outstanding leads, as `request_queue.judge_in` sees them there."""
    there = Fleet.from_columns(
        vm_state=rows.foreseen_vm_state, launched=rows.foreseen_launched, tags=rows.tags, tag_sets=rows.tag_sets
    )
    return situations(there, marked)


def _mask(operations: Iterable[Operation]) -> np.uint64:
    return np.uint64(sum(BIT[operation] for operation in operations))


def _by_rule(rules: tuple[Rule, ...], of: Callable[[Rule], Any], kind: Any) -> NDArray[Any]:
    return np.array([of(rule) for rule in rules], dtype=kind)


def _from_start(rules: tuple[Rule, ...]) -> Flags:
    return _by_rule(rules, lambda rule: rule.measured_from is MeasuredFrom.TASK_STARTED, np.bool_)
