"""The gate on packed states: every submission to a whole chunk of states at once.

Each state is looked up in the gate table by its situation; each row found there is one submission to one state. The
transition that follows from an answer is that of `core.admission`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from interlock.core.operations import BIT, Operation
from interlock.core.policy import Rule
from interlock.core.roles import Role
from interlock.core.states import NO_TASK
from interlock.policies.model_checker.actions import Alphabet
from interlock.policies.model_checker.gate_table import (
    EFFECT_BITS,
    EFFECT_MASK,
    ROLE_BIT,
    Bools,
    GateEffect,
    GateTable,
    Ints,
    Rows,
    Situation,
)
from interlock.policies.model_checker.queues import Queues
from interlock.policies.model_checker.state_encoding import Layout, Words
from interlock.policies.model_checker.step_tables import StepTables, leads_to
from interlock.policies.model_checker.steps import Action, Transitions


class PackedAnswers(NamedTuple):
    """The gate's answers to every submission to a chunk of states, without plain refusals."""

    rows: Ints
    """Indexes of the states in the chunk."""
    submission: Ints
    effect: Ints
    kind: Ints
    """The kind of the admitted request; for a lock its level, and 0 for other operations on the record."""


class PackedGate:
    """The gate of one search."""

    def __init__(
        self, alphabet: Alphabet, layout: Layout, tables: StepTables, queues: Queues, outstanding_max: int
    ) -> None:
        self._alphabet = alphabet
        self._layout = layout
        self._tables = tables
        self.queues = queues
        self._outstanding_max = outstanding_max
        self.gate = GateTable(alphabet)
        self._ages = _AgeCodes(alphabet)
        self._locks, self._holds = layout.locked.ones + 1, layout.held.ones + 1
        self._situation_numbers = np.full(
            len(alphabet.bases) * self._locks * self._holds * (len(alphabet.tasks) + 1) * self._ages.codes, -1, np.int64
        )
        self._rows: Rows | None = None
        self._leads_to_goal = tables.leads_to_goal
        self._resets = np.array([one.operation is Operation.RESET_STATE for one in alphabet.submissions], bool)
        self._goal_submissions = np.array(
            [leads_to(submission.operation, tables.goal) for submission in alphabet.submissions], bool
        )

    def answers(self, words: Words) -> PackedAnswers:
        """Return the answers to every submission."""
        situations = self.situations(words)
        return self._answers(words, situations, self._table())

    def ways_out(self, words: Words, role: Role | None, *, deletions: bool, resets: bool) -> PackedAnswers:
        """Return the answers to the submissions of a role (None: of any).

        With `deletions`, return only those to deletions; without `resets`, none to `reset_state`.
        """
        situations = self.situations(words)
        rows = self._table()
        kept = self._goal_submissions[rows.submission] | (not deletions)
        if not resets:
            kept &= ~self._resets[rows.submission]
        if role is not None:
            kept &= (rows.roles & ROLE_BIT[role]) > 0
        return self._answers(words, situations, rows.chosen(kept))

    def _answers(self, words: Words, situations: Ints, rows: Rows) -> PackedAnswers:
        count = rows.counts[situations]
        states = np.repeat(np.arange(len(words)), count)
        at = (
            np.arange(len(states))
            - np.repeat(np.cumsum(count) - count, count)
            + np.repeat(rows.first[situations], count)
        )
        outstanding = self.queues.outstanding(words)[states]
        effect = rows.effects[at, -1]
        for level in reversed(range(rows.masks.shape[1])):
            effect = np.where(outstanding & rows.masks[at, level], rows.effects[at, level], effect)
        given = np.flatnonzero(effect)
        effect, states = effect[given], states[given]
        answers = PackedAnswers(states, rows.submission[at[given]], effect & EFFECT_MASK, effect >> EFFECT_BITS)
        return self._foreseen(words, answers)

    def _foreseen(self, words: Words, answers: PackedAnswers) -> PackedAnswers:
        """Drop admissions in turn that the foreseen state does not permit, and those to a full queue."""
        layout, tables = self._layout, self._tables
        task = layout.task.of(words)
        count = self._outstanding_count(words)
        changes = self.queues.have_state_changes(words) | (task > 0)
        foreseen = self.queues.foreseen(words)[answers.rows]
        admit = answers.effect == GateEffect.ADMIT
        kind = np.where(admit, answers.kind, 0)
        in_turn = tables.in_turn[kind] & changes[answers.rows]
        permitted = tables.permits[kind * tables.bases + foreseen]
        full = count[answers.rows] >= self._alphabet.policy.outstanding_max
        keep = ~admit | (~full & (permitted | ~in_turn))
        preempt = np.flatnonzero(answers.effect == GateEffect.PREEMPT)
        if len(preempt):
            keep[preempt] &= ~self._waits_already(words, answers, preempt)
        kept = np.flatnonzero(keep)
        return PackedAnswers(*(column[kept] for column in answers))

    def _outstanding_count(self, words: Words) -> Ints:
        layout = self._layout
        count: Ints = self.queues.lengths(words) + (layout.task.of(words) > 0) + (layout.component.of(words) > 0)
        return count

    def _waits_already(self, words: Words, answers: PackedAnswers, preempt: Ints) -> Bools:
        """Return whether the same preempting request is queued already."""
        layout, variant = self._layout, self._tables.variant
        wanted = variant[answers.kind[preempt]]
        there = np.zeros(len(preempt), bool)
        queue = words[answers.rows[preempt]] & layout.queue.mask
        while queue.any():
            there |= variant[queue & layout.queue_first] == wanted
            queue = queue >> layout.kind_bits
        return there

    def transitions(self, words: Words, answers: PackedAnswers) -> Iterator[Transitions]:
        """Yield the transitions of admitted submissions."""
        for effect, follow in (
            (GateEffect.ADMIT, self._admitted),
            (GateEffect.TAKE_OVER, self._preempting),
            (GateEffect.PREEMPT, self._preempting),
            (GateEffect.LOCK, self._record_changed),
            (GateEffect.UNLOCK, self._record_changed),
            (GateEffect.RESET, self._record_changed),
        ):
            chosen = np.flatnonzero(answers.effect == effect)
            if len(chosen):
                yield follow(words, PackedAnswers(*(column[chosen] for column in answers)), effect)

    def _admitted(self, words: Words, answers: PackedAnswers, _effect: GateEffect) -> Transitions:
        count = self._outstanding_count(words)
        on_top = self._leads_to_goal[answers.kind]
        fits = np.flatnonzero(count[answers.rows] < self._outstanding_max + on_top)
        rows = answers.rows[fits]
        there = self.queues.appended(words[rows], answers.kind[fits])
        return Transitions(Action.SUBMIT + answers.submission[fits], rows, there)

    def _preempting(self, words: Words, answers: PackedAnswers, effect: GateEffect) -> Transitions:
        layout = self._layout
        own = words[answers.rows]
        if effect is GateEffect.TAKE_OVER:
            own = own & ~(layout.served | layout.component_served)
        else:
            stopping = (layout.task.of(own) > 0).astype(np.int64) & layout.deadline.ones
            component_stopping = (layout.component.of(own) > 0).astype(np.int64) & layout.component_deadline.ones
            own = own | stopping << layout.deadline.shift | component_stopping << layout.component_deadline.shift
        queue = (own & layout.queue.mask) << layout.kind_bits | answers.kind
        kept = self.queues.reevaluate(own, queue)
        count = _length(kept, layout.kind_bits) + (layout.task.of(own) > 0) + (layout.component.of(own) > 0)
        on_top = self._leads_to_goal[answers.kind]
        fits = np.flatnonzero(count <= self._outstanding_max + on_top)
        there = (own & ~layout.queue.mask) | kept
        # The new request is at the head of the queue unless it was cancelled.
        first = kept & layout.queue_first
        dropped = np.flatnonzero((self._tables.in_turn[answers.kind] & (first != answers.kind))[fits])
        return Transitions(Action.SUBMIT + answers.submission[fits], answers.rows[fits], there[fits], dropped)

    def _record_changed(self, words: Words, answers: PackedAnswers, effect: GateEffect) -> Transitions:
        layout, tables = self._layout, self._tables
        own = words[answers.rows]
        if effect is GateEffect.RESET:
            base = tables.resets[answers.submission, layout.base.of(own)]
            own = own & ~(layout.served | layout.component_served | layout.idle.mask | layout.base.mask)
            there = self.queues.reevaluated(own | base << layout.base.shift)
        elif effect is GateEffect.LOCK:
            level = np.minimum(np.maximum(layout.locked.of(own), answers.kind), layout.locked.ones)
            there = (own & ~layout.locked.mask) | level << layout.locked.shift
        else:
            there = own & ~layout.locked.mask
        changed = np.flatnonzero(there != own)
        return Transitions(Action.SUBMIT + answers.submission[changed], answers.rows[changed], there[changed])

    def held_admitted(self, words: Words) -> Iterator[Transitions]:
        """Admit the held requests that the policy admits."""
        for rows, own, answers in self._held_answers(words):
            for transitions in self.transitions(own, answers):
                yield transitions._replace(action=Action.HELD_ADMITTED, rows=rows[transitions.rows])

    def held_hope(self, words: Words) -> Bools:
        """Return whether the held request of each state is admitted now, or waits for a time."""
        hope = np.zeros(len(words), bool)
        for rows, _, answers in self._held_answers(words):
            hope[rows[answers.rows[answers.effect != GateEffect.UNEXPLAINED]]] = True
        return hope

    def _held_answers(self, words: Words) -> Iterator[tuple[Ints, Words, PackedAnswers]]:
        """Evaluate held requests as if they were not held: the rows of their states, these states, and the answers."""
        field = self._layout.held
        for number, submission in enumerate(self._alphabet.held, start=1):
            rows = np.flatnonzero(field.of(words) == number)
            if len(rows):
                own = words[rows] & ~field.mask
                situations = self.situations(own)
                table = self._table()
                yield rows, own, self._answers(own, situations, table.chosen(table.submission == submission))

    # ---------------------------------------------------------------------------------------------------------- places

    def situations(self, words: Words) -> Ints:
        """Return the number of each state's situation in the gate table."""
        codes = self._codes(words)
        situations = self._situation_numbers[codes]
        if (situations < 0).any():
            for code in np.unique(codes[situations < 0]):
                self._situation_numbers[code] = self.gate.add(self._situation(int(code)))
            self._rows = None
            situations = self._situation_numbers[codes]
        return situations

    def tasks_alone(self) -> Words:
        """Return the states with only a task outstanding, for every base state and task looked up, in every age."""
        layout = self._layout
        codes = np.flatnonzero(self._situation_numbers >= 0) // self._ages.codes
        tasks = len(self._alphabet.tasks) + 1
        words = []
        for base, task in {
            (code // tasks // self._holds // self._locks, code % tasks) for code in codes.tolist() if code % tasks
        }:
            ages = self._alphabet.task_ages[task - 1]
            word = base << layout.base.shift | task << layout.task.shift
            words += [
                word | silent << layout.silent.shift | running << layout.running.shift
                for silent in range(len(ages.silent) + 1)
                for running in range(len(ages.running) + 1)
            ]
        return np.array(words, np.int64)

    def _codes(self, words: Words) -> Ints:
        layout = self._layout
        task, component, locked = layout.task.of(words), layout.component.of(words), layout.locked.of(words)
        base = layout.base.of(words)
        age = self._ages.of(layout, words, task, component)
        return (
            ((base * self._locks + locked) * self._holds + layout.held.of(words)) * (len(self._alphabet.tasks) + 1)
            + task
        ) * self._ages.codes + age

    def rule(self, word: int, submission: int) -> Rule:
        """Return the rule that decides a submission in one state."""
        words = np.array([word], np.int64)
        situation = self._situation(int(self._codes(words)[0]))
        outstanding = int(self.queues.outstanding(words)[0])
        answers = self.gate.answers(self._alphabet.submissions[submission], situation)
        return next(answer.rule for answer in answers if answer.mask & outstanding)

    def _situation(self, code: int) -> Situation:
        rest, age = divmod(code, self._ages.codes)
        rest, task = divmod(rest, len(self._alphabet.tasks) + 1)
        rest, held = divmod(rest, self._holds)
        base, locked = divmod(rest, self._locks)
        there = self._alphabet.bases[base]
        task_state = self._alphabet.tasks[task - 1].phase if task else NO_TASK
        silent_ms, running_ms = self._ages.moments(task, age)
        return Situation(
            there.vm_state,
            there.launched,
            there.host_reachable,
            there.tags,
            self._alphabet.lock_levels[locked - 1] if locked else None,
            BIT[self._alphabet.submissions[self._alphabet.held[held - 1]].operation] if held else 0,
            task_state,
            silent_ms,
            running_ms,
        )

    def _table(self) -> Rows:
        if self._rows is None:
            self._rows = self.gate.rows()
        return self._rows


class _AgeCodes:
    """Encoding of the age on which a submission is judged: of the request in service, or of the idle instance."""

    def __init__(self, alphabet: Alphabet) -> None:
        self._alphabet = alphabet
        self._runnings = max((len(ages.running) for ages in alphabet.task_ages), default=0) + 1
        silences = max((len(ages.silent) for ages in alphabet.task_ages), default=0) + 1
        self._idles = len(alphabet.idle_ages) + 1
        self._component_runnings = len(alphabet.component_ages.running) + 1
        components = (len(alphabet.component_ages.silent) + 1) * self._component_runnings
        self.codes = max(silences * self._runnings, self._idles + components)

    def of(self, layout: Layout, words: Words, task: Ints, component: Ints) -> Ints:
        served = layout.silent.of(words) * self._runnings + layout.running.of(words)
        component_served = (
            layout.component_silent.of(words) * self._component_runnings
            + layout.component_running.of(words)
            + self._idles
        )
        return np.where(task > 0, served, np.where(component > 0, component_served, layout.idle.of(words)))

    def moments(self, task: int, code: int) -> tuple[int, int]:
        """Return the least silence and the least running time of an age code."""
        alphabet = self._alphabet
        if not task and code < self._idles:
            idle = _lower_bound(alphabet.idle_ages, code)
            return idle, idle
        if task:
            ages = alphabet.task_ages[task - 1]
            silent, running = divmod(code, self._runnings)
        else:
            ages = alphabet.component_ages
            silent, running = divmod(code - self._idles, self._component_runnings)
        silent_ms = _lower_bound(ages.silent, silent)
        return silent_ms, max(silent_ms, _lower_bound(ages.running, running))


def _lower_bound(bounds: tuple[int, ...], number: int) -> int:
    return bounds[number - 1] if number else 0


def _length(queue: Ints, bits: int) -> Ints:
    """Return the length of each queue."""
    length = np.zeros(len(queue), np.int64)
    while bits and queue.any():
        length += queue > 0
        queue = queue >> bits
    return length
