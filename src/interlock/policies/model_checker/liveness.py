"""Liveness check (law 5): whether the goal can be reached from every state although no other worker ever reports.

A fixpoint over all states: a state is safe if a transition that needs no other worker leads to a safe one. These are
submissions, taking a request, time that passes, and the success of an operation that leads to the goal. Where that does
not suffice, the success of a soft delete counts too, since the server deletes the instance when its time is over, and
then that of an evacuation, which is performed by another host.

A worker may also make progress for ever and never end: then no silence comes, and only what needs none counts. From
which states a deletion waits for silence is determined beside. A takeover measured from the last progress promises no
more, so that this breaks no law; the result says that the law is not kept there, as an assumption. It is all computed
for callers of all roles, and for the callers of one role alone.
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
from interlock.policies.model_checker.model import Model
from interlock.policies.model_checker.search import Visited
from interlock.policies.model_checker.state_encoding import Words
from interlock.policies.model_checker.steps import SILENCE, Transitions

_CHUNK: Final = 65_536
_COMPLETED: Final = ((), (Operation.SOFT_DELETE,), (Operation.SOFT_DELETE, Operation.EVACUATE))
"""What may have to complete, besides what leads to the goal; the least first."""


class Stuck(NamedTuple):
    """The numbers of the states from which the goal cannot be reached."""

    for_role: Ints
    """By callers of the role alone, if the worker hangs."""
    for_everyone: Ints
    """If the worker hangs."""
    with_progress: Ints
    """If the worker makes progress for ever, although states may be reset."""
    until_silence: Ints
    """If the worker makes progress for ever and nobody resets the state."""
    completed: tuple[Operation, ...] = ()
    """The operations that have to complete for a role, or everyone, to reach the goal from some state."""


class _Means(NamedTuple):
    """What counts as a transition that needs no other worker."""

    role: Role | None = None
    """The role of the callers; None: any."""
    deletions: bool = False
    """Whether only operations that lead to the goal are submitted: they nearly always suffice."""
    resets: bool = True
    """Whether states are reset."""
    silence: bool = True
    """Whether workers become silent."""
    completed: tuple[Operation, ...] = ()
    """The operations in service that succeed, besides those that lead to the goal."""


class _Fixpoint:
    """The states from which the goal is known to be reachable, and the others."""

    def __init__(self, model: Model, visited: Visited, expanded: int, until_s: float) -> None:
        self._model = model
        self._visited = visited
        self._until_s = until_s
        self._safe = model.tables.is_goal[model.layout.base.of(visited.words)]
        self._safe[expanded:] = True
        self.stuck = np.flatnonzero(~self._safe)
        self.completed: tuple[Operation, ...] = ()

    def extended(self, means: _Means) -> Ints | None:
        """Return the states that are stuck although these means count too; None if time ran out."""
        for deletions, completed in ((True, ()), *((False, some) for some in _COMPLETED)):
            own = means._replace(deletions=deletions, completed=completed)
            left = _reduced(self._model, self._visited, self._safe, self.stuck, own, self._until_s)
            if left is None:
                return None
            if completed and len(left) < len(self.stuck):
                self.completed = max(self.completed, completed, key=len)
            self.stuck = left
        return self.stuck


def find_stuck(
    model: Model, visited: Visited, expanded: int, role: Role = Role.MEMBER, until_s: float = math.inf
) -> Stuck | None:
    """Return the states from which the goal cannot be reached; None if time ran out at `until_s`.

    States that were found but not expanded do not count as stuck.
    """
    alone, everyone = (_Fixpoint(model, visited, expanded, until_s) for _ in range(2))
    found = [
        alone.extended(_Means(role)),
        everyone.extended(_Means(resets=False, silence=False)),
        everyone.extended(_Means(silence=False)),
        everyone.extended(_Means()),
    ]
    for_role, until_silence, with_progress, for_everyone = found
    if for_role is None or until_silence is None or with_progress is None or for_everyone is None:
        return None
    completed = max(alone.completed, everyone.completed, key=len)
    return Stuck(for_role, for_everyone, with_progress, until_silence, completed)


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
    answers = model.gate.ways_out(words, means.role, deletions=means.deletions, resets=means.resets)
    yield from model.gate.transitions(words, answers)
    yield from model.gate.held_admitted(words)
    yield steps.limited(words)
    yield from (passed for passed in steps.time(words) if means.silence or passed.action not in SILENCE)
