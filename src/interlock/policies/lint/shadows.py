"""Shadows: in how many cells earlier rules may decide instead of another one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import compress
from operator import mul
from typing import Final

from interlock.core.operations import BIT, TASK_OPERATION
from interlock.core.states import VmState
from interlock.policies.lint.condition_sets import (
    KEY_BITS,
    OPERATION,
    OUTSTANDING,
    TASK_STATE,
    TASKS,
    VM_STATE,
    Literal,
    Region,
    meet,
    places,
)
from interlock.policies.lint.reachability import Reaching, mask_of

_WIDTHS: Final = (len(VmState) * len(TASKS), len(TASKS))
"""In a mask of cells: how far operations, and vm_states, are apart."""
_TASKS_OF: Final = {
    operation: sum(KEY_BITS[TASK_STATE][task] for task in TASKS if TASK_OPERATION.get(task) is operation)
    for operation in dict.fromkeys(TASK_OPERATION.values())
}
"""For each operation the task states of its phases, as a mask."""


_NUMBER_BITS: Final = 32
_NUMBERS: Final = (1 << _NUMBER_BITS) - 1
_AS_NUMBERS: Final = bytes.maketrans(b"01", b"\0\1")
_RECALLED_MAX: Final = 100
_FEW: Final = 200
"""Up to so many rules are counted one by one."""


def packed(count: int, rule: int) -> int:
    """Return a count and the number of its rule as one integer, which sorts faster than a pair."""
    return count << _NUMBER_BITS | rule


def unpacked(each: int) -> tuple[int, int]:
    """Return the number of a rule, and its count."""
    return each & _NUMBERS, each >> _NUMBER_BITS


class Shadows:
    """Counts the cells in which earlier rules are evaluated and hold in a part of a region."""

    def __init__(self, reaching: Reaching) -> None:
        self._reaching = reaching
        self._keys = [
            tuple(_mask(reaching, number, place) for place in (OPERATION, VM_STATE, TASK_STATE))
            for number in range(len(reaching.rules))
        ]
        self._counts: dict[tuple[int, int], list[int]] = {}

    def in_region(self, number: int, region: Region) -> list[int]:
        """Return how many cells of the region each rule before `number` may decide in, if any, as `packed`."""
        reaching = self._reaching
        rules = reaching.masks.met(region) & ((1 << number) - 1)
        operations, states, tasks = region.choices[OPERATION : TASK_STATE + 1]
        tasks, without = self._tasks(region, tasks, rules & reaching.about_outstanding)
        if rules & reaching.unconditional:
            return list(self._one_by_one(rules, _cells(operations, states, tasks), without))
        apart = rules if rules.bit_count() <= _FEW else mask_of(without)
        found: list[int] = []
        for rule in places(apart & rules):
            own, own_states, own_tasks = self._keys[rule]
            own_tasks &= tasks & ~without.get(rule, 0)
            count = (own & operations).bit_count() * (own_states & states).bit_count() * own_tasks.bit_count()
            found += [packed(count, rule)] if count else []
        if rules & ~apart:
            held = bin(rules & ~apart)[:1:-1].encode().translate(_AS_NUMBERS)
            counts = (compress(self._common(place, region.choices[place]), held) for place in (OPERATION, VM_STATE))
            cells = map(mul, map(mul, *counts), compress(self._common(TASK_STATE, tasks), held))
            numbered = zip(cells, compress(range(len(held)), held), strict=True)
            found += [packed(count, rule) for count, rule in numbered if count]
        return found

    def _common(self, place: int, mask: int) -> list[int]:
        """Return how many of some operations, vm_states or task states each rule matches."""
        known = self._counts.get((place, mask))
        if known is None:
            if len(self._counts) >= _RECALLED_MAX:
                self._counts.clear()
            known = self._counts[place, mask] = [(keys[place - OPERATION] & mask).bit_count() for keys in self._keys]
        return known

    def _one_by_one(self, rules: int, left: int, without: dict[int, int]) -> Iterator[int]:
        """Yield the same where a rule without conditions takes all of what it matches from those after it."""
        for rule in places(rules):
            own, own_states, own_tasks = self._keys[rule]
            cells = _cells(own, own_states, own_tasks & ~without.get(rule, 0)) & left
            if cells:
                yield packed(cells.bit_count(), rule)
                if self._reaching.unconditional >> rule & 1:
                    left ^= cells
                    if not left:
                        break

    def _tasks(self, region: Region, tasks: int, apart: int) -> tuple[int, dict[int, int]]:
        """Return which task states of a region are possible, and for some rules those in which they do not hold.

        During a task its operation is outstanding.
        """
        without: dict[int, int] = {}
        if not apart and not region.shunned[OUTSTANDING]:
            return tasks, without
        for operation, own in _TASKS_OF.items():
            if tasks & own:
                inside = meet(region, Literal("any", OUTSTANDING, BIT[operation]))
                if inside is None:
                    tasks &= ~own
                    continue
                for rule in places(apart & ~self._reaching.masks.met(inside)):
                    without[rule] = without.get(rule, 0) | own
        return tasks, without


def _mask(reaching: Reaching, number: int, place: int) -> int:
    start = reaching.start(number)
    return 0 if start is None else start.choices[place]


@cache
def _cells(operations: int, states: int, tasks: int) -> int:
    """Return a mask of cells: the product of some operations, vm_states and task states."""
    per_operation, per_state = _WIDTHS
    inner = sum(tasks << per_state * state for state in places(states))
    return sum(inner << per_operation * operation for operation in places(operations))
