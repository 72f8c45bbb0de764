"""Laws checked on packed states (2, 5 and 8, which a policy can violate) and on packed steps (1, 3, 4, 7 and 12).

A word has no events and no fences. That an end is stored with its event (law 3), and that a late report is refused
(law 4), depends on them and is checked by the reference search of the tests. The checks of steps share no code with
these: they compare the words before and after one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from interlock.core import admission
from interlock.core.evaluation import would_admit
from interlock.core.operations import BIT, CATALOGUE, Lane
from interlock.core.records import Denied, Redundant
from interlock.core.states import Target, VmState
from interlock.policies.model_checker.actions import VM_STATES, RequestKind
from interlock.policies.model_checker.gate_table import Bools, GateEffect, Ints
from interlock.policies.model_checker.model import Model
from interlock.policies.model_checker.results import CANDIDATES_MAX, Breach, Breaches, describe
from interlock.policies.model_checker.state_encoding import NOW_MS, Words
from interlock.policies.model_checker.steps import Action, Transitions
from interlock.policies.model_checker.submissions import PackedAnswers


class PackedLaws:
    """Checks the laws on every state and transition of one search."""

    def __init__(self, model: Model, breaches: Breaches) -> None:
        self._model = model
        self._breaches = breaches
        self._steps = StepLaws(model, breaches)
        self._retry_times: dict[tuple[int, ...], str | None] = {}
        """What is wrong with a denial's retry time, if anything, for those checked with the core."""

    # ---------------------------------------------------------------------------------------------------- submissions

    def check_answers(self, numbers: Ints, words: Words, answers: PackedAnswers) -> None:
        """Check laws 5 and 8: something is admitted now or later, and refusals have a reason and the right time."""
        hopeful = np.zeros(len(words), bool)
        # A lock or another change of the record does not unblock a hung instance.
        idle = (answers.effect == GateEffect.RECORD_ONLY) | (answers.effect == GateEffect.LOCK)
        good = (answers.effect == GateEffect.REFUSED_UNTIL) | ((answers.effect >= GateEffect.ADMIT) & ~idle)
        hopeful[answers.rows[good]] = True
        doubtful = np.flatnonzero(answers.effect == GateEffect.UNCERTAIN)
        if len(doubtful):
            kept = self._retry_times_hold(numbers, words, answers, doubtful)
            hopeful[answers.rows[doubtful[kept]]] = True
        for at in np.flatnonzero(answers.effect == GateEffect.UNEXPLAINED)[:CANDIDATES_MAX]:
            submission = int(answers.submission[at])
            name = self._model.alphabet.submissions[submission].operation.value
            breach = Breach(8, f"{name} was refused without a rule or a reason")
            self._breaches.add(breach, int(numbers[answers.rows[at]]), Action.SUBMIT + submission)
        self._report_hopeless(numbers, words, np.flatnonzero(~hopeful))

    def _report_hopeless(self, numbers: Ints, words: Words, rows: Ints) -> None:
        layout, tables = self._model.layout, self._model.tables
        if not len(rows):
            return
        own = words[rows]
        # Once a deletion, soft or not, is queued, nothing else has to be admitted: liveness is checked last.
        fine = tables.is_goal[layout.base.of(own)]
        fine |= self._model.gate.held_hope(own)
        queue = own & layout.queue.mask
        while queue.any():
            fine |= tables.deletes[queue & layout.queue_first]
            queue >>= layout.kind_bits
        self.report_stuck(numbers[rows[~fine]], own[~fine], "nothing is ever admitted in {}")

    def report_stuck(self, numbers: Ints, words: Words, what: str) -> None:
        """Report states that violate law 5, one for each distinct description."""
        for description, rows in described(self._model, words).items():
            for at in rows:
                self._breaches.add(Breach(5, what.format(description)), int(numbers[at]))

    def _retry_times_hold(self, numbers: Ints, words: Words, answers: PackedAnswers, doubtful: Ints) -> Bools:
        """Check with the core that each submission is admitted at the retry time its denial names, and not before."""
        model = self._model
        rows, submissions = answers.rows[doubtful], answers.submission[doubtful]
        own = words[rows]
        keys = np.stack(
            [
                submissions,
                model.gate.situations(own),
                model.steps.queues.outstanding(own),
                model.steps.queues.foreseen(own),
            ],
            axis=1,
        )
        kept = np.zeros(len(doubtful), bool)
        for at, key in enumerate(map(tuple, keys.tolist())):
            if key not in self._retry_times:
                self._retry_times[key] = self._retry_time_fault(int(own[at]), int(submissions[at]))
            fault = self._retry_times[key]
            kept[at] = fault != _NOT_THEN
            if fault is not None:
                name = model.alphabet.submissions[int(submissions[at])].operation.value
                breach = Breach(8 if fault == _BEFORE else 5, f"{name} {fault} the retry time of its denial")
                self._breaches.add(breach, int(numbers[rows[at]]), Action.SUBMIT + int(submissions[at]))
        return kept

    def _retry_time_fault(self, word: int, submission: int) -> str | None:
        alphabet = self._model.alphabet
        instance = self._model.encoding.unpack(word)
        reachable = self._model.encoding.host_reachable(word)
        new = alphabet.submissions[submission].submission("new", host_reachable=reachable)

        answer: Any = admission.judge(instance, new, alphabet.policy, NOW_MS)
        at_ms = answer.allowed_at_ms if isinstance(answer, Denied | Redundant) else None
        if at_ms is None or not would_admit(instance, new, alphabet.policy, at_ms):
            return _NOT_THEN
        return _BEFORE if would_admit(instance, new, alphabet.policy, at_ms - 1) else None

    # ---------------------------------------------------------------------------------------------------------- steps

    def check_transitions(self, numbers: Ints, words: Words, transitions: Transitions) -> None:
        """Check law 2: a request taken is permitted then, none is cancelled as all goes as foreseen; and `StepLaws`."""
        if not len(transitions.rows):
            return
        self._steps.check(numbers, words, transitions)
        if not isinstance(transitions.action, int):
            self._dropped(numbers, transitions.action, transitions)
        elif transitions.action == Action.TAKE:
            self._taken(numbers, words, transitions)
        elif transitions.action == Action.TAKE_COMPONENT:
            self._component_taken(numbers, words, transitions)
        elif transitions.action in (Action.SUCCEED, Action.FINISH_COMPONENT):
            self._succeeded(numbers, words, transitions)

    def _dropped(self, numbers: Ints, actions: Ints, transitions: Transitions) -> None:
        for at in [] if transitions.dropped is None else transitions.dropped[: 64 * CANDIDATES_MAX].tolist():
            action = int(actions[at])
            name = self._model.alphabet.submissions[action - Action.SUBMIT].operation.value
            breach = Breach(2, f"{name} was cancelled although all went as foreseen")
            self._breaches.add(breach, int(numbers[transitions.rows[at]]), action)

    def _taken(self, numbers: Ints, words: Words, transitions: Transitions) -> None:
        layout, tables = self._model.layout, self._model.tables
        own = words[transitions.rows]
        kind, base = own & layout.queue_first, layout.base.of(own)
        place = kind * tables.bases + base
        fine = (tables.permits[place] | tables.anyway[place]) & ~tables.moot[place]
        kinds = self._model.alphabet.kinds
        self._not_permitted(numbers, transitions, fine, [k.operation.value for k in kinds], kind, base)

    def _component_taken(self, numbers: Ints, words: Words, transitions: Transitions) -> None:
        layout, tables = self._model.layout, self._model.tables
        own = words[transitions.rows]
        kind = self._model.steps.queues.first_component(own).kind
        base, task = layout.base.of(own), layout.task.of(own)
        beside = tables.task_leads[task * tables.bases + base]
        fine = tables.permits[kind * tables.bases + base]
        for there in (beside, self._model.steps.queues.foreseen(own)):
            fine |= tables.permits[kind * tables.bases + there]
        kinds = self._model.alphabet.kinds
        self._not_permitted(numbers, transitions, fine, [k.operation.value for k in kinds], kind, base)

    def _not_permitted(
        self, numbers: Ints, transitions: Transitions, fine: Bools, names: list[str], kind: Ints, base: Ints
    ) -> None:
        for at in np.flatnonzero(~fine)[: 64 * CANDIDATES_MAX].tolist():
            state = VM_STATES[self._model.tables.vm_state[base[at]]].value
            breach = Breach(2, f"{names[kind[at] - 1]} is served in {state}, where it is not permitted")
            self._breaches.add(breach, int(numbers[transitions.rows[at]]), int(transitions.action))

    def _succeeded(self, numbers: Ints, words: Words, transitions: Transitions) -> None:
        layout, alphabet = self._model.layout, self._model.alphabet
        own = words[transitions.rows]
        asked = layout.deadline.mask if transitions.action == Action.SUCCEED else layout.component_deadline.mask
        before, after = own & layout.queue.mask, transitions.words & layout.queue.mask
        for at in np.flatnonzero(before != after)[: 64 * CANDIDATES_MAX].tolist():
            lost = _lost(int(before[at]), int(after[at]), layout.kind_bits)
            kinds = [alphabet.kinds[kind - 1] for kind in lost]
            if (int(own[at]) & asked) and any(kind.preempts for kind in kinds):
                kinds = []  # What was to be interrupted has succeeded instead: not what was foreseen for them.
            self._cancelled(int(numbers[transitions.rows[at]]), transitions, kinds)

    def _cancelled(self, number: int, transitions: Transitions, lost: list[RequestKind]) -> None:
        for kind in lost:
            if kind.in_turn:
                breach = Breach(2, f"{kind.operation.value} was cancelled although all went as foreseen")
                self._breaches.add(breach, number, int(transitions.action))


