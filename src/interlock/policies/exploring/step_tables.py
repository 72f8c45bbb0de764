"""What the core says of kinds, tasks and footings, as arrays: where they lead, what is permitted, what may be beside.

Tables of (kind, footing) and (task, footing) are flat, so that a look-up takes one index: `kind * footings + footing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from interlock.core.operations import BIT, CATALOGUE, Operation
from interlock.core.request_queue import Foreseen
from interlock.core.states import VmState
from interlock.policies.exploring.alphabet import VM_STATES, Alphabet, Kind
from interlock.policies.exploring.gate_table import NOTHING, Bools, Ints


class StepTables:
    """The arrays of one alphabet. Whatever has a number 0 for none has an entry for it."""

    def __init__(self, alphabet: Alphabet, goal: VmState) -> None:
        self._alphabet = alphabet
        self.goal = goal
        self.footings = len(alphabet.footings)
        operations = [None, *(kind.operation for kind in alphabet.kinds)]
        tasks = [None, *(task.operation for task in alphabet.tasks)]
        self.vm_states = len(VM_STATES)
        self.vm_state = np.array([VM_STATES.index(footing.vm_state) for footing in alphabet.footings], np.int64)
        self.launched = np.array([footing.launched for footing in alphabet.footings], np.int64)
        self.is_goal = np.array([footing.vm_state is goal for footing in alphabet.footings])
        self.leads = self._lead(operations, alphabet.after)
        self.task_leads = self._lead(tasks, alphabet.after)
        self.task_fails = self._lead(tasks, alphabet.fails_to)
        self.stopped = self._footings(alphabet.guest_ends(each, VmState.STOPPED) for each in alphabet.footings)
        self.crashed = self._footings(alphabet.guest_ends(each, VmState.ERROR) for each in alphabet.footings)
        self.resets = np.array(
            [
                [alphabet.footing_number.get(alphabet.reset(each, ask.target), 0) for each in alphabet.footings]
                if ask.target
                else [0] * self.footings
                for ask in alphabet.asks
            ],
            np.int64,
        )
        self.permits = self._permitted(alphabet.kinds)
        self.part_permits = self._permitted(alphabet.part_kinds)
        self.holds = self._held(alphabet.kinds)
        self.stays = self.permits | self.holds.reshape(-1, self.vm_states)[:, self.vm_state].reshape(-1)
        """Whether a kind stays in the queue by what is foreseen for it; a preempting one may by other things too."""
        self._attributes()
        self._beside()

    def _attributes(self) -> None:
        alphabet = self._alphabet
        self.first_task = np.array([0, *(alphabet.first_task(kind) for kind in alphabet.kinds)], np.int64)
        self.next_task = np.array([0, *(alphabet.next_task(n + 1) for n in range(len(alphabet.tasks)))], np.int64)
        self.bit = _bits(kind.operation for kind in alphabet.kinds)
        self.part_kind_bit = _bits(kind.operation for kind in alphabet.part_kinds)
        self.task_bit = _bits(task.operation for task in alphabet.tasks)
        self.part_bit = _bits(alphabet.parts)
        self.nothing = NOTHING
        self.preempts = np.array([False, *(kind.preempts for kind in alphabet.kinds)])
        self.in_turn = np.array([False, *(kind.in_turn for kind in alphabet.kinds)])
        self.part_in_turn = np.array([False, *(kind.in_turn for kind in alphabet.part_kinds)])
        self.variant = _variants(alphabet.kinds)
        self.part_variant = _variants(alphabet.part_kinds)
        self.part_of = np.array([0, *(alphabet.part_number[kind.operation] for kind in alphabet.part_kinds)], np.int64)
        self.leads_to_goal = np.array([False, *(leads_to(kind.operation, self.goal) for kind in alphabet.kinds)])
        self.task_leads_to_goal = np.array([False, *(leads_to(task.operation, self.goal) for task in alphabet.tasks)])
        self.silences = np.array([0, *(len(ages.silent) for ages in alphabet.task_ages)], np.int64)
        self.runnings = np.array([0, *(len(ages.running) for ages in alphabet.task_ages)], np.int64)

    def _beside(self) -> None:
        """Flat: (part kind, task), and (part, kind)."""
        alphabet = self._alphabet
        self.part_kind_beside_task = np.array(
            [
                _may_be_beside(part, task)
                for part in (None, *(kind.operation for kind in alphabet.part_kinds))
                for task in (None, *(task.operation for task in alphabet.tasks))
            ]
        )
        self.part_beside_kind = np.array(
            [
                _may_be_beside(part, kind)
                for part in (None, *alphabet.parts)
                for kind in (None, *(kind.operation for kind in alphabet.kinds))
            ]
        )

    def _lead(self, operations: list[Operation | None], leads: Callable[[Operation, Foreseen], Foreseen]) -> Ints:
        footings = self._alphabet.footings
        return self._footings(
            footing if operation is None else leads(operation, footing)
            for operation in operations
            for footing in footings
        )

    def _footings(self, footings: Iterable[Foreseen]) -> Ints:
        return np.array([self._alphabet.footing_number[footing] for footing in footings], np.int64)

    def _permitted(self, kinds: tuple[Kind, ...]) -> Bools:
        known: dict[tuple[Operation, bool], list[bool]] = {}
        rows = [[False] * self.footings]
        for kind in kinds:
            key = (kind.operation, kind.hard)
            if key not in known:
                known[key] = [
                    self._alphabet.permitted(kind.operation, each, hard=kind.hard) for each in self._alphabet.footings
                ]
            rows.append(known[key])
        return np.array(rows).reshape(-1)

    def _held(self, kinds: tuple[Kind, ...]) -> Bools:
        """Whether a preempting kind can be performed in a vm_state: (kind, vm_state), flat."""
        rows = [[False] * self.vm_states]
        rows += [
            [kind.preempts and state in CATALOGUE[kind.operation].sources for state in VM_STATES] for kind in kinds
        ]
        return np.array(rows).reshape(-1)


def _bits(operations: Iterable[Operation]) -> Ints:
    return np.array([0, *(BIT[operation] for operation in operations)], np.int64)


def _variants(kinds: tuple[Kind, ...]) -> Ints:
    """A number for operation and hard of a kind that preempts; 0 for one that does not."""
    numbers: dict[tuple[Operation, bool], int] = {}
    return np.array(
        [0, *(numbers.setdefault((k.operation, k.hard), len(numbers) + 1) if k.preempts else 0 for k in kinds)],
        np.int64,
    )


def _may_be_beside(part: Operation | None, other: Operation | None) -> bool:
    return part is None or other is None or other in CATALOGUE[part].compatible_with


def leads_to(operation: Operation, goal: VmState) -> bool:
    """Whether an operation leads to the goal from wherever it is served."""
    return CATALOGUE[operation].to is goal
