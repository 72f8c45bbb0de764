"""Circumstances in which one rule of one policy and one of another both decide, found without trying them one by one.

`probes` are tried first, since they are simple; what is here finds what no probe finds, so that nothing is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from interlock.core.operations import BIT, TASK_OPERATION, Operation
from interlock.core.policy import Rule
from interlock.core.states import NO_TASK
from interlock.policies.probes import FLAGS, PLAIN_VALUES, Change, Probe, ordered
from interlock.policies.regions import Literal, Region, meet, members, miss
from interlock.policies.vocabulary import ROLES

STEPS_MAX: Final = 2_000
"""How many pieces of regions are held against a rule for one answer. Past it two rules count as never meeting."""

_ROLE, _SILENT = 0, 1 + len(FLAGS)
_SETS: Final = ("outstanding", "held", "tags")
_EVERY_KIND: Final = sum(BIT.values())


class Meetings:
    """The rules that two policies ask in one combination."""

    def __init__(self, mine: Sequence[Rule], yours: Sequence[Rule], task_state: str, *, hard: bool) -> None:
        asked = [rule for rule in (*mine, *yours) if rule.hard is None or rule.hard is hard]
        self._moments = sorted({0, *(rule.silent_ms_min or 0 for rule in asked)})
        self._tags = {tag: 1 << number for number, tag in enumerate(sorted({t for r in asked for t in r.tags or ()}))}
        self._served = 0 if task_state == NO_TASK else BIT[TASK_OPERATION[task_state]]
        self._mine, self._yours = (
            [(rule, tuple(self._literals(rule))) for rule in rules if rule.hard is None or rule.hard is hard]
            for rules in (mine, yours)
        )
        wanted = frozenset({self._served}) if self._served else frozenset[int]()
        sizes = (len(ROLES), *(2 for _ in FLAGS), len(self._moments))
        self._all = Region(
            tuple((1 << size) - 1 for size in sizes), (wanted, frozenset[int](), frozenset[int]()), (0, 0, 0)
        )

    def pairs(self) -> Iterator[tuple[Rule, Rule]]:
        """Every rule of the one policy beside every rule of the other, in the order asked."""
        return ((one, other) for one, _ in self._mine for other, _ in self._yours)

    def circumstances(self, mine: Rule, yours: Rule) -> Probe | None:
        """The circumstances in which both decide, one in each policy; None if there are none, or none are found."""
        before: list[tuple[Literal, ...]] = []
        region: Region | None = self._all
        for wanted, asked in ((mine, self._mine), (yours, self._yours)):
            for rule, literals in asked:
                if rule is wanted:
                    region = None if region is None else _within(region, literals)
                    break
                before.append(literals)
        if region is None:
            return None
        left = self._escape(region, list(dict.fromkeys(before)))
        return None if left is None else self._probe(left)

    def _escape(self, region: Region, before: list[tuple[Literal, ...]]) -> Region | None:
        """A part of the region in which none of the rules before holds."""
        pieces = [(region, 0)]
        for _ in range(STEPS_MAX):
            if not pieces:
                return None
            piece, place = pieces.pop()
            if place == len(before):
                return piece
            pieces += ((rest, place + 1) for rest in reversed(_without(piece, before[place])))
        return None

    def _literals(self, rule: Rule) -> Iterator[Literal]:
        """The conditions of a rule that the combination leaves open."""
        if rule.roles is not None:
            yield Literal("is", _ROLE, sum(1 << number for number, role in enumerate(ROLES) if role in rule.roles))
        for number, name in enumerate(FLAGS):
            wanted = getattr(rule, name)
            if wanted is not None:
                yield Literal("is", 1 + number, 2 if wanted else 1)
        if rule.silent_ms_min is not None:
            late = (1 << number for number, moment in enumerate(self._moments) if moment >= (rule.silent_ms_min or 0))
            yield Literal("is", _SILENT, sum(late))
        for place, kinds in enumerate((rule.outstanding, rule.held)):
            if kinds is not None:
                mask = sum(BIT[kind] for kind in kinds)
                yield Literal("any", place, mask) if kinds else Literal("none", place, _EVERY_KIND)
        if rule.tags is not None:
            yield Literal("any", _SETS.index("tags"), sum(self._tags[tag] for tag in rule.tags))

    def _probe(self, region: Region) -> Probe:
        role, *flags, silent = region.choices
        changes: list[Change] = []
        if not role >> ROLES.index(PLAIN_VALUES["role"]) & 1:
            changes.append(Change("role", ROLES[role.bit_length() - 1]))
        for name, left in zip(FLAGS, flags, strict=True):
            plain = PLAIN_VALUES[name]
            if not left & (2 if plain else 1):
                changes.append(Change(name, not plain))
        moment = self._moments[(silent & -silent).bit_length() - 1]
        if moment:
            changes.append(Change("silent_ms", moment))
        for place, name in enumerate(_SETS):
            mask = members(region.wanted[place], region.shunned[place])
            if name == "outstanding":
                mask &= ~self._served
            changes += (Change(name, member) for member in self._members(name, mask))
        return ordered(changes)

    def _members(self, name: str, mask: int) -> list[Any]:
        if name == "tags":
            return [tag for tag, bit in self._tags.items() if mask & bit]
        return [kind for kind in Operation if mask & BIT[kind]]


def _within(region: Region, literals: tuple[Literal, ...]) -> Region | None:
    left: Region | None = region
    for literal in literals:
        left = None if left is None else meet(left, literal)
    return left


def _without(region: Region, literals: tuple[Literal, ...]) -> list[Region]:
    """What is left of a region outside of another, in pieces."""
    inside: Region | None = region
    pieces = []
    for literal in literals:
        assert inside is not None
        rest = miss(inside, literal)
        if rest is not None:
            pieces.append(rest)
        inside = meet(inside, literal)
        if inside is None:
            return [region]
    return pieces
