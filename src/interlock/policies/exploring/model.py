"""All that the walk on packed states needs of one policy: its alphabet, its words, and what happens to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.states import VmState
from interlock.policies.exploring.alphabet import Alphabet
from interlock.policies.exploring.layout import Layout, Words
from interlock.policies.exploring.packing import Packing
from interlock.policies.exploring.step_tables import StepTables
from interlock.policies.exploring.steps import FAULTS, Moves, Steps
from interlock.policies.exploring.submitting import Answers, Submitting


class Model:
    """One policy, on packed states."""

    def __init__(
        self,
        policy: CompiledPolicy,
        operations: Iterable[Operation],
        *,
        starts: Iterable[VmState],
        outstanding_max: int,
        faults_max: int | None = None,
        role: str = "member",
        goal: VmState = VmState.DELETED,
    ) -> None:
        """Build the tables; takes about a second for a long policy.

        Raises:
            Invalid: states do not fit into a word: the bound is too large for so many operations.
        """
        self.starts = tuple(starts)
        self.alphabet = Alphabet(policy, operations, role, self.starts)
        asked = {ask.operation for ask in self.alphabet.asks}
        locks = not asked.isdisjoint(_LOCKING) and any(rule.locked is not None for rule in policy.rules)
        self.layout = Layout(self.alphabet, outstanding_max, locks=locks, faults_max=faults_max)
        self.tables = StepTables(self.alphabet, goal)
        self.steps = Steps(self.alphabet, self.layout, self.tables)
        self.gate = Submitting(self.alphabet, self.layout, self.tables, self.steps.queues, outstanding_max)
        self.packing = Packing(self.alphabet, self.layout)
        self._faults_max = faults_max

    def beginnings(self) -> Words:
        """The words of the states in which a walk begins, in the order given."""
        there = [self.alphabet.start(state) for state in self.starts]
        return np.array([number << self.layout.footing.shift for number in there], np.int64)

    def after(self, words: Words, answers: Answers) -> Iterator[Moves]:
        """Every step from some states; `answers` are the gate's for them."""
        for moves in self.steps.after(words):
            yield moves if self._faults_max is None or moves.action not in FAULTS else self._counted(moves)
        yield from self.gate.moves(words, answers)

    def _counted(self, moves: Moves) -> Moves:
        """One more fault, where there may be one more."""
        faults = self.layout.faults
        room = np.flatnonzero(faults.of(moves.words) < (self._faults_max or 0))
        return Moves(moves.action, moves.rows[room], moves.words[room] + (1 << faults.shift))


_LOCKING = frozenset({Operation.LOCK, Operation.UNLOCK})
