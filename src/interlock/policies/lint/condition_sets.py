"""Sets of views as products of conditions, with intersection and subtraction.

A condition restricts a choice to some values, or requires that a set contains any, or none, of some members. Which
values and members there are follows from the table of conditions and from the rules.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from interlock.core.condition_kinds import Bound, Choice, Members, Parts, Takes
from interlock.core.conditions import ABOUT, CONDITION, Condition, Conditions
from interlock.core.operations import BIT, TASK_OPERATION, TASK_STATES, Operation
from interlock.core.states import NO_TASK, VmState
from interlock.core.view_classes import members_of


class Literal(NamedTuple):
    """One condition of a rule."""

    test: str
    """`is` on a choice, with the allowed values; `any` and `none` on a set, with its members."""
    place: int
    """The index of the choice or of the set."""
    mask: int


class Region(NamedTuple):
    """A product of allowed values of each choice, and required and excluded members of each set."""

    choices: tuple[int, ...]
    wanted: tuple[frozenset[int], ...]
    """For each set: masks, of each of which it contains a member."""
    shunned: tuple[int, ...]
    """For each set: the members it does not contain."""


def meet(region: Region, literal: Literal) -> Region | None:
    """Return the part of a region in which a condition holds; None if it is empty."""
    if literal.test == "is":
        return _choose(region, literal.place, literal.mask)
    return (_want if literal.test == "any" else _shun)(region, literal.place, literal.mask)


def miss(region: Region, literal: Literal) -> Region | None:
    """Return the part of a region in which a condition does not hold; None if it is empty."""
    if literal.test == "is":
        return _choose(region, literal.place, ~literal.mask)
    return (_shun if literal.test == "any" else _want)(region, literal.place, literal.mask)


def within(region: Region, literals: Iterable[Literal]) -> Region | None:
    """Return the part of a region in which all conditions hold; None if it is empty."""
    left: Region | None = region
    for literal in literals:
        left = None if left is None else meet(left, literal)
    return left


def part_outside(
    region: Region, before: Sequence[tuple[Literal, ...]], steps_max: int, *, undecided: bool
) -> tuple[Region | None, int]:
    """Search a region depth first for a part in which none of the conjunctions holds.

    Return it, or None, and the number of subtractions. If they are more than `steps_max`, return a part in which one of
    the conjunctions may hold if `undecided` is true, and else None.
    """
    pending, steps = [(region, 0)], 0
    while pending:
        piece, index = pending.pop()
        outside: list[Region] | None = None
        while outside is None and index < len(before):
            steps += 1
            if steps >= steps_max:
                return (piece if undecided else None), steps
            outside = subtract(piece, before[index])
            index += 1
        if outside is None:
            return piece, steps
        pending.extend((rest, index) for rest in reversed(outside))
    return None, steps


def subtract(region: Region, literals: tuple[Literal, ...]) -> list[Region] | None:
    """Subtract the conjunction of some conditions from a region, in parts; None if they are disjoint."""
    inside: Region | None = region
    outside = []
    for literal in literals:
        assert inside is not None
        rest = miss(inside, literal)
        if rest is not None:
            outside.append(rest)
        inside = meet(inside, literal)
        if inside is None:
            return None
    return outside


def _choose(region: Region, index: int, mask: int) -> Region | None:
    left = region.choices[index] & mask
    if not left:
        return None
    if left == region.choices[index]:
        return region
    choices = (*region.choices[:index], left, *region.choices[index + 1 :])
    return Region(choices, region.wanted, region.shunned)


def _want(region: Region, index: int, mask: int) -> Region | None:
    if not mask & ~region.shunned[index]:
        return None
    wanted = (*region.wanted[:index], region.wanted[index] | {mask}, *region.wanted[index + 1 :])
    return Region(region.choices, wanted, region.shunned)


def _shun(region: Region, index: int, mask: int) -> Region | None:
    left = region.shunned[index] | mask
    if any(not wanted & ~left for wanted in region.wanted[index]):
        return None
    shunned = (*region.shunned[:index], left, *region.shunned[index + 1 :])
    return Region(region.choices, region.wanted, shunned)


def places(mask: int) -> Iterator[int]:
    """Yield the indexes of the bits that are set, from the lowest. A negative mask has no end."""
    if mask.bit_length() > _SHORT_BITS:
        digits = bin(mask)[:1:-1]
        place = digits.find("1")
        while place >= 0:
            yield place
            place = digits.find("1", place + 1)
        return
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


_SHORT_BITS: Final = 64
"""Up to this length of a mask, arithmetic finds its bits faster than their digits do."""
CHOICES: Final[tuple[Condition, ...]] = tuple(one for one in CONDITION.values() if isinstance(one.kind, Choice))
SETS: Final[tuple[Condition, ...]] = tuple(one for one in CONDITION.values() if isinstance(one.kind, Members))
"""One condition on each field with one value, and with a set."""
_PLACE: Final = {one.reads: place for each in (CHOICES, SETS) for place, one in enumerate(each)}
OUTSTANDING: Final = _PLACE["outstanding"]
"""The index of the set of outstanding operations, whose masks are unions of `operations.BIT`."""
TASKS: Final = (NO_TASK, *TASK_STATES)
OPERATION, VM_STATE, TASK_STATE = range(len(CHOICES), len(CHOICES) + 3)
"""The indexes of the choices by which rules are looked up; those of `CHOICES` come before them."""
_KEYS: Final[tuple[tuple[Any, ...], ...]] = (tuple(Operation), tuple(VmState), TASKS)
KEY_BITS: Final[dict[int, dict[Any, int]]] = {
    place: {word: 1 << number for number, word in enumerate(words)}
    for place, words in zip((OPERATION, VM_STATE, TASK_STATE), _KEYS, strict=True)
}
"""For each of them, the bit of each word."""
_CHOICES_FIRST: Final = [
    one for kind in (Choice, Members) for same in ABOUT.values() for one in same if isinstance(one.kind, kind)
]
"""All conditions, those on the same field together."""


def values_of(condition: Condition, rules: Sequence[Conditions], moments: Iterable[int] = ()) -> tuple[Any, ...]:
    """Return the values that the rules' conditions on its field distinguish, the most ordinary first.

    `moments` are distinguished besides, for a field of times.
    """
    first, *others = ABOUT[condition.reads]
    assert isinstance(first.kind, Choice)
    values = first.kind.values([*first.wanted(rules), *moments])
    for other in others:
        assert isinstance(other.kind, Choice)
        values = tuple(sorted({*values, *other.kind.values(other.wanted(rules))}))
    return values


def parts_of(condition: Condition, wanted: Any) -> Parts:
    """Return what a condition wants of its set."""
    assert isinstance(condition.kind, Members)
    return condition.kind.parts(wanted)


class ConditionSpace:
    """All values that some rules distinguish, as the axes of regions."""

    def __init__(self, rules: Sequence[Conditions], moments_ms: Iterable[int] = ()) -> None:
        """`moments_ms` are distinguished as silences besides those of the rules."""
        self._values: list[tuple[Any, ...]] = []
        self._bits: list[dict[Any, int]] = []
        self._literals: dict[tuple[str, Any], tuple[Literal, ...]] = {}
        self._everything: dict[Operation | None, Region] = {}
        for condition in CHOICES:
            self._values.append(values_of(condition, rules, moments_ms if condition.reads == "silent_ms" else ()))
        self._values += _KEYS
        for condition in SETS:
            is_mask = condition.kind.takes is Takes.KINDS
            members = enumerate(members_of(condition.reads, rules))
            self._bits.append({one: BIT[one] if is_mask else 1 << number for number, one in members})

        self._members = [(1 << len(bits)) - 1 for bits in self._bits]

    def everything(self, task_state: str | None = None) -> Region:
        """Return the region of all views, or of all during a task, whose operation is outstanding."""
        operation = None if task_state is None or task_state == NO_TASK else TASK_OPERATION[task_state]
        known = self._everything.get(operation)
        if known is None:
            served = frozenset({BIT[operation]}) if operation else frozenset[int]()
            known = self._everything[operation] = Region(
                choices=tuple((1 << len(values)) - 1 for values in self._values),
                wanted=tuple(served if place == OUTSTANDING else frozenset() for place in range(len(SETS))),
                shunned=(0,) * len(SETS),
            )
        return known

    def literals(self, rule: Conditions) -> tuple[Literal, ...]:
        """Return the conditions of a rule: at most one on each choice, and none that wants members it excludes."""
        found: list[Literal] = []
        excluded: dict[int, int] = {}
        for condition in _CHOICES_FIRST:
            if (wanted := condition.of(rule)) is not None:
                for literal in self._literal(condition, wanted):
                    if found and literal.test == "is" and found[-1].place == literal.place:
                        literal = literal._replace(mask=literal.mask & found.pop().mask)  # noqa: PLW2901
                    elif literal.test == "none":
                        excluded[literal.place] = literal.mask
                    found.append(literal)
        if not excluded:
            return tuple(found)
        return tuple(
            one._replace(mask=one.mask & ~excluded.get(one.place, 0)) if one.test == "any" else one for one in found
        )

    def _literal(self, condition: Condition, wanted: Any) -> tuple[Literal, ...]:
        key = (condition.key, wanted)
        known = self._literals.get(key)
        if known is None:
            match condition.kind:
                case Choice() as kind:
                    known = (self._choice(condition.reads, kind, wanted),)
                case Members() as kind:
                    known = tuple(self._about_members(condition.reads, kind.parts(wanted)))
            self._literals[key] = known
        return known

    def _about_members(self, reads: str, parts: Parts) -> Iterator[Literal]:
        if parts.some:
            yield self.any_of(reads, parts.some)
        for one in sorted(parts.every):
            yield self.any_of(reads, (one,))
        if parts.none:
            yield self.any_of(reads, parts.none)._replace(test="none")
        if not any(parts):
            yield self.only(reads, ())

    def choice(self, reads: str, accepts: Callable[[Any], object]) -> Literal:
        """Return the condition that a value is accepted."""
        place = _PLACE[reads]
        mask = sum(1 << number for number, value in enumerate(self._values[place]) if accepts(value))
        return Literal("is", place, mask)

    def _choice(self, reads: str, kind: Choice, wanted: Any) -> Literal:
        accepts = kind.test(wanted)
        if not isinstance(kind, Bound):
            return self.choice(reads, accepts)
        # The answer differs only between the values before the bound and those from it on, and may for 0.
        place = _PLACE[reads]
        values = self._values[place]
        least = bisect_left(values, kind.turns_at(wanted))
        below, every = (1 << least) - 1, (1 << len(values)) - 1
        mask = below if least > 1 and accepts(values[least - 1]) else 0
        mask |= every & ~below if least < len(values) and accepts(values[-1]) else 0
        return Literal("is", place, mask | 1 if accepts(values[0]) else mask & ~1)

    def silent_for(self, at_least_ms: int) -> Literal:
        """Return the condition on silence; a time past all that are distinguished counts as the longest of them."""
        longest = self._values[_PLACE["silent_ms"]][-1]
        return self.choice("silent_ms", min(at_least_ms, longest).__le__)

    def any_of(self, reads: str, members: Iterable[Any]) -> Literal:
        """Return the condition that a set has any of these members."""
        place = _PLACE[reads]
        return Literal("any", place, sum(self._bits[place][one] for one in members))

    def only(self, reads: str, members: Iterable[Any]) -> Literal:
        """Return the condition that a set has no other members."""
        place = _PLACE[reads]
        kept = set(members)
        return Literal("none", place, sum(bit for one, bit in self._bits[place].items() if one not in kept))

    def counts(self) -> tuple[int, ...]:
        """Return the number of values of each choice, those by which rules are looked up included."""
        return tuple(len(values) for values in self._values)

    def values(self, condition: Condition) -> tuple[Any, ...]:
        """Return the values of a choice that the rules distinguish."""
        return self._values[_PLACE[condition.reads]]

    def members(self, condition: Condition) -> Iterable[tuple[Any, int]]:
        """Return the members of a set that the rules distinguish, and the bit of each."""
        return self._bits[_PLACE[condition.reads]].items()

    def simplest(self, region: Region) -> Region:
        """Return one point of a region: the most ordinary values, and few members."""
        few = [_few(wanted, shunned) for wanted, shunned in zip(region.wanted, region.shunned, strict=True)]
        return Region(
            choices=tuple([left & -left for left in region.choices]),
            wanted=tuple([frozenset([1 << place for place in places(members)]) for members in few]),
            shunned=tuple([~members & every for members, every in zip(few, self._members, strict=True)]),
        )

    def view_values(self, region: Region) -> dict[str, Any]:
        """Return the fields of a view in a region that is not empty: the most ordinary values, and few members."""
        found = {}
        for condition, values, left in zip(CHOICES, self._values, region.choices, strict=False):
            found[condition.reads] = values[(left & -left).bit_length() - 1]
        for condition, members in zip(SETS, self.chosen_members(region), strict=True):
            assert isinstance(condition.kind, Members)
            found[condition.reads] = condition.kind.with_members(condition.usual, members)
        return found

    def chosen_members(self, region: Region) -> list[list[Any]]:
        """Return for each of `SETS` few members that it has somewhere in the region."""
        return [
            [one for one, bit in bits.items() if mask & bit]
            for bits, wanted, shunned in zip(self._bits, region.wanted, region.shunned, strict=True)
            for mask in (_few(wanted, shunned),)
        ]


def one_of(place: int, words: Iterable[Any]) -> Literal:
    """Return the condition that the operation, vm_state or task state is one of these."""
    bits = KEY_BITS[place]
    return Literal("is", place, sum(bits[word] for word in words))


def _few(wanted: frozenset[int], shunned: int) -> int:
    """Return a small set with a member of each mask and no excluded one (greedy)."""
    members = 0
    if not wanted:
        return members
    for mask in sorted(wanted):
        if not members & mask:
            allowed = mask & ~shunned
            members |= allowed & -allowed
    return members
