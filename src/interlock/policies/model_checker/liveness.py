"""Liveness check (law 5): whether the goal can be reached from every state although no other worker ever reports.

A fixpoint over all states: a state is safe if a transition that needs no other worker leads to a safe one. These are
submissions, taking a request, time that passes, and the success of an operation that leads to the goal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np

from interlock.policies.model_checker.gate_table import Ints
from interlock.policies.model_checker.layout import Words
from interlock.policies.model_checker.model import Model
from interlock.policies.model_checker.steps import Transitions
from interlock.policies.model_checker.visited_states import Visited

_CHUNK = 65_536


def find_stuck(model: Model, visited: Visited, expanded: int, until_s: float = math.inf) -> Ints | None:
    """Return the numbers of the states from which the goal cannot be reached; None if time ran out at `until_s`.

    States that were found but not expanded do not count as stuck.
    """
    words = visited.words
    safe = model.tables.is_goal[model.layout.base.of(words)]
    safe[expanded:] = True
    pending = np.flatnonzero(~safe)
    # A deletion nearly always suffices; everything else is tried only where it does not.
    for everything in (False, True):
        while len(pending):
            for first in range(0, len(pending), _CHUNK):
                if time.monotonic() >= until_s:
                    return None
                _expand(model, visited, safe, pending[first : first + _CHUNK], everything=everything)
            left = pending[~safe[pending]]
            if len(left) == len(pending):
                break
            pending = left
    return pending


def _expand(model: Model, visited: Visited, safe: np.ndarray, numbers: Ints, *, everything: bool) -> None:
    words = visited.words[numbers]
    for transitions in _unaided(model, words, everything=everything):
        open_rows = np.flatnonzero(~safe[numbers[transitions.rows]])
        found = visited.find(transitions.words[open_rows])
        there = open_rows[(found >= 0) & safe[found]]
        safe[numbers[transitions.rows[there]]] = True


def _unaided(model: Model, words: Words, *, everything: bool) -> Iterator[Transitions]:
    layout, tables, steps = model.layout, model.tables, model.steps
    task, component = layout.task.of(words), layout.component.of(words)
    yield steps.succeeded(words, np.flatnonzero(tables.task_leads_to_goal[task]))
    yield steps.take(words, task, component)
    yield steps.take_component(words, task, component)
    yield steps.deadline(words)
    gate = model.gate
    yield from gate.transitions(words, gate.answers(words) if everything else gate.answers_to_deletions(words))
    yield from steps.time(words)
