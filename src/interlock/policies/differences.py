"""Where two policies answer otherwise, told by the rules that make the difference.

Every combination of operation, vm_state and task_state is judged by both, plainly and under the circumstances that the
rules asked there name (see `probes`). Combinations in which the same two rules part company are one group, and a group
is told as a few products of sets. Differences in words that only people read (`because`) are none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from itertools import permutations, product
from typing import Any, NamedTuple

import msgspec

from interlock.core.operations import TASK_OPERATION, Operation
from interlock.core.policy import CompiledPolicy, Policy, Rule, Verdict, View
from interlock.core.states import NO_TASK, VmState
from interlock.policies.durations import seconds
from interlock.policies.meetings import Meetings
from interlock.policies.probes import Probe, applied, probes, words
from interlock.policies.tables import EVERYTHING, TASKS, Selection, Variant, compiled, variants, view_of


class Effect(StrEnum):
    """What a difference means for who asks."""

    LOOSER = "looser"
    """It is admitted where it was not, or sooner."""
    TIGHTER = "tighter"
    """It is refused, or called redundant, where it was not, or longer."""
    OTHER = "other"
    """It is as before admitted or not, in another way or with another reason."""


class Place(NamedTuple):
    """One combination."""

    operation: str
    """`Variant.word`: an operation, or such as `reboot_hard`."""
    vm_state: str
    task_state: str


class Product(msgspec.Struct, frozen=True, kw_only=True):
    """Every combination of some operations, vm_states and task_states."""

    operations: tuple[str, ...]
    vm_states: tuple[str, ...]
    task_states: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.operations) * len(self.vm_states) * len(self.task_states)


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """What one of the two policies answers."""

    rule: str
    """Its id; for one that stands for several operations, without the operation."""
    verdict: Verdict
    threshold_s: int | float | None
    reason: str
    source: str


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Where a rule of one policy and a rule of the other answer otherwise."""

    before: Side
    after: Side
    condition: str
    """Besides the combination, in words; empty if it shows with nothing in the way."""
    details: tuple[str, ...]
    """What else differs than verdict, threshold and reason, such as `grace 10s → 30s`."""
    effect: Effect
    follows: bool
    """Whether one of the two rules makes a difference under simpler circumstances already, in every combination."""
    combinations: int
    products: tuple[Product, ...]
    """Which they are: no combination is in two, the largest comes first."""


class Differences(msgspec.Struct, frozen=True, kw_only=True):
    """All that differs between two policies."""

    before: dict[str, str]
    """Name and digest."""
    after: dict[str, str]
    combinations: int
    """How many were compared."""
    differing: int
    """In how many of them something differs."""
    outstanding_max: tuple[int, int] | None
    """How many requests may be outstanding, where the two policies say otherwise."""
    operations: tuple[str, ...]
    """The operations that were compared, hard variants among them."""
    groups: tuple[Difference, ...]
    """What follows from another comes last, and before it what is admitted or not as before; else the largest first."""

    @property
    def any(self) -> bool:
        return bool(self.groups) or self.outstanding_max is not None


def differ(
    before: CompiledPolicy | Policy, after: CompiledPolicy | Policy, selection: Selection = EVERYTHING
) -> Differences:
    """Compare what two policies answer, everywhere or in a part of the matrix."""
    comparison = _Comparison(compiled(before), compiled(after), selection)
    compared = differing = 0
    collected: dict[tuple[Any, ...], tuple[Rule, Rule, list[Place]]] = {}
    for variant, vm_state, task_state in comparison.combinations():
        compared += 1
        found = comparison.parting(variant, vm_state, task_state)
        differing += bool(found)
        for probe, mine, yours, follows in found:
            key = (_family(mine), _answer(mine), _family(yours), _answer(yours), words(probe), follows)
            place = Place(variant.word, vm_state.value, task_state)
            collected.setdefault(key, (mine, yours, []))[2].append(place)
    groups = [
        Difference(
            before=_side(mine),
            after=_side(yours),
            condition=key[-2],
            details=tuple(_details(mine, yours)),
            effect=_effect(mine, yours),
            follows=key[-1],
            combinations=len(places),
            products=cover(places),
        )
        for key, (mine, yours, places) in collected.items()
    ]
    maxima = (comparison.before.outstanding_max, comparison.after.outstanding_max)
    return Differences(
        before=comparison.before.stamp,
        after=comparison.after.stamp,
        combinations=compared,
        differing=differing,
        outstanding_max=maxima if maxima[0] != maxima[1] else None,
        operations=tuple(variant.word for variant in comparison.variants),
        groups=tuple(sorted(groups, key=lambda one: (one.follows, one.effect is Effect.OTHER, -one.combinations))),
    )


