"""The transition system of one policy on packed states: alphabet, state encoding, transitions, gate and holds.

One request is held at a time. It is evaluated again as the core does, as a transition of its own; its hold ends at any
time, when it expires or its owner cancels it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec
import numpy as np

from interlock.core import admission
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Held
from interlock.core.states import VmState
from interlock.policies.model_checker.actions import Alphabet
from interlock.policies.model_checker.gate_table import outstanding_mask
from interlock.policies.model_checker.state_encoding import NOW_MS, Layout, StateEncoding, Words
from interlock.policies.model_checker.step_tables import StepTables
from interlock.policies.model_checker.steps import FAULTS, Action, Steps, Transitions
from interlock.policies.model_checker.submissions import PackedAnswers, PackedGate


class Model:
    """The transition system of one policy."""

    def __init__(
        self,
        policy: CompiledPolicy,
        operations: Iterable[Operation],
        *,
        starts: Iterable[VmState],
        outstanding_max: int,
        faults_max: int | None = None,
        goal: VmState = VmState.DELETED,
        alphabet: Alphabet | None = None,
    ) -> None:
        """Build the tables; takes about a second for a long policy. `alphabet` is that of the same policy, if known.

        Raises:
            Invalid: a state does not fit into a word.
        """
        self.starts = tuple(starts)
        self.alphabet = Alphabet(policy, operations, self.starts) if alphabet is None else alphabet
        submitted = {submission.operation for submission in self.alphabet.submissions}
        locks = not submitted.isdisjoint(_LOCKING) and any(
            rule.locked is not None or rule.locked_above is not None for rule in policy.rules
        )
        self.layout = Layout(self.alphabet, outstanding_max, locks=locks, faults_max=faults_max)
        self.tables = StepTables(self.alphabet, goal)
        self.steps = Steps(self.alphabet, self.layout, self.tables)
        self.gate = PackedGate(self.alphabet, self.layout, self.tables, self.steps.queues, outstanding_max)
        self.encoding = StateEncoding(self.alphabet, self.layout)
        self.holds = Holds(self.alphabet, self.layout, self.gate, self.encoding)
        self.faults_max = faults_max

    def initial_words(self) -> Words:
        """Return the words of the initial states, in the order given."""
        there = [self.alphabet.start(state) for state in self.starts]
        return np.array([number << self.layout.base.shift for number in there], np.int64)

    def after(self, words: Words, answers: PackedAnswers) -> Iterator[Transitions]:
        """Yield every transition from some states; `answers` are the gate's for them."""
        for transitions in self.steps.after(words):
            yield (
                transitions
                if self.faults_max is None or transitions.action not in FAULTS
                else self._counted(transitions)
            )
        yield from self.gate.transitions(words, answers)
        yield from self.holds.after(words)

    def _counted(self, transitions: Transitions) -> Transitions:
        """Count one more fault, and drop the transitions past the limit."""
        faults = self.layout.faults
        room = np.flatnonzero(faults.of(transitions.words) < (self.faults_max or 0))
        return Transitions(transitions.action, transitions.rows[room], transitions.words[room] + (1 << faults.shift))


_LOCKING = frozenset({Operation.LOCK, Operation.UNLOCK})


HOLD_MS: Final = 30 * 24 * 3_600_000


class Holds:
    """The transitions of held requests of one search."""

    def __init__(self, alphabet: Alphabet, layout: Layout, gate: PackedGate, encoding: StateEncoding) -> None:
        self._alphabet = alphabet
        self._layout = layout
        self._gate = gate
        self._encoding = encoding
        self._masks = {number: _named(alphabet, number) for number in alphabet.held}
        """For each submission, the sets of outstanding operations that rules about it distinguish."""
        self._known: dict[tuple[int, ...], bool] = {}

    def after(self, words: Words) -> Iterator[Transitions]:
        """Yield the transitions in which a request is held, is admitted, or its hold ends."""
        field = self._layout.held
        if not field.bits:
            return
        held = np.flatnonzero(field.of(words))
        yield Transitions(Action.HOLD_ENDED, held, words[held] & ~field.mask)
        yield from self._gate.held_admitted(words)
        free = np.flatnonzero(field.of(words) == 0)
        for number, submission in enumerate(self._alphabet.held, start=1):
            rows = free[self._are_held(words[free], submission)]
            yield Transitions(Action.HOLD + submission, rows, words[rows] | number << field.shift)

    def _are_held(self, words: Words, submission: int) -> np.ndarray:
        """Return whether the core holds a submission in each state; it is asked once for states that are alike."""
        queues = self._gate.queues
        outstanding, named = queues.outstanding(words), np.zeros(len(words), np.int64)
        for number, mask in enumerate(self._masks[submission]):
            named |= ((outstanding & mask) != 0).astype(np.int64) << number
        columns = [self._gate.situations(words), named, queues.foreseen(words)]
        keys = np.stack([*columns, queues.lengths(words)], axis=1)
        found, first, back = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        answers = np.zeros(len(found), bool)
        for at, key in enumerate(map(tuple, found.tolist())):
            known = (submission, *key)
            if known not in self._known:
                self._known[known] = self._is_held(int(words[first[at]]), submission)
            answers[at] = self._known[known]
        there: np.ndarray = answers[back.reshape(-1)]
        return there

    def _is_held(self, word: int, submission: int) -> bool:
        alphabet, encoding = self._alphabet, self._encoding
        new = alphabet.submissions[submission].submission("new", host_reachable=encoding.host_reachable(word))
        new = msgspec.structs.replace(new, hold_ms=HOLD_MS)
        change = admission.admit_there(encoding.unpack(word), new, alphabet.policy, NOW_MS)
        return isinstance(change.answer, Held)


def _named(alphabet: Alphabet, submission: int) -> list[int]:
    operation = alphabet.submissions[submission].operation
    named = [rule.outstanding for rule in alphabet.policy.rules if operation in rule.operations]
    return list(dict.fromkeys(outstanding_mask(operations) for operations in named if operations is not None))
