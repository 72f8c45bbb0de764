"""Laws 2, 5 and 8 checked on packed states: those that a policy can violate. The others are in `step_laws`."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from interlock.core import admission
from interlock.core.evaluation import would_admit
from interlock.core.records import Denied, Redundant
from interlock.policies.model_checker.actions import VM_STATES, RequestKind
from interlock.policies.model_checker.gate_table import Bools, GateEffect, Ints
from interlock.policies.model_checker.layout import Words
from interlock.policies.model_checker.model import Model
from interlock.policies.model_checker.results import CANDIDATES_MAX, Breach, Breaches, describe
from interlock.policies.model_checker.state_encoding import NOW_MS
from interlock.policies.model_checker.step_laws import StepLaws
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