class _Parting(NamedTuple):
    """Two rules that answer otherwise, and the simplest circumstances in which they do."""

    probe: Probe
    before: Rule
    after: Rule
    follows: bool


class _Comparison:
    """Two policies, and what is known of where their rules part."""

    def __init__(self, before: CompiledPolicy, after: CompiledPolicy, selection: Selection) -> None:
        self.before = before
        self.after = after
        there = {*variants(before), *variants(after)}
        self.variants = [
            variant
            for operation in Operation
            for variant in (Variant(operation), Variant(operation, hard=True))
            if variant in there and (selection.variants is None or variant in selection.variants)
        ]
        self._selection = selection
        self._known: dict[tuple[Any, ...], list[_Parting]] = {}

    def combinations(self) -> Iterator[tuple[Variant, VmState, str]]:
        vm_states, task_states = self._selection.vm_states, self._selection.task_states
        return product(
            self.variants,
            (state for state in VmState if vm_states is None or state in vm_states),
            (task for task in TASKS if task_states is None or task in task_states),
        )

    def parting(self, variant: Variant, vm_state: VmState, task_state: str) -> list[_Parting]:
        """The pairs of rules that answer otherwise in one combination, each with the simplest circumstances."""
        mine, yours = (policy.cell(variant.operation, vm_state, task_state) for policy in (self.before, self.after))
        asked = (*mine, *yours)
        # Only rules that look at what is outstanding can tell one served operation from another.
        served = TASK_OPERATION.get(task_state) if any(rule.outstanding is not None for rule in asked) else None
        key = (variant.hard, served, tuple(map(id, mine)), tuple(map(id, yours)))
        if key not in self._known:
            self._known[key] = [] if _same(mine, yours) else self._part(variant, vm_state, task_state, (mine, yours))
        return self._known[key]

    def _part(
        self, variant: Variant, vm_state: VmState, task_state: str, asked: tuple[tuple[Rule, ...], tuple[Rule, ...]]
    ) -> list[_Parting]:
        plain = view_of(variant, vm_state, task_state)
        found: dict[tuple[str, str], _Parting] = {}
        for probe in probes((*asked[0], *asked[1]), task_state):
            self._judge(plain, probe, found)
        # What no probe has found is looked for.
        meetings = Meetings(asked[0], asked[1], task_state, hard=variant.hard)
        for mine, yours, region, before in meetings.pairs():
            if _answer(mine) != _answer(yours) and (mine.id, yours.id) not in found:
                rest = meetings.circumstances(region, before)
                if rest is not None:
                    self._judge(plain, rest, found)
        return list(found.values())

    def _judge(self, plain: View, probe: Probe, found: dict[tuple[str, str], _Parting]) -> None:
        view = applied(plain, probe)
        mine, yours = self.before.decide(view), self.after.decide(view)
        if _answer(mine) != _answer(yours) and (mine.id, yours.id) not in found:
            simpler = (one for one in found.values() if set(one.probe) < set(probe))
            follows = any(one.before is mine or one.after is yours for one in simpler)
            found[mine.id, yours.id] = _Parting(probe, mine, yours, follows)


def _same(mine: tuple[Rule, ...], yours: tuple[Rule, ...]) -> bool:
    """Whether the rules are the same but for what only people read."""
    return len(mine) == len(yours) and all(
        one is other or _bare(one) == _bare(other) for one, other in zip(mine, yours, strict=True)
    )


def _bare(rule: Rule) -> Rule:
    return msgspec.structs.replace(rule, id="", because=None, source="", fixed=False, reason=rule.code)


def _answer(rule: Rule) -> tuple[Any, ...]:
    """All of a rule that decides what becomes of a request that it matches."""
    match rule.verdict:
        case Verdict.ADMIT:
            return rule.verdict, rule.in_turn
        case Verdict.PREEMPT:
            return rule.verdict, rule.grace_ms
        case Verdict.AFTER:
            return rule.verdict, rule.code, rule.threshold_ms, rule.measured_from, rule.before
        case _:
            return rule.verdict, rule.code


def _effect(mine: Rule, yours: Rule) -> Effect:
    ranks = [_SOONEST[rule.verdict] for rule in (mine, yours)]
    if mine.verdict is yours.verdict is Verdict.AFTER:
        ranks = [-(rule.threshold_ms or 0) for rule in (mine, yours)]
    if ranks[0] == ranks[1]:
        return Effect.OTHER
    return Effect.LOOSER if ranks[0] < ranks[1] else Effect.TIGHTER


_SOONEST = {Verdict.DENY: 0, Verdict.REDUNDANT: 0, Verdict.AFTER: 1, Verdict.ADMIT: 2, Verdict.PREEMPT: 2}


