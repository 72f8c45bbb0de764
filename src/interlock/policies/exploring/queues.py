"""The queues of packed states: how a request enters, and which of them still make sense."""

from __future__ import annotations

import numpy as np

from interlock.policies.exploring.alphabet import Alphabet
from interlock.policies.exploring.gate_table import Ints
from interlock.policies.exploring.layout import Layout, Words
from interlock.policies.exploring.step_tables import StepTables


class Queues:
    """The two queues of every state of a chunk."""

    def __init__(self, alphabet: Alphabet, layout: Layout, tables: StepTables) -> None:
        self._layout = layout
        self._tables = tables
        self._kind_ones = (1 << layout.kind_bits) - 1
        self._part_kind_ones = (1 << layout.part_kind_bits) - 1
        self._has_parts = bool(alphabet.part_kinds)

    def lengths(self, words: Words) -> tuple[Ints, Ints]:
        """How many state changes wait, and how many component changes."""
        layout = self._layout
        queue = words & layout.queue.mask
        waiting = np.zeros(len(words), np.int64)
        part_waiting = np.zeros(len(words), np.int64)
        for slot in range(layout.slots):
            waiting += queue >= 1 << (slot * layout.kind_bits)
        if self._has_parts:
            part_queue = layout.part_queue.of(words)
            for slot in range(layout.slots):
                part_waiting += part_queue >= 1 << (slot * layout.part_kind_bits)
        return waiting, part_waiting

    def outstanding(self, words: Words) -> Ints:
        """The kinds outstanding, as the union of their bits."""
        layout, tables = self._layout, self._tables
        mask = tables.task_bit[layout.task.of(words)] | tables.part_bit[layout.part.of(words)]
        queue = words & layout.queue.mask
        while queue.any():
            mask |= tables.bit[queue & self._kind_ones]
            queue >>= layout.kind_bits
        if self._has_parts:
            queue = layout.part_queue.of(words)
            while queue.any():
                mask |= tables.part_kind_bit[queue & self._part_kind_ones]
                queue >>= layout.part_kind_bits
        mask[mask == 0] = tables.nothing
        return mask

    def foreseen(self, words: Words) -> Ints:
        """The footing when everything outstanding has succeeded."""
        layout, tables = self._layout, self._tables
        there: Ints = tables.task_leads[layout.task.of(words) * tables.footings + layout.footing.of(words)]
        queue = words & layout.queue.mask
        while queue.any():
            there = tables.leads[(queue & self._kind_ones) * tables.footings + there]
            queue >>= layout.kind_bits
        return there

    def judged_again(self, words: Words) -> Words:
        """The states without what waits and no longer makes sense there."""
        rows = np.flatnonzero(words & self._layout.queues)
        if len(rows) == len(words):
            return self._judged(words, words & self._layout.queue.mask, self._layout.part_queue.of(words))
        own = words[rows]
        there = words.copy()
        there[rows] = self._judged(own, own & self._layout.queue.mask, self._layout.part_queue.of(own))
        return there

    def judged(self, words: Words, queue: Ints, part_queue: Ints) -> tuple[Ints, Ints]:
        """What is left of two queues, which may be one longer than a state can hold."""
        layout, tables = self._layout, self._tables
        footing = layout.footing.of(words)
        there = tables.task_leads[layout.task.of(words) * tables.footings + footing]
        halfway = tables.vm_state[footing]
        kept = np.zeros(len(words), np.int64)
        at = np.zeros(len(words), np.int64)
        while queue.any():
            kind = queue & self._kind_ones
            place = kind * tables.footings + there
            stays = tables.stays[place] | tables.holds[kind * tables.vm_states + halfway]
            kind = np.where(stays, kind, 0)
            kept |= kind << at
            at += stays * layout.kind_bits
            # A kind of 0 leads where it stands, but its vm_state is no half-way house.
            there = np.where(stays, tables.leads[place], there)
            halfway = np.where(stays, tables.vm_state[there], halfway)
            queue = queue >> layout.kind_bits
        return kept, self._parts_judged(part_queue, footing, there)

    def _parts_judged(self, queue: Ints, footing: Ints, there: Ints) -> Ints:
        layout, tables = self._layout, self._tables
        if not self._has_parts:
            return queue
        kept = np.zeros(len(queue), np.int64)
        at = np.zeros(len(queue), np.int64)
        while queue.any():
            kind = queue & self._part_kind_ones
            served_in = np.where(tables.part_in_turn[kind], there, footing)
            stays = tables.part_permits[kind * tables.footings + served_in]
            kept |= np.where(stays, kind, 0) << at
            at += stays * layout.part_kind_bits
            queue = queue >> layout.part_kind_bits
        return kept

    def _judged(self, words: Words, queue: Ints, part_queue: Ints) -> Words:
        kept, part_kept = self.judged(words, queue, part_queue)
        layout = self._layout
        return (words & ~layout.queues) | kept | part_kept << layout.part_queue.shift
