"""Lint: dead rules, which never decide, and the rules that shadow them.

A rule is dead if it decides no view at all: its conditions contradict each other, or earlier rules match all that it
matches. Where the analysis exceeds its limits, a rule counts as reachable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cached_property

from interlock.core.conditions import CONDITIONS
from interlock.core.operations import Operation
from interlock.core.policy import SET_MARK, Rule
from interlock.core.states import VmState
from interlock.policies.lint.condition_sets import Literal, Region, places
from interlock.policies.lint.findings import Finding, Severity, Written, file_of, operations_text, some, written
from interlock.policies.lint.reachability import Cell, Reaching, mask_of, states_of

_CAUSES_MAX = 40
"""Up to how many shadowing rules are reduced to the necessary ones."""
_COVERS_MAX = 5_000
"""How many regions are compared with the rules that cover them, to reduce the shadowing rules of all dead rules."""
_CELLS_MAX = 200
"""In how many cells two rules are compared: a pair that overlaps does so in the first few."""


class DeadRules:
    """The dead-rule lint of one policy."""

    def __init__(self, reaching: Reaching, own_file: str) -> None:
        self._reaching = reaching
        self.own_file = own_file
        self.written = written(reaching.rules)
        self._covers_left = _COVERS_MAX
        self._named = {number: one for one in self.written for number in one.numbers}

    @cached_property
    def reached(self) -> dict[int, set[Operation]]:
        """The rules that decide some view, each with the operations for which they do."""
        found: dict[int, set[Operation]] = {}
        done = dict.fromkeys(Operation, 0)
        for cells in self._reaching.alike:
            cell = cells[0]
            for number in places(self._reaching.program(cell) & ~done[cell.operation]):
                if self._reaching.can_decide(number, cell):
                    done[cell.operation] |= 1 << number
                    found.setdefault(number, set()).add(cell.operation)
        for number, rule in enumerate(self._reaching.rules):
            if number not in found and VmState.DELETED in states_of(rule):
                # `alike` leaves out deleted instances.
                for cell in self._reaching.matching(number):
                    if cell.vm_state is VmState.DELETED and self._reaching.can_decide(number, cell):
                        found.setdefault(number, set()).add(cell.operation)
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
            return Finding(
                severity=Severity.ERROR,
                code="contradiction",
                rule=one.id,
                place=one.rule.source,
                message=f"{one.id!r} can never hold: its conditions contradict each other.",
                remedy=_contradiction_remedy(one.rule),
            )
        rules = [self._reaching.rules[number] for number in causes]
        named = some(self.cite(number) for number in causes)
        if one.file == self.own_file and all(rule.fixed and file_of(rule) != self.own_file for rule in rules):
            otherwise = any(rule.verdict is not one.rule.verdict for rule in rules)
            return Finding(
                severity=Severity.ERROR,
                code="against-fixed" if otherwise else "unreachable",
                rule=one.id,
                place=one.rule.source,
                message=f"{one.id!r} never decides: everything it matches is decided by fixed {named}.",
                remedy="Remove it. A policy cannot change what a fixed rule of its base decides.",
            )
        if one.file != self.own_file and any(file_of(rule) != one.file for rule in rules):
            return Finding(
                severity=Severity.NOTE,
                code="overruled",
                rule=one.id,
                place=one.rule.source,
                message=f"{one.id!r} is overridden entirely by {named}.",
                detail=True,
            )
        return Finding(
            severity=Severity.ERROR,
            code="unreachable",
            rule=one.id,
            place=one.rule.source,
            message=f"{one.id!r} never decides: everything it matches is decided before it, by {named}.",
            remedy=f"Move it before {self._reaching.rules[causes[0]].id!r}, narrow that rule, or remove this one.",
        )

    def _causes(self, one: Written, operations: Container[Operation] = frozenset(Operation)) -> list[int]:
        """Return the earlier rules that shadow a rule."""
        return self.takers(
            {
                number: [cell for cell in self._reaching.matching(number) if cell.operation in operations]
                for number in one.numbers
            }
        )

    def takers(self, cells: Mapping[int, Iterable[Cell]], *more: Literal) -> list[int]:
        """Return the rules that shadow others where `more` holds, in some of their cells.

        Only those that are needed, the ones that shadow most first.
        """
        classes: list[tuple[Region, int]] = []
        together: Counter[int] = Counter()
        for number, each in cells.items():
            for cell, count in self._reaching.unlike(number, each):
                start = self._reaching.start(number, cell, more)
                if start is not None:
                    before = (1 << number) - 1
                    classes.append((start, self._reaching.about(cell) & before))
                    together[self._reaching.meeting(start, self._reaching.program(cell) & before)] += count
        taken: Counter[int] = Counter()
        for rules, count in together.items():
            for earlier in places(rules):
                taken[earlier] += count
        needed = sorted(taken, key=lambda earlier: (-taken[earlier], -earlier))
        if len(needed) <= _CAUSES_MAX and self._covers_left > 0:
            spare = self._spare(sorted(needed, key=lambda earlier: (taken[earlier], -earlier)), classes)
            needed = [earlier for earlier in needed if not spare >> earlier & 1]
        firsts: dict[str, int] = {}
        for earlier in needed:
            firsts.setdefault(self._named[earlier].id, earlier)
        return list(firsts.values())

    def _spare(self, rules: Sequence[int], classes: Iterable[tuple[Region, int]]) -> int:
        """Return the rules without which the others still cover all regions, the first ones first.

        Each region comes with the rules that match there. Which rules cover it is kept, so that it is looked at again
        only when one of these is left out.
        """
        left = mask_of(rules)
        covers: dict[tuple[Region, int], int] = {}
        for start, about in classes:
            key = (start, about & left)
            if key not in covers:
                self._covers_left -= 1
                used = self._reaching.covering(*key)
                if used is None:
                    return 0
                covers[key] = used
        spare = 0
        for rule in rules:
            rest = left ^ 1 << rule
            again: dict[tuple[Region, int], int] = {}
            for (start, about), used in covers.items():
                if used >> rule & 1:
                    self._covers_left -= 1
                    found = self._reaching.covering(start, about & rest)
                    if found is None:
                        break
                    again[start, about] = found
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
        for fixed in self._fixed:
            rule = self._reaching.rules[fixed]
            if _same_answer(rule, one.rule):
                continue
            met = next((number for number in one.numbers if self._meet(number, fixed)), None)
            if met is not None and _is_named(one.rule, rule):
                return Finding(
                    severity=Severity.WARNING,
                    code="partly-against-fixed",
                    rule=one.id,
                    place=one.rule.source,
                    message=f"Part of what {one.id!r} matches is decided by fixed {self.cite(fixed)} instead: "
                    f"{_reason(rule)}.",
                    remedy="Leave that part out: it has no effect.",
                )
        return None

    @cached_property
    def _fixed(self) -> list[int]:
        """The fixed rules of the policies that this one extends."""
        return [
            number for number, rule in enumerate(self._reaching.rules) if rule.fixed and file_of(rule) != self.own_file
        ]

    def _meet(self, number: int, fixed: int) -> bool:
        one, other = self._reaching.rules[number], self._reaching.rules[fixed]
        tasks = [rule.task_states for rule in (one, other) if rule.task_states is not None]
        common = frozenset.intersection(*tasks) if tasks else None
        looked_at = 0
        for cell in self._reaching.matching(number):
            if cell.operation not in other.operations or cell.vm_state not in states_of(other):
                continue
            if common is not None and cell.task_state not in common:
                continue
            start = self._reaching.start(number, cell)
            if start is not None and self._reaching.meeting(start, 1 << fixed):
                return True
            looked_at += 1
            if looked_at > _CELLS_MAX:
                break
        return False

    def _idle_part(self, one: Written) -> Iterator[Finding]:
        """Find operations that a rule names and never decides."""
        named = {operation for number in one.numbers for operation in self._reaching.rules[number].operations}
        idle = named - {operation for number in one.numbers for operation in self.reached.get(number, ())}
        if not idle or named == set(Operation):
            return
        causes = self._causes(one, idle)
        yield Finding(
            severity=Severity.NOTE,
            code="idle-part",
            rule=one.id,
            place=one.rule.source,
            message=f"{one.id!r} never decides for {operations_text(idle)}"
            + (f": decided before it, by {some(map(self.cite, causes))}." if causes else "."),
            detail=True,
        )

    def _idle_sets(self, one: Written) -> Iterator[Finding]:
        """Find sets of conditions of a rule with `any` that never decide."""
        sets: dict[str, list[int]] = {}
        for number in one.numbers:
            sets.setdefault(self._reaching.rules[number].id.partition(SET_MARK)[2], []).append(number)
        for own, numbers in sets.items():
            if own and not any(number in self.reached for number in numbers):
                causes = self.takers({number: [*self._reaching.matching(number)] for number in numbers})
                named = f"decided before it, by {some(map(self.cite, causes))}" if causes else "its conditions conflict"
                yield Finding(
                    severity=Severity.WARNING,
                    code="idle-set",
                    rule=one.id,
                    place=one.rule.source,
                    message=f"{_part(own)} of {one.id!r} never decides: {named}.",
                    remedy="Remove it, or change its conditions.",
                )


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