def _details(mine: Rule, yours: Rule) -> Iterable[str]:
    if mine.verdict is not yours.verdict:
        return
    match mine.verdict:
        case Verdict.ADMIT if mine.in_turn is not yours.in_turn:
            yield f"in_turn {str(mine.in_turn).lower()} → {str(yours.in_turn).lower()}"
        case Verdict.PREEMPT:
            yield f"grace {seconds(mine.grace_ms)}s → {seconds(yours.grace_ms)}s"
        case Verdict.AFTER:
            if mine.measured_from is not yours.measured_from:
                yield f"measured_from {mine.measured_from.value} → {yours.measured_from.value}"
            if mine.before is not yours.before:
                yield f"before {mine.before.value} → {yours.before.value}"
        case _:
            return


def _side(rule: Rule) -> Side:
    admits = rule.verdict in (Verdict.ADMIT, Verdict.PREEMPT)
    return Side(
        rule=_family(rule),
        verdict=rule.verdict,
        threshold_s=seconds(rule.threshold_ms or 0) if rule.verdict is Verdict.AFTER else None,
        reason="" if admits else rule.code,
        source=rule.source,
    )


_OPERATIONS = frozenset(operation.value for operation in Operation)


def _family(rule: Rule) -> str:
    """The id as it stands in the file: a rule that became one an operation has the operation behind a dot."""
    start, dot, end = rule.id.rpartition(".")
    return start if dot and end in _OPERATIONS else rule.id


# ------------------------------------------------------------------------------------------------------- products


def cover(places: Iterable[Place]) -> tuple[Product, ...]:
    """Products that have every place, once each, and nothing else: the fewest of those that are easily found."""
    wanted = list(places)
    best = min((_products(wanted, order) for order in permutations(range(3))), key=len)
    return tuple(sorted((_in_order(sets) for sets in best), key=lambda one: -one.size))


def _products(places: list[Place], order: tuple[int, ...]) -> list[tuple[frozenset[str], ...]]:
    """Gather the values of one axis, then those of the next that have the same ones, then those of the last."""
    rest = [tuple(place[axis] for axis in order) for place in places]
    # (second, third) -> values of the first axis; then (third, those) -> second; then those -> third.
    by_first = _gather(((place[1], place[2]), place[0]) for place in rest)
    by_second = _gather(((pair[1], firsts), pair[0]) for pair, firsts in by_first.items())
    by_third = _gather(((firsts, seconds_), third) for (third, firsts), seconds_ in by_second.items())
    found = []
    for (firsts, seconds_), thirds in by_third.items():
        sets = dict(zip(order, (firsts, seconds_, thirds), strict=True))
        found.append(tuple(sets[axis] for axis in range(3)))
    return found


def _gather(pairs: Iterable[tuple[Any, str]]) -> dict[Any, frozenset[str]]:
    values: dict[Any, set[str]] = {}
    for key, value in pairs:
        values.setdefault(key, set()).add(value)
    return {key: frozenset(members) for key, members in values.items()}


def _in_order(sets: tuple[frozenset[str], ...]) -> Product:
    operations, vm_states, task_states = sets
    return Product(
        operations=tuple(word for word in _WORDS if word in operations),
        vm_states=tuple(state.value for state in VmState if state.value in vm_states),
        task_states=tuple(task for task in TASKS if task in task_states),
    )


_WORDS = tuple(Variant(operation, hard).word for operation in Operation for hard in (False, True))


def told(one: Product, asked: Iterable[str] = _WORDS) -> str:
    """A product as people say it: `stop, reboot | in active, paused | while @reboot`.

    `asked` are the operations that were compared.
    """
    operations = _some(one.operations, asked, "every operation")
    deleted = VmState.DELETED.value
    states = [state.value for state in VmState if state is not VmState.DELETED or deleted in one.vm_states]
    return f"{operations} | in {_some(one.vm_states, states, 'any state')} | {_while(one.task_states)}"


def _some(there: Sequence[str], every: Iterable[str], whole: str) -> str:
    """The words themselves, or what they leave out where that is shorter."""
    missing = [word for word in every if word not in there]
    if not missing:
        return whole
    return f"{whole} but {', '.join(missing)}" if len(missing) * 2 < len(there) else ", ".join(there)


def _while(task_states: Sequence[str]) -> str:
    tasks = [task for task in task_states if task != NO_TASK]
    if not tasks:
        return "with no task"
    text = f"while {_some(_groups(tasks), _groups(TASKS[1:]), 'anything is being done')}"
    return text if len(tasks) == len(task_states) else f"{text}, or with no task"


def _groups(tasks: Sequence[str]) -> list[str]:
    """Task states, those of an operation of which all are there by its name."""
    found: dict[str, None] = {}
    for task in tasks:
        operation = TASK_OPERATION[task]
        whole = all(phase in tasks for phase in TASKS[1:] if TASK_OPERATION[phase] is operation)
        found[f"@{operation.value}" if whole else task] = None
    return list(found)
