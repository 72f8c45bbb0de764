"""The walk on packed states: breadth first, a chunk of states at a time, checking the laws on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Final

import numpy as np

from interlock.policies.exploring.explorations import Advance, OnAdvance
from interlock.policies.exploring.gate_table import Ints
from interlock.policies.exploring.layout import Words
from interlock.policies.exploring.model import Model
from interlock.policies.exploring.packed_laws import Breaches, PackedLaws
from interlock.policies.exploring.steps import Moves
from interlock.policies.exploring.visited import Visited

CHUNK: Final = 16_384
"""How many states are looked at together: few enough that what is known of them fits into a processor's cache."""
_TOLD_EVERY_S: Final = 0.2


class Walk:
    """The states found so far, and what was found wrong in them."""

    def __init__(self, model: Model, on_advance: OnAdvance | None = None) -> None:
        self.model = model
        self.visited = Visited()
        self.breaches = Breaches()
        self.looked_at = 0
        """How many states were looked at; those that come after it were only found."""
        self.transitions = 0
        self.depth = 0
        self.laws = PackedLaws(model, self.breaches)
        self._on_advance = on_advance

    @property
    def complete(self) -> bool:
        return self.looked_at == self.visited.count

    def run(self, *, states_max: int, started_s: float = 0.0, until_s: float = math.inf) -> None:
        """Walk until there is nothing new, or `states_max` states are known, or the clock shows `until_s`."""
        beginnings = self.model.beginnings()
        self.visited.add(beginnings, np.full(len(beginnings), -1), 0)
        told_s = time.monotonic()
        for chunk in self._chunks(states_max):
            self._look_at(chunk)
            self.looked_at += len(chunk)
            now_s = time.monotonic()
            if now_s >= until_s:
                break
            if self._on_advance is not None and now_s - told_s >= _TOLD_EVERY_S:
                told_s = now_s
                waiting = self.visited.count - self.looked_at
                self._on_advance(
                    Advance(states=self.visited.count, waiting=waiting, depth=self.depth, seconds=now_s - started_s)
                )

    def _chunks(self, states_max: int) -> Iterator[Ints]:
        """The numbers of the states that are to be looked at next, level after level."""
        while self.looked_at < self.visited.count < states_max:
            end = self.visited.count
            while self.looked_at < end and self.visited.count < states_max:
                yield np.arange(self.looked_at, min(end, self.looked_at + CHUNK))
            if self.visited.count > end:
                self.depth += 1

    def _look_at(self, numbers: Ints) -> None:
        words: Words = self.visited.words[numbers]
        answers = self.model.gate.answers(words)
        self.laws.of_answers(numbers, words, answers)
        for moves in self.model.after(words, answers):
            self.laws.of_moves(numbers, words, moves)
            self._follow(numbers, moves)

    def _follow(self, numbers: Ints, moves: Moves) -> None:
        self.transitions += len(moves.rows)
        self.visited.add(moves.words, numbers[moves.rows], moves.action)
