"""Regions of views: products of what each condition leaves possible, and what is left of one where a condition holds.

A condition is about a choice, of which it allows some values, or about a set, of which it wants any or none of some
members. What the choices and sets are, and which rules ask for them, is not here (see `reaching`).
"""

from __future__ import annotations

from typing import NamedTuple


class Literal(NamedTuple):
    """One condition of a rule."""

    test: str
    """`is` on a choice, with the values allowed; `any` and `none` on a set, with the members meant."""
    place: int
    """Of which choice, or of which set."""
    mask: int


class Region(NamedTuple):
    """What is left possible: of each choice some values, and for each set what must and what must not be in it."""

    choices: tuple[int, ...]
    wanted: tuple[frozenset[int], ...]
    """For each set: masks, of each of which one member is there."""
    shunned: tuple[int, ...]
    """For each set: what is not in it."""


def meet(region: Region, literal: Literal) -> Region | None:
    """The part of a region in which a condition holds; None if there is none."""
    if literal.test == "is":
        return _choose(region, literal.place, literal.mask)
    return (_want if literal.test == "any" else _shun)(region, literal.place, literal.mask)


def miss(region: Region, literal: Literal) -> Region | None:
    """The part of a region in which a condition does not hold."""
    if literal.test == "is":
        return _choose(region, literal.place, ~literal.mask)
    return (_shun if literal.test == "any" else _want)(region, literal.place, literal.mask)


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


def members(wanted: frozenset[int], shunned: int) -> int:
    """A smallest-looking set that has one member of each mask and none of what is shunned."""
    members = 0
    for mask in sorted(wanted):
        if not members & mask:
            allowed = mask & ~shunned
            members |= allowed & -allowed
    return members
