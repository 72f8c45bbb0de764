"""The queue of packed states: its length, the foreseen state, and re-evaluation of queued requests."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from interlock.policies.model_checker.actions import Alphabet
from interlock.policies.model_checker.gate_table import Bools, Ints
from interlock.policies.model_checker.state_encoding import Layout, Words
from interlock.policies.model_checker.step_tables import StepTables


class FirstComponent(NamedTuple):
    """The first component change that is queued in each state."""

    kind: Ints
    """0 if there is none."""
    slot: Ints


class Queues:
    """Operations on the queues of a chunk of states, which are in the order of service."""

    def __init__(self, alphabet: Alphabet, layout: Layout, tables: StepTables) -> None:
        self._layout = layout
        self._tables = tables
        self._kind_ones = (1 << layout.kind_bits) - 1
        self._has_components = bool(alphabet.components)
        self._has_last = bool(tables.comes_last.any())

    def lengths(self, words: Words) -> Ints:
        """Return the numbers of queued requests."""
        layout = self._layout
        queue = words & layout.queue.mask
        waiting = np.zeros(len(words), np.int64)
        for slot in range(layout.slots):
            waiting += queue >= 1 << (slot * layout.kind_bits)
        return waiting

    def have_state_changes(self, words: Words) -> Bools:
        """Return whether a state change is queued."""
        return self._any(words, self._tables.is_state_change)

    def _any(self, words: Words, of_kind: Bools) -> Bools:
        found = np.zeros(len(words), bool)
        queue = words & self._layout.queue.mask
        while queue.any():
            found |= of_kind[queue & self._kind_ones]
            queue >>= self._layout.kind_bits
        return found

    def first_component(self, words: Words) -> FirstComponent:
        layout = self._layout
        kind, slot = np.zeros(len(words), np.int64), np.zeros(len(words), np.int64)
        queue = words & layout.queue.mask
        for number in range(layout.slots if self._has_components else 0):
            here = queue & self._kind_ones
            found = (kind == 0) & self._tables.is_component[here]
            kind, slot = np.where(found, here, kind), np.where(found, number, slot)
            queue >>= layout.kind_bits
        return FirstComponent(kind, slot)

    def without(self, words: Words, slot: int | Ints) -> Words:
        """Return the states without the request in that slot of the queue."""
        layout = self._layout
        queue = words & layout.queue.mask
        before = (1 << (slot * layout.kind_bits)) - 1
        return (words & ~layout.queue.mask) | (queue & before) | ((queue >> layout.kind_bits) & ~before)

    def appended(self, words: Words, kind: Ints) -> Words:
        """Return the states with one more request: at the end, or before those that come last."""
        layout, tables = self._layout, self._tables
        at = self.lengths(words) * layout.kind_bits
        if not self._has_last:
            return words | kind << at
        queue = words & layout.queue.mask
        while queue.any():
            at -= (tables.comes_last[queue & self._kind_ones] & ~tables.comes_last[kind]) * layout.kind_bits
            queue >>= layout.kind_bits
        queue = words & layout.queue.mask
        before = (1 << at) - 1
        later = (queue & ~before) << layout.kind_bits
        return (words & ~layout.queue.mask) | (queue & before) | kind << at | later

    def outstanding(self, words: Words) -> Ints:
        """Return the mask of outstanding operations."""
        layout, tables = self._layout, self._tables
        mask = tables.task_bit[layout.task.of(words)] | tables.component_bit[layout.component.of(words)]
        queue = words & layout.queue.mask
        while queue.any():
            mask |= tables.bit[queue & self._kind_ones]
            queue >>= layout.kind_bits
        mask[mask == 0] = tables.none_outstanding
        return mask

    def foreseen(self, words: Words) -> Ints:
        """Return the base state after everything outstanding has succeeded."""
        layout, tables = self._layout, self._tables
        there: Ints = tables.task_leads[layout.task.of(words) * tables.bases + layout.base.of(words)]
        queue = words & layout.queue.mask
        while queue.any():
            there = tables.leads[(queue & self._kind_ones) * tables.bases + there]
            queue >>= layout.kind_bits
        return there

    def reevaluated(self, words: Words, *, host_changed: bool = False) -> Words:
        """Return the states without queued requests that are no longer permitted."""
        mask = self._layout.queue.mask
        rows = np.flatnonzero(words & mask)
        if len(rows) == len(words):
            return (words & ~mask) | self.reevaluate(words, words & mask, host_changed=host_changed)
        own = words[rows]
        there = words.copy()
        there[rows] = (own & ~mask) | self.reevaluate(own, own & mask, host_changed=host_changed)
        return there

    def reevaluate(self, words: Words, queue: Ints, *, host_changed: bool = False) -> Ints:
        """Return what remains of a queue, which may be one longer than a state can hold."""
        layout, tables = self._layout, self._tables
        spared = tables.spared_by_host if host_changed else tables.spared
        stays_anyway = tables.anyway_by_host if host_changed else tables.anyway
        base = layout.base.of(words)
        there = tables.task_leads[layout.task.of(words) * tables.bases + base]
        asked_to_stop = (words & layout.deadline.mask) > 0
        halfway = tables.vm_state[np.where(asked_to_stop, base, there)]
        kept = np.zeros(len(words), np.int64)
        at = np.zeros(len(words), np.int64)
        while queue.any():
            kind = queue & self._kind_ones
            place = kind * tables.bases + there
            at_present = kind * tables.bases + base
            anyway = stays_anyway[place] | spared[place] & tables.holds[kind * tables.vm_states + halfway]
            stays = tables.permits[place] | anyway | ~tables.in_turn[kind] & tables.permits[at_present]
            stays &= ~tables.moot[at_present]
            kind = np.where(stays, kind, 0)
            kept |= kind << at
            at += stays * layout.kind_bits
            # A component change leads to the same state, which is not an intermediate vm_state; nor does kind 0.
            there = np.where(stays, tables.leads[place], there)
            halfway = np.where(tables.is_state_change[kind], tables.vm_state[there], halfway)
            queue = queue >> layout.kind_bits
        return kept