def described(model: Model, words: Words) -> dict[str, list[int]]:
    """Describe states, and return the indexes of the first few of each description."""
    layout = model.layout
    seen = words & (layout.base.mask | layout.task.mask | layout.component.mask)
    order = np.argsort(seen, kind="stable")
    found: dict[str, list[int]] = {}
    for first in np.flatnonzero(np.diff(seen[order], prepend=-1)).tolist():
        alike = [at for at in order[first : first + CANDIDATES_MAX].tolist() if seen[at] == seen[order[first]]]
        word = int(words[alike[0]])
        base = model.alphabet.bases[layout.base.one(word)]
        lost = "" if base.host_reachable else " on a lost host"
        tagged = f" with the tag{'s' * (len(base.tags) > 1)} {', '.join(base.tags)}" if base.tags else ""
        found.setdefault(f"{describe(model.encoding.unpack(word))}{lost}{tagged}", []).extend(alike)
    return found


def _lost(before: int, after: int, bits: int) -> list[int]:
    """Return the kinds that are in the queue before and not after."""
    lost = _kinds_of(before, bits)
    for kind in _kinds_of(after, bits):
        lost.remove(kind)
    return lost


def _kinds_of(queue: int, bits: int) -> list[int]:
    kinds = []
    while queue:
        kinds.append(queue & ((1 << bits) - 1))
        queue >>= bits
    return kinds


