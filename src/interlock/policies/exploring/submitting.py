"""Every submission to a whole chunk of packed states at once.

The states are looked up in the gate's table by their place; each row found there is one submission to one state, and
the masks of the row say what becomes of it. What follows from the answer is as in `core.admission`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from interlock.core.policy import Rule
from interlock.core.states import NO_TASK
from interlock.policies.exploring.alphabet import Alphabet
from interlock.policies.exploring.gate_table import (
    EFFECT_BITS,
    EFFECT_MASK,
    Bools,
    Effect,
    GateTable,
    Ints,
    Place,
    Rows,
)
from interlock.policies.exploring.layout import Layout, Words
from interlock.policies.exploring.queues import Queues
from interlock.policies.exploring.step_tables import StepTables, leads_to
from interlock.policies.exploring.steps import Action, Moves


class Answers(NamedTuple):
    """What every submission to every state of a chunk is answered; one element for each that is not simply refused."""

    rows: Ints
    """Which state of the chunk."""
    ask: Ints
    effect: Ints
    kind: Ints
    """The kind of request that it makes; the number of the submission where it makes none."""


class Submitting:
    """The gate of one walk."""

    def __init__(
        self, alphabet: Alphabet, layout: Layout, tables: StepTables, queues: Queues, outstanding_max: int
    ) -> None:
        self._alphabet = alphabet
        self._layout = layout
        self._tables = tables
        self._queues = queues
        self._outstanding_max = outstanding_max
        self.gate = GateTable(alphabet)
        self._ages = _AgeCodes(alphabet)
        self._places = np.full(len(alphabet.footings) * 2 * (len(alphabet.tasks) + 1) * self._ages.codes, -1, np.int64)
        self._rows: Rows | None = None
        is_part = [ask.operation in alphabet.parts for ask in alphabet.asks]
        self.is_part = np.array(is_part, bool)
        self._leads_to_goal = tables.leads_to_goal
        self._asks_for_goal = np.array([leads_to(ask.operation, tables.goal) for ask in alphabet.asks], bool)

    def answers(self, words: Words) -> Answers:
        """The answers to every submission."""
        places = self.places(words)
        return self._answers(words, places, self._table())

    def answers_to_deletions(self, words: Words) -> Answers:
        """The answers to the submissions that lead to the goal."""
        places = self.places(words)
        return self._answers(words, places, self._table().chosen(self._asks_for_goal))

    def _answers(self, words: Words, places: Ints, rows: Rows) -> Answers:
        count = rows.counts[places]
        states = np.repeat(np.arange(len(words)), count)
        at = np.arange(len(states)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(rows.first[places], count)
        outstanding = self._queues.outstanding(words)[states]
        effect = rows.effects[at, -1]
        for level in reversed(range(rows.masks.shape[1])):
            effect = np.where(outstanding & rows.masks[at, level], rows.effects[at, level], effect)
        given = np.flatnonzero(effect)
        effect, states = effect[given], states[given]
        answers = Answers(states, rows.ask[at[given]], effect & EFFECT_MASK, effect >> EFFECT_BITS)
        return self._foreseen(words, answers)

    def _foreseen(self, words: Words, answers: Answers) -> Answers:
        """Without what is admitted in turn only, and not permitted in the foreseen state; nor into a full queue."""
        layout, tables = self._layout, self._tables
        waiting, part_waiting = self._queues.lengths(words)
        task, part = layout.task.of(words), layout.part.of(words)
        count = waiting + part_waiting + (task > 0) + (part > 0)
        changes = (waiting > 0) | (task > 0)
        foreseen = self._queues.foreseen(words)[answers.rows]
        is_part = self.is_part[answers.ask]
        admit = answers.effect == Effect.ADMIT
        kind = np.where(admit & ~is_part, answers.kind, 0)
        part_kind = np.where(admit & is_part, answers.kind, 0)
        judged = (tables.in_turn[kind] | tables.part_in_turn[part_kind]) & changes[answers.rows]
        permitted = tables.permits[kind * tables.footings + foreseen]
        permitted |= tables.part_permits[part_kind * tables.footings + foreseen]
        full = count[answers.rows] >= self._alphabet.policy.outstanding_max
        keep = ~admit | (~full & (permitted | ~judged))
        preempt = np.flatnonzero(answers.effect == Effect.PREEMPT)
        if len(preempt):
            keep[preempt] &= ~self._waits_already(words, answers, preempt)
        kept = np.flatnonzero(keep)
        return Answers(*(column[kept] for column in answers))

    def _waits_already(self, words: Words, answers: Answers, preempt: Ints) -> Bools:
        """Whether the same preempting request waits at the front already."""
        layout, tables = self._layout, self._tables
        rows, kind, is_part = answers.rows[preempt], answers.kind[preempt], self.is_part[answers.ask[preempt]]
        there = np.zeros(len(preempt), bool)
        for waiting, ones, bits, variant, own in (
            (words[rows] & layout.queue.mask, layout.queue_first, layout.kind_bits, tables.variant, ~is_part),
            (
                layout.part_queue.of(words[rows]),
                layout.part_queue_first,
                layout.part_kind_bits,
                tables.part_variant,
                is_part,
            ),
        ):
            queue = waiting
            wanted = variant[np.where(own, kind, 0)]
            while queue.any():
                there |= own & (variant[queue & ones] == wanted)
                queue = queue >> bits
        return there

    def moves(self, words: Words, answers: Answers) -> Iterator[Moves]:
        """Where what is admitted leads."""
        for effect, follow in (
            (Effect.ADMIT, self._admitted),
            (Effect.TAKE_OVER, self._overtaking),
            (Effect.PREEMPT, self._overtaking),
            (Effect.LOCK, self._noted),
            (Effect.UNLOCK, self._noted),
            (Effect.RESET, self._noted),
        ):
            chosen = np.flatnonzero(answers.effect == effect)
            if len(chosen):
                yield follow(words, Answers(*(column[chosen] for column in answers)), effect)

    def _admitted(self, words: Words, answers: Answers, _effect: Effect) -> Moves:
        layout = self._layout
        waiting, part_waiting = self._queues.lengths(words)
        count = waiting + part_waiting + (layout.task.of(words) > 0) + (layout.part.of(words) > 0)
        is_part = self.is_part[answers.ask]
        kind = np.where(is_part, 0, answers.kind)
        on_top = self._leads_to_goal[kind]
        fits = np.flatnonzero(count[answers.rows] < self._outstanding_max + on_top)
        rows, is_part, kind = answers.rows[fits], is_part[fits], answers.kind[fits]
        at = np.where(
            is_part,
            layout.part_queue.shift + part_waiting[rows] * layout.part_kind_bits,
            layout.queue.shift + waiting[rows] * layout.kind_bits,
        )
        return Moves(Action.SUBMIT + answers.ask[fits], rows, words[rows] | kind << at)

    def _overtaking(self, words: Words, answers: Answers, effect: Effect) -> Moves:
        layout = self._layout
        own = words[answers.rows]
        if effect is Effect.TAKE_OVER:
            own = own & ~(layout.served | layout.part_served)
        else:
            stopping = (layout.task.of(own) > 0).astype(np.int64) & layout.deadline.ones
            part_stopping = (layout.part.of(own) > 0).astype(np.int64) & layout.part_deadline.ones
            own = own | stopping << layout.deadline.shift | part_stopping << layout.part_deadline.shift
        is_part = self.is_part[answers.ask]
        queue, part_queue = own & layout.queue.mask, layout.part_queue.of(own)
        queue = np.where(is_part, queue, queue << layout.kind_bits | answers.kind)
        part_queue = np.where(is_part, part_queue << layout.part_kind_bits | answers.kind, part_queue)
        kept, part_kept = self._queues.judged(own, queue, part_queue)
        waiting = _length(kept, layout.kind_bits) + _length(part_kept, layout.part_kind_bits)
        count = waiting + (layout.task.of(own) > 0) + (layout.part.of(own) > 0)
        on_top = self._leads_to_goal[np.where(is_part, 0, answers.kind)]
        fits = np.flatnonzero(count <= self._outstanding_max + on_top)
        there = (own & ~layout.queues) | kept | part_kept << layout.part_queue.shift
        # It was put first in its queue.
        first = np.where(is_part, part_kept & layout.part_queue_first, kept & layout.queue_first)
        promised = self._tables.in_turn[np.where(is_part, 0, answers.kind)]
        promised |= self._tables.part_in_turn[np.where(is_part, answers.kind, 0)]
        dropped = np.flatnonzero((promised & (first != answers.kind))[fits])
        return Moves(Action.SUBMIT + answers.ask[fits], answers.rows[fits], there[fits], dropped)

    def _noted(self, words: Words, answers: Answers, effect: Effect) -> Moves:
        layout, tables = self._layout, self._tables
        own = words[answers.rows]
        if effect is Effect.RESET:
            footing = tables.resets[answers.ask, layout.footing.of(own)]
            own = own & ~(layout.served | layout.part_served | layout.idle.mask | layout.footing.mask)
            there = self._queues.judged_again(own | footing << layout.footing.shift)
        elif effect is Effect.LOCK:
            there = own | layout.locked.mask
        else:
            there = own & ~layout.locked.mask
        changed = np.flatnonzero(there != own)
        return Moves(Action.SUBMIT + answers.ask[changed], answers.rows[changed], there[changed])

    # ---------------------------------------------------------------------------------------------------------- places

    def places(self, words: Words) -> Ints:
        """The number of each state's place in the gate's table."""
        codes = self._codes(words)
        places = self._places[codes]
        if (places < 0).any():
            for code in np.unique(codes[places < 0]):
                self._places[code] = self.gate.add(self._place(int(code)))
            self._rows = None
            places = self._places[codes]
        return places

    def tasks_alone(self) -> Words:
        """For every footing and task that was asked about, and every age: the states with nothing else outstanding."""
        layout = self._layout
        codes = np.flatnonzero(self._places >= 0) // self._ages.codes
        tasks = len(self._alphabet.tasks) + 1
        words = []
        for footing, task in {(code // tasks // 2, code % tasks) for code in codes.tolist() if code % tasks}:
            ages = self._alphabet.task_ages[task - 1]
            word = footing << layout.footing.shift | task << layout.task.shift
            words += [
                word | silent << layout.silent.shift | running << layout.running.shift
                for silent in range(len(ages.silent) + 1)
                for running in range(len(ages.running) + 1)
            ]
        return np.array(words, np.int64)

    def _codes(self, words: Words) -> Ints:
        layout = self._layout
        task, part, locked = layout.task.of(words), layout.part.of(words), layout.locked.of(words)
        footing = layout.footing.of(words)
        age = self._ages.of(layout, words, task, part)
        return ((footing * 2 + locked) * (len(self._alphabet.tasks) + 1) + task) * self._ages.codes + age

    def rule(self, word: int, ask: int) -> Rule:
        """The rule that decides on a submission in one state."""
        words = np.array([word], np.int64)
        place = self._place(int(self._codes(words)[0]))
        outstanding = int(self._queues.outstanding(words)[0])
        answers = self.gate.answers(self._alphabet.asks[ask], place)
        return next(answer.rule for answer in answers if answer.mask & outstanding)

    def _place(self, code: int) -> Place:
        rest, age = divmod(code, self._ages.codes)
        rest, task = divmod(rest, len(self._alphabet.tasks) + 1)
        footing, locked = divmod(rest, 2)
        there = self._alphabet.footings[footing]
        task_state = self._alphabet.tasks[task - 1].phase if task else NO_TASK
        silent_ms, running_ms = self._ages.moments(task, age)
        return Place(there.vm_state, there.launched, bool(locked), task_state, silent_ms, running_ms)

    def _table(self) -> Rows:
        if self._rows is None:
            self._rows = self.gate.rows()
        return self._rows


class _AgeCodes:
    """One number for the age on which a submission is judged: that of what is served, or of the idle instance."""

    def __init__(self, alphabet: Alphabet) -> None:
        self._alphabet = alphabet
        self._runnings = max((len(ages.running) for ages in alphabet.task_ages), default=0) + 1
        silences = max((len(ages.silent) for ages in alphabet.task_ages), default=0) + 1
        self._idles = len(alphabet.idle_ages) + 1
        self._part_runnings = len(alphabet.part_ages.running) + 1
        parts = (len(alphabet.part_ages.silent) + 1) * self._part_runnings
        self.codes = max(silences * self._runnings, self._idles + parts)

    def of(self, layout: Layout, words: Words, task: Ints, part: Ints) -> Ints:
        served = layout.silent.of(words) * self._runnings + layout.running.of(words)
        part_served = layout.part_silent.of(words) * self._part_runnings + layout.part_running.of(words) + self._idles
        return np.where(task > 0, served, np.where(part > 0, part_served, layout.idle.of(words)))

    def moments(self, task: int, code: int) -> tuple[int, int]:
        """The least silence, and the least time running, of an age."""
        alphabet = self._alphabet
        if not task and code < self._idles:
            idle = _least(alphabet.idle_ages, code)
            return idle, idle
        if task:
            ages = alphabet.task_ages[task - 1]
            silent, running = divmod(code, self._runnings)
        else:
            ages = alphabet.part_ages
            silent, running = divmod(code - self._idles, self._part_runnings)
        silent_ms = _least(ages.silent, silent)
        return silent_ms, max(silent_ms, _least(ages.running, running))


def _least(bounds: tuple[int, ...], number: int) -> int:
    return bounds[number - 1] if number else 0


def _length(queue: Ints, bits: int) -> Ints:
    """How many places of a queue are taken; there is no gap in one."""
    length = np.zeros(len(queue), np.int64)
    while bits and queue.any():
        length += queue > 0
        queue = queue >> bits
    return length
