"""Breadth-first search on packed states, a chunk of states at a time, checking the laws."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Final

import numpy as np

from interlock.policies.model_checker.gate_table import Ints
from interlock.policies.model_checker.layout import Words
from interlock.policies.model_checker.model import Model
from interlock.policies.model_checker.packed_laws import PackedLaws
from interlock.policies.model_checker.results import Breaches, OnProgress, OutOfTime, SearchProgress
from interlock.policies.model_checker.steps import Transitions
from interlock.policies.model_checker.visited_states import Visited

CHUNK: Final = 16_384
"""States expanded together: few enough for their arrays to fit into a processor's cache."""
_PROGRESS_EVERY_S: Final = 0.2


class Search:
    """The states and breaches found so far."""

    def __init__(self, model: Model, on_progress: OnProgress | None = None) -> None:
        self.model = model
        self.visited = Visited()
        self.breaches = Breaches()
        self.expanded = 0
        """How many states were expanded; those after them were only found."""
        self.transitions = 0
        self.depth = 0
        self.laws = PackedLaws(model, self.breaches)
        self._on_progress = on_progress

    @property
    def complete(self) -> bool:
        return self.expanded == self.visited.count

    def run(self, *, states_max: int, started_s: float = 0.0, until_s: float = math.inf) -> None:
        """Search until no state is new, `states_max` states are known, or the monotonic clock reaches `until_s`."""
        initial_words = self.model.initial_words()
        self.visited.add(initial_words, np.full(len(initial_words), -1), 0)
        reported_s = time.monotonic()
        for chunk in self._chunks(states_max):
            try:
                self._expand(chunk)
            except OutOfTime:
                break
            self.expanded += len(chunk)
            now_s = time.monotonic()
            if now_s >= until_s:
                break
            if self._on_progress is not None and now_s - reported_s >= _PROGRESS_EVERY_S:
                reported_s = now_s
                waiting = self.visited.count - self.expanded
                self._on_progress(
                    SearchProgress(
                        states=self.visited.count, waiting=waiting, depth=self.depth, seconds=now_s - started_s
                    )
                )

    def _chunks(self, states_max: int) -> Iterator[Ints]:
        """Yield the numbers of the states to expand next, level by level."""
        while self.expanded < self.visited.count < states_max:
            end = self.visited.count
            while self.expanded < end and self.visited.count < states_max:
                yield np.arange(self.expanded, min(end, self.expanded + CHUNK))
            if self.visited.count > end:
                self.depth += 1

    def _expand(self, numbers: Ints) -> None:
        words: Words = self.visited.words[numbers]
        answers = self.model.gate.answers(words)
        self.laws.check_answers(numbers, words, answers)
        for transitions in self.model.after(words, answers):
            self.laws.check_transitions(numbers, words, transitions)
            self._follow(numbers, transitions)

    def _follow(self, numbers: Ints, transitions: Transitions) -> None:
        self.transitions += len(transitions.rows)
        self.visited.add(transitions.words, numbers[transitions.rows], transitions.action)
