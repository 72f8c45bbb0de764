"""Lint: dead rules, which never decide, the rules that shadow them, and time windows that never hold, or always.

A rule is dead if it decides no view at all: its conditions contradict each other, or earlier rules match all that it
matches. Where the analysis exceeds its limits, a rule counts as reachable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from itertools import chain, compress
from operator import mul
from typing import Final

from interlock.core.conditions import CONDITION, CONDITIONS
from interlock.core.operations import BIT, TASK_OPERATION, Operation
from interlock.core.policy import SET_MARK, Rule, windows_in
from interlock.core.states import VmState
from interlock.core.time_windows import Calendar
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
    one_of,
    places,
)
from interlock.policies.lint.finding_kinds import FIXED_REMEDY, finding
from interlock.policies.lint.findings import Finding, Written, file_of, operations_text, some, written
from interlock.policies.lint.reachability import Reaching, mask_of, states_of
from interlock.policies.lint.rule_masks import union
from interlock.policies.time_windows import HORIZON, calendar

_CAUSES_MAX = 40
"""Up to how many shadowing rules are reduced to the necessary ones."""
_COVERS_MAX = 5_000
"""How many regions are compared with the rules that cover them, to reduce the shadowing rules of all dead rules."""
_OPERATIONS: Final = tuple(Operation)
_DELETED: Final = one_of(VM_STATE, [VmState.DELETED])
_NOT_DELETED: Final = Literal("is", VM_STATE, ~_DELETED.mask)


class DeadRules:
    """The dead-rule lint of one policy."""

    def __init__(self, reaching: Reaching, own_file: str) -> None:
        self._reaching = reaching
        self.own_file = own_file
        self.written = written(reaching.rules)
        self._covers_left = _COVERS_MAX
        self._shadows = Shadows(reaching)
        self._named = {number: one for one in self.written for number in one.numbers}

    @cached_property
    def reached(self) -> dict[int, set[Operation]]:
        """The rules that decide some view, each with the operations for which they do.

        Of one for all operations, only some of these; views of a deleted instance count only if there is no other.
        """
        found: dict[int, set[Operation]] = {}
        for number, rule in enumerate(self._reaching.rules):
            one_is_enough = len(rule.operations) == len(Operation)
            operations = self._reaching.decides_in(number, OPERATION, _NOT_DELETED, one_is_enough=one_is_enough)
            if not operations and VmState.DELETED in states_of(rule):
                operations = self._reaching.decides_in(number, OPERATION, _DELETED, one_is_enough=one_is_enough)
            if operations:
                found[number] = {_OPERATIONS[place] for place in places(operations)}
        return found

    def findings(self) -> Iterator[Finding]:
        for one in self.written:
            alive = [number for number in one.numbers if number in self.reached]
            if not alive:
                yield self._dead(one)
                continue
            against = self._against_fixed(one)
            if against is not None:
                yield against
            elif one.file == self.own_file:
                yield from self._idle_part(one)
                yield from self._idle_sets(one)

    def _dead(self, one: Written) -> Finding:
        causes = self._causes(one)
        if not causes:
            message = f"{one.id!r} can never hold: its conditions contradict each other."
            return finding("contradiction", one, message, remedy=_contradiction_remedy(one.rule))
        rules = [self._reaching.rules[number] for number in causes]
        named = some(causes, word=self.cite)
        if one.file == self.own_file and all(rule.fixed and file_of(rule) != self.own_file for rule in rules):
            otherwise = any(rule.verdict is not one.rule.verdict for rule in rules)
            message = f"{one.id!r} never decides: everything it matches is decided by fixed {named}."
            return finding("against-fixed" if otherwise else "unreachable", one, message, remedy=FIXED_REMEDY)
        if one.file != self.own_file and any(file_of(rule) != one.file for rule in rules):
            message = f"{one.id!r} is overridden entirely by {named}."
            return finding("overruled", one, message, remedy=None, detail=True)
        return finding(
            "unreachable", one,
            f"{one.id!r} never decides: everything it matches is decided before it, by {named}.",
            remedy=f"Move it before {self._reaching.rules[causes[0]].id!r}, narrow that rule, or remove this one.",
        )  # fmt: skip

    def _causes(self, one: Written, operations: Iterable[Operation] = _OPERATIONS) -> list[int]:
        """Return the earlier rules that shadow a rule."""
        wanted = one_of(OPERATION, operations)
        return self.takers((number, self._reaching.start(number, wanted)) for number in one.numbers)

    def takers(self, starts: Iterable[tuple[int, Region | None]]) -> list[int]:
        """Return the rules that shadow others in some regions, in which these hold.

        Only those that are needed, the ones that shadow most first.
        """
        regions = [(number, region) for number, region in starts if region is not None]
        counts = [self._shadows.in_region(number, region) for number, region in regions]
        if len(counts) > 1:
            taken: Counter[int] = Counter()
            for each in chain.from_iterable(counts):
                rule, count = unpacked(each)
                taken[rule] += count
            counts = [[packed(count, rule) for rule, count in taken.items()]]
        most = [unpacked(each) for each in sorted(chain.from_iterable(counts), reverse=True)]
        needed = [rule for rule, _ in most]
        if len(needed) <= _CAUSES_MAX and self._covers_left > 0:
            spare = self._spare([rule for rule, _ in sorted(most, key=lambda one: (one[1], -one[0]))], regions)
            needed = [earlier for earlier in needed if not spare >> earlier & 1]
        if len(self.written) == len(self._named):
            return needed
        firsts: dict[str, int] = {}
        for earlier in needed:
            firsts.setdefault(self._named[earlier].id, earlier)
        return list(firsts.values())

    def _spare(self, rules: Sequence[int], regions: Iterable[tuple[int, Region]]) -> int:
        """Return the rules without which the others still cover all regions, the first ones first.

        Which rules cover a region is kept, so that it is looked at again only when one of these is left out.
        """
        left = mask_of(rules)
        covers: dict[tuple[int, Region], int] = {}
        for number, region in regions:
            self._covers_left -= 1
            used = self._reaching.covering(region, left & ((1 << number) - 1))
            if used is None:
                return 0
            covers[number, region] = used
        spare = 0
        for rule in rules:
            rest = left ^ 1 << rule
            again: dict[tuple[int, Region], int] = {}
            for (number, region), used in covers.items():
                if used >> rule & 1:
                    self._covers_left -= 1
                    found = self._reaching.covering(region, rest & ((1 << number) - 1))
                    if found is None:
                        break
                    again[number, region] = found
            else:
                covers.update(again)
                left, spare = rest, spare | 1 << rule
        return spare

    def cite(self, number: int) -> str:
        """Format a rule for a message: its id as written, and its position."""
        one = self._named[number]
        return f"{one.id!r} ({one.rule.source})"

    def _against_fixed(self, one: Written) -> Finding | None:
        """Find a fixed rule of the base that decides otherwise what this rule names explicitly."""
        if one.file != self.own_file:
            return None
        starts = [start for number in one.numbers if (start := self._reaching.start(number)) is not None]
        for fixed in places(union(self._reaching.masks.met(start) for start in starts) & self._fixed):
            rule = self._reaching.rules[fixed]
            if _same_answer(rule, one.rule) or not _is_named(one.rule, rule):
                continue
            if any(self._reaching.holds_in(fixed, start) for start in starts):
                part = f"Part of what {one.id!r} matches is decided by fixed {self.cite(fixed)} instead"
                return finding("partly-against-fixed", one, f"{part}: {_reason(rule)}.")
        return None

    @cached_property
    def _fixed(self) -> int:
        """The fixed rules of the policies that this one extends, one bit each."""
        rules = enumerate(self._reaching.rules)
        return mask_of(number for number, rule in rules if rule.fixed and file_of(rule) != self.own_file)

    def _idle_part(self, one: Written) -> Iterator[Finding]:
        """Find operations that a rule names and never decides."""
        named = {operation for number in one.numbers for operation in self._reaching.rules[number].operations}
        idle = named - {operation for number in one.numbers for operation in self.reached.get(number, ())}
        if not idle or named == set(Operation):
            return
        causes = self._causes(one, idle)
        by = f": decided before it, by {some(causes, word=self.cite)}" if causes else ""
        message = f"{one.id!r} never decides for {operations_text(idle)}{by}."
        yield finding("idle-part", one, message, remedy=None, detail=True)

    def _idle_sets(self, one: Written) -> Iterator[Finding]:
        """Find sets of conditions of a rule with `any` that never decide."""
        sets: dict[str, list[int]] = {}
        for number in one.numbers:
            sets.setdefault(self._reaching.rules[number].id.partition(SET_MARK)[2], []).append(number)
        for own, numbers in sets.items():
            if own and not any(number in self.reached for number in numbers):
                causes = self.takers((number, self._reaching.start(number)) for number in numbers)
                named = f"decided before it, by {some(causes, word=self.cite)}" if causes else "its conditions conflict"
                yield finding("idle-set", one, f"{_part(own)} of {one.id!r} never decides: {named}.")


def _part(mark: str) -> str:
    """Name a part of a rule by the mark in its id: the number of a set of `any`, or a variant."""
    return f"Set {mark} in `any`" if mark.isdigit() else f"The {mark} variant"


def _same_answer(one: Rule, other: Rule) -> bool:
    return one.verdict is other.verdict


def _reason(rule: Rule) -> str:
    return rule.because.removesuffix(".") if rule.because else f"{rule.verdict.value} ({rule.code})"


def _is_named(one: Rule, fixed: Rule) -> bool:
    """Return whether a rule names what a fixed rule matches, rather than merely not excluding it.

    Every rule without `roles` matches readers too; a finding for each would hide those that matter.
    """
    both = (each.of(one) is not None and each.of(fixed) is not None for each in CONDITIONS if each.reads != "silent_ms")
    if any(both):
        return True
    return fixed.operations <= one.operations and one.operations != frozenset(Operation)


def _contradiction_remedy(rule: Rule) -> str:
    if rule.outstanding == frozenset() and rule.task_states is not None:
        return "During a task, its operation is outstanding; leave out one of the two conditions."
    return "Leave out one of the conditions."


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


_FROM_MS: Final = 1_767_571_200_000
"""A Monday; for a weekly window any serves, apart from the weeks in which clocks change."""


def window_findings(rules: tuple[Written, ...], own_file: str) -> Iterator[Finding]:
    """Yield a finding for each rule of the file whose time windows never hold, or always."""
    for one in rules:
        within = one.rule.within
        if within is None or one.file != own_file:
            continue
        holds = CONDITION["windows"].kind.test(within)
        intervals = calendar(windows_in([one.rule]), _FROM_MS, 0)
        seen = {bool(holds(intervals.open_at(at_ms))) for at_ms in _moments(intervals)}
        if seen == {True}:
            message = f"The time windows of {one.id!r} always hold: they leave no gap in the week."
            yield finding("windows-always", one, message)
        elif seen == {False}:
            message = f"The time windows of {one.id!r} never hold: those with `!` cover the others."
            yield finding("windows-never", one, message)


def _moments(intervals: Calendar) -> list[int]:
    """Return a moment of each part of some weeks in which the same windows are open."""
    bounds = {bound for spans in intervals.intervals.values() for span in spans for bound in span}
    inside = range(_FROM_MS, _FROM_MS + round(HORIZON.total_seconds() * 1000))
    return sorted({_FROM_MS, *(bound for bound in bounds if bound in inside)})
