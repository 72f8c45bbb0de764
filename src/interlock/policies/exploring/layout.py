"""How a state is packed into one word of 63 bits: which field lies where.

From the right: the queue of state changes, that of component changes, each with the first to be served rightmost, and
then the fields of the instance and of what is being served. A field that can have one value only takes no bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from interlock.core.errors import Invalid
from interlock.policies.exploring.alphabet import Alphabet

Words = NDArray[np.int64]
WORD_BITS = 63


class Field(NamedTuple):
    """A run of bits of a word."""

    shift: int
    bits: int

    @property
    def ones(self) -> int:
        """The largest value, and the mask of it where it is not shifted."""
        return (1 << self.bits) - 1

    @property
    def mask(self) -> int:
        return self.ones << self.shift

    def of(self, words: Words) -> Words:
        return (words >> self.shift) & self.ones

    def one(self, word: int) -> int:
        return (word >> self.shift) & self.ones


class Layout:
    """The fields of one walk."""

    def __init__(self, alphabet: Alphabet, outstanding_max: int, *, locks: bool, faults_max: int | None) -> None:
        self.slots = outstanding_max + 1
        """How many requests a queue can hold: one that leads to the goal may stand on top of the bound."""
        self.kind_bits = len(alphabet.kinds).bit_length()
        self.part_kind_bits = len(alphabet.part_kinds).bit_length()
        self._used = 0
        self.queue = self._next((1 << (self.kind_bits * self.slots)) - 1)
        self.part_queue = self._next((1 << (self.part_kind_bits * self.slots)) - 1)
        self.footing = self._next(len(alphabet.footings) - 1)
        self.task = self._next(len(alphabet.tasks))
        self.silent = self._next(max((len(ages.silent) for ages in alphabet.task_ages), default=0))
        self.running = self._next(max((len(ages.running) for ages in alphabet.task_ages), default=0))
        self.deadline = self._next(1 if any(kind.preempts for kind in alphabet.kinds + alphabet.part_kinds) else 0)
        """Whether what is served was asked to stop, and is fenced when its time is up."""
        self.part = self._next(len(alphabet.parts))
        self.part_silent = self._next(len(alphabet.part_ages.silent) if alphabet.parts else 0)
        self.part_running = self._next(len(alphabet.part_ages.running) if alphabet.parts else 0)
        self.part_deadline = self._next(self.deadline.ones if alphabet.parts else 0)
        self.idle = self._next(len(alphabet.idle_ages))
        """The class of the time since the instance itself showed life: its age where nothing is served."""
        self.locked = self._next(1 if locks else 0)
        self.faults = self._next(faults_max or 0)
        if self._used > WORD_BITS:
            raise Invalid(
                f"States of {outstanding_max} outstanding requests of {len(alphabet.operations)} operations do not fit "
                f"into {WORD_BITS} bits: they need {self._used}.",
                remedy="Walk with fewer outstanding requests, or fewer different times in the rules.",
            )
        self.served = self.task.mask | self.silent.mask | self.running.mask | self.deadline.mask
        self.part_served = self.part.mask | self.part_silent.mask | self.part_running.mask | self.part_deadline.mask
        self.queues = self.queue.mask | self.part_queue.mask
        self.queue_first = (1 << self.kind_bits) - 1
        self.part_queue_first = (1 << self.part_kind_bits) - 1

    def _next(self, largest: int) -> Field:
        field = Field(self._used, largest.bit_length())
        self._used += field.bits
        return field

    @property
    def bits(self) -> int:
        return self._used
