"""Bit layout of a state packed into a 63-bit word.

From the lowest bit: the queue in the order of service, its head lowest, then the fields of the instance and of the
requests in service. A field with only one possible value takes no bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from interlock.core.errors import Invalid
from interlock.policies.model_checker.actions import Alphabet

Words = NDArray[np.int64]
WORD_BITS = 63


class Field(NamedTuple):
    """A bit field of a word."""

    shift: int
    bits: int

    @property
    def ones(self) -> int:
        """The largest value, which is the unshifted mask."""
        return (1 << self.bits) - 1

    @property
    def mask(self) -> int:
        return self.ones << self.shift

    def of(self, words: Words) -> Words:
        return (words >> self.shift) & self.ones

    def one(self, word: int) -> int:
        return (word >> self.shift) & self.ones


class Layout:
    """The fields of one search's words."""

    def __init__(self, alphabet: Alphabet, outstanding_max: int, *, locks: bool, faults_max: int | None) -> None:
        self.slots = outstanding_max + 1
        """Capacity of the queue: one operation that leads to the goal may exceed the bound."""
        self.kind_bits = len(alphabet.kinds).bit_length()
        self._used = 0
        self.queue = self._next((1 << (self.kind_bits * self.slots)) - 1)
        self.base = self._next(len(alphabet.bases) - 1)
        self.task = self._next(len(alphabet.tasks))
        self.silent = self._next(max((len(ages.silent) for ages in alphabet.task_ages), default=0))
        self.running = self._next(max((len(ages.running) for ages in alphabet.task_ages), default=0))
        self.deadline = self._next(1 if any(kind.preempts for kind in alphabet.kinds) else 0)
        """Whether the request in service was interrupted, and is fenced at its deadline."""
        self.component = self._next(len(alphabet.components))
        self.component_silent = self._next(len(alphabet.component_ages.silent) if alphabet.components else 0)
        self.component_running = self._next(len(alphabet.component_ages.running) if alphabet.components else 0)
        self.component_deadline = self._next(self.deadline.ones if alphabet.components else 0)
        self.idle = self._next(len(alphabet.idle_ages))
        """The age class of an instance with nothing in service."""
        self.locked = self._next(len(alphabet.lock_levels) if locks else 0)
        self.held = self._next(len(alphabet.held))
        """The number in `Alphabet.held`, plus 1, of the submission that is held."""
        self.faults = self._next(faults_max or 0)
        if self._used > WORD_BITS:
            raise Invalid(
                f"States do not fit into {WORD_BITS} bits: {outstanding_max} outstanding requests of "
                f"{len(alphabet.operations)} operations need {self._used}.",
                remedy="Use fewer outstanding requests, or fewer different times or names of callers in the rules.",
            )
        self.served = self.task.mask | self.silent.mask | self.running.mask | self.deadline.mask
        self.component_served = (
            self.component.mask
            | self.component_silent.mask
            | self.component_running.mask
            | self.component_deadline.mask
        )
        self.queue_first = (1 << self.kind_bits) - 1

    def _next(self, largest: int) -> Field:
        field = Field(self._used, largest.bit_length())
        self._used += field.bits
        return field

    @property
    def bits(self) -> int:
        return self._used
