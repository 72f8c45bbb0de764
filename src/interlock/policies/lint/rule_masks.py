"""Bit masks of rules: which rules hold in all of a region, and which hold somewhere in it.

One bit per rule, so that a region is compared with thousands of rules in a few operations on large integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from interlock.policies.lint.condition_sets import Literal, Region, places

_ALL: Final = -1
"""Every rule."""


class _Set:
    """The conditions of all rules on one set."""

    def __init__(self) -> None:
        self.wanting: dict[int, int] = {}
        """For each member: the rules that want any of some members, with this one among them."""
        self.shunning: dict[int, int] = {}
        """For each member: the rules that want none of some members, with this one among them."""
        self.want = self.shun = 0

    def add(self, literal: Literal, rule: int) -> None:
        of_member = self.wanting if literal.test == "any" else self.shunning
        for member in places(literal.mask):
            of_member[member] = of_member.get(member, 0) | rule
        if literal.test == "any":
            self.want |= rule
        else:
            self.shun |= rule

    def held(self, wanted: frozenset[int], shunned: int) -> int:
        """Return the rules whose conditions hold for every set with such members."""
        wants = 0
        for mask in wanted:
            wants |= _common(self.wanting, mask & ~shunned)
        broken = self.shun
        if broken and shunned:
            broken = 0
            for member, rules in self.shunning.items():
                if not shunned >> member & 1:
                    broken |= rules
        return ~self.want & ~broken | wants & ~broken

    def met(self, wanted: frozenset[int], shunned: int) -> int:
        """Return the rules whose conditions hold for some set with such members."""
        missing = 0
        if shunned and self.want:
            found = 0
            for member, rules in self.wanting.items():
                if not shunned >> member & 1:
                    found |= rules
            missing = self.want & ~found
        for mask in wanted:
            if self.shun:
                missing |= _common(self.shunning, mask & ~shunned) & self.shun
        return ~missing


class RuleMasks:
    """The conditions of some rules, transposed: for each value and each member, the rules that accept it."""

    def __init__(self, literals: Sequence[tuple[Literal, ...]], choices: Sequence[int], sets: int) -> None:
        """`choices` has the number of values of each choice, and `sets` the number of sets."""
        self._accepting = [[_ALL] * count for count in choices]
        every = [_Set() for _ in range(sets)]
        self.inexact = 0
        """The rules with several conditions on one set, of which `held` and `met` know too little."""
        self._known: dict[tuple[int, ...], tuple[int, int, int, int]] = {}
        for number, each in enumerate(literals):
            rule = 1 << number
            seen: set[int] = set()
            for literal in each:
                if literal.test == "is":
                    self._accept(literal, rule)
                    continue
                if literal.test == "any" and literal.place in seen:
                    self.inexact |= rule
                seen |= {literal.place} if literal.test == "any" else set()
                every[literal.place].add(literal, rule)
        self._naming = {
            (place, member): each.wanting.get(member, 0) | each.shunning.get(member, 0)
            for place, each in enumerate(every)
            for member in each.wanting.keys() | each.shunning.keys()
        }
        self._in_use = [(place, each) for place, each in enumerate(every) if each.want or each.shun]

    def naming(self, place: int, bit: int) -> int:
        """Return the rules with a condition on a member of a set."""
        return self._naming.get((place, bit.bit_length() - 1), 0)

    def _accept(self, literal: Literal, rule: int) -> None:
        accepting = self._accepting[literal.place]
        for value in range(len(accepting)):
            if not literal.mask >> value & 1:
                accepting[value] &= ~rule

    def held(self, region: Region) -> int:
        """Return the rules that hold in all of a region. Not all of those with two conditions on one set."""
        rules = self._of_choices(region.choices)[0]
        for place, each in self._in_use:
            rules &= each.held(region.wanted[place], region.shunned[place])
        return rules

    def met(self, region: Region) -> int:
        """Return the rules that hold somewhere in a region, and perhaps some that have two conditions on one set."""
        rules = self._of_choices(region.choices)[1]
        for place, each in self._in_use:
            if region.wanted[place] or region.shunned[place]:
                rules &= each.met(region.wanted[place], region.shunned[place])
        return rules

    def open_conditions(self, region: Region) -> tuple[int, int]:
        """Return the rules of which at most one condition, and of which none, does not hold in all of a region."""
        one, more = self._of_choices(region.choices)[2:]
        for place, each in self._in_use:
            missed = ~each.held(region.wanted[place], region.shunned[place])
            more |= one & missed
            one |= missed
        return ~more, ~one

    def _of_choices(self, choices: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Return the rules that accept all of these values, and any of each choice.

        And those of which at least one, and at least two, conditions do not accept all.
        """
        known = self._known.get(choices)
        if known is None:
            some, one, more = _ALL, 0, self.inexact
            for accepting, mask in zip(self._accepting, choices, strict=True):
                every, any_of = _ALL, 0
                for value in places(mask):
                    every &= accepting[value]
                    any_of |= accepting[value]
                some &= any_of
                more |= one & ~every
                one |= ~every
            one |= more
            known = self._known[choices] = (~one, some, one, more)
        return known


def _common(rules_of: dict[int, int], members: int) -> int:
    """Return the rules that all of some members have in common; none if there is no member."""
    common = _ALL if members else 0
    for member in places(members):
        common &= rules_of.get(member, 0)
        if not common:
            break
    return common
