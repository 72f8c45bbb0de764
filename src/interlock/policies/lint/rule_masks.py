"""Bit masks of rules: which rules hold in all of a region, and which hold somewhere in it.

One bit per rule, so that a region is compared with thousands of rules in a few operations on large integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from interlock.policies.lint.condition_sets import Literal, Region, places

_RECALLED_MAX: Final = 10_000


def transposed(rows: Sequence[int], width: int) -> list[int]:
    """Return the columns of a matrix of bits: in each, bit n is that of row n."""
    if not rows:
        return [0] * width
    digits = "".join([format(row, f"0{width}b") for row in reversed(rows)])
    return [int(digits[width - 1 - column :: width], 2) for column in range(width)]


class _Choice:
    """The conditions of all rules on one choice."""

    def __init__(self, literals: Sequence[Literal | None], count: int) -> None:
        full = (1 << count) - 1
        self.accepting = transposed([full if one is None else one.mask & full for one in literals], count)
        """For each value: the rules that accept it."""
        self._all = (1 << len(literals)) - 1
        self._known: dict[int, tuple[int, int]] = {}

    def of(self, mask: int) -> tuple[int, int]:
        """Return the rules that do not accept all of some values, and those that accept any of them."""
        known = self._known.get(mask)
        if known is None:
            every, any_of = self._all, 0
            for value in places(mask):
                every &= self.accepting[value]
                any_of |= self.accepting[value]
            known = self._known[mask] = (self._all & ~every, any_of)
        return known


class _Set:
    """The conditions of all rules on one set."""

    def __init__(self) -> None:
        self.wanting: dict[int, int] = {}
        """For each member: the rules that want any of several members, with this one among them."""
        self.requiring: dict[int, int] = {}
        """For each member: the rules that want this member."""
        self.shunning: dict[int, int] = {}
        """For each member: the rules that want none of some members, with this one among them."""
        self.want = self.shun = 0
        self._wanted = self._required = self._shunned = 0
        self._open: dict[tuple[frozenset[int], int], tuple[int, int]] = {}
        self._missed: dict[tuple[frozenset[int], int], int] = {}

    def add(self, literal: Literal, rule: int) -> None:
        if literal.test == "none":
            of_member = self.shunning
            self.shun |= rule
            self._shunned |= literal.mask
        elif literal.mask.bit_count() == 1:
            of_member = self.requiring
            self._required |= literal.mask
        else:
            of_member = self.wanting
            self.want |= rule
            self._wanted |= literal.mask
        for member in places(literal.mask):
            of_member[member] = of_member.get(member, 0) | rule

    def open(self, wanted: frozenset[int], shunned: int) -> tuple[int, int]:
        """Return the rules of which at least one, and at least two, conditions do not hold for every such set."""
        key = (wanted, shunned)
        known = self._open.get(key)
        if known is None:
            if len(self._open) >= _RECALLED_MAX:
                self._open.clear()
            known = self._open[key] = self._opened(wanted, shunned)
        return known

    def _opened(self, wanted: frozenset[int], shunned: int) -> tuple[int, int]:
        found = present = 0
        for mask in wanted:
            allowed = mask & ~shunned
            found |= _common(self.wanting, allowed)
            if not allowed & (allowed - 1):
                present |= allowed
        one, more = self.want & ~found, 0
        for member, rules in self.requiring.items():
            if not present >> member & 1:
                more |= one & rules
                one |= rules
        broken = self.shun
        if broken and shunned:
            broken = 0
            for member in places(self._shunned & ~shunned):
                broken |= self.shunning[member]
        return one | broken, more | one & broken

    def missed(self, wanted: frozenset[int], shunned: int) -> int:
        """Return the rules of which a condition holds for no set with such members."""
        key = (wanted, shunned)
        known = self._missed.get(key)
        if known is None:
            if len(self._missed) >= _RECALLED_MAX:
                self._missed.clear()
            known = self._missed[key] = self._not_met(wanted, shunned)
        return known

    def _not_met(self, wanted: frozenset[int], shunned: int) -> int:
        missing = 0
        if shunned:
            if self.want:
                found = 0
                for member in places(self._wanted & ~shunned):
                    found |= self.wanting[member]
                missing = self.want & ~found
            for member in places(self._required & shunned):
                missing |= self.requiring[member]
        if self.shun:
            for mask in wanted:
                missing |= _common(self.shunning, mask & ~shunned)
        return missing


class RuleMasks:
    """The conditions of some rules, transposed: for each value and each member, the rules that accept it."""

    def __init__(self, literals: Sequence[tuple[Literal, ...]], choices: Sequence[int], sets: int) -> None:
        """`choices` has the number of values of each choice, and `sets` the number of sets.

        A rule has at most one condition on a choice, and wants no member of a set that it excludes.
        """
        self._all = (1 << len(literals)) - 1
        about: dict[int, list[Literal | None]] = {}
        every = [_Set() for _ in range(sets)]
        never = 0
        for number, each in enumerate(literals):
            rule = 1 << number
            for literal in each:
                if literal.test == "is":
                    about.setdefault(literal.place, [None] * len(literals))[number] = literal
                    continue
                if literal.test == "any" and not literal.mask:
                    never |= rule
                every[literal.place].add(literal, rule)
        self._possible = self._all & ~never
        self._choices = [(place, _Choice(about[place], choices[place])) for place in sorted(about)]
        self._sets = [(place, each) for place, each in enumerate(every) if each.want or each.requiring or each.shun]
        self._naming = {
            (place, member): _of(each.wanting, member) | _of(each.requiring, member) | _of(each.shunning, member)
            for place, each in self._sets
            for member in each.wanting.keys() | each.requiring.keys() | each.shunning.keys()
        }

    def accepting(self, place: int, count: int) -> list[int]:
        """Return for each value of a choice the rules that accept it."""
        return next((each.accepting for own, each in self._choices if own == place), [self._all] * count)

    def naming(self, place: int, bit: int) -> int:
        """Return the rules with a condition on a member of a set."""
        return self._naming.get((place, bit.bit_length() - 1), 0)

    def about_set(self, place: int) -> int:
        """Return the rules with a condition on a set."""
        rules = (rules for (own, _), rules in self._naming.items() if own == place)
        return union(rules)

    def held(self, region: Region) -> int:
        """Return the rules that hold in all of a region."""
        choices, broken = region.choices, 0
        for place, choice in self._choices:
            broken |= choice.of(choices[place])[0]
        for place, each in self._sets:
            broken |= each.open(region.wanted[place], region.shunned[place])[0]
        return self._possible & ~broken

    def met(self, region: Region) -> int:
        """Return the rules that hold somewhere in a region."""
        choices, rules = region.choices, self._possible
        for place, choice in self._choices:
            rules &= choice.of(choices[place])[1]
        for place, each in self._sets:
            wanted, shunned = region.wanted[place], region.shunned[place]
            if wanted or shunned:
                rules &= ~each.missed(wanted, shunned)
        return rules

    def open_conditions(self, region: Region) -> tuple[int, int]:
        """Return the rules of which at least one, and at least two, conditions do not hold in all of a region."""
        never = self._all & ~self._possible
        choices, one, more = region.choices, never, never
        for place, choice in self._choices:
            missed = choice.of(choices[place])[0]
            more |= one & missed
            one |= missed
        for place, each in self._sets:
            missed, twice = each.open(region.wanted[place], region.shunned[place])
            more |= one & missed | twice
            one |= missed
        return one, more


def union(masks: Iterable[int]) -> int:
    """Return what is in any of some masks."""
    found = 0
    for mask in masks:
        found |= mask
    return found


def _of(rules_of: dict[int, int], member: int) -> int:
    return rules_of.get(member, 0)


def _common(rules_of: dict[int, int], members: int) -> int:
    """Return the rules that all of some members have in common; none if there is no member."""
    common = -1 if members else 0
    for member in places(members):
        common &= rules_of.get(member, 0)
        if not common:
            break
    return common
