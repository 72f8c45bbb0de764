"""Reachability of rules: which views a rule decides, computed with sets of conditions instead of enumeration.

A cell is an (operation, vm_state, task_state). The conditions of a rule define a region over cells, roles, flags,
silence, outstanding operations, held operations, tags and so on. A rule decides somewhere if its region is not empty
after the regions of all earlier rules are subtracted. One search answers for all cells; which rules matter to a part of
the region follows from bit masks (`rule_masks`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import cache, cached_property
from typing import Any, Final, NamedTuple, TypeVar

from interlock.core.operations import BIT, CATALOGUE, TASK_OPERATION, Operation
from interlock.core.policy import MeasuredFrom, Rule, Verdict
from interlock.core.states import LEFT_AT_END, NO_TASK, VmState
from interlock.policies.lint.condition_sets import (
    KEY_BITS,
    OPERATION,
    OUTSTANDING,
    SETS,
    TASK_STATE,
    TASKS,
    VM_STATE,
    ConditionSpace,
    Literal,
    Region,
    meet,
    miss,
    one_of,
    places,
    subtract,
    within,
)
from interlock.policies.lint.rule_masks import RuleMasks

_Word = TypeVar("_Word", bound=str)

STEPS_MAX: Final = 1_000
"""How many regions one answer may look at. Past it a rule counts as reachable."""
STEPS_MAX_IN_ALL: Final = 100_000
"""The same for all answers about one policy."""
_UNDECIDED: Final = -1
"""In place of the rules that cover a region: it took too many steps to say whether they do."""


class Cell(NamedTuple):
    """The key by which rules are looked up."""

    operation: Operation
    vm_state: VmState
    task_state: str

    def __str__(self) -> str:
        state = self.vm_state.value if self.task_state == NO_TASK else f"{self.vm_state.value}/{self.task_state}"
        return f"{self.operation.value} in {state}"


class ViewClass(NamedTuple):
    """Views that differ from each other in little, in whatever cell."""

    region: Region
    met: int
    """The rules that hold in some of them, one bit each."""
    held: int
    """Those that hold in all of them."""


class Reaching:
    """The rules of one policy, indexed for reachability queries."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self.space = ConditionSpace(self.rules, (rule.threshold_ms for rule in self.rules if rule.threshold_ms))
        conditions = [self.space.literals(rule) for rule in self.rules]
        self.unconditional = mask_of(number for number, literals in enumerate(conditions) if not literals)
        self._literals = [(*_keys(rule), *own) for rule, own in zip(self.rules, conditions, strict=True)]
        counts = self.space.counts()
        self.masks = RuleMasks(self._literals, counts, len(SETS))
        self._by_operation, self._by_state, self._by_task = (
            dict[str, int](zip(KEY_BITS[place], self.masks.accepting(place, counts[place]), strict=True))
            for place in (OPERATION, VM_STATE, TASK_STATE)
        )
        self.about_outstanding = self.masks.about_set(OUTSTANDING)
        self._starts: dict[int, Region | None] = {}
        self._permitted: dict[tuple[Hashable, ...], int] = {}
        self._steps = STEPS_MAX_IN_ALL

    def program(self, cell: Cell) -> int:
        """Return the rules evaluated in a cell, one bit each: up to the first without another condition."""
        asked = self.about(cell)
        last = asked & self.unconditional
        return asked if not last else asked & (((last & -last) << 1) - 1)

    def about(self, cell: Cell) -> int:
        """Return the rules that match a cell, one bit each, whether or not they are evaluated there."""
        return self._by_operation[cell.operation] & self._by_state[cell.vm_state] & self._by_task[cell.task_state]

    def about_pair(self, vm_state: VmState, task_state: str) -> int:
        """Return the rules that match a vm_state and a task state, for whatever operations."""
        return self._by_state[vm_state] & self._by_task[task_state]

    @property
    def exhausted(self) -> bool:
        """Whether the analysis exceeded its limits."""
        return self._steps <= 0

    def matching(self, number: int) -> Iterator[Cell]:
        """Yield the cells that a rule matches, whether or not it decides there: one of each class of states and tasks.

        No rule distinguishes the states of a class, or the tasks.
        """
        bit = 1 << number
        for operation in Operation:
            if self._by_operation[operation] & bit:
                for state in self._state_classes:
                    if self._by_state[state] & bit:
                        for task in self._task_classes:
                            if self._by_task[task] & bit:
                                yield Cell(operation, state, task)

    def deciding(self, number: int) -> Iterator[tuple[Literal, ...]]:
        """Yield the cells in which a rule decides, as conditions: operations in a class of states and one of tasks."""
        for states in self._state_classes.values():
            for tasks in self._task_classes.values():
                keys = (one_of(VM_STATE, states), one_of(TASK_STATE, tasks))
                operations = self.decides_in(number, OPERATION, *keys)
                if operations:
                    yield (*keys, Literal("is", OPERATION, operations))

    @cached_property
    def _state_classes(self) -> dict[VmState, list[VmState]]:
        """Each class of vm_states, by its first. Deleted is a class of its own."""
        return _classes((state, (state is VmState.DELETED, self._by_state[state])) for state in VmState)

    @cached_property
    def _task_classes(self) -> dict[str, list[str]]:
        """Each class of task states, by its first: the phases of an operation, if no rule distinguishes them."""
        return _classes((task, (TASK_OPERATION.get(task), self._by_task[task])) for task in TASKS)

    def start(self, number: int, *more: Literal) -> Region | None:
        """Return the region in which a rule's conditions and `more` hold, ignoring earlier rules; None if it is empty.

        Its task states are still without their operations.
        """
        if number not in self._starts:
            self._starts[number] = within(self.space.everything(), self._literals[number])
        start = self._starts[number]
        return start if start is None or not more else within(start, more)

    def values_of(self, place: int, mask: int) -> Iterator[Any]:
        """Yield the operations, vm_states or task states of a mask."""
        return (word for word, bit in KEY_BITS[place].items() if mask & bit)

    def decides_in(self, number: int, place: int, *more: Literal, one_is_enough: bool = False) -> int:
        """Return for which values of a choice the rule decides views for which `more` holds, one bit each.

        With `one_is_enough`, perhaps not all of them.
        """
        before, found = (1 << number) - 1, 0
        region = self.start(number, *more)
        while region is not None:
            piece, used = self._left(region, before)
            if piece is None:
                break
            shown = region.choices[place] if used == _UNDECIDED else self._shown(piece, place, region, before)
            found |= shown
            if one_is_enough:
                break
            region = meet(region, Literal("is", place, ~shown))
        return found

    def _shown(self, piece: Region, place: int, region: Region, before: int) -> int:
        """Return the values of a choice in a region for which a point of it is outside some rules."""
        point = self._point(piece)
        assert point is not None
        choices = list(point.choices)
        choices[place] = 0
        before &= self.masks.held(Region(tuple(choices), point.wanted, point.shunned))
        accepting = self.masks.accepting(place, self.space.counts()[place])
        return mask_of(value for value in places(region.choices[place]) if not before & accepting[value])

    def _point(self, region: Region) -> Region | None:
        """Return the most ordinary view of a region, as a region; None if there is none, for no task can be served."""
        point = self.space.simplest(region)
        for value in places(region.choices[TASK_STATE]):
            choices = (*point.choices[:TASK_STATE], 1 << value, *point.choices[TASK_STATE + 1 :])
            if value == 0:
                return Region(choices, point.wanted, point.shunned)
            served = Literal("any", OUTSTANDING, BIT[TASK_OPERATION[TASKS[value]]])
            within_task = meet(region, served)
            if within_task is not None:
                return self.space.simplest(Region(choices, within_task.wanted, within_task.shunned))
        return None

    def view_class(self, task: str, *conditions: Literal) -> ViewClass | None:
        """Return views in which some conditions hold, in whatever cell with that task; None if there are none."""
        region = within(self.space.everything(task), conditions)
        if region is None:
            return None
        return ViewClass(region, self.masks.met(region), self.masks.held(_in_any_cell(region)))

    def held_when(self, task: str, *conditions: Literal) -> int:
        """Return the rules that hold in the most ordinary view in which some conditions do, in whatever cell."""
        region = within(self.space.everything(task), conditions)
        return 0 if region is None else self.masks.held(_in_any_cell(self.space.simplest(region)))

    def permits(self, cell: Cell, views: ViewClass, good: int, key: Hashable) -> int:
        """Return the rules that hold in one of the views that one of `good` decides in a cell; 0 if there is none.

        At once, or after a threshold. `key` is equal for situations that differ at most in the operation in service.
        """
        rules = self.about(cell) & views.met
        fully = rules & views.held
        if fully:
            rules &= ((fully & -fully) << 1) - 1
        good &= rules
        if not good:
            return 0
        served = TASK_OPERATION.get(cell.task_state) if rules & self.about_outstanding else None
        known_by = (rules, good, key, served)
        known = self._permitted.get(known_by)
        if known is None:
            region = within(views.region, _cell_keys(cell))
            each = (0 if region is None else self._permits(number, region, rules) for number in places(good))
            known = self._permitted[known_by] = next(filter(None, each), 0)
        return known

    def _permits(self, number: int, region: Region, rules: int) -> int:
        rule = self.rules[number]
        inside = within(region, self._literals[number])
        if rule.verdict is Verdict.AFTER and rule.measured_from is MeasuredFrom.LAST_PROGRESS and inside is not None:
            inside = meet(inside, self.space.silent_for(rule.threshold_ms or 0))
        left, used = (None, 0) if inside is None else self._left(inside, rules & ((1 << number) - 1))
        if left is None or used == _UNDECIDED:
            return 0 if left is None else 1 << number
        return self.masks.held(_in_any_cell(self.space.simplest(left)))

    def covering(self, start: Region, before: int) -> int | None:
        """Return None if a part of the region is outside the rules `before`, and else rules that cover it together."""
        left, used = self._left(start, before)
        return used if left is None else None

    def holds_in(self, number: int, region: Region) -> bool:
        """Return whether a rule holds for a view in a region."""
        inside = within(region, self._literals[number])
        return inside is not None and self._point(inside) is not None

    def first(self, cell: Cell, held: int) -> int | None:
        """Return the number of the first rule evaluated in a cell among those that hold; None if there is none."""
        deciding = self.about(cell) & held
        return (deciding & -deciding).bit_length() - 1 if deciding else None

    def _left(self, region: Region, before: int) -> tuple[Region | None, int]:
        """Return a part of a region outside some rules, or None and rules that cover the region together.

        Its most ordinary point first, and then depth first. When it takes too many steps, return a part that they may
        cover, and `_UNDECIDED`.
        """
        before &= self.masks.met(region)
        if before:
            point = self._point(region)
            if point is None or not before & self.masks.held(point):
                return point, 0
        pending, steps, used = [(region, before)], 0, 0
        while pending:
            piece, rules = pending.pop()
            steps += 1
            rules &= self.masks.met(piece)
            if not rules and self._point(piece) is not None:
                self._steps -= steps
                return piece, 0
            if steps > STEPS_MAX or self.exhausted:
                self._steps -= steps
                return piece, _UNDECIDED
            one, more = self.masks.open_conditions(piece)
            covering = rules & ~one
            if covering or not rules:
                used |= covering & -covering
                continue
            # A rule with one open condition leaves one part, and so does not branch.
            unit = rules & ~more
            if unit:
                rest, cut = self._without(piece, unit)
                used |= cut
                if rest is not None:
                    pending.append((rest, rules ^ unit))
                continue
            first = rules & -rules
            outside = subtract(piece, self._literals[first.bit_length() - 1])
            used |= 0 if outside is None else first
            pending.extend((rest, rules ^ first) for rest in reversed([piece] if outside is None else outside))
        self._steps -= steps
        return None, used

    def _without(self, piece: Region, rules: int) -> tuple[Region | None, int]:
        """Subtract rules of which all conditions but one hold; return what is left, and those that took a part."""
        used = 0
        for number in places(rules):
            rest: Region | None = None
            for literal in self._literals[number]:
                rest = miss(piece, literal)
                if rest is not None:
                    break
            if rest is not piece:
                used |= 1 << number
            if rest is None:
                return None, used
            piece = rest
        return piece, used


