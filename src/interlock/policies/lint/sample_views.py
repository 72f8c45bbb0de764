"""Probes: sample views of a cell on which rules may disagree, built from the rules' conditions, the simplest first.

A probe is a minimal set of changes to a default submission: by a member, with nothing locked, blocked, tagged, held or
outstanding but the task; the host is reachable, the instance was launched, and no time has passed. `Meetings` finds
what no probe finds, by intersecting condition sets, so that a comparison is complete.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import combinations, islice, product
from typing import Any, Final, NamedTuple, assert_never

import msgspec

from interlock.core.condition_kinds import Choice, Members
from interlock.core.conditions import ABOUT, CONDITION, Condition, Subject
from interlock.core.operations import TASK_OPERATION, Operation
from interlock.core.policy import Rule
from interlock.core.states import NO_TASK
from interlock.core.views import View
from interlock.policies.lint.condition_sets import (
    CHOICES,
    SETS,
    ConditionSpace,
    Literal,
    Region,
    meet,
    part_outside,
    parts_of,
    values_of,
    within,
)

PAIRED_MAX: Final = 30
"""Up to this many probes, pairs of them are tried too. `meetings` covers the rest."""

_CHOICES: Final = tuple(one for one in CHOICES if one.subject is not Subject.REQUEST)
"""A probe leaves the requested variant as it is."""
_SETS: Final = frozenset(condition.reads for condition in SETS)
_LIKELY_KINDS: Final = (Operation.STOP, Operation.START)
"""Which operation stands for any, where rules only ask whether there is one."""


class Change(NamedTuple):
    """One difference from a default submission."""

    field: str
    """The field of `View`; for an operation or tag, the field that contains it."""
    value: Any

    def __str__(self) -> str:
        return CONDITION[self.field].because(self.value)


Probe = tuple[Change, ...]


def words(probe: Probe) -> str:
    """Describe a probe; empty for the default submission."""
    return ", ".join(str(change) for change in probe)


def applied(view: View, probe: Probe) -> View:
    """Apply the changes of a probe to a view."""
    changes: dict[str, Any] = {}
    for change in probe:
        kind = CONDITION[change.field].kind
        match kind:
            case Members():
                before = changes.get(change.field, getattr(view, change.field))
                changes[change.field] = kind.with_members(before, (change.value,))
            case Choice():
                changes[change.field] = change.value
            case _:
                assert_never(kind)
    if "silent_ms" in changes:
        changes["running_ms"] = changes["silent_ms"]
    return msgspec.structs.replace(view, **changes) if changes else view


def probes(rules: Sequence[Rule], task_state: str) -> list[Probe]:
    """Return the probes for some rules: single changes, what each rule requires, and pairs of these.

    The default submission is first, and fewer changes come before more. One operation or tag represents all of its
    class.
    """
    served = None if task_state == NO_TASK else TASK_OPERATION[task_state]
    classes = {condition.reads: _classes(rules, condition, served) for condition in SETS}
    parts: dict[Probe, None] = dict.fromkeys(_single(rules, classes))
    for rule in rules:
        parts.update(dict.fromkeys(_wanted(rule, classes, served)))
    parts.pop((), None)
    found: dict[Probe, None] = {(): None, **dict.fromkeys(sorted(parts, key=len))}
    if len(parts) <= PAIRED_MAX:
        for one, other in combinations(parts, 2):
            merged = _merged(one, other)
            if merged is not None:
                found.setdefault(merged)
    return sorted(found, key=len)


def simplest(rules: Sequence[Rule], task_state: str, count: int) -> list[Probe]:
    """Return the default submission, and the fewest changes with which each rule holds, at most `count` of them."""
    served = None if task_state == NO_TASK else TASK_OPERATION[task_state]
    classes = {condition.reads: _classes(rules, condition, served) for condition in SETS}
    return [(), *islice((probe for rule in rules for probe in islice(_wanted(rule, classes, served), 1)), count)]


def _single(rules: Sequence[Rule], classes: dict[str, list[Any]]) -> Iterator[Probe]:
    for condition in _CHOICES:
        if any(one.wanted(rules) for one in ABOUT[condition.reads]):
            values = values_of(condition, rules)
            yield from ((Change(condition.reads, value),) for value in values if value != condition.usual)
    for field, members in classes.items():
        yield from ((Change(field, member),) for member in members)


def _wanted(rule: Rule, classes: dict[str, list[Any]], served: Operation | None) -> Iterator[Probe]:
    """Yield the fewest changes with which the rule holds; none if it cannot hold in the cell."""
    changes: list[Change] = []
    for condition in _CHOICES:
        tests = [one.kind.test(wanted) for one in ABOUT[condition.reads] if (wanted := one.of(rule)) is not None]
        if tests:
            values = (value for value in values_of(condition, [rule]) if all(test(value) for test in tests))
            value = next(values, None)
            if value is None:
                return
            if value != condition.usual:
                changes.append(Change(condition.reads, value))
    choices = [
        [Change(condition.reads, member) for member in sorted(some, key=_order)]
        for condition in SETS
        for some in _members_wanted(rule, condition, classes[condition.reads], served)
    ]
    for chosen in product(*choices):
        yield ordered((*changes, *dict.fromkeys(chosen)))


def _members_wanted(
    rule: Rule, condition: Condition, there: list[Any], served: Operation | None
) -> Iterator[frozenset[Any]]:
    """Yield sets of members, of each of which the rule wants one."""
    parts = [parts_of(one, wanted) for one in ABOUT[condition.reads] if (wanted := one.of(rule)) is not None]
    shunned = frozenset[Any]().union(*(each.none for each in parts))
    for each in parts:
        yield from (frozenset({member}) for member in each.every)
        if each.some and (condition.reads != "outstanding" or served not in each.some):
            yield each.some.intersection(there) - shunned


def _classes(rules: Sequence[Rule], condition: Condition, served: Operation | None) -> list[Any]:
    """Return one member of each class that no rule distinguishes."""
    wanted = [parts_of(one, each) for one in ABOUT[condition.reads] for each in one.wanted(rules)]
    asked = [parts for parts in wanted if any(parts)]
    named: dict[Any, list[Hashable]] = {}
    for number, parts in enumerate(asked):
        for mark, members in zip("an", (parts.some, parts.none), strict=True):
            for member in members:
                named.setdefault(member, []).append((number, mark))
        for member in parts.every:
            named.setdefault(member, []).append((number, member))
    first: dict[Hashable, Any] = {}
    for member in sorted(named, key=_order):
        if condition.reads != "outstanding" or member is not served:
            first.setdefault(tuple(named[member]), member)
    if wanted and not asked:
        return [next(kind for kind in _LIKELY_KINDS if kind is not served)]
    return list(first.values())


def _order(member: Any) -> Any:
    return tuple(Operation).index(member) if isinstance(member, Operation) else str(member)


def _merged(one: Probe, other: Probe) -> Probe | None:
    """Merge two probes; None if they contradict each other."""
    values: dict[str, Any] = {}
    for change in (*one, *other):
        if change.field not in _SETS and values.setdefault(change.field, change.value) != change.value:
            if change.field != "silent_ms":
                return None
            values["silent_ms"] = max(values["silent_ms"], change.value)
    many = {change for change in (*one, *other) if change.field in _SETS}
    return ordered((*(Change(field, value) for field, value in values.items()), *many))


def ordered(changes: Iterable[Change]) -> Probe:
    """Return the changes in canonical order."""
    return tuple(sorted(changes, key=lambda change: (change.field, str(change.value))))


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
