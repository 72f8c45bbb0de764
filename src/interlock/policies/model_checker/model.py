"""The transition system of one policy on packed states: alphabet, state encoding, transitions and gate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.states import VmState
from interlock.policies.model_checker.actions import Alphabet
from interlock.policies.model_checker.holds import Holds
from interlock.policies.model_checker.layout import Layout, Words
from interlock.policies.model_checker.state_encoding import StateEncoding
from interlock.policies.model_checker.step_tables import StepTables
from interlock.policies.model_checker.steps import FAULTS, Steps, Transitions
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
