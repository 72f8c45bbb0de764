"""Breadth-first search on packed states, a chunk at a time, checking the laws; and the hash table of visited states."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Final

import numpy as np

from interlock.policies.model_checker.gate_table import Ints
from interlock.policies.model_checker.model import Model
from interlock.policies.model_checker.packed_laws import PackedLaws
from interlock.policies.model_checker.results import Breaches, OnProgress, OutOfTime, SearchProgress
from interlock.policies.model_checker.state_encoding import Words
from interlock.policies.model_checker.steps import Transitions

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


_EMPTY = -1
_FIRST_BITS = 16
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Visited:
    """Words with parent and action, and an open-addressed hash table of them, at most half full."""

    def __init__(self) -> None:
        self.count = 0
        self._words = np.zeros(1 << (_FIRST_BITS - 1), np.int64)
        self._parents = np.zeros(len(self._words), np.int32)
        self._actions = np.zeros(len(self._words), np.int16)
        self._bits = _FIRST_BITS
        self._keys = np.full(1 << _FIRST_BITS, _EMPTY, np.int64)
        self._numbers = np.zeros(1 << _FIRST_BITS, np.int32)

    @property
    def words(self) -> Words:
        return self._words[: self.count]

    def parent(self, number: int) -> int:
        """Return the number of the state from which this one was first reached; -1 for an initial state."""
        return int(self._parents[number])

    def action(self, number: int) -> int:
        """Return the action that first led to the state."""
        return int(self._actions[number])

    def add(self, words: Words, parents: Ints, action: int | Ints) -> None:
        """Add the states that are new, each with its first parent here."""
        while 2 * (self.count + len(words)) > len(self._keys):
            self._grow()
        new = self._enter(words)
        if not len(new):
            return
        end = self.count + len(new)
        self._words[self.count : end] = words[new]
        self._parents[self.count : end] = parents[new]
        self._actions[self.count : end] = action if isinstance(action, int) else action[new]
        self.count = end

    def find(self, words: Words) -> Ints:
        """Return the number of each state; -1 if not visited."""
        found = np.full(len(words), -1, np.int64)
        pending = np.arange(len(words))
        slots = self._slots(words)
        while len(pending):
            keys = self._keys[slots]
            hit = keys == words[pending]
            found[pending[hit]] = self._numbers[slots[hit]]
            going = ~hit & (keys != _EMPTY)
            pending, slots = pending[going], (slots[going] + 1) & (len(self._keys) - 1)
        return found

    def _enter(self, words: Words) -> Ints:
        """Insert each new word with the next number, and return the indexes of the new words."""
        pending = np.arange(len(words))
        slots = self._slots(words)
        new: list[Ints] = []
        while len(pending):
            keys = self._keys[slots]
            own = words[pending]
            free = keys == _EMPTY
            if free.any():
                claimed, claimants = slots[free], pending[free]
                self._keys[claimed] = words[claimants]
                # Of several claimants of one slot, the last written wins.
                self._numbers[claimed] = claimants
                won = self._numbers[claimed] == claimants
                new.append(claimants[won])
                keys = self._keys[slots]
            going = keys != own
            pending, slots = pending[going], (slots[going] + 1) & (len(self._keys) - 1)
        if not new:
            return pending
        found = np.sort(np.concatenate(new))
        self._numbers[self._where(words[found])] = np.arange(self.count, self.count + len(found))
        return found

    def _where(self, words: Words) -> Ints:
        """Return the slots of words that are in the table."""
        slots = self._slots(words)
        pending = np.flatnonzero(self._keys[slots] != words)
        while len(pending):
            slots[pending] = (slots[pending] + 1) & (len(self._keys) - 1)
            pending = pending[self._keys[slots[pending]] != words[pending]]
        return slots

    def _slots(self, words: Words) -> Ints:
        mixed = words.astype(np.uint64) * _MIX
        return (mixed >> np.uint64(64 - self._bits)).astype(np.int64)

    def _grow(self) -> None:
        self._bits += 1
        size = 1 << self._bits
        self._keys = np.full(size, _EMPTY, np.int64)
        self._numbers = np.zeros(size, np.int32)
        for name in ("_words", "_parents", "_actions"):
            old = getattr(self, name)
            grown = np.zeros(size >> 1, old.dtype)
            grown[: self.count] = old[: self.count]
            setattr(self, name, grown)
        count, self.count = self.count, 0
        self._enter(self._words[:count])
        self.count = count
