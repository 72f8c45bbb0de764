"""Transitions of packed states, except submissions, for a whole chunk of states at once.

Each is a transition of the core on words instead of records, with lookup tables computed by the core; a test compares
both. Transitions that change nothing a decision depends on are left out: interrupt requests, unknown outcomes, and the
adoption of a single request, which equals a sign of life.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from interlock.policies.model_checker.actions import Ages, Alphabet
from interlock.policies.model_checker.gate_table import Bools, Ints
from interlock.policies.model_checker.queues import Queues
from interlock.policies.model_checker.state_encoding import Field, Layout, Words
from interlock.policies.model_checker.step_tables import StepTables


class Action(IntEnum):
    """What happened. `RELABEL` and the last two start ranges: for each tag, slot of a queue, or submission."""

    BEGIN = 0
    TAKE = 1
    TAKE_COMPONENT = 2
    LIFE = 3
    """A progress report of the state change in service."""
    PHASE = 4
    """A progress report with its next phase."""
    COMPONENT_LIFE = 5
    SUCCEED = 6
    FAIL = 7
    INTERRUPT = 8
    """Ended and left the instance as it was, as one of `ARRIVES` that arrived does too."""
    FINISH_COMPONENT = 9
    GUEST_STOPPED = 10
    GUEST_CRASHED = 11
    GUEST_RESET = 12
    SILENT = 13
    """Time passes until the silence reaches its next class."""
    RUNNING = 14
    COMPONENT_SILENT = 15
    COMPONENT_RUNNING = 16
    IDLE = 17
    DEADLINE = 18
    ADOPT = 19
    """Both requests in service are adopted; for a single one that equals `LIFE`."""
    HOST_LOST = 20
    HOST_BACK = 21
    ARRIVE = 22
    """A migration off a lost host has ended, and the instance is as it was on another host."""
    HELD_ADMITTED = 23
    HOLD_ENDED = 24
    """The hold expires, or is cancelled by its owner."""
    RELABEL = 25
    """A tag is set or removed: one for each of `Alphabet.tags`."""
    CANCEL = 32
    SUBMIT = 96
    HOLD = 8192
    """A submission is denied and held: one for each submission."""


class Transitions(NamedTuple):
    """Transitions of one kind from some of the states of a chunk."""

    action: int | Ints
    """One for all, or one for each."""
    rows: Ints
    """Indexes of the source states in the chunk."""
    words: Words
    """The target states."""
    dropped: Ints | None = None
    """Indexes of submissions that were admitted in turn and cancelled in the same transition."""


SILENCE = frozenset({Action.SILENT, Action.COMPONENT_SILENT})
"""Time that passes without progress of a worker."""
FAULTS = frozenset({Action.FAIL, Action.GUEST_STOPPED, Action.GUEST_CRASHED})
"""The actions that `faults_max` limits. Time that passes is not one: a worker may hang in every state (law 5)."""


class Steps:
    """The transitions of one search, except submissions."""

    def __init__(self, alphabet: Alphabet, layout: Layout, tables: StepTables) -> None:
        self.layout = layout
        self.tables = tables
        self.queues = Queues(alphabet, layout, tables)
        self._ages = _possible_ages(alphabet, layout)
        self._component_ages = alphabet.component_ages

    def after(self, words: Words) -> Iterator[Transitions]:
        """Yield all transitions but submissions."""
        layout = self.layout
        task, component = layout.task.of(words), layout.component.of(words)
        busy, component_busy = np.flatnonzero(task), np.flatnonzero(component)
        yield from self._taken(words, task, component)
        yield from self._signs_of_life(words, busy, component_busy)
        yield from self._ends(words, busy, component_busy)
        yield from self._guest(words)
        yield from self._cancelled(words)
        yield from self._surroundings(words)
        yield from self.time(words)

    # -------------------------------------------------------------------------------------------- taking and reporting

    def _taken(self, words: Words, task: Ints, component: Ints) -> Iterator[Transitions]:
        yield self.take(words, task, component)
        yield self.take_component(words, task, component)

    def take(self, words: Words, task: Ints, component: Ints) -> Transitions:
        layout, tables = self.layout, self.tables
        first = words & layout.queue_first
        kinds = len(tables.preempts)
        beside = tables.component_with_kind[component * kinds + first]
        rows = np.flatnonzero(tables.is_state_change[first] & (task == 0) & beside)
        own = words[rows]
        kept = self.queues.without(own, 0) & ~(layout.served | layout.idle.mask)
        return Transitions(Action.TAKE, rows, kept | tables.first_task[first[rows]] << layout.task.shift)

    def take_component(self, words: Words, task: Ints, component: Ints) -> Transitions:
        layout, tables = self.layout, self.tables
        change, slot = self.queues.first_component(words)
        # Before others only beside the state change in service, which they have to wait for.
        may = (slot == 0) | ((task > 0) & ~tables.preempts[words & layout.queue_first])
        beside = tables.kind_with_task[change * len(tables.next_task) + task]
        rows = np.flatnonzero((change != 0) & (component == 0) & beside & may)
        kept = self.queues.without(words[rows], slot[rows]) & ~(layout.component_served | layout.idle.mask)
        return Transitions(
            Action.TAKE_COMPONENT, rows, kept | tables.component_of[change[rows]] << layout.component.shift
        )

    def _signs_of_life(self, words: Words, busy: Ints, component_busy: Ints) -> Iterator[Transitions]:
        layout = self.layout
        for action, rows, silent in (
            (Action.LIFE, busy, layout.silent),
            (Action.COMPONENT_LIFE, component_busy, layout.component_silent),
        ):
            fresh = ~(silent.mask | layout.idle.mask)
            own = words[rows]
            there = own & fresh
            changed = np.flatnonzero(there != own)
            yield Transitions(action, rows[changed], there[changed])
        both = busy[layout.component.of(words[busy]) > 0]
        own = words[both]
        there = own & ~(layout.silent.mask | layout.component_silent.mask | layout.idle.mask)
        changed = np.flatnonzero(there != own)
        yield Transitions(Action.ADOPT, both[changed], there[changed])
        own = words[busy]
        following = self.tables.next_task[layout.task.of(own)]
        rows = np.flatnonzero(following)
        kept = own[rows] & ~(layout.task.mask | layout.silent.mask | layout.idle.mask)
        yield Transitions(Action.PHASE, busy[rows], kept | following[rows] << layout.task.shift)

    def _ends(self, words: Words, busy: Ints, component_busy: Ints) -> Iterator[Transitions]:
        layout, tables = self.layout, self.tables
        yield self.succeeded(words, busy)
        own = words[busy]
        base = layout.base.of(own)
        failed = tables.task_fails[layout.task.of(own) * tables.bases + base]
        rows = np.flatnonzero(failed != base)
        gone = layout.served | layout.idle.mask
        yield Transitions(Action.FAIL, busy[rows], self._settled(own[rows] & ~gone, failed[rows]))
        yield Transitions(Action.INTERRUPT, busy, self._settled(own & ~gone, base))
        own = words[component_busy]
        gone = layout.component_served | layout.idle.mask
        yield Transitions(Action.FINISH_COMPONENT, component_busy, self._settled(own & ~gone, layout.base.of(own)))

    def succeeded(self, words: Words, busy: Ints) -> Transitions:
        layout, tables = self.layout, self.tables
        own = words[busy]
        leads = tables.task_leads[layout.task.of(own) * tables.bases + layout.base.of(own)]
        return Transitions(Action.SUCCEED, busy, self._settled(own & ~(layout.served | layout.idle.mask), leads))

    def _settled(self, words: Words, base: Ints, *, host_changed: bool = False) -> Words:
        """Set the base state and re-evaluate the queues."""
        there = (words & ~self.layout.base.mask) | base << self.layout.base.shift
        return self.queues.reevaluated(there, host_changed=host_changed)

    def _guest(self, words: Words) -> Iterator[Transitions]:
        layout, tables = self.layout, self.tables
        base = layout.base.of(words)
        every = np.arange(len(words))
        awake = words & ~layout.idle.mask
        for action, leads in ((Action.GUEST_STOPPED, tables.stopped), (Action.GUEST_CRASHED, tables.crashed)):
            there = leads[base]
            # Without a guest, both only cause a re-evaluation of the queues.
            rows = every if action is Action.GUEST_STOPPED else np.flatnonzero(there != tables.stopped[base])
            settled = self._settled(awake[rows], there[rows])
            changed = np.flatnonzero(settled != words[rows])
            yield Transitions(action, rows[changed], settled[changed])
        changed = np.flatnonzero(awake != words)
        yield Transitions(Action.GUEST_RESET, changed, awake[changed])

    def _surroundings(self, words: Words) -> Iterator[Transitions]:
        """Lose the host or get it back, set or remove a tag: each changes the base state, and is no sign of life."""
        tables = self.tables
        base = self.layout.base.of(words)
        for action, leads in (
            (Action.HOST_LOST, tables.host_lost),
            (Action.HOST_BACK, tables.host_back),
            *((Action.RELABEL + number, leads) for number, leads in enumerate(tables.relabelled)),
        ):
            there = leads[base]
            rows = np.flatnonzero(there != base)
            if len(rows):
                changed = action in (Action.HOST_LOST, Action.HOST_BACK)
                yield Transitions(action, rows, self._settled(words[rows], there[rows], host_changed=changed))
        arrives = tables.task_arrives[self.layout.task.of(words)]
        there = tables.host_back[base]
        rows = np.flatnonzero(arrives & (there != base))
        if len(rows):
            own = words[rows] & ~(self.layout.served | self.layout.idle.mask)
            yield Transitions(Action.ARRIVE, rows, self._settled(own, there[rows]))

    def _cancelled(self, words: Words) -> Iterator[Transitions]:
        layout = self.layout
        for slot in range(layout.slots):
            rows = np.flatnonzero(words & (layout.queue_first << (slot * layout.kind_bits)))
            if not len(rows):
                break
            there = self.queues.without(words[rows], slot)
            yield Transitions(Action.CANCEL + slot, rows, self.queues.reevaluated(there))

    # ------------------------------------------------------------------------------------------------------------ time

    def time(self, words: Words) -> Iterator[Transitions]:
        """Let time pass until one age reaches its next class, or a deadline passes."""
        layout = self.layout
        task, component = layout.task.of(words), layout.component.of(words)
        tables = self.tables
        for action, field, classes in (
            (Action.SILENT, layout.silent, tables.silences[task]),
            (Action.RUNNING, layout.running, tables.runnings[task]),
            (Action.COMPONENT_SILENT, layout.component_silent, (component > 0) * len(self._component_ages.silent)),
            (Action.COMPONENT_RUNNING, layout.component_running, (component > 0) * len(self._component_ages.running)),
            (Action.IDLE, layout.idle, np.full(len(words), self._ages.idle)),
        ):
            if field.bits:
                rows = np.flatnonzero(field.of(words) < classes)
                there = words[rows] + (1 << field.shift)
                possible = self._ages.are_possible(layout, there)
                yield Transitions(action, rows[possible], there[possible])
        yield self.deadline(words)

    def limited(self, words: Words) -> Transitions:
        """Fence the requests in service whose total time is limited (`served_at_most`), once it has passed."""
        layout, tables = self.layout, self.tables
        limited = tables.task_limited[layout.task.of(words)] | tables.component_limited[layout.component.of(words)]
        rows = np.flatnonzero(limited)
        there = words[rows] & ~(layout.served | layout.component_served)
        return Transitions(Action.DEADLINE, rows, self.queues.reevaluated(there))

    def deadline(self, words: Words) -> Transitions:
        """Fence the requests in service whose interrupt deadline has passed."""
        layout = self.layout
        rows = np.flatnonzero(words & (layout.deadline.mask | layout.component_deadline.mask))
        there = words[rows] & ~(layout.served | layout.component_served)
        return Transitions(Action.DEADLINE, rows, self.queues.reevaluated(there))


class _PossibleAges(NamedTuple):
    """Which combinations of age classes are possible: idle ≤ silent ≤ running.

    Each table is flat, over the task or component in service and two age classes.
    """

    tables: tuple[tuple[Field, Field, Bools], ...]
    component_tables: tuple[tuple[Field, Field, Bools], ...]
    idle: int

    def are_possible(self, layout: Layout, words: Words) -> Ints:
        there = np.ones(len(words), bool)
        for tables, owner in (
            (self.tables, layout.task.of(words)),
            (self.component_tables, (layout.component.of(words) > 0).astype(np.int64)),
        ):
            for one, other, table in tables:
                at = (owner * (one.ones + 1) + one.of(words)) * (other.ones + 1) + other.of(words)
                there &= table[at]
        return np.flatnonzero(there)


def _possible_ages(alphabet: Alphabet, layout: Layout) -> _PossibleAges:
    empty = Ages((), ())
    tasks = [empty, *alphabet.task_ages]
    components = [empty, alphabet.component_ages] if alphabet.components else [empty]
    return _PossibleAges(
        _age_tables(tasks, alphabet.idle_ages, layout.silent, layout.running, layout.idle),
        _age_tables(components, alphabet.idle_ages, layout.component_silent, layout.component_running, layout.idle),
        len(alphabet.idle_ages),
    )


def _age_tables(
    owners: list[Ages], idle_ages: tuple[int, ...], silent: Field, running: Field, idle: Field
) -> tuple[tuple[Field, Field, Bools], ...]:
    silences, runnings = [ages.silent for ages in owners], [ages.running for ages in owners]
    idles = [idle_ages] * len(owners)
    found = (
        (silent, running, _possible_pairs(silences, runnings, silent, running)),
        (idle, silent, _possible_pairs(idles, silences, idle, silent)),
        (idle, running, _possible_pairs(idles, runnings, idle, running)),
    )
    return tuple(each for each in found if each[0].bits and each[1].bits)


def _possible_pairs(younger: list[tuple[int, ...]], older: list[tuple[int, ...]], one: Field, other: Field) -> Bools:
    """Return, flat over (owner, i, j), whether an age of class `i` can be at most one of class `j`.

    Owner 0 is none in service, for which every combination is possible.
    """
    table = np.zeros((len(younger), one.ones + 1, other.ones + 1), bool)
    table[0] = True
    for owner in range(1, len(younger)):
        for i in range(len(younger[owner]) + 1):
            for j in range(len(older[owner]) + 1):
                begins = younger[owner][i - 1] if i else 0
                table[owner, i, j] = j == len(older[owner]) or begins < older[owner][j]
    return table.reshape(-1)