_NOT_THEN: Final = "is not admitted at"
_BEFORE: Final = "is admitted before"


_TASK_ENDS: Final = frozenset({Action.SUCCEED, Action.FAIL, Action.INTERRUPT, Action.ARRIVE})
_AROUND: Final = frozenset({Action.GUEST_STOPPED, Action.GUEST_CRASHED, Action.HOST_LOST, Action.HOST_BACK})
"""The actions after which queued requests may be cancelled; so may they be when something ends."""
_LOST: Final = "a queued request is lost, doubled or moved by {}"


class StepLaws:
    """Checks the laws about requests on every step of one search."""

    def __init__(self, model: Model, breaches: Breaches) -> None:
        self._breaches = breaches
        self._layout, self._tables = model.layout, model.tables
        alphabet = self._alphabet = model.alphabet
        self._submitted = np.array([BIT[one.operation] for one in alphabet.submissions], np.int64)
        self._changes_record = np.array([CATALOGUE[one.operation].lane is Lane.RECORD for one in alphabet.submissions])
        self._held = np.array([0, *alphabet.held], np.int64)
        tasks = [None, *(CATALOGUE[task.operation] for task in alphabet.tasks)]
        components = [None, *(CATALOGUE[operation] for operation in alphabet.components)]
        self._beside = np.array(
            [
                [one is None or task is None or task.operation in one.compatible_with for task in tasks]
                for one in components
            ]
        )
        """Whether a component change may be served beside a task."""
        targets = [None if task is None else task.to for task in tasks]
        self._leaves = np.array([VM_STATES.index(to) if isinstance(to, VmState) else -1 for to in targets], np.int64)
        """The vm_state that a task leads to; -1 if that depends on the state in which it succeeds."""
        self._stays = np.array([to is Target.SAME for to in targets])

    def check(self, numbers: Ints, words: Words, transitions: Transitions) -> None:
        """Check one kind of steps; `numbers` are those of the states `words`."""
        own, action = words[transitions.rows], transitions.action
        if not len(own):
            return
        report = _Report(self._breaches, numbers[transitions.rows], transitions, self._name)
        if not isinstance(action, int):
            self._admitted(own, transitions, action - Action.SUBMIT, report)
        elif action == Action.HELD_ADMITTED:
            self._admitted(own, transitions, self._held[self._layout.held.of(own)], report)
        elif action == Action.TAKE:
            self._taken(own, transitions.words, report)
        elif action == Action.TAKE_COMPONENT:
            self._component_taken(own, transitions.words, report)
        else:
            self._happened(own, transitions.words, action, report)

    def _name(self, action: int) -> str:
        if Action.SUBMIT <= action < Action.HOLD:
            return self._alphabet.submissions[action - Action.SUBMIT].operation.value
        return max(one for one in Action if one <= action).name.lower()

    # ------------------------------------------------------------------------------------------------ what is served

    def _tasks(self, words: Words) -> Ints:
        return self._tables.task_bit[self._layout.task.of(words)]

    def _components(self, words: Words) -> Ints:
        return words & self._layout.component.mask

    def _happened(self, own: Words, there: Words, action: int, report: _Report) -> None:
        """Check that only what the action ends is gone, and that nothing else was added, lost or moved."""
        layout = self._layout
        ended, ended_component = action in _TASK_ENDS, action == Action.FINISH_COMPONENT
        if action == Action.DEADLINE:
            report(4, (there & (layout.task.mask | layout.component.mask)) > 0, "{} leaves a worker that it fenced")
        else:
            gone = (there & layout.task.mask) > 0 if ended else self._tasks(own) != self._tasks(there)
            report(7 if ended else 3, gone, "the request in service is not as {} leaves it")
            left = self._components(own) * (not ended_component)
            report(3, left != self._components(there), "the component change in service is not as {} leaves it")
        if action == Action.SUCCEED:
            self._succeeded(own, there, report)
        judged = (
            ended
            or ended_component
            or action in _AROUND
            or action == Action.DEADLINE
            or Action.RELABEL <= action < Action.SUBMIT
        )
        before, after = own & layout.queue.mask, there & layout.queue.mask
        report(3, self._not_left(before, after) if judged else before != after, _LOST)

    def _succeeded(self, own: Words, there: Words, report: _Report) -> None:
        """Check law 7: the instance is in the vm_state that the catalogue names."""
        layout, tables = self._layout, self._tables
        task = layout.task.of(own)
        before, after = tables.vm_state[layout.base.of(own)], tables.vm_state[layout.base.of(there)]
        leaves = self._leaves[task]
        wrong = (leaves >= 0) & (after != leaves) | self._stays[task] & (after != before)
        report(7, wrong, "a success leaves another vm_state than the operation's")

    def _taken(self, own: Words, there: Words, report: _Report) -> None:
        layout, tables = self._layout, self._tables
        report(1, layout.task.of(own) > 0, "a state change is taken while another is served")
        self._served_beside(there, report)
        report(12, self._tasks(there) != tables.bit[own & layout.queue_first], "a request is taken out of turn")
        report(3, self._components(own) != self._components(there), "{} changes the component change in service")
        report(3, there & layout.queue.mask != (own & layout.queue.mask) >> layout.kind_bits, _LOST)

    def _component_taken(self, own: Words, there: Words, report: _Report) -> None:
        layout, tables = self._layout, self._tables
        report(1, self._components(own) > 0, "a component change is taken while another is served")
        self._served_beside(there, report)
        queue, ones = own & layout.queue.mask, layout.queue_first
        kind, slot = queue & ones, np.zeros_like(own)
        for number in range(1, layout.slots):
            further = ~tables.is_component[kind]
            kind = np.where(further, (queue >> (number * layout.kind_bits)) & ones, kind)
            slot += further
        waits = (layout.task.of(own) == 0) | tables.preempts[queue & ones]
        early = (slot > 0) & waits
        out_of_turn = early | (layout.component.of(there) != tables.component_of[kind])
        report(12, out_of_turn, "a component change is taken out of turn")
        report(3, self._tasks(own) != self._tasks(there), "{} changes the state change in service")
        report(3, there & layout.queue.mask != self._without(queue, slot), _LOST)

    def _served_beside(self, there: Words, report: _Report) -> None:
        allowed = self._beside[self._layout.component.of(there), self._layout.task.of(there)]
        report(1, ~allowed, "a component change is served beside a state change that does not allow it")

    # ------------------------------------------------------------------------------------------------- what is admitted

    def _admitted(self, own: Words, transitions: Transitions, submission: Ints, report: _Report) -> None:
        """Check that a submission adds one request at its place, and touches others only if it preempts or resets."""
        layout = self._layout
        there = transitions.words
        before, after = own & layout.queue.mask, there & layout.queue.mask
        same = (self._tasks(own) == self._tasks(there)) & (self._components(own) == self._components(there))
        gone = (there & (layout.task.mask | layout.component.mask)) == 0
        if transitions.dropped is not None:
            # It preempts: what is served is fenced, or asked to stop and fenced at a deadline.
            report(
                4, ~(gone | same & self._is_asked_to_stop(there)), "{} preempts a worker that keeps its right to act"
            )
            head = after & layout.queue_first
            new = self._tables.preempts[head] & (self._tables.bit[head] == self._submitted[submission])
            report(3, self._not_left(np.where(new, before << layout.kind_bits | head, before), after), _LOST)
            return
        record = self._changes_record[submission]
        report(3, ~(same | record & gone), "{} ends the request in service")
        report(3, record & self._not_left(before, after), _LOST)
        self._appended(before, after, submission, ~record, report)

    def _is_asked_to_stop(self, there: Words) -> Bools:
        layout = self._layout
        stopping: Bools = (layout.task.of(there) == 0) | (layout.deadline.of(there) > 0)
        stopping &= (layout.component.of(there) == 0) | (layout.component_deadline.of(there) > 0)
        return stopping

    def _appended(self, before: Ints, after: Ints, submission: Ints, queued: Bools, report: _Report) -> None:
        """Check that one request of the submitted operation was added, behind all that are served in order."""
        layout, tables = self._layout, self._tables
        place, alike = np.zeros_like(before), np.ones(len(before), bool)
        for slot in range(layout.slots):
            alike &= ((before ^ after) >> (slot * layout.kind_bits)) & layout.queue_first == 0
            place += alike
        added = (after >> (place * layout.kind_bits)) & layout.queue_first
        is_added = (self._without(after, place) == before) & (tables.bit[added] == self._submitted[submission])
        report(3, queued & ~is_added, _LOST)
        later, early = before >> (place * layout.kind_bits), np.zeros(len(before), bool)
        while later.any():
            kind = later & layout.queue_first
            early |= (kind > 0) & ~(tables.comes_last[kind] & ~tables.comes_last[added])
            later >>= layout.kind_bits
        report(12, queued & is_added & early, "{} is queued before a request that came first")

    # ------------------------------------------------------------------------------------------------------ the queue

    def _without(self, queue: Ints, slot: Ints) -> Ints:
        below = (1 << (slot * self._layout.kind_bits)) - 1
        left: Ints = (queue & below) | ((queue >> self._layout.kind_bits) & ~below)
        return left

    def _not_left(self, before: Ints, after: Ints) -> Bools:
        """Return where a queue is not what is left of the one before, in its order, after some have ended."""
        wrong: Bools = before != after
        rows = np.flatnonzero(wrong)
        rest, whole = after[rows], before[rows]
        bits, ones = self._layout.kind_bits, self._layout.queue_first
        while whole.any():
            rest = np.where(rest & ones == whole & ones, rest >> bits, rest)
            whole = whole >> bits
        wrong[rows] = rest > 0
        return wrong


class _Report:
    """Adds breaches of one kind of steps."""

    def __init__(self, breaches: Breaches, states: Ints, transitions: Transitions, name: Callable[[int], str]) -> None:
        self._breaches, self._states, self._action, self._name = breaches, states, transitions.action, name

    def __call__(self, law: int, wrong: Bools, what: str) -> None:
        """Report where a step is wrong; `{}` in `what` stands for the action."""
        for at in np.flatnonzero(wrong)[:CANDIDATES_MAX].tolist():
            action = self._action if isinstance(self._action, int) else int(self._action[at])
            self._breaches.add(Breach(law, what.format(self._name(action))), int(self._states[at]), action)
