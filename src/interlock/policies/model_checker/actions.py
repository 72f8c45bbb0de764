"""The alphabet of one search: numbers of submissions, request kinds, tasks, base states and age classes.

Numbers of kinds, tasks and components start at 1; 0 means none.

* A *caller* stands for all callers that the rules about an operation do not distinguish.
* A *kind* is a queued request: operation, caller, hard or soft, judged on the foreseen state or not, preempting or not.
* A *task* is the state change in service: a class of phases that the policy does not distinguish. A *component* is the
  operation of the component change in service.
* A *base state* is a vm_state, its stack of past vm_states, and whether the instance was ever launched.
* An *age class* is an interval of ages in which every rule answers the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from interlock.core.conditions import CALLER, CONDITIONS, Subject
from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.policy import CompiledPolicy, MeasuredFrom, Policy, Rule, Verdict
from interlock.core.records import Request, Submission
from interlock.core.request_queue import judge_in, permits
from interlock.core.state_stack import remembered_in, without_guest
from interlock.core.states import EXECUTING_STATES, LEFT_AT_END, NO_TASK, VmState
from interlock.core.view_classes import callers
from interlock.core.views import Foreseen
from interlock.policies.model_checker.symmetry_reduction import distinct_operations, distinct_phases

VM_STATES = tuple(VmState)
PACKED_ID = "packed"
"""The ids of what stands for many requests or instances."""
UNNAMED = "someone"
"""Who asks, where no rule looks at the name."""
RESET_TARGETS = (VmState.ERROR, VmState.ACTIVE)
"""The targets of `reset_state` that are explored."""
_GUEST_ENDS = (VmState.STOPPED, VmState.ERROR)


Caller = tuple[tuple[str, Any], ...]
"""The fields of requests, submissions and views that describe who asks, with their values."""


class SubmissionKind(NamedTuple):
    """A submission: an operation with its parameters, and who asks."""

    operation: Operation
    caller: Caller
    hard: bool
    target: VmState | None = None
    """The vm_state that `reset_state` sets."""

    @property
    def parameters(self) -> dict[str, Any]:
        if self.target is not None:
            return {"vm_state": self.target.value}
        return {"hard": True} if self.hard else {}

    def submission(self, request_id: str) -> Submission:
        """Return it as the core knows it."""
        caller = {"requested_by": UNNAMED, **dict(self.caller)}
        return Submission(request_id=request_id, operation=self.operation, parameters=self.parameters, **caller)


class RequestKind(NamedTuple):
    """A queued request, reduced to what decisions depend on."""

    operation: Operation
    caller: Caller
    hard: bool
    in_turn: bool
    preempts: bool

    @property
    def is_component(self) -> bool:
        return CATALOGUE[self.operation].lane is Lane.COMPONENT


class Task(NamedTuple):
    """A state change in one of its phases."""

    operation: Operation
    phase: str


class Ages(NamedTuple):
    """Ages in milliseconds, ascending, at which some rule's answer changes."""

    silent: tuple[int, ...]
    running: tuple[int, ...]


