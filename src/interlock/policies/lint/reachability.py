"""Reachability of rules: which views a rule decides, computed with sets of conditions instead of enumeration.

A cell is an (operation, vm_state, task_state). In a cell, the other conditions of a rule define a region over roles,
flags, silence, outstanding operations, held operations and tags. A rule decides in a cell if its region is not empty
after the regions of all earlier rules are subtracted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Final, NamedTuple

from interlock.core.operations import BIT, CATALOGUE, TASK_OPERATION, TASK_STATES, Operation
from interlock.core.policy import Rule
from interlock.core.states import LEFT_AT_END, NO_TASK, VmState
from interlock.core.views import View
from interlock.policies.lint.condition_sets import OUTSTANDING, ConditionSpace, Literal, Region, part_outside, within

TASKS: Final = (NO_TASK, *TASK_STATES)
STEPS_MAX: Final = 20_000
"""How many region-by-rule subtractions one answer may take. Past it a rule counts as reachable."""
STEPS_MAX_IN_ALL: Final = 20_000_000
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
        self._unconditional = _mask_of(number for number, literals in enumerate(self._literals) if not literals)
        self._by_operation = _index(((rule.operations for rule in self.rules)), Operation)
        self._by_state = _index((states_of(rule) for rule in self.rules), VmState)
        self._by_task = _index((rule.task_states or TASKS for rule in self.rules), TASKS)
        self._about_kinds = _mask_of(
            number
            for number, literals in enumerate(self._literals)
            if any(literal.test != "is" and literal.place == OUTSTANDING for literal in literals)
        )
        self._known: dict[tuple[int, int, int, tuple[Literal, ...]], Region | None] = {}
        self._steps = STEPS_MAX_IN_ALL

    @cached_property
    def alike(self) -> tuple[tuple[Cell, ...], ...]:
        """All cells but those of a deleted instance, grouped by the rules that decide them."""
        groups: dict[tuple[Operation, int, str], list[Cell]] = {}
        for operation in Operation:
            for state in sorted(_UNDELETED, key=tuple(VmState).index):
                for task in TASKS:
                    cell = Cell(operation, state, task)
                    served = task if task == NO_TASK else TASK_OPERATION[task]
                    groups.setdefault((operation, self.program(cell), served), []).append(cell)
        return tuple(tuple(cells) for cells in groups.values())

    def program(self, cell: Cell) -> int:
        """Return the rules evaluated in a cell, one bit each: up to the first without another condition."""
        asked = self._by_operation[cell.operation] & self._by_state[cell.vm_state] & self._by_task[cell.task_state]
        last = asked & self._unconditional
        return asked if not last else asked & (((last & -last) << 1) - 1)

    @property
    def exhausted(self) -> bool:
        """Whether the analysis exceeded its limits."""
        return self._steps <= 0

    def unlike(self, number: int, cells: Iterable[Cell]) -> Iterator[tuple[Cell, int]]:
        """Yield one cell of each class in which the rule is decided in the same way, and the size of the class."""
        found: dict[tuple[int, int], tuple[Cell, int]] = {}
        for cell in cells:
            before = self.program(cell) & ((1 << number) - 1)
            key = (before, self._served(cell, before | 1 << number))
            first, count = found.get(key, (cell, 0))
            found[key] = (first, count + 1)
        yield from found.values()

    def _served(self, cell: Cell, rules: int) -> int:
        """Return the bit of the operation in service, if any of the rules has a condition on outstanding requests."""
        if cell.task_state == NO_TASK or not rules & self._about_kinds:
            return 0
        return BIT[TASK_OPERATION[cell.task_state]]

    def asked(self, cell: Cell) -> tuple[int, ...]:
        """Return the numbers of the rules evaluated in a cell, in order."""
        return tuple(_places(self.program(cell)))

    def matching(self, number: int) -> Iterator[Cell]:
        """Yield the cells that a rule matches, whether or not it decides there."""
        rule = self.rules[number]
        for operation in Operation:
            if operation in rule.operations:
                for state in states_of(rule):
                    for task in TASKS if rule.task_states is None else rule.task_states:
                        yield Cell(operation, state, task)

    def decides(self, number: int, cell: Cell, *more: Literal) -> View | None:
        """Return a view in the cell that the rule decides and for which `more` holds; None if there is none."""
        region = self._region(number, cell, more)
        return None if region is None else self._view(cell, region)

    def can_hold(self, number: int, cell: Cell, *more: Literal) -> bool:
        """Return whether the rule's conditions and `more` can hold together in the cell, ignoring earlier rules."""
        return self._start(number, cell, more) is not None

    def survives(self, number: int, cell: Cell, before: Iterable[int], *more: Literal) -> bool:
        """Return whether the rule would decide in the cell if only the rules `before` came first."""
        start = self._start(number, cell, more)
        about = self._by_operation[cell.operation] & self._by_state[cell.vm_state] & self._by_task[cell.task_state]
        return (
            start is not None and self._left(start, (each for each in sorted(before) if about >> each & 1)) is not None
        )

    def overlapping(self, number: int, earlier: int, cell: Cell, *more: Literal) -> bool:
        """Return whether both rules hold for some view of the cell."""
        region = self._start(number, cell, more)
        return region is not None and within(region, self._literals[earlier]) is not None

    def _start(self, number: int, cell: Cell, more: tuple[Literal, ...]) -> Region | None:
        return within(self.space.everything(cell.task_state), (*more, *self._literals[number]))

    def _region(self, number: int, cell: Cell, more: tuple[Literal, ...]) -> Region | None:
        program = self.program(cell)
        if not program >> number & 1:
            return None
        before = program & ((1 << number) - 1)
        looks = any(literal.test != "is" and literal.place == OUTSTANDING for literal in more)
        served = self._served(cell, self._about_kinds if looks else before | 1 << number)
        key = (before, number, served, more)
        if key not in self._known:
            start = self._start(number, cell, more)
            self._known[key] = None if start is None else self._left(start, _places(before))
        return self._known[key]

    def _left(self, region: Region, before: Iterable[int]) -> Region | None:
        """Return a part of a region outside the regions of some rules; None if there is none."""
        if self._steps <= 0:
            return region
        unlike = list(dict.fromkeys(self._literals[earlier] for earlier in before))
        left, steps = part_outside(region, unlike, min(STEPS_MAX, self._steps), undecided=True)
        self._steps -= steps
        return left

    def _view(self, cell: Cell, region: Region) -> View:
        values = self.space.view_values(region)
        return View(
            operation=cell.operation,
            vm_state=cell.vm_state,
            task_state=cell.task_state,
            running_ms=values["silent_ms"],
            **values,
        )


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


def _places(mask: int) -> Iterator[int]:
    """Yield the indexes of the bits that are set, from the lowest."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def _mask_of(places: Iterable[int]) -> int:
    mask = 0
    for place in places:
        mask |= 1 << place
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
