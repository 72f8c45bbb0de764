"""Lint: verdicts without the intended effect, such as thresholds that never pass or takeovers of nothing.

Also operations that are admitted in states in which no driver can perform them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Final

from interlock.core.durations import format_seconds
from interlock.core.operations import CATALOGUE, TASK_OPERATION, TASK_STATES, Lane, Operation
from interlock.core.policy import MeasuredFrom, Rule, Verdict
from interlock.core.roles import Role
from interlock.core.states import NO_TASK, VmState
from interlock.core.view_classes import members_of
from interlock.policies.language.loader import builtin_names, load
from interlock.policies.lint.condition_sets import OPERATION, TASK_STATE, TASKS, VM_STATE, Literal, one_of
from interlock.policies.lint.dead_rules import DeadRules
from interlock.policies.lint.exit_lints import DELETIONS, WaysOut
from interlock.policies.lint.finding_kinds import finding
from interlock.policies.lint.findings import Finding, Severity, Written, file_of, operations_text, some, states_text
from interlock.policies.lint.reachability import Reaching, can_be_together, states_of

Variant = tuple[Operation, bool]
"""An operation, and whether it is the hard variant."""

_STATE_KINDS: Final = frozenset(operation for operation, entry in CATALOGUE.items() if entry.lane is Lane.STATE)
_OTHER_KINDS: Final = frozenset(Operation) - _STATE_KINDS


class StrangeVerdicts:
    """The verdict lint of one policy."""

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
            yield from self._out_of_turn(one, alive)
            yield from self._unperformable(one, alive)
        yield from self._redundant_for_ever()
        yield from self._rings()

    def unbinding(self, protected: Callable[[Iterable[str]], frozenset[str]]) -> Iterator[Finding]:
        """Find rules that a caller whom they deny can get around: by taking a tag off, or with a role left out."""
        for one in self._dead.written:
            if self._dead.reached.keys().isdisjoint(one.numbers):
                continue
            named = frozenset(members_of("tags", [one.rule]))
            free = sorted(named - protected(named))
            if free:
                yield finding(
                    "tag-not-protected", one,
                    f"{one.id!r} depends on the tag{'s' if len(free) > 1 else ''} {', '.join(map(repr, free))}, which "
                    "everybody who may change the VM may set or remove.",
                    remedy=f"If the rule is to bind them: protected_tags = {free} under [policy].".replace("'", '"'),
                )  # fmt: skip
            roles = one.rule.roles or frozenset()
            names_who_may = Role.AGENT in roles
            left_out = Role.MEMBER in roles and Role.PROJECT_ADMIN not in roles and not names_who_may
            if one.rule.verdict is Verdict.DENY and left_out:
                yield finding(
                    "role-left-out", one,
                    f"{one.id!r} denies members, and leaves out project_admin, which may do what members may.",
                )  # fmt: skip

    def unperformed(self, performs: Iterable[Operation]) -> Iterator[Finding]:
        """Find operations that the policy admits and the driver does not perform."""
        permitted = set[Operation]().union(*self._ways_out.permitted.values())
        missing = permitted - set(performs) - {each for each in Operation if CATALOGUE[each].lane is Lane.RECORD}
        if missing:
            message = f"The driver does not perform {operations_text(missing)}; the server denies these."
            yield finding("not-performed", self._reaching.rules[0].source, message, remedy=None)

    def _time(self, one: Written, alive: list[int]) -> Iterator[Finding]:
        rule = one.rule
        if rule.task_states == frozenset({NO_TASK}) and rule.outstanding == frozenset() and _is_timed(rule):
            yield finding(
                "nothing-in-flight", one,
                f"{one.id!r} has a condition on silence, but nothing is in flight where it holds: it measures the time "
                "since the instance last changed.",
            )  # fmt: skip
        if rule.verdict is not Verdict.AFTER or rule.threshold_ms is None:
            return
        threshold = format_seconds(rule.threshold_ms)
        if rule.measured_from is MeasuredFrom.LAST_PROGRESS:
            if rule.silent_ms_min is not None and rule.silent_ms_min >= rule.threshold_ms:
                longer = rule.silent_ms_min > rule.threshold_ms
                yield finding(
                    "threshold-never-refuses", one,
                    f"The threshold of {one.id!r} ({threshold}) never denies anything: the rule holds only after "
                    f"silence of {format_seconds(rule.silent_ms_min)}, and then takes over at once. Until then, later "
                    "rules decide.",
                    severity=Severity.WARNING if longer else Severity.NOTE,
                )  # fmt: skip
            if not any(self._passes(number) for number in alive):
                causes = some(self._takers(alive, rule.threshold_ms), word=self._dead.cite)
                yield finding(
                    "threshold-never-passes", one,
                    f"The threshold of {one.id!r} ({threshold}) never passes: by then {causes} decides instead, so "
                    "that its denials name a retry time that does not hold.",
                )  # fmt: skip

    def _takers(self, alive: list[int], threshold_ms: int) -> list[int]:
        """Return the rules that decide instead of these once their threshold has passed."""
        reaching, past = self._reaching, self._reaching.space.silent_for(threshold_ms)
        return self._dead.takers(
            (number, reaching.start(number, *cells, past)) for number in alive for cells in reaching.deciding(number)
        )

    def _passes(self, number: int) -> bool:
        past = self._reaching.space.silent_for(self._reaching.rules[number].threshold_ms or 0)
        return bool(self._reaching.decides_in(number, OPERATION, past, one_is_enough=True))

    def _impossible(self, one: Written) -> Iterator[Finding]:
        rule = one.rule
        if rule.task_states is None or NO_TASK in rule.task_states:
            return
        pairs = {(state, task) for state in states_of(rule) for task in rule.task_states}
        if not any(can_be_together(*pair) for pair in pairs):
            yield finding(
                "never-together", one,
                f"{one.id!r} matches {states_text(pairs)}, and no "
                "operation is ever in that phase in such a state.",
            )  # fmt: skip

    def _record(self, one: Written) -> Iterator[Finding]:
        rule = one.rule
        if rule.verdict not in (Verdict.AFTER, Verdict.PREEMPT):
            return
        operations = {each for number in one.numbers for each in self._reaching.rules[number].operations}
        if all(CATALOGUE[each].lane is Lane.RECORD for each in operations):
            yield finding(
                "takes-nothing-over", one,
                f"{one.id!r} has verdict {rule.verdict.value!r} for {operations_text(operations)}, which only changes "
                "the record: it completes when admitted, and interrupts nothing.",
            )  # fmt: skip

    def _out_of_turn(self, one: Written, alive: list[int]) -> Iterator[Finding]:
        """Find state changes that are admitted on the present state alone, behind other state changes."""
        if one.rule.verdict is not Verdict.ADMIT or one.rule.in_turn:
            return
        behind = (self._reaching.space.any_of("outstanding", _STATE_KINDS), one_of(OPERATION, _STATE_KINDS))
        broken = {
            operation
            for number in alive
            for operation in self._reaching.values_of(OPERATION, self._reaching.decides_in(number, OPERATION, *behind))
        }
        if broken:
            # Law 2 holds only for requests admitted in turn, so that the model checker would not find this.
            yield finding(
                "no-promise", one,
                f"{one.id!r} admits {operations_text(broken)} behind other state changes without checking the "
                "foreseen state: it may be cancelled, or served in a state that does not permit it.",
                severity=Severity.WARNING if one.rule in _shipped(one.file) else Severity.ERROR,
            )  # fmt: skip

    def _unperformable(self, one: Written, alive: list[int]) -> Iterator[Finding]:
        inside: dict[VmState, set[Operation]] = {}
        outside: dict[VmState, set[Operation]] = {}
        for number in alive:
            for operation, state in self._gaps(number):
                there = inside if state in self._ways_out.inhabited else outside
                there.setdefault(state, set()).add(operation)
        # The built-in policies are tested with the drivers.
        shipped = one.rule in _shipped(one.file)
        for found, severity, when in (
            (inside, Severity.WARNING if shipped else Severity.ERROR, ""),
            (outside, Severity.NOTE, " (only a reset puts an instance there)"),
        ):
            if found:
                yield finding(
                    "not-performable", one,
                    f"{one.id!r} admits {_products(found)}, where no driver performs it{when}.",
                    severity=severity,
                )  # fmt: skip

    def _gaps(self, number: int) -> Iterator[tuple[Operation, VmState]]:
        """Yield what a rule permits in states in which no driver performs it."""
        rule = self._reaching.rules[number]
        if rule.verdict in (Verdict.DENY, Verdict.REDUNDANT):
            return
        more: list[Literal] = []
        if rule.verdict is Verdict.ADMIT and rule.in_turn:
            # Behind a state change the foreseen state counts, which is judged without a task.
            more = [one_of(TASK_STATE, [NO_TASK]), self._reaching.space.only("outstanding", _OTHER_KINDS)]
        if rule.verdict is Verdict.AFTER and rule.measured_from is MeasuredFrom.LAST_PROGRESS:
            more.append(self._reaching.space.silent_for(rule.threshold_ms or 0))
        for state in states_of(rule) - {VmState.DELETED}:
            operations = one_of(OPERATION, [each for each in rule.operations if state not in CATALOGUE[each].sources])
            tasks = one_of(TASK_STATE, [task for task in TASKS if can_be_together(state, task)])
            here = (operations, one_of(VM_STATE, [state]), tasks)
            found = self._reaching.decides_in(number, OPERATION, *here, *more)
            yield from ((operation, state) for operation in self._reaching.values_of(OPERATION, found))

    def _redundant_for_ever(self) -> Iterator[Finding]:
        """Find repeated requests that stay redundant however long the task is silent, with nothing to take over."""
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
            yield finding(
                "redundant-for-ever", rules[rule_id],
                f"{rule_id!r} answers a repeated request as redundant however long the task makes no progress, and "
                f"only a deletion or a reset takes over, in {states_text(pairs)}.",
            )  # fmt: skip

    def _takeover(self, state: VmState, task: str) -> bool:
        others = (each for each in Operation if each not in DELETIONS and CATALOGUE[each].lane is Lane.STATE)
        for operation in others:
            for hard in (False, True):
                verdict = self._ways_out.decided(operation, state, task, hard=hard).verdict
                if verdict in (Verdict.AFTER, Verdict.PREEMPT):
                    return True
        return False

    def _rings(self) -> Iterator[Finding]:
        """Find operations that preempt each other in a cycle."""
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
            each_other = "preempt each other" if len(ring) > 1 else "preempts itself"
            message = f"{names} {each_other}: repeated requests keep it from ever completing."
            yield finding("preempt-ring", rule, message)


def _cycles(edges: dict[Variant, dict[Variant, Rule]]) -> Iterator[tuple[Variant, ...]]:
    """Yield the operations that preempt themselves, and the pairs that preempt each other."""
    reported: set[frozenset[Operation]] = set()
    for one, targets in edges.items():
        for other in targets:
            pair = frozenset({one[0], other[0]})
            if one in edges.get(other, {}) and pair not in reported:
                reported.add(pair)
                yield (one,) if one == other else (one, other)


@cache
def _shipped(file: str) -> frozenset[Rule]:
    """Return the rules of a built-in policy; none if `file` is not one."""
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


def _is_timed(rule: Rule) -> bool:
    return rule.verdict is Verdict.AFTER or rule.silent_ms_min is not None


def _is_hard(task: str) -> bool:
    return task in CATALOGUE[TASK_OPERATION[task]].hard_phases
