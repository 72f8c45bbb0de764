"""What packed states are spelled with: the submissions, kinds of request, tasks, footings and ages of one walk.

Everything has a number here, and nothing is decided. Numbers of kinds, tasks and parts begin with 1; 0 stands for none.

* A *kind* is a request as a queue knows it: its operation, whether it is the hard variant, was judged on the foreseen
  state, and preempts.
* A *task* is what a state change that is being served shows to the policy: a class of its phases that the policy does
  not tell apart. A *part* is the operation of a component change that is being served.
* A *footing* is where an instance stands or will stand: vm_state, what it remembers, and whether it was ever launched.
* An *age class* lies between two moments at which some rule answers otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any, NamedTuple

import msgspec

from interlock.core.operations import CATALOGUE, Lane, Operation, remembered_in, without_guest
from interlock.core.policy import CompiledPolicy, MeasuredFrom, Policy, Rule, Verdict, View
from interlock.core.records import Request
from interlock.core.request_queue import Foreseen, judge_in, permits
from interlock.core.states import EXECUTING_STATES, LEFT_AT_END, NO_TASK, VmState
from interlock.policies.likeness import phases_told_apart, told_apart

VM_STATES = tuple(VmState)
RESET_TARGETS = (VmState.ERROR, VmState.ACTIVE)
"""Where a walk lets `reset_state` lead."""
_GUEST_ENDS = (VmState.STOPPED, VmState.ERROR)


class Ask(NamedTuple):
    """One way to submit an operation."""

    operation: Operation
    hard: bool
    target: VmState | None = None
    """For `reset_state`: where it leads."""

    @property
    def parameters(self) -> dict[str, Any]:
        if self.target is not None:
            return {"vm_state": self.target.value}
        return {"hard": True} if self.hard else {}


class Kind(NamedTuple):
    """A request that waits, as far as anything depends on it."""

    operation: Operation
    hard: bool
    in_turn: bool
    preempts: bool


class Task(NamedTuple):
    """A state change in one of its phases."""

    operation: Operation
    phase: str


class Ages(NamedTuple):
    """The moments, in milliseconds, from which some rule answers otherwise, in order."""

    silent: tuple[int, ...]
    running: tuple[int, ...]


class Alphabet:
    """The numbers of everything that one walk can meet."""

    def __init__(
        self, policy: CompiledPolicy, operations: Iterable[Operation], role: str, starts: Iterable[VmState]
    ) -> None:
        self.policy = policy
        self.role = role
        rules = tuple(rule for rule in policy.rules if can_hold(rule, role))
        self._alive = CompiledPolicy(Policy(name="alive", rules=rules))
        """The rules that may hold in this walk: what the others say makes no difference to it."""
        self.operations = told_apart(self._alive, operations)
        self._phases = {entry.operation: phases_told_apart(self._alive, entry) for entry in CATALOGUE.values()}
        self.asks = tuple(ask for operation in self.operations for ask in self._asks(operation))
        kinds = [kind for ask in self.asks for kind in self._kinds(ask)]
        self.kinds = tuple(kind for kind in kinds if CATALOGUE[kind.operation].lane is Lane.STATE)
        self.part_kinds = tuple(kind for kind in kinds if CATALOGUE[kind.operation].lane is Lane.COMPONENT)
        self.parts = tuple(dict.fromkeys(kind.operation for kind in self.part_kinds))
        self.tasks = tuple(
            Task(operation, phase)
            for operation in dict.fromkeys(kind.operation for kind in self.kinds)
            for phases in self._phases[operation]
            for phase in phases
        )
        self.task_number = {task: number for number, task in enumerate(self.tasks, start=1)}
        self.kind_number = {
            kind: number for kinds in (self.kinds, self.part_kinds) for number, kind in enumerate(kinds, start=1)
        }
        self.part_number = {part: number for number, part in enumerate(self.parts, start=1)}
        self.task_ages = tuple(self._ages_of_task(task) for task in self.tasks)
        self.part_ages = self._ages([NO_TASK], [NO_TASK])
        self.idle_ages = tuple(sorted({*self.part_ages.silent, *self.part_ages.running}))
        self._sees_launch = any(rule.launched is not None for rule in rules)
        self.footings = tuple(self._reachable(list(dict.fromkeys(map(self._beginning, starts)))))
        self.footing_number = {footing: number for number, footing in enumerate(self.footings)}

    def _asks(self, operation: Operation) -> Iterator[Ask]:
        if operation is Operation.RESET_STATE:
            yield from (Ask(operation, hard=False, target=target) for target in RESET_TARGETS)
            return
        yield Ask(operation, hard=False)
        seen = any(rule.hard is not None and operation in rule.operations for rule in self._alive.rules)
        if seen or self._phases[operation][1]:
            yield Ask(operation, hard=True)

    def _kinds(self, ask: Ask) -> Iterator[Kind]:
        """Every kind of request that the policy can make of a submission."""
        rules = [rule for rule in self._alive.rules if ask.operation in rule.operations]
        admitting = {Verdict.ADMIT: False, Verdict.AFTER: True, Verdict.PREEMPT: True}
        ways = {(rule.in_turn, admitting[rule.verdict]) for rule in rules if rule.verdict in admitting}
        for in_turn, preempts in sorted(ways):
            yield Kind(ask.operation, ask.hard, in_turn, preempts)

    def start(self, vm_state: VmState) -> int:
        """The footing of an instance that begins in a vm_state."""
        return self.footing_number[self._beginning(vm_state)]

    def _beginning(self, vm_state: VmState) -> Foreseen:
        return self.canonical(Foreseen(vm_state, (), launched=vm_state is not VmState.BUILDING))

    # ------------------------------------------------------------------------------------------------------- tasks

    def phases(self, operation: Operation, *, hard: bool) -> tuple[str, ...]:
        """The phases that are told apart, for one variant of an operation."""
        soft, harder = self._phases[operation]
        return harder if hard and harder else soft

    def first_task(self, kind: Kind) -> int:
        return self.task_number[Task(kind.operation, self.phases(kind.operation, hard=kind.hard)[0])]

    def next_task(self, number: int) -> int:
        """The task that follows; 0 for the last."""
        task = self.tasks[number - 1]
        for phases in self._phases[task.operation]:
            if task.phase in phases[:-1]:
                return self.task_number[Task(task.operation, phases[phases.index(task.phase) + 1])]
        return 0

    def task_of(self, operation: Operation, phase: str) -> int:
        """The task that stands for a phase: the last one told apart at or before it."""
        entry = CATALOGUE[operation]
        soft, hard = self._phases[operation]
        if phase in entry.phases:
            written, told = entry.phases, soft
        else:
            written, told = entry.hard_phases, hard
            if not hard:  # They are like the others, one for one.
                alike = _starts_of_classes(self._alive, written)
                return self.task_number[Task(operation, soft[sum(written.index(phase) >= one for one in alike) - 1])]
        known = [each for each in written[: written.index(phase) + 1] if each in told]
        return self.task_number[Task(operation, known[-1])]

    # -------------------------------------------------------------------------------------------------------- ages

    def _ages_of_task(self, task: Task) -> Ages:
        entry = CATALOGUE[task.operation]
        return self._ages([task.phase], entry.phases + entry.hard_phases)

    def _ages(self, silent_in: Iterable[str], running_in: Iterable[str]) -> Ages:
        """Silence begins anew with a phase; how long it has run is counted through all of them."""
        silent: set[int] = set()
        running: set[int] = set()
        for rule in self._alive.rules:
            if rule.operations.isdisjoint(self.operations):
                continue
            if _names_phase(rule, silent_in):
                silent.update(_silences(rule))
            if _names_phase(rule, running_in) and rule.measured_from is MeasuredFrom.TASK_STARTED:
                running.update([rule.threshold_ms or 0])
        return Ages(tuple(sorted(silent - {0})), tuple(sorted(running - {0})))

    # ---------------------------------------------------------------------------------------------------- footings

    def canonical(self, footing: Foreseen) -> Foreseen:
        """The footing that stands for all that no decision tells from it."""
        launched = footing.launched or footing.vm_state in EXECUTING_STATES or not self._sees_launch
        return Foreseen(footing.vm_state, footing.memory, launched)

    def permitted(self, operation: Operation, footing: Foreseen, *, hard: bool) -> bool:
        """Whether the policy permits it there with nothing outstanding."""
        request = Request(
            id="", instance_id="", operation=operation, requested_by="", role=self.role, rule="", admitted_at_ms=0,
            parameters={"hard": True} if hard else {},
        )  # fmt: skip
        return permits(judge_in(self.policy, request, footing, ()))

    def fails_to(self, operation: Operation, footing: Foreseen) -> Foreseen:
        state = CATALOGUE[operation].on_failure or footing.vm_state
        return self._come_to(state, footing)

    def after(self, operation: Operation, footing: Foreseen) -> Foreseen:
        return self.canonical(footing.after(operation))

    def guest_ends(self, footing: Foreseen, state: VmState) -> Foreseen:
        """Where the end of the guest leads."""
        there = footing._replace(memory=without_guest(footing.vm_state, footing.memory))
        return self._come_to(state if footing.vm_state in LEFT_AT_END else footing.vm_state, there)

    def reset(self, footing: Foreseen, target: VmState) -> Foreseen:
        return self._come_to(target, footing)

    def _come_to(self, state: VmState, footing: Foreseen) -> Foreseen:
        return self.canonical(Foreseen(state, remembered_in(state, footing.memory), footing.launched))

    def _reachable(self, pending: list[Foreseen]) -> Iterator[Foreseen]:
        known = dict.fromkeys(pending)
        for footing in pending:
            yield footing
            there = [self.guest_ends(footing, state) for state in _GUEST_ENDS]
            for kind in self.kinds:
                there += [self.after(kind.operation, footing), self.fails_to(kind.operation, footing)]
            there += [self.reset(footing, ask.target) for ask in self.asks if ask.target is not None]
            for each in there:
                if each not in known:
                    known[each] = None
                    pending.append(each)


def alone(rule: Rule) -> CompiledPolicy:
    """A policy of one rule, without what a place or a queue says of it."""
    open_rule = msgspec.structs.replace(
        rule, operations=frozenset(Operation), vm_states=None, task_states=None, outstanding=None
    )
    return CompiledPolicy(Policy(name="alone", rules=(open_rule,)))


def can_hold(rule: Rule, role: str) -> bool:
    """Whether a rule can ever hold for a caller of that role, and an instance without tags whose host is alive."""
    one = alone(rule)
    views = (
        View(
            Operation.STOP,
            VmState.ACTIVE,
            NO_TASK,
            role=role,
            locked=locked,
            hard=hard,
            launched=launched,
            silent_ms=rule.silent_ms_min or 0,
        )
        for locked, hard, launched in product((False, True), repeat=3)
    )
    return any(one.decide(view) is one.rules[0] for view in views)


def _names_phase(rule: Rule, phases: Iterable[str]) -> bool:
    return rule.task_states is None or not rule.task_states.isdisjoint(phases)


def _silences(rule: Rule) -> Iterator[int]:
    if rule.silent_ms_min is not None:
        yield rule.silent_ms_min
    if rule.threshold_ms is not None and rule.measured_from is MeasuredFrom.LAST_PROGRESS:
        yield rule.threshold_ms


def _starts_of_classes(policy: CompiledPolicy, phases: tuple[str, ...]) -> list[int]:
    """Where, among some phases, one begins that a rule tells from the one before."""
    marks = [[phase in rule.task_states for rule in policy.rules if rule.task_states is not None] for phase in phases]
    return [number for number in range(len(phases)) if not number or marks[number] != marks[number - 1]]
