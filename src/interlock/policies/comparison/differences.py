"""Semantic diff of two policies, grouped by the pairs of rules that decide differently.

Both judge every combination of operation, vm_state and task_state, by default and under the circumstances in the rules
(see `probes`). A group is described as a few products of sets. Texts for people (`because`) are not compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from itertools import permutations, product
from typing import Any, NamedTuple, assert_never

import msgspec

from interlock.core.durations import seconds
from interlock.core.operations import TASK_OPERATION, Operation
from interlock.core.policy import CompiledPolicy, Policy, Rule, Verdict
from interlock.core.states import NO_TASK, VmState
from interlock.core.views import View
from interlock.policies.lint.reachability import Cell, Reaching
from interlock.policies.lint.sample_views import Meetings, Probe, applied, probes, simplest, words
from interlock.policies.rendering.tables import EVERYTHING, TASKS, Selection, Variant, compiled, variants, view_of

WORK_MAX = 10_000_000
"""How many rules are asked before the rest is looked at less closely."""
SHARE_MIN = 12_000
"""How many are asked in each kind of combination even then."""


class Effect(StrEnum):
    """What a difference means for the caller."""

    LOOSER = "looser"
    """It is admitted where it was not, or sooner."""
    TIGHTER = "tighter"
    """It is refused, or called redundant, where it was not, or longer."""
    OTHER = "other"
    """It is as before admitted or not, in another way or with another reason."""


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of one of the two policies."""

    rule: str
    """Its id; for one that stands for several operations, without the operation."""
    verdict: Verdict
    threshold_s: int | float | None
    reason: str
    source: str


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Combinations that a rule of each policy decides differently."""

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
    """The differences between two policies."""

    before: dict[str, str]
    """Name and digest."""
    after: dict[str, str]
    combinations: int
    """How many were compared."""
    differing: int
    """In how many of them something differs."""
    outstanding_max: tuple[int, int] | None
    """`outstanding_max` of both, if they differ."""
    protected_tags: tuple[tuple[str, ...], tuple[str, ...]] | None
    """`protected_tags` of both, if they differ."""
    served_at_most: tuple[dict[str, int], dict[str, int]] | None
    """`[served_at_most]` of both, in milliseconds by operation, if they differ."""
    complete: bool
    """False if the limits of the analysis were reached."""
    operations: tuple[str, ...]
    """The operations that were compared, hard variants among them."""
    groups: tuple[Difference, ...]
    """What follows from another comes last, and before it what is admitted or not as before; else the largest first."""

    @property
    def any(self) -> bool:
        """Whether they differ, or may differ because the analysis is incomplete."""
        limits = (self.outstanding_max, self.protected_tags, self.served_at_most)
        return bool(self.groups) or any(one is not None for one in limits) or not self.complete


def differ(
    before: CompiledPolicy | Policy, after: CompiledPolicy | Policy, selection: Selection = EVERYTHING
) -> Differences:
    """Compare the answers of two policies, for all combinations or a selection."""
    comparison = _Comparison(compiled(before), compiled(after), selection)
    alike: dict[Any, list[Combination]] = {}
    for variant, vm_state, task_state in comparison.combinations():
        key = comparison.kind(variant, vm_state, task_state)
        alike.setdefault(key, []).append(Combination(variant.word, vm_state.value, task_state))
    collected: dict[tuple[Any, ...], tuple[Rule, Rule, list[Any]]] = {}
    differing = 0
    for left, (kind, places) in zip(range(len(alike), 0, -1), alike.items(), strict=True):
        partings = comparison.partings(places[0], left)
        differing += len(places) if partings else 0
        for probe, mine, yours, follows in partings:
            key = (mine.family, _answer(mine), yours.family, _answer(yours), words(probe), follows)
            collected.setdefault(key, (mine, yours, []))[2].append(kind)
    covers: dict[tuple[Any, ...], tuple[Product, ...]] = {}
    groups = []
    for key, (mine, yours, kinds) in collected.items():
        found = tuple(dict.fromkeys(kinds))
        if found not in covers:
            covers[found] = cover(place for kind in found for place in alike[kind])
        groups.append(_difference(mine, yours, key[-2], follows=key[-1], products=covers[found]))
    tags = (comparison.before.policy.protected_tags, comparison.after.policy.protected_tags)
    limits = (_limits(comparison.before), _limits(comparison.after))
    maxima = (comparison.before.outstanding_max, comparison.after.outstanding_max)
    return Differences(
        before=comparison.before.stamp,
        after=comparison.after.stamp,
        combinations=sum(map(len, alike.values())),
        differing=differing,
        outstanding_max=maxima if maxima[0] != maxima[1] else None,
        protected_tags=tags if set(tags[0]) != set(tags[1]) else None,
        served_at_most=limits if limits[0] != limits[1] else None,
        complete=comparison.complete,
        operations=tuple(variant.word for variant in comparison.variants),
        groups=tuple(sorted(groups, key=lambda one: (one.follows, one.effect is Effect.OTHER, -one.combinations))),
    )


def _limits(policy: CompiledPolicy) -> dict[str, int]:
    return {operation.value: limit_ms for operation, limit_ms in policy.policy.served_at_most.items() if limit_ms}


class _Parting(NamedTuple):
    """Two rules that decide differently, and the simplest circumstances in which they do."""

    probe: Probe
    before: Rule
    after: Rule
    follows: bool


class _Comparison:
    """Compares two policies, and caches which of their rules differ."""

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
        self._programs = [Reaching(policy.rules) for policy in (before, after)]
        self.complete = True
        self._work = WORK_MAX

    def combinations(self) -> Iterator[tuple[Variant, VmState, str]]:
        vm_states, task_states = self._selection.vm_states, self._selection.task_states
        return product(
            self.variants,
            (state for state in VmState if vm_states is None or state in vm_states),
            (task for task in TASKS if task_states is None or task in task_states),
        )

    def kind(self, variant: Variant, vm_state: VmState, task_state: str) -> tuple[Any, ...]:
        """What two combinations have in common that are compared with the same result."""
        cell = Cell(variant.operation, vm_state, task_state)
        programs = (each.program(cell) for each in self._programs)
        return (variant.hard, TASK_OPERATION.get(task_state), vm_state is VmState.DELETED, *programs)

    def partings(self, place: Combination, left: int) -> list[_Parting]:
        """The pairs of rules that answer otherwise in one combination, each with the simplest circumstances.

        `left` is how many kinds of combinations are still to be compared, which share what work there is.
        """
        hard = place.operation not in tuple(Operation)
        operation = Operation(place.operation.removesuffix("_hard") if hard else place.operation)
        vm_state = VmState(place.vm_state)
        mine, yours = (policy.cell(operation, vm_state, place.task_state) for policy in (self.before, self.after))
        if _same(mine, yours):
            return []
        found = _Found(view_of(Variant(operation, hard), vm_state, place.task_state), self.before, self.after)
        share = max(SHARE_MIN, self._work // left)
        rest = self._look(found, mine, yours, place.task_state, share, hard=hard)
        self._work = max(0, self._work - (share - max(0, rest)))
        self.complete &= rest > 0
        return found.partings

    def _look(
        self, found: _Found, mine: tuple[Rule, ...], yours: tuple[Rule, ...], task_state: str, work: int, *, hard: bool
    ) -> int:
        """Try the circumstances that the rules name; how much of the work is left when all is done."""
        cost = len(mine) + len(yours)
        if cost * cost > work:
            # There are too many rules for trying what each of them names. What only one policy has shows most.
            for probe in simplest(_unshared(mine, yours), task_state, work // cost):
                found.judge(probe)
            return 0
        for probe in probes((*mine, *yours), task_state):
            found.judge(probe)
            work -= cost
            if work <= 0:
                return 0
        # What no probe has shown of either rule is looked for.
        meetings = Meetings(mine, yours, task_state, hard=hard)
        for one, other in meetings.pairs():
            work -= 1
            if found.lacks(one, other) and _answer(one) != _answer(other):
                work -= cost
                if (probe_found := meetings.circumstances(one, other)) is not None:
                    found.judge(probe_found)
            if work <= 0:
                return 0
        return work


class _Found:
    """What was found in one combination."""

    def __init__(self, plain: View, before: CompiledPolicy, after: CompiledPolicy) -> None:
        self._plain = plain
        self._policies = (before, after)
        self._pairs: set[tuple[str, str]] = set()
        self._by_rule: tuple[dict[str, list[Probe]], dict[str, list[Probe]]] = ({}, {})
        self.partings: list[_Parting] = []

    def lacks(self, mine: Rule, yours: Rule) -> bool:
        """Whether neither rule is known to make a difference."""
        return mine.id not in self._by_rule[0] and yours.id not in self._by_rule[1]

    def judge(self, probe: Probe) -> None:
        view = applied(self._plain, probe)
        mine, yours = (policy.decide(view) for policy in self._policies)
        if (mine.id, yours.id) in self._pairs or _answer(mine) == _answer(yours):
            return
        known = [by.setdefault(rule.id, []) for by, rule in zip(self._by_rule, (mine, yours), strict=True)]
        follows = any(set(simpler) < set(probe) for each in known for simpler in each)
        self._pairs.add((mine.id, yours.id))
        self.partings.append(_Parting(probe, mine, yours, follows))
        for each in known:
            each.append(probe)


def _same(mine: tuple[Rule, ...], yours: tuple[Rule, ...]) -> bool:
    """Whether the rules are the same but for what only people read."""
    return len(mine) == len(yours) and all(
        one is other or _bare(one) == _bare(other) for one, other in zip(mine, yours, strict=True)
    )


def _unshared(mine: tuple[Rule, ...], yours: tuple[Rule, ...]) -> list[Rule]:
    """Return the rules that only one of the two has."""
    bare = [{_bare(rule): rule for rule in rules} for rules in (mine, yours)]
    return [rule for one, other in (bare, reversed(bare)) for key, rule in one.items() if key not in other]


def _bare(rule: Rule) -> Rule:
    return msgspec.structs.replace(rule, id="", because=None, source="", fixed=False, reason=rule.code)


def _answer(rule: Rule) -> tuple[Any, ...]:
    """All of a rule that decides what becomes of a request that it matches."""
    match rule.verdict:
        case Verdict.ADMIT:
            return rule.verdict, rule.in_turn, rule.served_at_most_ms
        case Verdict.PREEMPT:
            return rule.verdict, rule.grace_ms, rule.served_at_most_ms
        case Verdict.AFTER:
            return (
                *(rule.verdict, rule.code, rule.threshold_ms, rule.measured_from, rule.before),
                rule.served_at_most_ms,
            )
        case Verdict.DENY | Verdict.REDUNDANT:
            return rule.verdict, rule.code, rule.unless_approved_by, rule.approve_within_ms
        case _:
            assert_never(rule.verdict)


def _effect(mine: Rule, yours: Rule) -> Effect:
    ranks = [_SOONEST[rule.verdict] for rule in (mine, yours)]
    if mine.verdict is yours.verdict is Verdict.AFTER:
        ranks = [-(rule.threshold_ms or 0) for rule in (mine, yours)]
    if ranks[0] == ranks[1]:
        return Effect.OTHER
    return Effect.LOOSER if ranks[0] < ranks[1] else Effect.TIGHTER


_SOONEST = {Verdict.DENY: 0, Verdict.REDUNDANT: 0, Verdict.AFTER: 1, Verdict.ADMIT: 2, Verdict.PREEMPT: 2}


def _difference(mine: Rule, yours: Rule, condition: str, *, follows: bool, products: tuple[Product, ...]) -> Difference:
    return Difference(
        before=_side(mine),
        after=_side(yours),
        condition=condition,
        details=(*_details(mine, yours), *_limit_details(mine, yours)),
        effect=_effect(mine, yours),
        follows=follows,
        combinations=sum(each.size for each in products),
        products=products,
    )


def _details(mine: Rule, yours: Rule) -> Iterable[str]:
    if mine.verdict is not yours.verdict:
        return
    match mine.verdict:
        case Verdict.ADMIT:
            if mine.in_turn is not yours.in_turn:
                yield f"in_turn {str(mine.in_turn).lower()} → {str(yours.in_turn).lower()}"
        case Verdict.PREEMPT:
            if mine.grace_ms != yours.grace_ms:
                yield f"grace {seconds(mine.grace_ms)}s → {seconds(yours.grace_ms)}s"
        case Verdict.AFTER:
            if mine.measured_from is not yours.measured_from:
                yield f"measured_from {mine.measured_from.value} → {yours.measured_from.value}"
            if mine.before is not yours.before:
                yield f"before {mine.before.value} → {yours.before.value}"
        case Verdict.DENY | Verdict.REDUNDANT:
            pass
        case _:
            assert_never(mine.verdict)


def _limit_details(mine: Rule, yours: Rule) -> Iterable[str]:
    if mine.verdict is yours.verdict and mine.served_at_most_ms != yours.served_at_most_ms:
        yield f"served_at_most {_limit(mine)} → {_limit(yours)}"


def _limit(rule: Rule) -> str:
    if rule.served_at_most_ms is None:
        return "default"
    return f"{seconds(rule.served_at_most_ms)}s" if rule.served_at_most_ms else "unlimited"


def _side(rule: Rule) -> Side:
    admits = rule.verdict in (Verdict.ADMIT, Verdict.PREEMPT)
    return Side(
        rule=rule.family,
        verdict=rule.verdict,
        threshold_s=seconds(rule.threshold_ms or 0) if rule.verdict is Verdict.AFTER else None,
        reason="" if admits else rule.code,
        source=rule.source,
    )


class Combination(NamedTuple):
    """One combination."""

    operation: str
    """`Variant.word`: an operation, or for example `reboot_hard`."""
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


def cover(places: Iterable[Combination]) -> tuple[Product, ...]:
    """Partition the combinations into few products (greedy)."""
    wanted = list(places)
    best = min((_products(wanted, order) for order in permutations(range(3))), key=len)
    return tuple(sorted((_in_order(sets) for sets in best), key=lambda one: -one.size))


def _products(places: list[Combination], order: tuple[int, ...]) -> list[tuple[frozenset[str], ...]]:
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


def product_text(one: Product, asked: Iterable[str] = _WORDS) -> str:
    """A product as people say it: `stop, reboot | in active, paused | while @reboot`.

    `asked` are the operations that were compared.
    """
    operations = _some(one.operations, asked, "every operation")
    deleted = VmState.DELETED.value
    states = [state.value for state in VmState if state is not VmState.DELETED or deleted in one.vm_states]
    return f"{operations} | in {_some(one.vm_states, states, 'any state')} | {_while(one.task_states)}"


def _some(there: Sequence[str], every: Iterable[str], whole: str) -> str:
    """List the words, or those left out if that is shorter."""
    missing = [word for word in every if word not in there]
    if not missing:
        return whole
    return f"{whole} but {', '.join(missing)}" if len(missing) * 2 < len(there) else ", ".join(there)


def _while(task_states: Sequence[str]) -> str:
    tasks = [task for task in task_states if task != NO_TASK]
    if not tasks:
        return "with no task"
    text = f"while {_some(_groups(tasks), _groups(TASKS[1:]), 'any operation is in progress')}"
    return text if len(tasks) == len(task_states) else f"{text}, or with no task"


def _groups(tasks: Sequence[str]) -> list[str]:
    """Task states, those of an operation of which all are there by its name."""
    found: dict[str, None] = {}
    for task in tasks:
        operation = TASK_OPERATION[task]
        whole = all(phase in tasks for phase in TASKS[1:] if TASK_OPERATION[phase] is operation)
        found[f"@{operation.value}" if whole else task] = None
    return list(found)
