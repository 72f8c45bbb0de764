"""Everything that can happen to a whole chunk of packed states at once.

Each step here is one of the core's, on words instead of records: what it asks of rules and landings it looks up in
tables that the core filled (see `step_tables`, `gate_table`). That both lead to the same states is held by a test. What
changes nothing on which anything depends, such as asking a worker to stop half-way, is left out: so are unknown
outcomes, and adopting one request, which is a sign of life and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from interlock.policies.exploring.alphabet import Ages, Alphabet
from interlock.policies.exploring.gate_table import Bools, Ints
from interlock.policies.exploring.layout import Field, Layout, Words
from interlock.policies.exploring.queues import Queues
from interlock.policies.exploring.step_tables import StepTables


class Action(IntEnum):
    """What happened, as the arrays hold it. The last three are the first of many: one for each place, or submission."""

    BEGIN = 0
    TAKE = 1
    TAKE_PART = 2
    LIFE = 3
    """A sign of life of the state change being served."""
    PHASE = 4
    """The same, in its next phase."""
    PART_LIFE = 5
    SUCCEED = 6
    FAIL = 7
    INTERRUPT = 8
    """It ended and left the instance as it was, as one of `ARRIVES` does too that arrived."""
    FINISH_PART = 9
    GUEST_STOPPED = 10
    GUEST_CRASHED = 11
    GUEST_RESET = 12
    SILENT = 13
    """Time passes, until what is served has been silent for another of the named lengths."""
    RUNNING = 14
    PART_SILENT = 15
    PART_RUNNING = 16
    IDLE = 17
    DEADLINE = 18
    ADOPT = 19
    """Both workers are lost, and what they served is taken over; for one alone that is a sign of life."""
    CANCEL = 32
    CANCEL_PART = 64
    SUBMIT = 96


class Moves(NamedTuple):
    """Steps of one kind, from some of the states of a chunk."""

    action: int | Ints
    """The same for all, or one for each."""
    rows: Ints
    """Which states of the chunk."""
    words: Words
    """Where they lead."""
    dropped: Ints | None = None
    """Which of these are submissions that were admitted in turn, and cancelled in the same breath."""


FAULTS = frozenset({Action.FAIL, Action.GUEST_STOPPED, Action.GUEST_CRASHED})
"""What counts as a fault. Time is none: a worker may hang in every state, since law 5 is about those that do."""


class Steps:
    """The steps of one walk."""

    def __init__(self, alphabet: Alphabet, layout: Layout, tables: StepTables) -> None:
        self.layout = layout
        self.tables = tables
        self.queues = Queues(alphabet, layout, tables)
        self._ages = _possible_ages(alphabet, layout)
        self._part_ages = alphabet.part_ages

    def after(self, words: Words) -> Iterator[Moves]:
        """All of them but submissions."""
        layout = self.layout
        task, part = layout.task.of(words), layout.part.of(words)
        busy, part_busy = np.flatnonzero(task), np.flatnonzero(part)
        yield from self._taken(words, task, part)
        yield from self._signs_of_life(words, busy, part_busy)
        yield from self._ends(words, busy, part_busy)
        yield from self._guest(words)
        yield from self._cancelled(words)
        yield from self.time(words)

    # -------------------------------------------------------------------------------------------- taking and reporting

    def _taken(self, words: Words, task: Ints, part: Ints) -> Iterator[Moves]:
        yield self.take(words, task, part)
        yield self.take_part(words, task, part)

    def take(self, words: Words, task: Ints, part: Ints) -> Moves:
        layout, tables = self.layout, self.tables
        first = words & layout.queue_first
        kinds = len(tables.preempts)
        rows = np.flatnonzero((first != 0) & (task == 0) & tables.part_beside_kind[part * kinds + first])
        own = words[rows]
        queue = layout.queue.of(own)
        kept = own & ~(layout.queue.mask | layout.served | layout.idle.mask)
        kept |= (queue >> layout.kind_bits) << layout.queue.shift
        return Moves(Action.TAKE, rows, kept | tables.first_task[first[rows]] << layout.task.shift)

    def take_part(self, words: Words, task: Ints, part: Ints) -> Moves:
        layout, tables = self.layout, self.tables
        if not layout.part_kind_bits:
            return Moves(Action.TAKE_PART, np.zeros(0, np.int64), words[:0])
        waiting = words & layout.queue_first
        change = (words >> layout.part_queue.shift) & layout.part_queue_first
        goes_first = (waiting != 0) & ((task == 0) | tables.preempts[waiting])
        beside = tables.part_kind_beside_task[change * len(tables.next_task) + task]
        rows = np.flatnonzero((change != 0) & (part == 0) & beside & ~goes_first)
        own = words[rows]
        queue = layout.part_queue.of(own)
        kept = own & ~(layout.part_queue.mask | layout.part_served | layout.idle.mask)
        kept |= (queue >> layout.part_kind_bits) << layout.part_queue.shift
        return Moves(Action.TAKE_PART, rows, kept | tables.part_of[change[rows]] << layout.part.shift)

    def _signs_of_life(self, words: Words, busy: Ints, part_busy: Ints) -> Iterator[Moves]:
        layout = self.layout
        for action, rows, silent in (
            (Action.LIFE, busy, layout.silent),
            (Action.PART_LIFE, part_busy, layout.part_silent),
        ):
            fresh = ~(silent.mask | layout.idle.mask)
            own = words[rows]
            there = own & fresh
            changed = np.flatnonzero(there != own)
            yield Moves(action, rows[changed], there[changed])
        both = busy[layout.part.of(words[busy]) > 0]
        own = words[both]
        there = own & ~(layout.silent.mask | layout.part_silent.mask | layout.idle.mask)
        changed = np.flatnonzero(there != own)
        yield Moves(Action.ADOPT, both[changed], there[changed])
        own = words[busy]
        following = self.tables.next_task[layout.task.of(own)]
        rows = np.flatnonzero(following)
        kept = own[rows] & ~(layout.task.mask | layout.silent.mask | layout.idle.mask)
        yield Moves(Action.PHASE, busy[rows], kept | following[rows] << layout.task.shift)

    def _ends(self, words: Words, busy: Ints, part_busy: Ints) -> Iterator[Moves]:
        layout, tables = self.layout, self.tables
        yield self.succeeded(words, busy)
        own = words[busy]
        footing = layout.footing.of(own)
        failed = tables.task_fails[layout.task.of(own) * tables.footings + footing]
        rows = np.flatnonzero(failed != footing)
        gone = layout.served | layout.idle.mask
        yield Moves(Action.FAIL, busy[rows], self._settled(own[rows] & ~gone, failed[rows]))
        yield Moves(Action.INTERRUPT, busy, self._settled(own & ~gone, footing))
        own = words[part_busy]
        gone = layout.part_served | layout.idle.mask
        yield Moves(Action.FINISH_PART, part_busy, self._settled(own & ~gone, layout.footing.of(own)))

    def succeeded(self, words: Words, busy: Ints) -> Moves:
        layout, tables = self.layout, self.tables
        own = words[busy]
        leads = tables.task_leads[layout.task.of(own) * tables.footings + layout.footing.of(own)]
        return Moves(Action.SUCCEED, busy, self._settled(own & ~(layout.served | layout.idle.mask), leads))

    def _settled(self, words: Words, footing: Ints) -> Words:
        """The states with another footing, and what waits judged again."""
        shift = self.layout.footing.shift
        return self.queues.judged_again((words & ~self.layout.footing.mask) | footing << shift)

    def _guest(self, words: Words) -> Iterator[Moves]:
        layout, tables = self.layout, self.tables
        footing = layout.footing.of(words)
        every = np.arange(len(words))
        awake = words & ~layout.idle.mask
        for action, leads in ((Action.GUEST_STOPPED, tables.stopped), (Action.GUEST_CRASHED, tables.crashed)):
            there = leads[footing]
            # Where no guest is held, both are no more than a reason to judge again.
            rows = every if action is Action.GUEST_STOPPED else np.flatnonzero(there != tables.stopped[footing])
            settled = self._settled(awake[rows], there[rows])
            changed = np.flatnonzero(settled != words[rows])
            yield Moves(action, rows[changed], settled[changed])
        changed = np.flatnonzero(awake != words)
        yield Moves(Action.GUEST_RESET, changed, awake[changed])

    def _cancelled(self, words: Words) -> Iterator[Moves]:
        layout = self.layout
        for first, field, bits in (
            (Action.CANCEL, layout.queue, layout.kind_bits),
            (Action.CANCEL_PART, layout.part_queue, layout.part_kind_bits),
        ):
            for slot in range(layout.slots if bits else 0):
                rows = np.flatnonzero(words & (((1 << bits) - 1) << (field.shift + slot * bits)))
                if not len(rows):
                    break
                own = words[rows]
                before = (1 << (slot * bits)) - 1
                queue = field.of(own)
                queue = (queue & before) | ((queue >> bits) & ~before)
                there = (own & ~field.mask) | queue << field.shift
                yield Moves(first + slot, rows, self.queues.judged_again(there))

    # ------------------------------------------------------------------------------------------------------------ time

    def time(self, words: Words) -> Iterator[Moves]:
        """Time passes, until one age comes into its next class, or a deadline is over."""
        layout = self.layout
        task, part = layout.task.of(words), layout.part.of(words)
        tables = self.tables
        for action, field, classes in (
            (Action.SILENT, layout.silent, tables.silences[task]),
            (Action.RUNNING, layout.running, tables.runnings[task]),
            (Action.PART_SILENT, layout.part_silent, (part > 0) * len(self._part_ages.silent)),
            (Action.PART_RUNNING, layout.part_running, (part > 0) * len(self._part_ages.running)),
            (Action.IDLE, layout.idle, np.full(len(words), self._ages.idle)),
        ):
            if field.bits:
                rows = np.flatnonzero(field.of(words) < classes)
                there = words[rows] + (1 << field.shift)
                possible = self._ages.are_possible(layout, there)
                yield Moves(action, rows[possible], there[possible])
        yield self.deadline(words)

    def deadline(self, words: Words) -> Moves:
        """What was asked to stop and did not is fenced, with all that is served."""
        layout = self.layout
        rows = np.flatnonzero(words & (layout.deadline.mask | layout.part_deadline.mask))
        there = words[rows] & ~(layout.served | layout.part_served)
        return Moves(Action.DEADLINE, rows, self.queues.judged_again(there))


class _PossibleAges(NamedTuple):
    """Which classes of ages there can be together.

    What was silent for so long has run for at least as long, and an instance has not been idle for longer than what it
    serves has been silent. Each table is flat, over what is served and two of the classes.
    """

    tables: tuple[tuple[Field, Field, Bools], ...]
    part_tables: tuple[tuple[Field, Field, Bools], ...]
    idle: int

    def are_possible(self, layout: Layout, words: Words) -> Ints:
        there = np.ones(len(words), bool)
        for tables, owner in (
            (self.tables, layout.task.of(words)),
            (self.part_tables, (layout.part.of(words) > 0).astype(np.int64)),
        ):
            for one, other, table in tables:
                at = (owner * (one.ones + 1) + one.of(words)) * (other.ones + 1) + other.of(words)
                there &= table[at]
        return np.flatnonzero(there)


def _possible_ages(alphabet: Alphabet, layout: Layout) -> _PossibleAges:
    nothing = Ages((), ())
    tasks = [nothing, *alphabet.task_ages]
    parts = [nothing, alphabet.part_ages] if alphabet.parts else [nothing]
    return _PossibleAges(
        _together(tasks, alphabet.idle_ages, layout.silent, layout.running, layout.idle),
        _together(parts, alphabet.idle_ages, layout.part_silent, layout.part_running, layout.idle),
        len(alphabet.idle_ages),
    )


def _together(
    owners: list[Ages], idle_ages: tuple[int, ...], silent: Field, running: Field, idle: Field
) -> tuple[tuple[Field, Field, Bools], ...]:
    silences, runnings = [ages.silent for ages in owners], [ages.running for ages in owners]
    idles = [idle_ages] * len(owners)
    found = (
        (silent, running, _younger(silences, runnings, silent, running)),
        (idle, silent, _younger(idles, silences, idle, silent)),
        (idle, running, _younger(idles, runnings, idle, running)),
    )
    return tuple(each for each in found if each[0].bits and each[1].bits)


def _younger(younger: list[tuple[int, ...]], older: list[tuple[int, ...]], one: Field, other: Field) -> Bools:
    """Whether an age of class `i` of the first can be no more than one of class `j` of the second.

    (owner, i, j), flat. Owner 0 serves nothing, and everything goes with that.
    """
    table = np.zeros((len(younger), one.ones + 1, other.ones + 1), bool)
    table[0] = True
    for owner in range(1, len(younger)):
        for i in range(len(younger[owner]) + 1):
            for j in range(len(older[owner]) + 1):
                begins = younger[owner][i - 1] if i else 0
                table[owner, i, j] = j == len(older[owner]) or begins < older[owner][j]
    return table.reshape(-1)
