"""The alphabet of one search: numbers of submissions, request kinds, tasks, base states and age classes.

Numbers of kinds, tasks and components start at 1; 0 means none.

* A *caller* stands for all callers that the rules about an operation do not distinguish. Callers of every role submit.
* A *kind* is a queued request: operation, caller, hard or soft, judged on the foreseen state or not, preempting or not.
  Its caller stands for all that the rules on a settled instance do not distinguish, since no other rule judges it.
* A *task* is the state change in service: a class of phases that the policy does not distinguish. A *component* is the
  operation of the component change in service.
* A *base state* is a vm_state, its stack of past vm_states, whether the instance was ever launched, whether its host is
  reachable, and its tags, each as far as rules distinguish them.
* An *age class* is an interval of ages in which every rule answers the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import inf
from typing import Any, Final, NamedTuple

from interlock.core.conditions import CALLER, CONDITIONS, Subject
from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.policy import CompiledPolicy, MeasuredFrom, Policy, Rule, Verdict
from interlock.core.records import Request, Submission
from interlock.core.request_queue import judge_in, permits
from interlock.core.roles import Role
from interlock.core.state_stack import remembered_in, without_guest
from interlock.core.states import EXECUTING_STATES, LEFT_AT_END, NO_TASK, VmState
from interlock.core.view_classes import callers, members_of
from interlock.core.views import Foreseen
from interlock.policies.model_checker.results import check_time
from interlock.policies.model_checker.symmetry_reduction import distinct_operations, distinct_phases

VM_STATES = tuple(VmState)
PACKED_ID = "packed"
"""The ids of what stands for many requests or instances."""
UNNAMED = "someone"
"""Who asks, where no rule looks at the name."""
RESET_TARGETS = (VmState.ERROR, VmState.ACTIVE)
"""The targets of `reset_state` that are explored."""
_WAYS_OUT: Final = frozenset({Operation.DELETE, Operation.FORCE_DELETE, Operation.RESET_STATE})
_HELD_ALIKE: Final = 2
"""How many operations are held of those that the rules on held requests do not distinguish."""
TAGS_MAX: Final = 7
"""How many tags are set and removed at most."""
_FEW_TAGS: Final = 3
_TOGETHER: Final = 2
"""How many tags an instance has at most where rules name more than `_FEW_TAGS`."""
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

    def submission(self, request_id: str, *, host_reachable: bool = True) -> Submission:
        """Return it as the core knows it."""
        caller = {"requested_by": UNNAMED, **dict(self.caller)}
        return Submission(
            request_id=request_id,
            operation=self.operation,
            parameters=self.parameters,
            host_reachable=host_reachable,
            **caller,
        )


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
        self, policy: CompiledPolicy, operations: Iterable[Operation], starts: Iterable[VmState], until_s: float = inf
    ) -> None:
        self.policy = policy
        self.until_s = until_s  # of the monotonic clock; past it, what goes on raises `OutOfTime`
        rules = tuple(rule for rule in policy.rules if can_hold(rule))
        self._live = CompiledPolicy(Policy(name="alive", rules=rules))
        """The rules that can hold in this search."""
        tried = tuple(operations)
        about_them = [rule for rule in rules if not rule.operations.isdisjoint(tried)]
        self.sees_host = any(rule.host_reachable is not None for rule in about_them)
        """Whether the host is lost and comes back."""
        self.named_tags = tuple(map(str, members_of("tags", about_them)))
        self.tags = self.named_tags[:TAGS_MAX]
        """The tags that are set and removed."""
        self.tags_together = len(self.tags) if len(self.tags) <= _FEW_TAGS else _TOGETHER
        """How many of them an instance has at most."""
        self.operations = distinct_operations(self._live, tried, hosts_vary=self.sees_host)
        self.rules_on_holds = tuple(rule for rule in about_them if rule.held is not None)
        self.idle_rules_on_holds = tuple(rule for rule in self.rules_on_holds if self._refuses_beside(rule))
        """Those that only refuse operations which no way to delete needs: they are not explored."""
        self.lock_levels = self._lock_levels(rules)
        self._callers = {operation: self._distinct_callers(operation, rules) for operation in Operation}
        settled = [rule for rule in rules if _holds_settled(rule)]
        self._waiting_callers = {
            operation: _representatives(known, _about(operation, settled)) for operation, known in self._callers.items()
        }
        """For each operation and caller, the caller of the queued request."""
        self._phases = {entry.operation: distinct_phases(self._live, entry) for entry in CATALOGUE.values()}
        self.submissions = tuple(
            submission for operation in self.operations for submission in self._submissions(operation)
        )
        self.held = self._held_submissions()
        """The numbers of the submissions that are held, one at a time."""
        kinds = list(dict.fromkeys(kind for submission in self.submissions for kind in self._kinds(submission)))
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
        """Return the caller that stands for a queued request's."""
        rules = _about(request.operation, self._live.rules)
        known = self._callers[request.operation]
        own = self._answers(rules, {one.reads: getattr(request, one.reads) for one in CALLER})
        caller = next(caller for caller in known if self._answers(rules, dict(caller)) == own)
        return self._waiting_callers[request.operation][caller]

    def roles_of(self, submission: SubmissionKind) -> frozenset[Role]:
        """Return the roles of the callers that a submission's caller stands for."""
        rules = _about(submission.operation, self._live.rules)
        own = dict(submission.caller)
        answers = self._answers(rules, own)
        return frozenset(role for role in Role if self._answers(rules, {**own, "role": role}) == answers)

    def _lock_levels(self, rules: Iterable[Rule]) -> tuple[Role, ...]:
        """Return the roles with which an instance is locked, the least first.

        It is the least alone where every rule about a lock above the caller's role denies: then a lock with a higher
        role leaves callers with less, and those with that role with as much.
        """
        about = _about(Operation.LOCK, rules)
        lock = [caller["role"] for caller in callers(about) if not _always_refused(Operation.LOCK, caller, rules)]
        above = [rule for rule in rules if rule.locked_above is not None]
        self.locks_by_least = any(above) and all(
            rule.locked_above is True and rule.verdict is Verdict.DENY for rule in above
        )
        levels = tuple(role for role in Role if role in lock)
        return levels if above and not self.locks_by_least else levels[:1]

    def lock_level(self, role: Role) -> int:
        """Return the number of the highest level that a role includes; 0 if it includes none."""
        return sum(role.includes(level) for level in self.lock_levels)

    def _distinct_callers(self, operation: Operation, rules: Iterable[Rule]) -> tuple[Caller, ...]:
        """Return one caller of each class that the rules about an operation distinguish, the most ordinary first."""
        about = _about(operation, rules)
        found: dict[tuple[bool, ...], Caller] = {}
        for role in (Role.MEMBER, *(role for role in reversed(Role) if role is not Role.MEMBER)):
            for caller in callers(about, role=role):
                found.setdefault(self._answers(about, caller), tuple(caller.items()))
        return tuple(found.values())

    def _answers(self, rules: list[Rule], values: Mapping[str, Any]) -> tuple[bool, ...]:
        """Return how the conditions that depend on the caller answer for one."""
        above = any(rule.locked_above is not None for rule in rules)
        levels = [values["role"].includes(level) for level in self.lock_levels] if above else []
        return (*_answers(rules, values), *levels)

    def _submissions(self, operation: Operation) -> Iterator[SubmissionKind]:
        for caller in self._callers[operation]:
            if _always_refused(operation, dict(caller), self._live.rules):
                continue
            if operation is Operation.RESET_STATE:
                yield from (SubmissionKind(operation, caller, hard=False, target=target) for target in RESET_TARGETS)
                continue
            yield SubmissionKind(operation, caller, hard=False)
            seen = any(rule.hard is not None and operation in rule.operations for rule in self._live.rules)
            if seen or self._phases[operation][1]:
                yield SubmissionKind(operation, caller, hard=True)

    def _refuses_beside(self, rule: Rule) -> bool:
        """Return whether a rule on held requests can only refuse, and decides no deletion and no `reset_state`."""
        if not rule.held or rule.verdict not in {Verdict.DENY, Verdict.REDUNDANT}:
            return False
        tasks = [NO_TASK, *(phase for entry in CATALOGUE.values() for phase in entry.phases + entry.hard_phases)]
        needed = rule.operations & _WAYS_OUT
        places = ((operation, state, task) for operation in needed for state in VmState for task in tasks)
        return not any(one.id == rule.id for place in places for one in self._live.cell(*place))

    def _held_submissions(self) -> tuple[int, ...]:
        """Return submissions to hold: a few of each class that the rules on held requests do not distinguish."""
        rules = [rule for rule in self.rules_on_holds if rule not in self.idle_rules_on_holds]
        found: dict[tuple[bool, ...], list[int]] = {}
        for number, submission in enumerate(self.submissions):
            operation = submission.operation
            alike = found.setdefault(tuple(operation in (rule.held or ()) for rule in rules), [])
            known = {self.submissions[one].operation for one in alike}
            if CATALOGUE[operation].lane is Lane.STATE and operation not in known and len(known) < _HELD_ALIKE:
                alike.append(number)
        return tuple(number for named, alike in found.items() if any(named) for number in alike)

    def _kinds(self, submission: SubmissionKind) -> Iterator[RequestKind]:
        """Yield every kind of request that the policy can admit a submission as."""
        rules = _deciding(submission.operation, dict(submission.caller), self._live.rules)
        admitting = {Verdict.ADMIT: False, Verdict.AFTER: True, Verdict.PREEMPT: True}
        ways = {(rule.in_turn, admitting[rule.verdict]) for rule in rules if rule.verdict in admitting}
        for in_turn, preempts in sorted(ways):
            yield self.kind(submission, in_turn=in_turn, preempts=preempts)

    def kind(self, submission: SubmissionKind, *, in_turn: bool, preempts: bool) -> RequestKind:
        """Return the kind of request that a submission becomes."""
        caller = self._waiting_callers[submission.operation][submission.caller]
        return RequestKind(submission.operation, caller, submission.hard, in_turn, preempts)

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
        reachable = base.host_reachable or not self.sees_host
        tags = tuple(tag for tag in self.tags if tag in base.tags)
        return Foreseen(base.vm_state, base.memory, launched, reachable, tags)

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

    def with_host(self, base: Foreseen, *, reachable: bool) -> Foreseen:
        return self.canonical(base._replace(host_reachable=reachable))

    def relabelled(self, base: Foreseen, tag: str) -> Foreseen:
        """Return the base state after a tag was removed, or set if the instance may have one more."""
        tags = {*base.tags} ^ {tag}
        return base if len(tags) > self.tags_together else self.canonical(base._replace(tags=tuple(tags)))

    def reset(self, base: Foreseen, target: VmState) -> Foreseen:
        return self._move_to(target, base)

    def _move_to(self, state: VmState, base: Foreseen) -> Foreseen:
        return self.canonical(base._replace(vm_state=state, memory=remembered_in(state, base.memory)))

    def _reachable(self, pending: list[Foreseen]) -> Iterator[Foreseen]:
        known = dict.fromkeys(pending)
        changes = list(dict.fromkeys(kind.operation for kind in self.kinds if not kind.is_component))
        for base in pending:
            check_time(self.until_s)
            yield base
            there = [self.guest_ends(base, state) for state in _GUEST_ENDS]
            there += [self.with_host(base, reachable=reachable) for reachable in (True, False)]
            there += [self.relabelled(base, tag) for tag in self.tags]
            for operation in changes:
                there += [self.after(operation, base), self.fails_to(operation, base)]
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


