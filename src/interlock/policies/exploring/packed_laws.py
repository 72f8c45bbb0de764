"""The laws on packed states: those that a policy can break.

Laws 2, 5 and 8 are looked at here. That workers are fenced, ends told once and late reports refused is the core's own
doing, which no policy changes and no word tells of: see `interlock.policies.laws`, and the walk by objects.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from interlock.core import admission
from interlock.core.records import Admitted, Denied, Redundant, Submission
from interlock.policies.exploring.alphabet import VM_STATES, Kind
from interlock.policies.exploring.by_objects import describe
from interlock.policies.exploring.gate_table import Bools, Effect, Ints
from interlock.policies.exploring.layout import Words
from interlock.policies.exploring.model import Model
from interlock.policies.exploring.packing import NOW_MS
from interlock.policies.exploring.steps import Action, Moves
from interlock.policies.exploring.submitting import Answers
from interlock.policies.laws import Breach

_CANDIDATES_MAX: Final = 8
"""How many states are kept that show the same breach: the first that can be replayed is told."""


class Found(NamedTuple):
    """A state in which a law is broken, and the step that breaks it; no step, if none has to be taken."""

    state: int
    action: int | None


class Breaches:
    """Each way in which a law was broken, with the first states that show it."""

    def __init__(self) -> None:
        self.found: dict[Breach, list[Found]] = {}

    def add(self, breach: Breach, state: int, action: int | None = None) -> None:
        known = self.found.setdefault(breach, [])
        if len(known) < _CANDIDATES_MAX:
            known.append(Found(state, action))


class PackedLaws:
    """The laws, on every state and step of one walk."""

    def __init__(self, model: Model, breaches: Breaches) -> None:
        self._model = model
        self._breaches = breaches
        self._moments: dict[tuple[int, ...], str | None] = {}
        """What is wrong with the moment that a refusal names, if anything, where the core had to be asked."""

    # ---------------------------------------------------------------------------------------------------- submissions

    def of_answers(self, numbers: Ints, words: Words, answers: Answers) -> None:
        """Laws 5 and 8: something is admitted now or at a moment that is kept, and refusals have a reason."""
        hopeful = np.zeros(len(words), bool)
        # A lock or a note that is admitted is no hope for an instance that hangs.
        idle = (answers.effect == Effect.NOTE) | (answers.effect == Effect.LOCK)
        good = (answers.effect == Effect.LATER) | ((answers.effect >= Effect.ADMIT) & ~idle)
        hopeful[answers.rows[good]] = True
        doubtful = np.flatnonzero(answers.effect == Effect.DOUBTFUL)
        if len(doubtful):
            kept = self._moments_kept(numbers, words, answers, doubtful)
            hopeful[answers.rows[doubtful[kept]]] = True
        for at in np.flatnonzero(answers.effect == Effect.MUTE)[:_CANDIDATES_MAX]:
            ask = int(answers.ask[at])
            name = self._model.alphabet.asks[ask].operation.value
            breach = Breach(8, f"{name} was refused without a rule or a reason")
            self._breaches.add(breach, int(numbers[answers.rows[at]]), Action.SUBMIT + ask)
        self._hopeless(numbers, words, np.flatnonzero(~hopeful))

    def _hopeless(self, numbers: Ints, words: Words, rows: Ints) -> None:
        layout, tables = self._model.layout, self._model.tables
        if not len(rows):
            return
        own = words[rows]
        # Once what leads to the goal waits, nothing more has to come in: whether it gets there is judged at the end.
        fine = tables.is_goal[layout.footing.of(own)]
        queue = own & layout.queue.mask
        while queue.any():
            fine |= tables.leads_to_goal[queue & layout.queue_first]
            queue >>= layout.kind_bits
        self.note_stuck(numbers[rows[~fine]], own[~fine], "nothing is ever admitted in {}")

    def note_stuck(self, numbers: Ints, words: Words, what: str) -> None:
        """Note states in which law 5 does not hold: one for each thing that can be said of them."""
        layout = self._model.layout
        seen = words & (layout.footing.mask | layout.task.mask | layout.part.mask)
        order = np.argsort(seen, kind="stable")
        firsts = np.flatnonzero(np.diff(seen[order], prepend=-1))
        for first in firsts.tolist():
            for at in order[first : first + _CANDIDATES_MAX].tolist():
                if seen[at] == seen[order[first]]:
                    instance = self._model.packing.unpack(int(words[at]))
                    self._breaches.add(Breach(5, what.format(describe(instance))), int(numbers[at]))

    def _moments_kept(self, numbers: Ints, words: Words, answers: Answers, doubtful: Ints) -> Bools:
        """Whether a submission is admitted at the moment that its refusal names, and not before, by asking the core."""
        model = self._model
        rows, asks = answers.rows[doubtful], answers.ask[doubtful]
        own = words[rows]
        keys = np.stack(
            [
                asks,
                model.gate.places(own),
                model.steps.queues.outstanding(own),
                model.steps.queues.foreseen(own),
            ],
            axis=1,
        )
        kept = np.zeros(len(doubtful), bool)
        for at, key in enumerate(map(tuple, keys.tolist())):
            if key not in self._moments:
                self._moments[key] = self._asked(int(own[at]), int(asks[at]))
            wrong = self._moments[key]
            kept[at] = wrong != _NOT_THEN
            if wrong is not None:
                name = model.alphabet.asks[int(asks[at])].operation.value
                breach = Breach(5, f"{name} {wrong} the moment that its refusal names")
                self._breaches.add(breach, int(numbers[rows[at]]), Action.SUBMIT + int(asks[at]))
        return kept

    def _asked(self, word: int, ask: int) -> str | None:
        alphabet = self._model.alphabet
        instance = self._model.packing.unpack(word)
        submission = Submission(
            request_id="new",
            operation=alphabet.asks[ask].operation,
            parameters=alphabet.asks[ask].parameters,
            requested_by="someone",
            role=alphabet.role,
        )

        def judged(at_ms: int) -> Any:
            return admission.judge(instance, submission, alphabet.policy, at_ms)

        answer = judged(NOW_MS)
        at_ms = answer.allowed_at_ms if isinstance(answer, Denied | Redundant) else None
        if at_ms is None or not isinstance(judged(at_ms), Admitted):
            return _NOT_THEN
        return _BEFORE if isinstance(judged(at_ms - 1), Admitted) else None

    # ---------------------------------------------------------------------------------------------------------- steps

    def of_moves(self, numbers: Ints, words: Words, moves: Moves) -> None:
        """Law 2: what is taken is permitted when it is taken, and nothing is cancelled while all goes as foreseen."""
        if not len(moves.rows):
            return
        if not isinstance(moves.action, int):
            self._dropped(numbers, moves.action, moves)
        elif moves.action == Action.TAKE:
            self._taken(numbers, words, moves)
        elif moves.action == Action.TAKE_PART:
            self._part_taken(numbers, words, moves)
        elif moves.action in (Action.SUCCEED, Action.FINISH_PART):
            self._succeeded(numbers, words, moves)

    def _dropped(self, numbers: Ints, actions: Ints, moves: Moves) -> None:
        for at in [] if moves.dropped is None else moves.dropped[: 64 * _CANDIDATES_MAX].tolist():
            action = int(actions[at])
            name = self._model.alphabet.asks[action - Action.SUBMIT].operation.value
            breach = Breach(2, f"{name} was cancelled although all went as foreseen")
            self._breaches.add(breach, int(numbers[moves.rows[at]]), action)

    def _taken(self, numbers: Ints, words: Words, moves: Moves) -> None:
        layout, tables = self._model.layout, self._model.tables
        own = words[moves.rows]
        kind, footing = own & layout.queue_first, layout.footing.of(own)
        fine = tables.permits[kind * tables.footings + footing]
        fine |= tables.holds[kind * tables.vm_states + tables.vm_state[footing]]
        kinds = self._model.alphabet.kinds
        self._not_permitted(numbers, moves, fine, [k.operation.value for k in kinds], kind, footing)

    def _part_taken(self, numbers: Ints, words: Words, moves: Moves) -> None:
        layout, tables = self._model.layout, self._model.tables
        own = words[moves.rows]
        kind = (own >> layout.part_queue.shift) & layout.part_queue_first
        footing, task = layout.footing.of(own), layout.task.of(own)
        beside = tables.task_leads[task * tables.footings + footing]
        fine = tables.part_permits[kind * tables.footings + footing]
        for there in (beside, self._model.steps.queues.foreseen(own)):
            fine |= tables.part_permits[kind * tables.footings + there]
        kinds = self._model.alphabet.part_kinds
        self._not_permitted(numbers, moves, fine, [k.operation.value for k in kinds], kind, footing)

    def _not_permitted(
        self, numbers: Ints, moves: Moves, fine: Bools, names: list[str], kind: Ints, footing: Ints
    ) -> None:
        for at in np.flatnonzero(~fine)[: 64 * _CANDIDATES_MAX].tolist():
            state = VM_STATES[self._model.tables.vm_state[footing[at]]].value
            breach = Breach(2, f"{names[kind[at] - 1]} is served in {state}, where it is not permitted")
            self._breaches.add(breach, int(numbers[moves.rows[at]]), int(moves.action))

    def _succeeded(self, numbers: Ints, words: Words, moves: Moves) -> None:
        layout, alphabet = self._model.layout, self._model.alphabet
        own = words[moves.rows]
        before, after = own & layout.queue.mask, moves.words & layout.queue.mask
        for at in np.flatnonzero(before != after)[: 64 * _CANDIDATES_MAX].tolist():
            lost = _lost(int(before[at]), int(after[at]), layout.kind_bits)
            self._cancelled(int(numbers[moves.rows[at]]), moves, [alphabet.kinds[kind - 1] for kind in lost])
        # A state change that was admitted later is news for a component change, and a word does not tell which was:
        # so this is about those without any.
        alone = (own & (layout.queue.mask | layout.task.mask)) == 0
        before, after = layout.part_queue.of(own), layout.part_queue.of(moves.words)
        for at in np.flatnonzero((before != after) & alone)[: 64 * _CANDIDATES_MAX].tolist():
            lost = _lost(int(before[at]), int(after[at]), layout.part_kind_bits)
            self._cancelled(int(numbers[moves.rows[at]]), moves, [alphabet.part_kinds[kind - 1] for kind in lost])

    def _cancelled(self, number: int, moves: Moves, lost: list[Kind]) -> None:
        for kind in lost:
            if kind.in_turn:
                breach = Breach(2, f"{kind.operation.value} was cancelled although all went as foreseen")
                self._breaches.add(breach, number, int(moves.action))


def _lost(before: int, after: int, bits: int) -> list[int]:
    """The kinds that are in one queue and not in the other."""
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