class Alphabet:
    """The numbering of everything that occurs in one search."""

    def __init__(
        self, policy: CompiledPolicy, operations: Iterable[Operation], role: str, starts: Iterable[VmState]
    ) -> None:
        self.policy = policy
        self.role = role
        rules = tuple(rule for rule in policy.rules if can_hold(rule, role))
        self._live = CompiledPolicy(Policy(name="alive", rules=rules))
        """The rules that can hold in this search."""
        self.operations = distinct_operations(self._live, operations)
        self._callers = {
            operation: tuple(
                tuple(caller.items())
                for caller in callers([rule for rule in rules if operation in rule.operations], role=role)
            )
            for operation in Operation
        }
        self._phases = {entry.operation: distinct_phases(self._live, entry) for entry in CATALOGUE.values()}
        self.submissions = tuple(
            submission for operation in self.operations for submission in self._submissions(operation)
        )
        kinds = [kind for submission in self.submissions for kind in self._kinds(submission)]
        self.kinds = tuple(kind for kind in kinds if CATALOGUE[kind.operation].lane is not Lane.RECORD)
        state_changes = [kind.operation for kind in self.kinds if not kind.is_component]
        self.components = tuple(dict.fromkeys(kind.operation for kind in self.kinds if kind.is_component))
        self.tasks = tuple(
            Task(operation, phase)
            for operation in dict.fromkeys(state_changes)
            for phases in self._phases[operation]
            for phase in phases
        )
        self.task_number = {task: number for number, task in enumerate(self.tasks, start=1)}
        self.kind_number = {kind: number for number, kind in enumerate(self.kinds, start=1)}
        self.component_number = {component: number for number, component in enumerate(self.components, start=1)}
        self.task_ages = tuple(self._ages_of_task(task) for task in self.tasks)
        self.component_ages = self._ages([NO_TASK], [NO_TASK])
        self.idle_ages = tuple(sorted({*self.component_ages.silent, *self.component_ages.running}))
        self._sees_launch = any(rule.launched is not None for rule in rules)
        self.bases = tuple(self._reachable(list(dict.fromkeys(map(self._initial, starts)))))
        self.base_number = {base: number for number, base in enumerate(self.bases)}

    def callers(self, operation: Operation) -> tuple[Caller, ...]:
        """Return one caller of each class that the rules about an operation distinguish."""
        return self._callers[operation]

    def caller_of(self, request: Request) -> Caller:
        """Return the caller that stands for a request's."""
        known = self._callers[request.operation]
        if len(known) == 1:
            return known[0]
        rules = [rule for rule in self._live.rules if request.operation in rule.operations]

        def answers(values: Mapping[str, Any]) -> list[bool]:
            return [
                bool(condition.kind.test(wanted)(values[condition.reads]))
                for condition in CALLER
                for wanted in condition.wanted(rules)
            ]

        own = answers({**{one.reads: getattr(request, one.reads) for one in CALLER}, "role": self.role})
        return next(caller for caller in known if answers(dict(caller)) == own)

    def _submissions(self, operation: Operation) -> Iterator[SubmissionKind]:
        for caller in self._callers[operation]:
            if operation is Operation.RESET_STATE:
                yield from (SubmissionKind(operation, caller, hard=False, target=target) for target in RESET_TARGETS)
                continue
            yield SubmissionKind(operation, caller, hard=False)
            seen = any(rule.hard is not None and operation in rule.operations for rule in self._live.rules)
            if seen or self._phases[operation][1]:
                yield SubmissionKind(operation, caller, hard=True)

    def _kinds(self, submission: SubmissionKind) -> Iterator[RequestKind]:
        """Yield every kind of request that the policy can admit a submission as."""
        rules = [rule for rule in self._live.rules if submission.operation in rule.operations]
        admitting = {Verdict.ADMIT: False, Verdict.AFTER: True, Verdict.PREEMPT: True}
        ways = {(rule.in_turn, admitting[rule.verdict]) for rule in rules if rule.verdict in admitting}
        for in_turn, preempts in sorted(ways):
            yield RequestKind(submission.operation, submission.caller, submission.hard, in_turn, preempts)

    def start(self, vm_state: VmState) -> int:
        """Return the base state of a new instance in a vm_state."""
        return self.base_number[self._initial(vm_state)]

    def _initial(self, vm_state: VmState) -> Foreseen:
        return self.canonical(Foreseen(vm_state, (), launched=vm_state is not VmState.BUILDING))

    # ------------------------------------------------------------------------------------------------------- tasks

    def phases(self, operation: Operation, *, hard: bool) -> tuple[str, ...]:
        """Return the distinct phases of one variant of an operation."""
        soft, harder = self._phases[operation]
        return harder if hard and harder else soft

    def first_task(self, kind: RequestKind) -> int:
        return self.task_number[Task(kind.operation, self.phases(kind.operation, hard=kind.hard)[0])]

    def next_task(self, number: int) -> int:
        """Return the next task, or 0 after the last."""
        task = self.tasks[number - 1]
        for phases in self._phases[task.operation]:
            if task.phase in phases[:-1]:
                return self.task_number[Task(task.operation, phases[phases.index(task.phase) + 1])]
        return 0

    def task_of(self, operation: Operation, phase: str) -> int:
        """Return the task that represents a phase: the last distinct phase at or before it."""
        entry = CATALOGUE[operation]
        soft, hard = self._phases[operation]
        if phase in entry.phases:
            written, distinct = entry.phases, soft
        else:
            written, distinct = entry.hard_phases, hard
            if not hard:  # The hard phases match the soft ones one to one.
                alike = _starts_of_classes(self._live, written)
                return self.task_number[Task(operation, soft[sum(written.index(phase) >= one for one in alike) - 1])]
        known = [each for each in written[: written.index(phase) + 1] if each in distinct]
        return self.task_number[Task(operation, known[-1])]

    # -------------------------------------------------------------------------------------------------------- ages

    def _ages_of_task(self, task: Task) -> Ages:
        entry = CATALOGUE[task.operation]
        return self._ages([task.phase], entry.phases + entry.hard_phases)

    def _ages(self, silent_in: Iterable[str], running_in: Iterable[str]) -> Ages:
        """Return the age bounds. Silence restarts with each phase; running time spans all phases."""
        silent: set[int] = set()
        running: set[int] = set()
        for rule in self._live.rules:
            if rule.operations.isdisjoint(self.operations):
                continue
            if _names_phase(rule, silent_in):
                silent.update(_silences(rule))
            if _names_phase(rule, running_in) and rule.measured_from is MeasuredFrom.TASK_STARTED:
                running.update([rule.threshold_ms or 0])
        return Ages(tuple(sorted(silent - {0})), tuple(sorted(running - {0})))

    # ------------------------------------------------------------------------------------------------- base states

    def canonical(self, base: Foreseen) -> Foreseen:
        """Return the representative of all base states that no decision distinguishes from this one."""
        launched = base.launched or base.vm_state in EXECUTING_STATES or not self._sees_launch
        return Foreseen(base.vm_state, base.memory, launched)

    def permitted(self, kind: RequestKind, base: Foreseen) -> bool:
        """Return whether the policy permits a kind in a base state with nothing outstanding."""
        return permits(judge_in(self.policy, request_of(kind), base))

    def fails_to(self, operation: Operation, base: Foreseen) -> Foreseen:
        state = CATALOGUE[operation].on_failure or base.vm_state
        return self._move_to(state, base)

    def after(self, operation: Operation, base: Foreseen) -> Foreseen:
        return self.canonical(base.after(operation))

    def guest_ends(self, base: Foreseen, state: VmState) -> Foreseen:
        """Return the base state after the guest has ended."""
        there = base._replace(memory=without_guest(base.vm_state, base.memory))
        return self._move_to(state if base.vm_state in LEFT_AT_END else base.vm_state, there)

    def reset(self, base: Foreseen, target: VmState) -> Foreseen:
        return self._move_to(target, base)

    def _move_to(self, state: VmState, base: Foreseen) -> Foreseen:
        return self.canonical(Foreseen(state, remembered_in(state, base.memory), base.launched))

    def _reachable(self, pending: list[Foreseen]) -> Iterator[Foreseen]:
        known = dict.fromkeys(pending)
        for base in pending:
            yield base
            there = [self.guest_ends(base, state) for state in _GUEST_ENDS]
            for kind in (kind for kind in self.kinds if not kind.is_component):
                there += [self.after(kind.operation, base), self.fails_to(kind.operation, base)]
            there += [
                self.reset(base, submission.target) for submission in self.submissions if submission.target is not None
            ]
            for each in there:
                if each not in known:
                    known[each] = None
                    pending.append(each)


