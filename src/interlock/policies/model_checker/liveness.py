"""Liveness check (law 5): whether the goal can be reached from every state although no other worker ever reports.

A fixpoint over all states: a state is safe if a transition that needs no other worker leads to a safe one. These are
submissions, taking a request, time that passes, and the success of an operation that leads to the goal. Where that does
not suffice, the success of a soft delete counts too, since the server deletes the instance when its time is over, and
then that of an evacuation, which is performed by another host.

It is first computed for the callers of one role alone, and then for callers of all roles.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from interlock.core.operations import Operation
from interlock.core.roles import Role
from interlock.policies.model_checker.gate_table import Bools, Ints
from interlock.policies.model_checker.layout import Words
from interlock.policies.model_checker.model import Model
from interlock.policies.model_checker.steps import Transitions
from interlock.policies.model_checker.visited_states import Visited

_CHUNK: Final = 65_536
_COMPLETED: Final = ((), (Operation.SOFT_DELETE,), (Operation.SOFT_DELETE, Operation.EVACUATE))
"""What may have to complete, besides what leads to the goal; the least first."""


class Stuck(NamedTuple):
    """The numbers of the states from which the goal cannot be reached."""

    for_role: Ints
    """By callers of the role alone."""
    for_everyone: Ints
    completed: tuple[Operation, ...] = ()
    """The operations that have to complete for a role, or everyone, to reach the goal from some state."""


class _Means(NamedTuple):
    """What counts as a transition that needs no other worker."""

    role: Role | None
    """The role of the callers; None: any."""
    deletions: bool
    """Whether only operations that lead to the goal are submitted: they nearly always suffice."""
    completed: tuple[Operation, ...] = ()
    """The operations in service that succeed, besides those that lead to the goal."""


def find_stuck(
    model: Model, visited: Visited, expanded: int, role: Role = Role.MEMBER, until_s: float = math.inf
) -> Stuck | None:
    """Return the states from which the goal cannot be reached; None if time ran out at `until_s`.

    States that were found but not expanded do not count as stuck.
    """
    safe = model.tables.is_goal[model.layout.base.of(visited.words)]
    safe[expanded:] = True
    stuck = Stuck(np.zeros(0, np.int64), np.flatnonzero(~safe))
    for callers in (role, None):
        pending = stuck.for_everyone
        for means in (_Means(callers, deletions=True), *(_Means(callers, False, some) for some in _COMPLETED)):
            left = _reduced(model, visited, safe, pending, means, until_s)
            if left is None:
                return None
            if means.completed and len(left) < len(pending):
                stuck = stuck._replace(completed=max(stuck.completed, means.completed, key=len))
            pending = left
        stuck = stuck._replace(for_everyone=pending, for_role=stuck.for_role if callers is None else pending)
    return stuck


def _reduced(model: Model, visited: Visited, safe: Bools, pending: Ints, means: _Means, until_s: float) -> Ints | None:
    """Mark the states that are safe by these means; return those of `pending` that are not, or None if time ran out."""
    while len(pending):
        for first in range(0, len(pending), _CHUNK):
            if time.monotonic() >= until_s:
                return None
            _expand(model, visited, safe, pending[first : first + _CHUNK], means)
        left = pending[~safe[pending]]
        if len(left) == len(pending):
            break
        pending = left
    return pending


def _expand(model: Model, visited: Visited, safe: Bools, numbers: Ints, means: _Means) -> None:
    words = visited.words[numbers]
    for transitions in _unaided(model, words, means):
        open_rows = np.flatnonzero(~safe[numbers[transitions.rows]])
        found = visited.find(transitions.words[open_rows])
        there = open_rows[(found >= 0) & safe[found]]
        safe[numbers[transitions.rows[there]]] = True


def _unaided(model: Model, words: Words, means: _Means) -> Iterator[Transitions]:
    layout, tables, steps = model.layout, model.tables, model.steps
    task, component = layout.task.of(words), layout.component.of(words)
    succeeds = tables.task_leads_to_goal | tables.is_task_of(means.completed)
    yield steps.succeeded(words, np.flatnonzero(succeeds[task]))
    yield steps.take(words, task, component)
    yield steps.take_component(words, task, component)
    yield steps.deadline(words)
    yield from model.gate.transitions(words, model.gate.ways_out(words, means.role, deletions=means.deletions))
    yield from model.gate.held_admitted(words)
    yield from steps.time(words)
