"""Overlap of two policies' rules: a view that one rule of each decides, found by intersecting condition sets.

`probes` are tried first, since they are simpler; this finds what no probe finds, so that the comparison is complete.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from interlock.core.operations import TASK_OPERATION
from interlock.core.policy import Rule
from interlock.policies.lint.condition_sets import (
    CHOICES,
    SETS,
    ConditionSpace,
    Literal,
    Region,
    meet,
    part_outside,
    within,
)
from interlock.policies.lint.sample_views import Change, Probe, ordered

STEPS_MAX: Final = 2_000
"""How many region-by-rule subtractions one answer may take. Past it two rules count as disjoint."""


class Meetings:
    """The rules that two policies evaluate in one cell."""

    def __init__(self, mine: Sequence[Rule], yours: Sequence[Rule], task_state: str, *, hard: bool) -> None:
        self._space = ConditionSpace([*mine, *yours])
        self._served = TASK_OPERATION.get(task_state)
        self._all = meet(self._space.everything(task_state), self._space.choice("hard", hard.__eq__))
        self._mine, self._yours = (
            [(rule, self._space.literals(rule)) for rule in rules if rule.hard is None or rule.hard is hard]
            for rules in (mine, yours)
        )

    def pairs(self) -> Iterator[tuple[Rule, Rule]]:
        """Yield every pair of a rule of each policy, in order of evaluation."""
        return ((one, other) for one, _ in self._mine for other, _ in self._yours)

    def circumstances(self, mine: Rule, yours: Rule) -> Probe | None:
        """Return circumstances in which both rules decide, each in its policy; None if none are found."""
        before: list[tuple[Literal, ...]] = []
        region = self._all
        for wanted, asked in ((mine, self._mine), (yours, self._yours)):
            for rule, literals in asked:
                if rule is wanted:
                    region = None if region is None else within(region, literals)
                    break
                before.append(literals)
        if region is None:
            return None
        left, _ = part_outside(region, list(dict.fromkeys(before)), STEPS_MAX, undecided=False)
        return None if left is None else self._probe(left)

    def _probe(self, region: Region) -> Probe:
        values = self._space.view_values(region)
        changes = [
            Change(condition.reads, values[condition.reads])
            for condition in CHOICES
            if condition.reads != "hard" and values[condition.reads] != condition.usual
        ]
        for condition, members in zip(SETS, self._space.chosen_members(region), strict=True):
            served = self._served if condition.reads == "outstanding" else None
            changes += (Change(condition.reads, member) for member in members if member is not served)
        return ordered(changes)