EXPLORED: Final = frozenset(
    {
        "outstanding",
        "locked",
        "launched",
        "hard",
        "silent_ms",
        "running_ms",
        "host_reachable",
        "tags",
        "locked_above",
        "held",
    }
)
"""What varies in a search, by field of the view; besides, who asks."""


def can_hold(rule: Rule) -> bool:
    """Return whether a rule can hold; what a search does not vary is as usual."""
    return all(
        condition.kind.test(wanted)(condition.usual)
        for condition in CONDITIONS
        if (wanted := condition.of(rule)) is not None
        and condition.reads not in EXPLORED
        and condition.subject is not Subject.CALLER
    )


_SETTLED: Final = frozenset({"outstanding", "held", "locked", "locked_above", "blocked", "silent_ms"})
"""The fields of a view that are as usual in `settled_view`, on which queued requests are judged."""


def _holds_settled(rule: Rule) -> bool:
    """Return whether a rule can hold for a queued request."""
    if rule.task_states is not None and NO_TASK not in rule.task_states:
        return False
    return all(
        condition.kind.test(wanted)(condition.usual)
        for condition in CONDITIONS
        if condition.reads in _SETTLED and (wanted := condition.of(rule)) is not None
    )


def _about(operation: Operation, rules: Iterable[Rule]) -> list[Rule]:
    return [rule for rule in rules if operation in rule.operations]


