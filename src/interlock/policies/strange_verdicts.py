"""Verdicts that do not mean what they seem to: thresholds that do not count, takeovers of nothing, promises not kept.

And the gap that makes a driver panic: an operation admitted in a state in which it cannot be performed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Final

from interlock.core.operations import BIT, CATALOGUE, TASK_OPERATION, TASK_STATES, Lane, Operation
from interlock.core.policy import MeasuredFrom, Rule, Verdict
from interlock.core.states import NO_TASK, VmState
from interlock.policies.dead_rules import DeadRules
from interlock.policies.durations import format_seconds
from interlock.policies.findings import Finding, Severity, Written, file_of, operations_text, some, states_text
from interlock.policies.reaching import Cell, Reaching, can_be_together
from interlock.policies.reading import builtin_names, load
from interlock.policies.regions import Literal
from interlock.policies.ways_out import DELETIONS, WaysOut, permits_somewhen

Variant = tuple[Operation, bool]
"""An operation, and whether its hard variant is meant."""

_STATE_KINDS: Final = sum(BIT[operation] for operation, entry in CATALOGUE.items() if entry.lane is Lane.STATE)
_OTHER_KINDS: Final = sum(BIT.values()) & ~_STATE_KINDS


class StrangeVerdicts:
    """The search for verdicts of one policy that do not mean what they seem to."""

    def __init__(self, reaching: Reaching, dead: DeadRules, ways_out: WaysOut) -> None:
        self._reaching = reaching
        self._dead = dead
        self._ways_out = ways_out

    def findings(self) -> Iterator[Finding]:
        for one in self._dead.written:
            alive = [number for number in one.numbers if number in self._dead.reached]
            if not alive:
                continue
            yield from self._time(one, alive)
            yield from self._impossible(one)
            yield from self._record(one)
            yield from self._promises(one, alive)
            yield from self._unperformable(one, alive)
        yield from self._redundant_for_ever()
        yield from self._rings()

    def unperformed(self, performs: Iterable[Operation]) -> Iterator[Finding]:
        """The operations that the policy lets through somewhere and no driver of the server performs."""
        permitted = set[Operation]().union(*self._ways_out.permitted.values())
        missing = permitted - set(performs) - {each for each in Operation if CATALOGUE[each].lane is Lane.RECORD}
        if missing:
            yield Finding(
                severity=Severity.NOTE,
                code="not-performed",
                rule=None,
                place=self._reaching.rules[0].source,
                message=f"The driver performs no {operations_text(missing)}; the server denies that.",
            )

    def _time(self, one: Written, alive: list[int]) -> Iterator[Finding]:
        rule = one.rule
        if rule.task_states == frozenset({NO_TASK}) and rule.outstanding == frozenset() and _is_timed(rule):
            yield _finding(
                one, Severity.WARNING, "nothing-in-flight",
                f"{one.id!r} waits for silence, but nothing is in flight where it holds: what it measures is the time "
                "since the instance last changed.",
                "Name the tasks that it is about, or leave the time out.",
            )  # fmt: skip
        if rule.verdict is not Verdict.AFTER or rule.threshold_ms is None:
            return
        threshold = format_seconds(rule.threshold_ms)
        if rule.measured_from is MeasuredFrom.LAST_PROGRESS:
            if rule.silent_ms_min is not None and rule.silent_ms_min >= rule.threshold_ms:
                longer = rule.silent_ms_min > rule.threshold_ms
                yield _finding(
                    one, Severity.WARNING if longer else Severity.NOTE, "threshold-never-refuses",
                    f"The threshold of {one.id!r} ({threshold}) never refuses anything: the rule holds only once there "
                    f"has been silence for {format_seconds(rule.silent_ms_min)}, and takes over at once. Before, "
                    "the rules behind it answer.",
                    "Make silent_for shorter than the threshold, if callers are to be told when they can take over.",
                )  # fmt: skip
            if not any(self._passes(number) for number in alive):
                causes = some(map(self._dead.cite, self._takers(alive, rule.threshold_ms)))
                yield _finding(
                    one, Severity.ERROR, "threshold-never-passes",
                    f"The threshold of {one.id!r} ({threshold}) never passes: by then {causes} decides instead, so "
                    "callers are told a moment at which they are refused again.",
                    "Move the rule before it, or let that one begin later.",
                )  # fmt: skip

    def _takers(self, alive: list[int], threshold_ms: int) -> list[int]:
        """What decides instead of these rules once their threshold has passed."""
        decided = {
            number: [
                cell for cell in self._reaching.matching(number) if self._reaching.decides(number, cell) is not None
            ]
            for number in alive
        }
        return self._dead.takers(decided, self._reaching.silent_for(threshold_ms))

    def _passes(self, number: int) -> bool:
        rule = self._reaching.rules[number]
        past = self._reaching.silent_for(rule.threshold_ms or 0)
        return any(self._reaching.decides(number, cell, past) is not None for cell in self._reaching.matching(number))

    def _impossible(self, one: Written) -> Iterator[Finding]:
        rule = one.rule
        if rule.task_states is None or NO_TASK in rule.task_states:
            return
        cells = [cell for number in one.numbers for cell in self._reaching.matching(number)]
        if not any(can_be_together(cell.vm_state, cell.task_state) for cell in cells):
            yield _finding(
                one, Severity.NOTE, "never-together",
                f"{one.id!r} is about {states_text((cell.vm_state, cell.task_state) for cell in cells)}, and no "
                "operation is ever in that phase in such a state.",
                "See the catalogue for where each operation can be performed.",
            )  # fmt: skip

    def _record(self, one: Written) -> Iterator[Finding]:
        rule = one.rule
        if rule.verdict not in (Verdict.AFTER, Verdict.PREEMPT):
            return
        operations = {each for number in one.numbers for each in self._reaching.rules[number].operations}
        if all(CATALOGUE[each].lane is Lane.RECORD for each in operations):
            yield _finding(
                one, Severity.NOTE, "takes-nothing-over",
                f"{one.id!r} lets {operations_text(operations)} {rule.verdict.value}, but that changes only the "
                "record: it is done when admitted, and interrupts nothing.",
                'Write verdict = "admit".',
            )  # fmt: skip

    def _promises(self, one: Written, alive: list[int]) -> Iterator[Finding]:
        """A state change admitted on the present state alone: where what comes before it leads, nobody has asked."""
        if one.rule.verdict is not Verdict.ADMIT or one.rule.in_turn:
            return
        behind = self._reaching.any_outstanding(_STATE_KINDS)
        broken = {
            cell.operation
            for number in alive
            for cell in self._reaching.matching(number)
            if CATALOGUE[cell.operation].lane is Lane.STATE and self._reaching.decides(number, cell, behind) is not None
        }
        if broken:
            # Law 2 holds only for what is admitted in turn, so that no walk would find what is broken here.
            yield _finding(
                one, Severity.WARNING if one.rule in _shipped(one.file) else Severity.ERROR, "no-promise",
                f"{one.id!r} admits {operations_text(broken)} behind other state changes without looking at where "
                "those lead: it may be cancelled, or served where it makes no sense.",
                "Leave in_turn out, so that it must be permitted in the foreseen state too.",
            )  # fmt: skip

    def _unperformable(self, one: Written, alive: list[int]) -> Iterator[Finding]:
        inside: dict[VmState, set[Operation]] = {}
        outside: dict[VmState, set[Operation]] = {}
        for number in alive:
            rule = self._reaching.rules[number]
            if rule.verdict in (Verdict.DENY, Verdict.REDUNDANT):
                continue
            for cell in self._reaching.matching(number):
                if self._is_gap(rule, number, cell):
                    there = inside if cell.vm_state in self._ways_out.inhabited else outside
                    there.setdefault(cell.vm_state, set()).add(cell.operation)
        # What the policies that come with Interlock admit is known, and its drivers are tested with it.
        shipped = one.rule in _shipped(one.file)
        for found, severity, when in (
            (inside, Severity.WARNING if shipped else Severity.ERROR, ""),
            (outside, Severity.NOTE, " (only a reset puts an instance there)"),
        ):
            if found:
                yield _finding(
                    one, severity, "not-performable",
                    f"{one.id!r} admits {_products(found)}, where no driver performs it{when}.",
                    'Narrow vm_state; "@sources" is wherever the operation can be performed.',
                )  # fmt: skip

    def _is_gap(self, rule: Rule, number: int, cell: Cell) -> bool:
        if cell.vm_state in CATALOGUE[cell.operation].sources or cell.vm_state is VmState.DELETED:
            return False
        if not can_be_together(cell.vm_state, cell.task_state):
            return False
        more: tuple[Literal, ...] = ()
        if rule.verdict is Verdict.ADMIT and rule.in_turn:
            # Behind a state change, it is where that leads which counts, and there the same is asked with no task.
            if cell.task_state != NO_TASK:
                return False
            more = (self._reaching.only_outstanding(_OTHER_KINDS),)
        return permits_somewhen(self._reaching, number, cell, *more) is not None

    def _redundant_for_ever(self) -> Iterator[Finding]:
        """The same again, redundant however long what is in flight has been silent, and nothing else takes over."""
        found: dict[str, dict[VmState, set[str]]] = {}
        for task in TASK_STATES:
            operation = TASK_OPERATION[task]
            for state in VmState:
                if state is VmState.DELETED or not can_be_together(state, task):
                    continue
                if self._takeover(state, task):
                    continue
                rule = self._ways_out.decided(operation, state, task, hard=_is_hard(task))
                if rule.verdict is Verdict.REDUNDANT:
                    found.setdefault(rule.id, {}).setdefault(state, set()).add(task)
        rules = {rule.id: rule for rule in self._reaching.rules}
        for rule_id, states in found.items():
            pairs = [(state, task) for state, tasks in states.items() for task in tasks]
            yield Finding(
                severity=Severity.WARNING,
                code="redundant-for-ever",
                rule=rule_id,
                place=rules[rule_id].source,
                message=f"By {rule_id!r} the same again is redundant however long it has shown no life, and nothing "
                f"but a deletion or a reset takes over, in {states_text(pairs)}.",
                remedy='Write verdict = "after" with before = "redundant", so that asking again takes over in the end.',
            )

    def _takeover(self, state: VmState, task: str) -> bool:
        others = (each for each in Operation if each not in DELETIONS and CATALOGUE[each].lane is Lane.STATE)
        for operation in others:
            for hard in (False, True):
                verdict = self._ways_out.decided(operation, state, task, hard=hard).verdict
                if verdict in (Verdict.AFTER, Verdict.PREEMPT):
                    return True
        return False

    def _rings(self) -> Iterator[Finding]:
        """Operations that interrupt one another for ever, as long as somebody goes on asking."""
        edges: dict[Variant, dict[Variant, Rule]] = {}
        for task in TASK_STATES:
            target = (TASK_OPERATION[task], _is_hard(task))
            for state in VmState:
                if state is VmState.DELETED or not can_be_together(state, task):
                    continue
                for operation in Operation:
                    if CATALOGUE[operation].lane is not Lane.STATE:
                        continue
                    hards = (False, True) if CATALOGUE[operation].hard_phases else (False,)
                    for hard in hards:
                        rule = self._ways_out.decided(operation, state, task, hard=hard, silent_ms=0)
                        if rule.verdict is Verdict.PREEMPT:
                            edges.setdefault((operation, hard), {})[target] = rule
        for ring in _cycles(edges):
            rules = [edges[one][other] for one in ring for other in ring if other in edges[one]]
            rule = next((each for each in rules if file_of(each) == self._dead.own_file), rules[0])
            names = " and ".join(f"hard {one.value}" if hard else one.value for one, hard in ring)
            yield Finding(
                severity=Severity.WARNING,
                code="preempt-ring",
                rule=rule.id,
                place=rule.source,
                message=f"{names} {'preempt one another' if len(ring) > 1 else 'preempts itself'}: whoever goes on "
                "asking keeps it from ever being done.",
                remedy='Make the same again redundant while it lives: verdict = "after" with before = "redundant".',
            )


def _cycles(edges: dict[Variant, dict[Variant, Rule]]) -> Iterator[tuple[Variant, ...]]:
    """What preempts itself, and the pairs that preempt each other."""
    told: set[frozenset[Operation]] = set()
    for one, targets in edges.items():
        for other in targets:
            pair = frozenset({one[0], other[0]})
            if one in edges.get(other, {}) and pair not in told:
                told.add(pair)
                yield (one,) if one == other else (one, other)


@cache
def _shipped(file: str) -> frozenset[Rule]:
    """The rules of a policy that comes with Interlock; none if that file is not one's."""
    name = file.removesuffix(".toml")
    return frozenset(load(name).rules) if name in builtin_names() and file != name else frozenset()


def _products(found: dict[VmState, set[Operation]]) -> str:
    alike: dict[frozenset[Operation], list[VmState]] = {}
    for state, operations in sorted(found.items(), key=lambda item: tuple(VmState).index(item[0])):
        alike.setdefault(frozenset(operations), []).append(state)
    return "; ".join(
        f"{operations_text(operations)} in {some((state.value for state in states), len(VmState))}"
        for operations, states in alike.items()
    )


def _finding(one: Written, severity: Severity, code: str, message: str, remedy: str) -> Finding:
    return Finding(
        severity=severity, code=code, rule=one.id, place=one.rule.source, message=message, remedy=remedy
    )  # fmt: skip


def _is_timed(rule: Rule) -> bool:
    return rule.verdict is Verdict.AFTER or rule.silent_ms_min is not None


def _is_hard(task: str) -> bool:
    return task in CATALOGUE[TASK_OPERATION[task]].hard_phases
