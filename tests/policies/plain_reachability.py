"""Reachability of rules cell by cell and rule by rule: what the indexed analysis is compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from operator import not_

from interlock.core.operations import CATALOGUE, TASK_OPERATION, Lane, Operation
from interlock.core.policy import MeasuredFrom, Rule, Verdict
from interlock.core.states import NO_TASK, VmState
from interlock.policies.lint.condition_sets import TASKS, ConditionSpace, Literal, Region, part_outside, within
from interlock.policies.lint.reachability import Cell, states_of

_STEPS_MAX = 1_000_000


class PlainReachability:
    """The same answers as those of `Reaching`, for a few rules."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = rules
        self.space = ConditionSpace(rules, (rule.threshold_ms for rule in rules if rule.threshold_ms))
        self._literals = [self.space.literals(rule) for rule in rules]
        named = [set(rule.task_states or ()) for rule in rules]
        of_each = {operation: task for task, operation in TASK_OPERATION.items()}
        self.tasks = [task for task in TASKS if task in {NO_TASK, *of_each.values()}.union(*named)]
        """A task state of each class, and perhaps more."""
        self._known: dict[tuple[object, ...], bool] = {}

    def reached(self, *, deleted: bool = False) -> dict[int, set[Operation]]:
        """The operations for which each rule decides some view."""
        found: dict[int, set[Operation]] = {}
        for number, rule in enumerate(self.rules):
            for cell in self._cells(rule, self.tasks):
                if (cell.vm_state is VmState.DELETED) is deleted and self._decides(number, cell):
                    found.setdefault(number, set()).add(cell.operation)
        return found

    def permits(self, cell: Cell) -> bool:
        """Whether a plain submission may be admitted in a cell, at once or after a threshold."""
        served = TASK_OPERATION.get(cell.task_state)
        components = [each for each in Operation if CATALOGUE[each].lane is Lane.COMPONENT]
        plain = (self.space.choice("blocked", not_), self.space.only("outstanding", [served] if served else components))
        for number, rule in enumerate(self.rules):
            if rule.verdict in (Verdict.DENY, Verdict.REDUNDANT) or cell not in self._cells(rule, [cell.task_state]):
                continue
            timed = rule.verdict is Verdict.AFTER and rule.measured_from is MeasuredFrom.LAST_PROGRESS
            more = (self.space.silent_for(rule.threshold_ms or 0),) if timed else ()
            if self._decides(number, cell, *plain, *more):
                return True
        return False

    def shadows(self, number: int) -> Counter[int]:
        """In how many cells each earlier rule is evaluated and holds for a view that the rule matches."""
        found: Counter[int] = Counter()
        for cell in self._cells(self.rules[number], TASKS):
            start = within(self.space.everything(cell.task_state), self._literals[number])
            for earlier in self._before(number, cell):
                if start is not None and within(start, self._literals[earlier]) is not None:
                    found[earlier] += 1
                if not self._literals[earlier]:
                    break
        return found

    def _decides(self, number: int, cell: Cell, *more: Literal) -> bool:
        before = tuple(self._before(number, cell))
        key = (number, before, TASK_OPERATION.get(cell.task_state), more)
        if key not in self._known:
            start = within(self.space.everything(cell.task_state), (*more, *self._literals[number]))
            self._known[key] = start is not None and self._outside(start, before) is not None
        return self._known[key]

    def _outside(self, start: Region, before: Sequence[int]) -> Region | None:
        literals = [self._literals[earlier] for earlier in before]
        return part_outside(start, literals, _STEPS_MAX, undecided=True)[0]

    def _before(self, number: int, cell: Cell) -> Iterator[int]:
        for earlier, rule in enumerate(self.rules[:number]):
            here = cell.operation in rule.operations and cell.vm_state in states_of(rule)
            if here and (rule.task_states is None or cell.task_state in rule.task_states):
                yield earlier

    def _cells(self, rule: Rule, tasks: Sequence[str]) -> Iterator[Cell]:
        for operation in rule.operations:
            for state in states_of(rule):
                for task in tasks:
                    if rule.task_states is None or task in rule.task_states:
                        yield Cell(operation, state, task)
