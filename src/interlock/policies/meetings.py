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

STEPS_MAX: Final = 5_000
"""How many rules are held against pieces of regions for one answer. Past it two rules count as never meeting."""

_ROLE, _SILENT = 0, 1 + len(FLAGS)
_SETS: Final = ("outstanding", "held", "tags")
_EVERY_KIND: Final = sum(BIT.values())


class Meetings:
    """The rules that two policies ask in one combination."""

    def __init__(self, mine: Sequence[Rule], yours: Sequence[Rule], task_state: str, *, hard: bool) -> None:
        asked = [rule for rule in (*mine, *yours) if rule.hard is None or rule.hard is hard]
        self._moments = sorted({0, *(rule.silent_ms_min or 0 for rule in asked)})
        self._tags = sorted({tag for rule in asked for tag in rule.tags or ()})
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
        self._steps = 0

    def pairs(self) -> Iterator[tuple[Rule, Rule, Region, list[tuple[Literal, ...]]]]:
        """Rules that can hold together, where they do, and what those before them ask for."""
        for place, (one, literals) in enumerate(self._mine):
            region = _within(self._all, literals)
            if region is None:
                continue
            for other_place, (other, more) in enumerate(self._yours):
                both = _within(region, more)
                if both is not None:
                    before = [each for _, each in (*self._mine[:place], *self._yours[:other_place])]
                    yield one, other, both, list(dict.fromkeys(before))

    def circumstances(self, region: Region, before: list[tuple[Literal, ...]]) -> Probe | None:
        """A probe for a place in the region in which none of the rules before decides; None if there is none."""
        self._steps = STEPS_MAX
        left = self._escape(region, before, 0)
        return None if left is None else self._probe(left)

    def _escape(self, region: Region, before: list[tuple[Literal, ...]], index: int) -> Region | None:
        for place in range(index, len(before)):
            self._steps -= 1
            if self._steps <= 0:
                return None
            inside: Region | None = region
            pieces = []
            for literal in before[place]:
                assert inside is not None
                rest = miss(inside, literal)
                if rest is not None:
                    pieces.append(rest)
                inside = meet(inside, literal)
                if inside is None:
                    break
            if inside is None:
                continue
            found = (self._escape(piece, before, place + 1) for piece in pieces)
            return next((left for left in found if left is not None), None)
        return region

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
            yield Literal("any", _SETS.index("tags"), sum(1 << self._tags.index(tag) for tag in rule.tags))

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
            return [tag for number, tag in enumerate(self._tags) if mask >> number & 1]
        return [kind for kind in Operation if mask & BIT[kind]]


def _within(region: Region, literals: tuple[Literal, ...]) -> Region | None:
    left: Region | None = region
    for literal in literals:
        left = None if left is None else meet(left, literal)
    return left
