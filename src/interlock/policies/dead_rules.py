"""Rules that never decide, and what keeps them from it.

A rule is called dead only if no view whatever is decided by it: its own conditions exclude one another, or the rules
asked before it take all that it is about. Where a region is too intricate to be taken apart, it counts as reachable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from functools import cached_property

from interlock.core.operations import Operation
from interlock.core.policy import Rule
from interlock.policies.findings import Finding, Severity, Written, file_of, operations_text, some, written
from interlock.policies.reaching import Cell, Reaching, states_of
from interlock.policies.regions import Literal

_CAUSES_MAX = 40
"""Of how many rules it is found out which are needed to keep another from deciding."""
_CELLS_MAX = 200
"""In how many cells two rules are compared, at most: a pair that meets does so in the first few."""


class DeadRules:
    """The search for rules of one policy that never decide."""

    def __init__(self, reaching: Reaching, own_file: str) -> None:
        self._reaching = reaching
        self.own_file = own_file
        self.written = written(reaching.rules)
        self._named = {number: one for one in self.written for number in one.numbers}

    @cached_property
    def reached(self) -> dict[int, set[Operation]]:
        """For each rule that decides some view, the operations for which it does."""
        found: dict[int, set[Operation]] = {}
        for cells in self._reaching.alike:
            cell = cells[0]
            for number in self._reaching.asked(cell):
                if cell.operation not in found.get(number, ()) and self._reaching.decides(number, cell) is not None:
                    found.setdefault(number, set()).add(cell.operation)
        for number, rule in enumerate(self._reaching.rules):
            if number not in found and rule.vm_states is not None:
                # About deleted instances only, which no other rule is.
                for cell in self._reaching.matching(number):
                    if self._reaching.decides(number, cell) is not None:
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

    def _dead(self, one: Written) -> Finding:
        causes = self._causes(one)
        if not causes:
            return Finding(
                severity=Severity.ERROR,
                code="contradiction",
                rule=one.id,
                place=one.rule.source,
                message=f"{one.id!r} can never hold: its own conditions exclude one another.",
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
                message=f"{one.id!r} never decides anything: what it is about is decided by fixed {named}.",
                remedy="Remove it. What a fixed rule decides, no policy that extends it can change.",
            )
        if one.file != self.own_file and any(file_of(rule) != one.file for rule in rules):
            return Finding(
                severity=Severity.NOTE,
                code="overruled",
                rule=one.id,
                place=one.rule.source,
                message=f"{one.id!r} is wholly overruled by {named}.",
                detail=True,
            )
        return Finding(
            severity=Severity.ERROR,
            code="unreachable",
            rule=one.id,
            place=one.rule.source,
            message=f"{one.id!r} never decides anything: all that it is about is decided before it, by {named}.",
            remedy=f"Move it before {self._reaching.rules[causes[0]].id!r}, narrow that one, or remove this.",
        )

    def _causes(self, one: Written, operations: Container[Operation] = frozenset(Operation)) -> list[int]:
        """The rules before it that take what it is about."""
        return self.takers(
            {
                number: [cell for cell in self._reaching.matching(number) if cell.operation in operations]
                for number in one.numbers
            }
        )

    def takers(self, cells: Mapping[int, Iterable[Cell]], *more: Literal) -> list[int]:
        """The rules that take from others what those are about, so far as `more` holds, in some of their cells.

        No more of them than it needs, those that take most first.
        """
        taken: Counter[int] = Counter()
        places = [(number, *kind) for number, each in cells.items() for kind in self._reaching.unlike(number, each)]
        for number, cell, count in places:
            if self._reaching.can_hold(number, cell, *more):
                for earlier in self._reaching.asked(cell):
                    if earlier < number and self._reaching.overlapping(number, earlier, cell, *more):
                        taken[earlier] += count
        needed = [earlier for earlier, _ in sorted(taken.items(), key=lambda item: (-item[1], -item[0]))]
        if len(needed) <= _CAUSES_MAX:
            for spare in sorted(needed, key=lambda earlier: (taken[earlier], -earlier)):
                rest = [earlier for earlier in needed if earlier != spare]
                if not any(self._reaching.survives(number, cell, rest, *more) for number, cell, _ in places):
                    needed = rest
        firsts: dict[str, int] = {}
        for earlier in needed:
            firsts.setdefault(self._named[earlier].id, earlier)
        return list(firsts.values())

    def cite(self, number: int) -> str:
        """A rule in a sentence: its id as written, and where it stands."""
        one = self._named[number]
        return f"{one.id!r} ({one.rule.source})"

    def _against_fixed(self, one: Written) -> Finding | None:
        """The part of a rule that a fixed rule of what is extended decides otherwise, if its writer named it."""
        if one.file != self.own_file:
            return None
        for fixed, rule in enumerate(self._reaching.rules):
            if not rule.fixed or file_of(rule) == self.own_file or _same_answer(rule, one.rule):
                continue
            met = next((number for number in one.numbers if self._meet(number, fixed)), None)
            if met is not None and _is_named(one.rule, rule):
                return Finding(
                    severity=Severity.WARNING,
                    code="partly-against-fixed",
                    rule=one.id,
                    place=one.rule.source,
                    message=f"Part of what {one.id!r} is about is decided by fixed {self.cite(fixed)} instead: "
                    f"{_said(rule)}.",
                    remedy="Leave that part out, so that the policy does not seem to say what it does not do.",
                )
        return None

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
            if self._reaching.overlapping(number, fixed, cell):
                return True
            looked_at += 1
            if looked_at > _CELLS_MAX:
                break
        return False

    def _idle_part(self, one: Written) -> Iterator[Finding]:
        """The operations that a rule names and for which it never decides."""
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
            + (f": that is decided before it, by {some(map(self.cite, causes))}." if causes else "."),
            detail=True,
        )


def _same_answer(one: Rule, other: Rule) -> bool:
    return one.verdict is other.verdict


def _said(rule: Rule) -> str:
    return rule.because.removesuffix(".") if rule.because else f"{rule.verdict.value} ({rule.code})"


_CONDITIONS = ("roles", "locked", "blocked", "tags", "host_reachable", "hard", "launched", "outstanding", "held")


def _is_named(one: Rule, fixed: Rule) -> bool:
    """Whether the writer of a rule named what a fixed rule is about, instead of merely not excluding it.

    Every rule that says nothing of roles is about readers too; to say so of each would hide what matters.
    """
    if any(getattr(one, key) is not None and getattr(fixed, key) is not None for key in _CONDITIONS):
        return True
    return fixed.operations <= one.operations and one.operations != frozenset(Operation)


def _contradiction_remedy(rule: Rule) -> str:
    if rule.outstanding == frozenset() and rule.task_states is not None:
        return "While a task is being done, that operation is outstanding; leave out one of the two conditions."
    return "Leave out one of the conditions."