@cache
def can_be_together(vm_state: VmState, task_state: str) -> bool:
    """Return whether a task can be in service in a vm_state.

    These are the states from which its operation can be performed, and those after the guest ended meanwhile.
    """
    if task_state == NO_TASK:
        return True
    sources = CATALOGUE[TASK_OPERATION[task_state]].sources
    ended = {VmState.STOPPED, VmState.ERROR} if sources & LEFT_AT_END else set()
    return vm_state in sources | ended


def states_of(rule: Rule) -> frozenset[VmState]:
    """Return the vm_states that a rule matches; all but `deleted` if it names none."""
    return rule.vm_states if rule.vm_states is not None else _UNDELETED


_UNDELETED: Final = frozenset(VmState) - {VmState.DELETED}


def _keys(rule: Rule) -> Iterator[Literal]:
    """Yield the conditions of a rule on the operation and the states."""
    yield one_of(OPERATION, rule.operations)
    yield one_of(VM_STATE, states_of(rule))
    if rule.task_states is not None:
        yield one_of(TASK_STATE, rule.task_states)


def _in_any_cell(region: Region) -> Region:
    """Return a region without conditions on the cell, for `RuleMasks.held`."""
    return Region((*region.choices[:OPERATION], 0, 0, 0), region.wanted, region.shunned)


@cache
def _cell_keys(cell: Cell) -> tuple[Literal, ...]:
    keys = zip((OPERATION, VM_STATE, TASK_STATE), cell, strict=True)
    return tuple(one_of(place, (word,)) for place, word in keys)


def _classes(keys: Iterable[tuple[_Word, Hashable]]) -> dict[_Word, list[_Word]]:
    """Return each class, whose keys are equal, by its first word."""
    words: dict[Hashable, list[_Word]] = {}
    for word, key in keys:
        words.setdefault(key, []).append(word)
    return {each[0]: each for each in words.values()}


def mask_of(numbers: Iterable[int]) -> int:
    """Return the bit mask of some numbers."""
    mask = 0
    for number in numbers:
        mask |= 1 << number
    return mask
