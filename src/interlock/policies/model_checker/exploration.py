"""Run the model checker on a policy: build the model, search, check liveness, replay counterexamples on the core."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Final

import numpy as np

from interlock.core.errors import Invalid
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.policies.model_checker.actions import Alphabet
from interlock.policies.model_checker.assumptions import assumptions, with_assumed_values
from interlock.policies.model_checker.counterexamples import CounterexampleBuilder
from interlock.policies.model_checker.gate_table import GateEffect, Ints
from interlock.policies.model_checker.liveness import Stuck, find_stuck
from interlock.policies.model_checker.model import Model
from interlock.policies.model_checker.packed_laws import described
from interlock.policies.model_checker.results import Exit, Exploration, OnProgress, OutOfTime, RolePromise, Violation
from interlock.policies.model_checker.search import Search

DEFAULT_STATES_MAX: Final = 20_000_000
_SEARCH_SHARE: Final = 0.6
_LIVENESS_SHARE: Final = 0.9
"""Shares of a time limit at which the search and the liveness check end; the rest is for counterexamples."""
_NO_REMEDY: Final = frozenset({Operation.DELETE, Operation.FORCE_DELETE, Operation.RESET_STATE})


def explore(
    policy: CompiledPolicy,
    *,
    operations: Iterable[Operation] | None = None,
    starts: Iterable[VmState] = (VmState.BUILDING,),
    outstanding_max: int = 3,
    faults_max: int | None = None,
    states_max: int = DEFAULT_STATES_MAX,
    seconds_max: float | None = None,
    role: Role = Role.MEMBER,
    goal: VmState = VmState.DELETED,
    on_progress: OnProgress | None = None,
) -> Exploration:
    """Search from `starts` with `operations` (None: all) submitted by all callers, up to `outstanding_max` outstanding.

    One operation that leads to `goal` may exceed that bound, since it must always be admissible. Law 5 demands that
    some caller can reach the goal; `weaker` of the result says where callers of `role` cannot. `faults_max` limits
    failures and guest ends on one path (None: no limit); a worker may always hang. `seconds_max` ends the search early,
    with `complete` false, perhaps before any state was looked at, and lowers `outstanding_max` where states would not
    fit into a word.

    Raises:
        Invalid: a state does not fit into a word with so many operations, ages and outstanding requests.
        BrokenInvariant: the core does not replay a counterexample, which is a defect of the model checker.
    """
    started_s = time.monotonic()
    policy, assumed = with_assumed_values(policy)
    limit_s = math.inf if seconds_max is None else seconds_max
    tried, first = tuple(Operation if operations is None else operations), tuple(starts)
    search_until_s, until_s = (started_s + share * limit_s for share in (_SEARCH_SHARE, _LIVENESS_SHARE))

    try:
        alphabet = Alphabet(policy, tried, first, search_until_s)
        build = partial(Model, policy, tried, starts=first, faults_max=faults_max, goal=goal, alphabet=alphabet)
        model, outstanding_used = _largest_model(build, outstanding_max, outstanding_max if seconds_max is None else 1)
    except OutOfTime:
        return _nothing_searched(tried, outstanding_max, time.monotonic() - started_s)
    search = Search(model, on_progress)
    search.run(states_max=states_max, started_s=started_s, until_s=search_until_s)
    stuck = _find_stuck(search, role, until_s)
    if stuck is not None:
        _report_stuck(search, stuck, goal)
    seconds = time.monotonic() - started_s
    violations, undecided = _violations(search)
    return Exploration(
        states=min(search.visited.count, states_max),
        transitions=search.transitions,
        complete=search.complete and stuck is not None and not undecided and outstanding_used == outstanding_max,
        operations=model.alphabet.operations,
        outstanding_max=outstanding_used,
        violations=violations,
        undecided=undecided,
        seconds=seconds,
        depth=search.depth,
        assumptions=(*assumptions(model, tried, outstanding_used, stuck), *assumed),
        until_silence=() if stuck is None else _listed(search, stuck.until_silence, stuck.for_everyone),
        weaker=None if stuck is None else _weaker(search, stuck, role),
        exits=tuple(_exits(model)),
    )


def _nothing_searched(operations: tuple[Operation, ...], outstanding_max: int, seconds: float) -> Exploration:
    """Return the result of a search that ended before its tables were built."""
    return Exploration(
        states=0,
        transitions=0,
        complete=False,
        operations=operations,
        outstanding_max=outstanding_max,
        violations=(),
        seconds=seconds,
    )


def _find_stuck(search: Search, role: Role, until_s: float) -> Stuck | None:
    """Return the states that are stuck; None if that takes too long."""
    search.model.alphabet.until_s = until_s
    try:
        return find_stuck(search.model, search.visited, search.expanded, role, until_s)
    except OutOfTime:
        return None
    finally:
        search.model.alphabet.until_s = math.inf


def _largest_model(build_model: Callable[..., Model], most: int, least: int) -> tuple[Model, int]:
    """Return the model with the most outstanding requests whose states fit into a word, and that number."""
    while True:
        try:
            return build_model(outstanding_max=most), most
        except Invalid:
            if most == least:
                raise
            most -= 1


def _report_stuck(search: Search, stuck: Stuck, goal: VmState) -> None:
    """Report every state from which no caller can reach the goal."""
    if len(stuck.for_everyone):
        what = f"{goal.value} cannot be reached from {{}} without its worker's help"
        search.laws.report_stuck(stuck.for_everyone, search.visited.words[stuck.for_everyone], what)


def _weaker(search: Search, stuck: Stuck, role: Role) -> RolePromise:
    """Return in which states callers of the role cannot reach the goal, and others can."""
    return RolePromise(role=role, cannot=_listed(search, stuck.for_role, stuck.for_everyone))


def _listed(search: Search, stuck: Ints, reported: Ints) -> tuple[str, ...]:
    """Describe the states that are stuck and not reported as violations."""
    alone = np.setdiff1d(stuck, reported, assume_unique=True)
    words, layout = search.visited.words[alone], search.model.layout
    # Where a request only has to be taken, the state after that is listed.
    shown = (words & layout.queue.mask == 0) | (words & (layout.task.mask | layout.component.mask) > 0)
    return tuple(described(search.model, words[shown]))


def _violations(search: Search) -> tuple[tuple[Violation, ...], tuple[str, ...]]:
    """Return the violations, and those undecided: age classes over-approximate, so that some paths have no timing."""
    undecided: list[str] = []
    found: list[Violation] = []
    builder = CounterexampleBuilder(search.model, search.visited)
    for breach, candidates in search.breaches.found.items():
        stories = (builder.build(candidate.state, candidate.action) for candidate in candidates)
        story = next((story for story in stories if story is not None), None)
        if story is None:
            undecided.append(f"law {breach.law}: {breach.what}")
        else:
            found.append(Violation(law=breach.law, what=breach.what, story=story))
    return tuple(sorted(found, key=lambda one: len(one.story))), tuple(undecided)


def _exits(model: Model) -> Iterator[Exit]:
    """Yield what is possible during each task that was reached, with nothing else outstanding."""
    words = model.gate.tasks_alone()
    answers = model.gate.answers(words)
    tasks = model.layout.task.of(words)
    states = model.tables.vm_state[model.layout.base.of(words)]
    found: dict[tuple[int, int], dict[bool, set[Operation]]] = {}
    for state, task in zip(states.tolist(), tasks.tolist(), strict=True):
        found.setdefault((state, task), {True: set(), False: set()})
    for row, submission, effect in zip(
        answers.rows.tolist(), answers.submission.tolist(), answers.effect.tolist(), strict=True
    ):
        operation = model.alphabet.submissions[submission].operation
        if effect in (GateEffect.ADMIT, GateEffect.TAKE_OVER, GateEffect.PREEMPT) and operation not in _NO_REMEDY:
            found[int(states[row]), int(tasks[row])][effect != GateEffect.ADMIT].add(operation)
    for (state, task), possible in sorted(found.items()):
        if model.tables.task_leads_to_goal[task]:
            continue
        yield Exit(
            vm_state=tuple(VmState)[state],
            task_state=model.alphabet.tasks[task - 1].phase,
            takeovers=tuple(sorted(possible[True])),
            queued=tuple(sorted(possible[False] - possible[True])),
        )
