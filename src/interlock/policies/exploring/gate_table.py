"""What the gate answers to every submission, as rows of masks: asked of the compiled policy, place by place.

A *place* is all that a rule can see of an instance but the kinds outstanding: vm_state, launched, locked, task, ages.
At one place, the answer to a submission depends on the kinds outstanding only, as a short list of masks: the first that
meets a kind outstanding decides. That list is what the rules of the cell of the place say, in order; which of them
hold otherwise is the core's answer to each rule alone. What an answer leads to is not here (see `submitting`).
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from interlock.core.operations import BIT, CATALOGUE, Lane, Operation
from interlock.core.policy import CompiledPolicy, MeasuredFrom, Rule, Verdict, View
from interlock.core.states import NO_TASK, VmState
from interlock.policies.exploring.alphabet import Alphabet, Ask, Kind, alone

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NOTHING = 1 << 62
"""The bit that stands in a mask for an instance of which nothing is outstanding."""
_ALWAYS = (1 << 63) - 1


class Effect(IntEnum):
    """What an answer is to a walk. The lower half of what a row holds; the upper half is the kind of request."""

    REFUSED = 0
    LATER = 1
    """Refused, with a moment at which it is admitted as far as the rules alone can tell."""
    DOUBTFUL = 2
    """Refused, with a moment at which another rule may have a say: the core has to be asked."""
    MUTE = 3
    """Refused without a rule or a reason."""
    ADMIT = 4
    TAKE_OVER = 5
    PREEMPT = 6
    NOTE = 7
    """A change of the record that no decision depends on."""
    LOCK = 8
    UNLOCK = 9
    RESET = 10


EFFECT_BITS = 4
EFFECT_MASK = (1 << EFFECT_BITS) - 1
_PLAIN_RECORDS = {Operation.LOCK: Effect.LOCK, Operation.UNLOCK: Effect.UNLOCK, Operation.RESET_STATE: Effect.RESET}


class Place(NamedTuple):
    """Where a submission is judged."""

    vm_state: VmState
    launched: bool
    locked: bool
    task_state: str
    silent_ms: int
    running_ms: int


class Answer(NamedTuple):
    """What one rule says, and of which kinds one has to be outstanding for it."""

    mask: int
    rule: Rule


class Rows(NamedTuple):
    """The rows of all places asked for so far: `first[place]` to `first[place] + counts[place]`."""

    first: Ints
    counts: Ints
    ask: Ints
    """The number of the submission."""
    masks: Ints
    """(rows, levels); one that is not needed is 0."""
    effects: Ints
    """(rows, levels + 1); the last one where no mask meets."""

    def chosen(self, asks: Bools) -> Rows:
        """Those of some submissions only."""
        kept = asks[self.ask]
        before = np.concatenate([[0], np.cumsum(kept)])
        first = before[self.first]
        counts = before[self.first + self.counts] - first
        return Rows(first, counts, self.ask[kept], self.masks[kept], self.effects[kept])


class GateTable:
    """The answers at every place, found when first asked for."""

    def __init__(self, alphabet: Alphabet) -> None:
        self._policy = alphabet.policy
        self._alphabet = alphabet
        self._cells: dict[tuple[Operation, VmState, str], tuple[tuple[int, Rule], ...]] = {}
        self._number = {rule.id: number for number, rule in enumerate(self._policy.rules)}
        self._alone: dict[int, CompiledPolicy] = {}
        self._holding: dict[tuple[int, bool, bool, bool, int], bool] = {}
        self._numbers: dict[Place, int] = {}
        self._asks = {ask: number for number, ask in enumerate(alphabet.asks)}
        self._first = [0]
        self._new: list[tuple[int, list[int], list[int]]] = []
        """Submission, masks and effects of each row that is not in the arrays yet."""
        none = np.zeros(0, np.int64)
        self._rows = Rows(none, none, none, np.zeros((0, 0), np.int64), np.zeros((0, 1), np.int64))
        self._answers: dict[tuple[int, Place], tuple[Answer, ...]] = {}

    def add(self, place: Place) -> int:
        """Ask at one more place; its number."""
        known = self._numbers.get(place)
        if known is not None:
            return known
        self._first.append(self._first[-1])
        if place.vm_state is not VmState.DELETED:
            for number, ask in enumerate(self._alphabet.asks):
                answers = self.answers(ask, place)
                masks, effects = _merged([(one.mask, self._effect(ask, place, one)) for one in answers])
                if any(effects):
                    self._new.append((number, masks, effects))
                    self._first[-1] += 1
        self._numbers[place] = len(self._first) - 2
        return self._numbers[place]

    def rows(self) -> Rows:
        """The rows of all places so far."""
        levels = max((len(masks) for _, masks, _ in self._new), default=0)
        self._rows = _widened(self._rows, levels)
        levels = self._rows.masks.shape[1]
        masks = np.zeros((len(self._new), levels), np.int64)
        effects = np.zeros((len(self._new), levels + 1), np.int64)
        for number, (_, own_masks, own_effects) in enumerate(self._new):
            masks[number, : len(own_masks)] = own_masks
            effects[number, : len(own_masks)] = own_effects[:-1]
            effects[number, levels] = own_effects[-1]
        first = np.array(self._first, np.int64)
        self._rows = Rows(
            first[:-1],
            np.diff(first),
            np.concatenate([self._rows.ask, np.array([row[0] for row in self._new], np.int64)]),
            np.concatenate([self._rows.masks, masks]),
            np.concatenate([self._rows.effects, effects]),
        )
        self._new.clear()
        return self._rows

    def answers(self, ask: Ask, place: Place) -> tuple[Answer, ...]:
        """The rules that may decide on a submission at a place, in order; the last one needs nothing outstanding."""
        key = (self._asks[ask], place)
        known = self._answers.get(key)
        if known is None:
            known = self._answers[key] = tuple(self._ask(ask, place))
        return known

    def _ask(self, ask: Ask, place: Place) -> list[Answer]:
        found = []
        for number, rule in self._cell(ask.operation, place.vm_state, place.task_state):
            if self._holds(number, rule, ask, place):
                mask = _ALWAYS if rule.outstanding is None else _mask(rule.outstanding)
                found.append(Answer(mask, rule))
                if rule.outstanding is None:
                    break
        return found

    def _cell(self, operation: Operation, vm_state: VmState, task_state: str) -> tuple[tuple[int, Rule], ...]:
        key = (operation, vm_state, task_state)
        known = self._cells.get(key)
        if known is None:
            cell = self._policy.cell(*key)
            known = self._cells[key] = tuple((self._number.get(rule.id, -1), rule) for rule in cell)
        return known

    def _holds(self, number: int, rule: Rule, ask: Ask, place: Place) -> bool:
        """Whether a rule holds at a place, whatever is outstanding: what the core says of a policy of it alone."""
        if number < 0:
            return True
        key = (number, ask.hard, place.launched, place.locked, place.silent_ms)
        known = self._holding.get(key)
        if known is None:
            policy = self._alone.get(number)
            if policy is None:
                policy = self._alone[number] = alone(rule)
            view = View(
                ask.operation,
                VmState.ACTIVE,
                NO_TASK,
                role=self._alphabet.role,
                locked=place.locked,
                hard=ask.hard,
                silent_ms=place.silent_ms,
                running_ms=place.running_ms,
                launched=place.launched,
            )
            known = self._holding[key] = policy.decide(view) is policy.rules[0]
        return known

    def _effect(self, ask: Ask, place: Place, answer: Answer) -> int:
        rule = answer.rule
        if rule.verdict is Verdict.AFTER and _age_ms(rule, place) < (rule.threshold_ms or 0):
            return Effect.LATER if self._keeps_its_word(ask, place, rule) else Effect.DOUBTFUL
        if rule.verdict in (Verdict.DENY, Verdict.REDUNDANT):
            return Effect.REFUSED if rule.id and rule.code else Effect.MUTE
        entry = CATALOGUE[ask.operation]
        if entry.lane is Lane.RECORD:
            effect = _PLAIN_RECORDS.get(ask.operation, Effect.NOTE)
            number = self._asks[ask]
            return effect | number << EFFECT_BITS
        effect = {Verdict.ADMIT: Effect.ADMIT, Verdict.AFTER: Effect.TAKE_OVER}.get(rule.verdict, Effect.PREEMPT)
        kind = Kind(ask.operation, ask.hard, rule.in_turn, effect is not Effect.ADMIT)
        return effect | self._alphabet.kind_number[kind] << EFFECT_BITS

    def _keeps_its_word(self, ask: Ask, place: Place, rule: Rule) -> bool:
        """Whether this rule surely decides when its threshold has just passed, and just before.

        It does if no rule comes before it then that does not come before it now.
        """
        now = {answer.rule.id for answer in _until(self.answers(ask, place), rule)}
        threshold = rule.threshold_ms or 0
        moments = []
        for at_ms in (threshold - 1, threshold):
            if rule.measured_from is MeasuredFrom.LAST_PROGRESS:
                # However long it has run then: no rule that could hold here sees that but by its threshold.
                moments.append(place._replace(silent_ms=at_ms, running_ms=max(place.running_ms, at_ms)))
            else:
                moments += [place._replace(silent_ms=ms, running_ms=at_ms) for ms in self._silences(place, at_ms)]
        for then in moments:
            answers = self.answers(ask, then)
            before = {answer.rule.id for answer in _until(answers, rule)}
            if not before <= now or all(answer.rule is not rule for answer in answers):
                return False
        return True

    def _silences(self, place: Place, at_ms: int) -> list[int]:
        """A silence of each class that there may be when what is done has run for `at_ms`."""
        moments = {
            moment
            for rule in self._policy.rules
            for moment in (rule.silent_ms_min, rule.threshold_ms)
            if moment is not None and place.silent_ms < moment <= at_ms
        }
        return sorted({place.silent_ms, *moments})


def _widened(rows: Rows, levels: int) -> Rows:
    """The rows with room for at least so many masks."""
    more = levels - rows.masks.shape[1]
    if more <= 0:
        return rows
    room = np.zeros((len(rows.masks), more), np.int64)
    effects = np.concatenate([rows.effects[:, :-1], room, rows.effects[:, -1:]], axis=1)
    return rows._replace(masks=np.concatenate([rows.masks, room], axis=1), effects=effects)


def _until(answers: tuple[Answer, ...], rule: Rule) -> tuple[Answer, ...]:
    for number, answer in enumerate(answers):
        if answer.rule is rule:
            return answers[:number]
    return answers


def _mask(operations: frozenset[Operation]) -> int:
    return sum(BIT[operation] for operation in operations) if operations else NOTHING


def _age_ms(rule: Rule, place: Place) -> int:
    return place.silent_ms if rule.measured_from is MeasuredFrom.LAST_PROGRESS else place.running_ms


def _merged(answers: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """The masks, and what follows from each; neighbours with the same effect are one, and the last needs no mask."""
    masks: list[int] = []
    effects: list[int] = []
    for mask, effect in answers:
        if effects and effects[-1] == effect:
            masks[-1] |= mask
        else:
            masks.append(mask)
            effects.append(effect)
    return masks[:-1], effects
