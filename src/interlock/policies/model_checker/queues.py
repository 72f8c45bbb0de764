"""The queues of packed states: lengths, foreseen states, and re-evaluation of queued requests."""

from __future__ import annotations

import numpy as np

from interlock.policies.model_checker.actions import Alphabet
from interlock.policies.model_checker.gate_table import Ints
from interlock.policies.model_checker.layout import Layout, Words
from interlock.policies.model_checker.step_tables import StepTables


class Queues:
    """Operations on the two queues of a chunk of states."""

    def __init__(self, alphabet: Alphabet, layout: Layout, tables: StepTables) -> None:
        self._layout = layout
        self._tables = tables
        self._kind_ones = (1 << layout.kind_bits) - 1
        self._component_kind_ones = (1 << layout.component_kind_bits) - 1
        self._has_components = bool(alphabet.component_kinds)

    def lengths(self, words: Words) -> tuple[Ints, Ints]:
        """Return the numbers of queued state changes and of queued component changes."""
        layout = self._layout
        queue = words & layout.queue.mask
        waiting = np.zeros(len(words), np.int64)
        component_waiting = np.zeros(len(words), np.int64)
        for slot in range(layout.slots):
            waiting += queue >= 1 << (slot * layout.kind_bits)
        if self._has_components:
            component_queue = layout.component_queue.of(words)
            for slot in range(layout.slots):
                component_waiting += component_queue >= 1 << (slot * layout.component_kind_bits)
        return waiting, component_waiting

    def outstanding(self, words: Words) -> Ints:
        """Return the mask of outstanding operations."""
        layout, tables = self._layout, self._tables
        mask = tables.task_bit[layout.task.of(words)] | tables.component_bit[layout.component.of(words)]
        queue = words & layout.queue.mask
        while queue.any():
            mask |= tables.bit[queue & self._kind_ones]
            queue >>= layout.kind_bits
        if self._has_components:
            queue = layout.component_queue.of(words)
            while queue.any():
                mask |= tables.component_kind_bit[queue & self._component_kind_ones]
                queue >>= layout.component_kind_bits
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

    def reevaluated(self, words: Words) -> Words:
        """Return the states without queued requests that are no longer permitted."""
        rows = np.flatnonzero(words & self._layout.queues)
        if len(rows) == len(words):
            return self._with_queues_reevaluated(
                words, words & self._layout.queue.mask, self._layout.component_queue.of(words)
            )
        own = words[rows]
        there = words.copy()
        there[rows] = self._with_queues_reevaluated(
            own, own & self._layout.queue.mask, self._layout.component_queue.of(own)
        )
        return there

    def reevaluate(self, words: Words, queue: Ints, component_queue: Ints) -> tuple[Ints, Ints]:
        """Return what remains of two queues, which may be one longer than a state can hold."""
        layout, tables = self._layout, self._tables
        base = layout.base.of(words)
        there = tables.task_leads[layout.task.of(words) * tables.bases + base]
        halfway = tables.vm_state[base]
        kept = np.zeros(len(words), np.int64)
        at = np.zeros(len(words), np.int64)
        while queue.any():
            kind = queue & self._kind_ones
            place = kind * tables.bases + there
            stays = tables.stays[place] | tables.holds[kind * tables.vm_states + halfway]
            stays |= ~tables.in_turn[kind] & tables.permits[kind * tables.bases + base]
            kind = np.where(stays, kind, 0)
            kept |= kind << at
            at += stays * layout.kind_bits
            # Kind 0 leads to the same state, which is not an intermediate vm_state.
            there = np.where(stays, tables.leads[place], there)
            halfway = np.where(stays, tables.vm_state[there], halfway)
            queue = queue >> layout.kind_bits
        return kept, self._components_reevaluated(component_queue, base, there)

    def _components_reevaluated(self, queue: Ints, base: Ints, there: Ints) -> Ints:
        layout, tables = self._layout, self._tables
        if not self._has_components:
            return queue
        kept = np.zeros(len(queue), np.int64)
        at = np.zeros(len(queue), np.int64)
        while queue.any():
            kind = queue & self._component_kind_ones
            stays = tables.component_permits[kind * tables.bases + there]
            stays |= ~tables.component_in_turn[kind] & tables.component_permits[kind * tables.bases + base]
            kept |= np.where(stays, kind, 0) << at
            at += stays * layout.component_kind_bits
            queue = queue >> layout.component_kind_bits
        return kept

    def _with_queues_reevaluated(self, words: Words, queue: Ints, component_queue: Ints) -> Words:
        kept, component_kept = self.reevaluate(words, queue, component_queue)
        layout = self._layout
        return (words & ~layout.queues) | kept | component_kept << layout.component_queue.shift
