"""Law 5, judged on the worst: whether the goal is reached from every state although no other worker ever reports.

Backwards over all states at once: a state is safe if a step that needs nobody's help leads to a safe one. Those steps
are submitting, taking, letting time pass, and the success of what leads to the goal itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np

from interlock.policies.exploring.gate_table import Ints
from interlock.policies.exploring.layout import Words
from interlock.policies.exploring.model import Model
from interlock.policies.exploring.steps import Moves
from interlock.policies.exploring.visited import Visited

_CHUNK = 65_536


def without_escape(model: Model, visited: Visited, looked_at: int, until_s: float = math.inf) -> Ints | None:
    """The numbers of the states from which the goal is not reached; None if the clock shows `until_s` before.

    What was found and not looked at is not held against the policy.
    """
    words = visited.words
    safe = model.tables.is_goal[model.layout.footing.of(words)]
    safe[looked_at:] = True
    pending = np.flatnonzero(~safe)
    # Nearly always a deletion is all that it takes; only where it is not, everything else is tried.
    for everything in (False, True):
        while len(pending):
            for first in range(0, len(pending), _CHUNK):
                if time.monotonic() >= until_s:
                    return None
                _look_at(model, visited, safe, pending[first : first + _CHUNK], everything=everything)
            left = pending[~safe[pending]]
            if len(left) == len(pending):
                break
            pending = left
    return pending


def _look_at(model: Model, visited: Visited, safe: np.ndarray, numbers: Ints, *, everything: bool) -> None:
    words = visited.words[numbers]
    for moves in _unaided(model, words, everything=everything):
        open_rows = np.flatnonzero(~safe[numbers[moves.rows]])
        found = visited.find(moves.words[open_rows])
        there = open_rows[(found >= 0) & safe[found]]
        safe[numbers[moves.rows[there]]] = True


def _unaided(model: Model, words: Words, *, everything: bool) -> Iterator[Moves]:
    layout, tables, steps = model.layout, model.tables, model.steps
    task, part = layout.task.of(words), layout.part.of(words)
    yield steps.succeeded(words, np.flatnonzero(tables.task_leads_to_goal[task]))
    yield steps.take(words, task, part)
    yield steps.take_part(words, task, part)
    yield steps.deadline(words)
    gate = model.gate
    yield from gate.moves(words, gate.answers(words) if everything else gate.answers_to_deletions(words))
    yield from steps.time(words)