def request_of(kind: RequestKind) -> Request:
    """Return a request of a kind as the core knows it."""
    return Request(
        id="",
        instance_id=PACKED_ID,
        operation=kind.operation,
        parameters={"hard": True} if kind.hard else {},
        rule=PACKED_ID,
        admitted_at_ms=0,
        in_turn=kind.in_turn,
        preempts=kind.preempts,
        **{"requested_by": UNNAMED, **dict(kind.caller)},
    )


EXPLORED = frozenset({"outstanding", "locked", "launched", "hard", "silent_ms"})
"""What varies in a search, by field of the view; besides, who asks, except for the role."""


def can_hold(rule: Rule, role: str) -> bool:
    """Return whether a rule can hold for callers of the role; what a search does not vary is as usual."""
    for condition in CONDITIONS:
        wanted = condition.of(rule)
        if wanted is None or condition.reads in EXPLORED:
            continue
        if condition.reads == "role":
            value = role
        elif condition.subject is Subject.CALLER:
            continue
        else:
            value = condition.usual
        if not condition.kind.test(wanted)(value):
            return False
    return True


def _names_phase(rule: Rule, phases: Iterable[str]) -> bool:
    return rule.task_states is None or not rule.task_states.isdisjoint(phases)


def _silences(rule: Rule) -> Iterator[int]:
    if rule.silent_ms_min is not None:
        yield rule.silent_ms_min
    if rule.threshold_ms is not None and rule.measured_from is MeasuredFrom.LAST_PROGRESS:
        yield rule.threshold_ms


def _starts_of_classes(policy: CompiledPolicy, phases: tuple[str, ...]) -> list[int]:
    """Return the indexes of phases that some rule distinguishes from the one before."""
    marks = [[phase in rule.task_states for rule in policy.rules if rule.task_states is not None] for phase in phases]
    return [number for number in range(len(phases)) if not number or marks[number] != marks[number - 1]]