def _representatives(known: tuple[Caller, ...], rules: list[Rule]) -> dict[Caller, Caller]:
    """Return for each caller the first one that the rules do not distinguish from it."""
    first: dict[tuple[bool, ...], Caller] = {}
    return {caller: first.setdefault(_answers(rules, dict(caller)), caller) for caller in known}


def _always_refused(operation: Operation, caller: Mapping[str, Any], rules: Iterable[Rule]) -> bool:
    """Return whether a caller's submissions are refused with a reason whatever the state."""
    deciding = _deciding(operation, caller, rules)
    return all(rule.verdict is Verdict.DENY and rule.id and rule.code for rule in deciding)


def _deciding(operation: Operation, caller: Mapping[str, Any], rules: Iterable[Rule]) -> list[Rule]:
    """Return the rules that may decide a caller's submissions: those up to the first without further conditions."""
    found = []
    for rule in _about(operation, rules):
        if all(_answers([rule], caller)):
            found.append(rule)
            others = [one for one in CONDITIONS if one.subject is not Subject.CALLER and one.of(rule) is not None]
            if not others and rule.vm_states is None and rule.task_states is None:
                break
    return found


def _answers(rules: list[Rule], values: Mapping[str, Any]) -> tuple[bool, ...]:
    """Return for each rule with conditions on the caller whether all of them hold for one."""
    return tuple(all(one) for rule in rules if (one := _caller_conditions(rule, values)))


def _caller_conditions(rule: Rule, values: Mapping[str, Any]) -> list[bool]:
    return [
        bool(condition.kind.test(wanted)(values[condition.reads]))
        for condition in CALLER
        if (wanted := condition.of(rule)) is not None
    ]


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
