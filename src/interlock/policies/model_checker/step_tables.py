"""Lookup tables computed by the core: target states, permissions and compatibility of kinds and tasks.

Tables of (kind, base state) and (task, base state) are flat: the index is `kind * bases + base`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from interlock.core.operations import BIT, CATALOGUE, Operation
from interlock.core.request_queue import is_denied_around, judge_in
from interlock.core.state_stack import ARRIVES
from interlock.core.states import VmState
from interlock.core.views import Foreseen
from interlock.policies.model_checker.actions import VM_STATES, Alphabet, RequestKind, request_of
from interlock.policies.model_checker.gate_table import NONE_OUTSTANDING, Bools, Ints
from interlock.policies.model_checker.results import check_time


class StepTables:
    """The lookup tables of one alphabet, including entries for number 0 (none)."""

    def __init__(self, alphabet: Alphabet, goal: VmState) -> None:
        self._alphabet = alphabet
        self.goal = goal
        self.bases = len(alphabet.bases)
        operations = [None, *(None if kind.is_component else kind.operation for kind in alphabet.kinds)]
        tasks = [None, *(task.operation for task in alphabet.tasks)]
        self.vm_states = len(VM_STATES)
        self.vm_state = np.array([VM_STATES.index(base.vm_state) for base in alphabet.bases], np.int64)
        self.launched = np.array([base.launched for base in alphabet.bases], np.int64)
        self.is_goal = np.array([base.vm_state is goal for base in alphabet.bases])
        self.leads = self._lead(operations, alphabet.after)
        self.task_leads = self._lead(tasks, alphabet.after)
        self.task_fails = self._lead(tasks, alphabet.fails_to)
        self.stopped = self._base_numbers(alphabet.guest_ends(each, VmState.STOPPED) for each in alphabet.bases)
        self.crashed = self._base_numbers(alphabet.guest_ends(each, VmState.ERROR) for each in alphabet.bases)
        self.host_lost = self._base_numbers(alphabet.with_host(each, reachable=False) for each in alphabet.bases)
        self.host_back = self._base_numbers(alphabet.with_host(each, reachable=True) for each in alphabet.bases)
        self.relabelled = [
            self._base_numbers(alphabet.relabelled(each, tag) for each in alphabet.bases) for tag in alphabet.tags
        ]
        self.task_arrives = np.array([False, *(task.operation in ARRIVES for task in alphabet.tasks)])
        self.resets = np.array(
            [
                [alphabet.base_number.get(alphabet.reset(each, submission.target), 0) for each in alphabet.bases]
                if submission.target
                else [0] * self.bases
                for submission in alphabet.submissions
            ],
            np.int64,
        )
        self.permits = self._permitted(alphabet.kinds)
        self.holds = self._held(alphabet.kinds)
        performed = self.holds.reshape(-1, self.vm_states)[:, self.vm_state].reshape(-1)
        self.spared, self.spared_by_host = (self._spared(host_changed=changed) for changed in (False, True))
        """Whether a preempting kind stays in a base state if it can be performed; the second when the host is lost or
        back."""
        self.anyway, self.anyway_by_host = self.spared & performed, self.spared_by_host & performed
        """Whether a kind stays in a base state that does not permit it."""
        self.reachable = np.array([base.host_reachable for base in alphabet.bases])
        evacuates = [False, *(kind.operation is Operation.EVACUATE for kind in alphabet.kinds)]
        self.moot = (np.array(evacuates)[:, None] & self.reachable).reshape(-1)
        """Whether a kind is an evacuation off a host that is back."""
        self._attributes()
        self._compatibility()

    def is_task_of(self, operations: Iterable[Operation]) -> Bools:
        """Return for each task whether it is one of these operations'."""
        wanted = frozenset(operations)
        return np.array([False, *(task.operation in wanted for task in self._alphabet.tasks)])

    def _attributes(self) -> None:
        alphabet = self._alphabet
        kinds = alphabet.kinds
        self.is_component = np.array([False, *(kind.is_component for kind in kinds)])
        """Whether a kind is a component change; kind 0 is none."""
        self.is_state_change = np.array([False, *(not kind.is_component for kind in kinds)])
        self.comes_last = np.array(
            [False, *(kind.is_component and not kind.in_turn and not kind.preempts for kind in kinds)]
        )
        """Whether a kind is served after those that are in the order admitted."""
        self.first_task = np.array([0, *(0 if k.is_component else alphabet.first_task(k) for k in kinds)], np.int64)
        self.next_task = np.array([0, *(alphabet.next_task(n + 1) for n in range(len(alphabet.tasks)))], np.int64)
        self.bit = _bits(kind.operation for kind in alphabet.kinds)
        self.task_bit = _bits(task.operation for task in alphabet.tasks)
        self.component_bit = _bits(alphabet.components)
        self.none_outstanding = NONE_OUTSTANDING
        self.preempts = np.array([False, *(kind.preempts for kind in alphabet.kinds)])
        self.in_turn = np.array([False, *(kind.in_turn for kind in alphabet.kinds)])
        self.variant = _variants(alphabet.kinds)
        self.component_of = np.array([0, *(alphabet.component_number.get(k.operation, 0) for k in kinds)], np.int64)
        self.leads_to_goal = np.array([False, *(leads_to(kind.operation, self.goal) for kind in alphabet.kinds)])
        self.deletes = self.leads_to_goal | np.array(
            [False, *(leads_to(kind.operation, VmState.SOFT_DELETED) for kind in alphabet.kinds)]
        )
        self.task_leads_to_goal = np.array([False, *(leads_to(task.operation, self.goal) for task in alphabet.tasks)])
        self.task_limited = np.array([False, *(alphabet.policy.limits(task.operation) for task in alphabet.tasks)])
        self.component_limited = np.array(
            [False, *(alphabet.policy.limits(operation) for operation in alphabet.components)]
        )
        self.silences = np.array([0, *(len(ages.silent) for ages in alphabet.task_ages)], np.int64)
        self.runnings = np.array([0, *(len(ages.running) for ages in alphabet.task_ages)], np.int64)

    def _compatibility(self) -> None:
        """Fill the flat tables (kind, task), of component changes, and (component, kind), of state changes."""
        alphabet = self._alphabet
        self.kind_with_task = np.array(
            [
                _compatible(component, task)
                for component in (None, *(kind.operation for kind in alphabet.kinds))
                for task in (None, *(task.operation for task in alphabet.tasks))
            ]
        )
        self.component_with_kind = np.array(
            [
                _compatible(component, kind)
                for component in (None, *alphabet.components)
                for kind in (None, *(kind.operation for kind in alphabet.kinds))
            ]
        )

    def _lead(self, operations: list[Operation | None], leads: Callable[[Operation, Foreseen], Foreseen]) -> Ints:
        bases = self._alphabet.bases
        rows = {
            operation: self._base_numbers(base if operation is None else leads(operation, base) for base in bases)
            for operation in dict.fromkeys(operations)
        }
        return np.concatenate([rows[operation] for operation in operations])

    def _base_numbers(self, bases: Iterable[Foreseen]) -> Ints:
        check_time(self._alphabet.until_s)
        return np.array([self._alphabet.base_number[base] for base in bases], np.int64)

    def _permitted(self, kinds: tuple[RequestKind, ...]) -> Bools:
        known: dict[RequestKind, list[bool]] = {}
        rows = [[False] * self.bases]
        for kind in kinds:
            key = kind._replace(in_turn=True, preempts=False)
            check_time(self._alphabet.until_s)
            if key not in known:
                known[key] = [self._alphabet.permitted(key, each) for each in self._alphabet.bases]
            rows.append(known[key])
        return np.array(rows).reshape(-1)

    def _spared(self, *, host_changed: bool) -> Bools:
        policy, bases = self._alphabet.policy, self._alphabet.bases
        rows = [[False] * len(bases)]
        for kind in self._alphabet.kinds:
            check_time(self._alphabet.until_s)
            request = request_of(kind)
            rows.append(
                [
                    kind.preempts
                    and not is_denied_around(
                        request, judge_in(policy, request, base), host_reachable=False, host_changed=host_changed
                    )
                    for base in bases
                ]
            )
        return np.array(rows).reshape(-1)

    def _held(self, kinds: tuple[RequestKind, ...]) -> Bools:
        """Return whether a preempting kind can be performed: flat (kind, vm_state)."""
        rows = [[False] * self.vm_states]
        rows += [
            [
                kind.preempts and not kind.is_component and state in CATALOGUE[kind.operation].sources
                for state in VM_STATES
            ]
            for kind in kinds
        ]
        return np.array(rows).reshape(-1)


def _bits(operations: Iterable[Operation]) -> Ints:
    return np.array([0, *(BIT[operation] for operation in operations)], np.int64)


def _variants(kinds: tuple[RequestKind, ...]) -> Ints:
    """Number the (operation, hard) pairs of preempting kinds; 0 for others."""
    numbers: dict[tuple[Operation, bool], int] = {}
    return np.array(
        [0, *(numbers.setdefault((k.operation, k.hard), len(numbers) + 1) if k.preempts else 0 for k in kinds)],
        np.int64,
    )


def _compatible(component: Operation | None, other: Operation | None) -> bool:
    return component is None or other is None or other in CATALOGUE[component].compatible_with


def leads_to(operation: Operation, goal: VmState) -> bool:
    """Return whether an operation leads to the goal from every state."""
    return CATALOGUE[operation].to is goal
