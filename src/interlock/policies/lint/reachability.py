"""Reachability of rules: which views a rule decides, computed with sets of conditions instead of enumeration.

A cell is an (operation, vm_state, task_state). In a cell, the other conditions of a rule define a region over roles,
flags, silence, outstanding operations, held operations and tags. A rule decides in a cell if its region is not empty
after the regions of all earlier rules are subtracted.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import cache, cached_property
from typing import Final, NamedTuple, TypeVar

from interlock.core.operations import BIT, CATALOGUE, TASK_OPERATION, TASK_STATES, Operation
from interlock.core.policy import Rule
from interlock.core.states import LEFT_AT_END, NO_TASK, VmState
from interlock.core.views import View
from interlock.policies.lint.condition_sets import (
    OUTSTANDING,
    SETS,
    ConditionSpace,
    Literal,
    Region,
    places,
    subtract,
    within,
)
from interlock.policies.lint.rule_masks import RuleMasks

_Word = TypeVar("_Word", bound=str)

TASKS: Final = (NO_TASK, *TASK_STATES)
STEPS_MAX: Final = 1_000
"""How many regions one answer may look at. Past it a rule counts as reachable."""
STEPS_MAX_IN_ALL: Final = 100_000
"""The same for all answers about one policy."""


class Cell(NamedTuple):
    """The key by which rules are looked up."""

    operation: Operation
    vm_state: VmState
    task_state: str

    def __str__(self) -> str:
        state = self.vm_state.value if self.task_state == NO_TASK else f"{self.vm_state.value}/{self.task_state}"
        return f"{self.operation.value} in {state}"


class Reaching:
    """The rules of one policy, indexed for reachability queries."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self.space = ConditionSpace(self.rules, (rule.threshold_ms for rule in self.rules if rule.threshold_ms))
        self._literals = [self.space.literals(rule) for rule in self.rules]
        self._unconditional = mask_of(number for number, literals in enumerate(self._literals) if not literals)
        self._by_operation = _index(((rule.operations for rule in self.rules)), Operation)
        self._by_state = _index((states_of(rule) for rule in self.rules), VmState)
        self._by_task = _index((rule.task_states or TASKS for rule in self.rules), TASKS)
        self._about_kinds = {
            bit: mask_of(
                number
                for number, literals in enumerate(self._literals)
                if any(one.test != "is" and one.place == OUTSTANDING and one.mask & bit for one in literals)
            )
            for bit in BIT.values()
        }
        self.masks = RuleMasks(self._literals, self.space.counts(), len(SETS))
        self._starts: dict[tuple[int, Operation | None, tuple[Literal, ...]], Region | None] = {}
        self._known: dict[tuple[int, int, int, tuple[Literal, ...]], bool] = {}
        self._steps = STEPS_MAX_IN_ALL

    @cached_property
    def alike(self) -> tuple[tuple[Cell, ...], ...]:
        """All cells but those of a deleted instance, grouped by the rules that decide them."""
        groups: dict[tuple[Operation, int, int], list[Cell]] = {}
        for operation in Operation:
            for state in sorted(_UNDELETED, key=tuple(VmState).index):
                for task in TASKS:
                    cell = Cell(operation, state, task)
                    program = self.program(cell)
                    # Nothing in flight is a class of its own: components may be outstanding then.
                    served = self._served(cell, program) if task != NO_TASK else -1
                    groups.setdefault((operation, program, served), []).append(cell)
        return tuple(tuple(cells) for cells in groups.values())

    def program(self, cell: Cell) -> int:
        """Return the rules evaluated in a cell, one bit each: up to the first without another condition."""
        asked = self.about(cell)
        last = asked & self._unconditional
        return asked if not last else asked & (((last & -last) << 1) - 1)

    @property
    def exhausted(self) -> bool:
        """Whether the analysis exceeded its limits."""
        return self._steps <= 0

    def unlike(self, number: int, cells: Iterable[Cell]) -> Iterator[tuple[Cell, int]]:
        """Yield one of the cells in which the rule is decided in the same way, and the number of all that match."""
        found: dict[tuple[int, int], tuple[Cell, int]] = {}
        for cell in cells:
            before = self.program(cell) & ((1 << number) - 1)
            key = (before, self._served(cell, before | 1 << number))
            first, count = found.get(key, (cell, 0))
            size = self._state_classes[cell.vm_state] * self._task_classes[cell.task_state]
            found[key] = (first, count + size)
        yield from found.values()

    def _served(self, cell: Cell, rules: int, more: tuple[Literal, ...] = ()) -> int:
        """Return the bit of the operation in service, if any of the rules or conditions distinguishes it."""
        if cell.task_state == NO_TASK:
            return 0
        bit = BIT[TASK_OPERATION[cell.task_state]]
        if rules & self._about_kinds[bit] or any(one.test != "is" and one.place == OUTSTANDING for one in more):
            return bit
        return 0

    def asked(self, cell: Cell) -> tuple[int, ...]:
        """Return the numbers of the rules evaluated in a cell, in order."""
        return tuple(places(self.program(cell)))

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

    @cached_property
    def _state_classes(self) -> dict[VmState, int]:
        """The first vm_state of each class, and the size of the class. Deleted is a class of its own."""
        return _classes((state, (state is VmState.DELETED, self._by_state[state])) for state in VmState)

    @cached_property
    def _task_classes(self) -> dict[str, int]:
        """The first task state of each class, and the size of the class. No task is a class of its own."""
        kinds = {task: self._about_kinds[BIT[TASK_OPERATION[task]]] for task in TASK_STATES}
        return _classes((task, (kinds.get(task), self._by_task[task])) for task in TASKS)

    def decides(self, number: int, cell: Cell, *more: Literal) -> View | None:
        """Return a view in the cell that the rule decides and for which `more` holds; None if there is none."""
        program, start = self.program(cell), self.start(number, cell, more)
        if start is None or not program >> number & 1:
            return None
        region, _ = self._left(start, program & ((1 << number) - 1))
        return None if region is None else self._view(cell, region)

    def can_decide(self, number: int, cell: Cell, *more: Literal) -> bool:
        """Return whether there is a view in the cell that the rule decides and for which `more` holds."""
        program = self.program(cell)
        if not program >> number & 1:
            return False
        before = program & ((1 << number) - 1)
        key = (before, number, self._served(cell, before | 1 << number, more), more)
        known = self._known.get(key)
        if known is None:
            start = self.start(number, cell, more)
            known = self._known[key] = start is not None and self._is_left(start, before)
        return known

    def covering(self, start: Region, before: int) -> int | None:
        """Return None if a part of the region is outside the rules `before`, and else rules that cover it together."""
        left, used = self._left(start, before)
        return used if left is None else None

    def about(self, cell: Cell) -> int:
        """Return the rules that match a cell, one bit each, whether or not they are evaluated there."""
        return self._by_operation[cell.operation] & self._by_state[cell.vm_state] & self._by_task[cell.task_state]

    def meeting(self, region: Region, rules: int) -> int:
        """Return which of some rules hold somewhere in a region."""
        met = self.masks.met(region) & rules
        for number in places(met & self.masks.inexact):
            if within(region, self._literals[number]) is None:
                met ^= 1 << number
        return met

    def first(self, cell: Cell, held: int) -> int | None:
        """Return the number of the first rule evaluated in a cell among those that hold; None if there is none."""
        deciding = self.program(cell) & held
        return (deciding & -deciding).bit_length() - 1 if deciding else None

    def start(self, number: int, cell: Cell, more: tuple[Literal, ...] = ()) -> Region | None:
        """Return the region in which the rule's conditions and `more` hold in the cell, ignoring earlier rules."""
        served = None if cell.task_state == NO_TASK else TASK_OPERATION[cell.task_state]
        key = (number, served, more)
        if key not in self._starts:
            everything = self.space.everything(cell.task_state)
            self._starts[key] = within(everything, (*more, *self._literals[number]))
        return self._starts[key]

    def _is_left(self, region: Region, before: int) -> bool:
        """Return whether a part of a region is outside some rules, trying its simplest point first."""
        before &= self.masks.met(region)
        if not before:
            return True
        if before & self.masks.held(region):
            return False
        if not before & (self.masks.held(self.space.simplest(region)) | self.masks.inexact):
            return True
        return self._left(region, before)[0] is not None

    def _left(self, region: Region, before: int) -> tuple[Region | None, int]:
        """Return a part of a region outside some rules, or None and rules that cover the region together.

        Depth first. When it takes too many steps, return a part that they may cover.
        """
        pending, steps, used = [(region, before)], 0, 0
        while pending:
            piece, rules = pending.pop()
            steps += 1
            rules &= self.masks.met(piece)
            if not rules or steps > STEPS_MAX or self.exhausted:
                self._steps -= steps
                return piece, 0
            nearly, fully = self.masks.open_conditions(piece)
            covering = rules & fully
            if covering:
                used |= covering & -covering
                continue
            # A rule with one open condition leaves one part, and so does not branch.
            unit = rules & nearly
            first = unit & -unit or rules & -rules
            outside = subtract(piece, self._literals[first.bit_length() - 1])
            if outside is None:
                pending.append((piece, rules ^ first))
                continue
            used |= first
            pending.extend((rest, rules ^ first) for rest in reversed(outside))
        self._steps -= steps
        return None, used

    def _view(self, cell: Cell, region: Region) -> View:
        values = self.space.view_values(region)
        return View(
            operation=cell.operation,
            vm_state=cell.vm_state,
            task_state=cell.task_state,
            running_ms=values["silent_ms"],
            **values,
        )


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


def _classes(keys: Iterable[tuple[_Word, Hashable]]) -> dict[_Word, int]:
    """Return the first word of each class, whose keys are equal, and the size of the class."""
    words: dict[Hashable, list[_Word]] = {}
    for word, key in keys:
        words.setdefault(key, []).append(word)
    return {each[0]: len(each) for each in words.values()}


def mask_of(numbers: Iterable[int]) -> int:
    """Return the bit mask of some numbers."""
    mask = 0
    for number in numbers:
        mask |= 1 << number
    return mask


def _index(names: Iterable[Iterable[str]], words: Iterable[str]) -> dict[str, int]:
    """Return for each word the rules that name it, one bit each."""
    collected: dict[str, bytearray] = {}
    listed = [tuple(each) for each in names]
    for word in words:
        collected[word] = bytearray(len(listed) // 8 + 1)
    for number, each in enumerate(listed):
        for word in each:
            collected[word][number >> 3] |= 1 << (number & 7)
    return {word: int.from_bytes(bits, "little") for word, bits in collected.items()}
