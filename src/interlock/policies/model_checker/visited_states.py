"""The visited set: states in the order found, and a hash table from word to number."""

from __future__ import annotations

import numpy as np

from interlock.policies.model_checker.gate_table import Ints
from interlock.policies.model_checker.layout import Words

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
