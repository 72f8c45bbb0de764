"""Reference model checker: breadth-first search over the core's own records. Slow; checks the packed search.

The search is breadth first, so that the first counterexample of a violation is the shortest. States are equal if no
decision can distinguish them: ids and absolute times are dropped, ages are reduced to classes, and symmetric operations
and phases are tried once. `laws` checks each transition.

Workers may report, hang, crash or report late; guests may act; time may pass. Law 5 assumes the worst: from every state
the instance can be deleted although no worker but that of the deletion ever reports again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, Final

import msgspec

from interlock.core import admission, evaluation, lifecycle
from interlock.core.conditions import CALLER
from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import (
    SERVED,
    Admitted,
    Change,
    Denied,
    GuestEvent,
    Instance,
    Outcome,
    Redundant,
    Request,
    Status,
    Submission,
)
from interlock.core.state_stack import ARRIVES
from interlock.core.states import VmState
from interlock.core.view_classes import callers
from interlock.policies.model_checker.results import Breach, Exploration, Violation, describe
from interlock.policies.model_checker.symmetry_reduction import distinct_operations, distinct_phases
from model_checker_reference.ages import Ages
from model_checker_reference.laws import Step, StepKind, check, explained, one_copy

START_MS: Final = 1_000_000_000
DEFAULT_STATES_MAX: Final = 200_000

_NO_PROGRESS: Final = frozenset({entry.operation for entry in CATALOGUE.values() if entry.lane is Lane.RECORD}) - {
    Operation.UNLOCK,
    Operation.RESET_STATE,
}
"""Operations whose admission does not unblock a hung instance."""
_CLOCK_BACK_MS: Final = 3_600_000
_encode = msgspec.json.Encoder().encode
_GUEST_EVENTS: Final = (GuestEvent.STOPPED, GuestEvent.RESET, GuestEvent.CRASHED, GuestEvent.VANISHED)
"""The guest events that are explored; an unresponsive guest changes no decision."""
_Key = tuple[Any, ...]


class _Node(msgspec.Struct, frozen=True):
    """One state: a representative instance, and the step that first led to it."""

    instance: Instance
    now_ms: int
    admitted: int
    parent: int
    event: dict[str, Any]


def explore(
    policy: CompiledPolicy,
    *,
    operations: Iterable[Operation] | None = None,
    starts: Iterable[VmState] = (VmState.BUILDING,),
    outstanding_max: int = 3,
    states_max: int = DEFAULT_STATES_MAX,
    seconds_max: float | None = None,
    goal: VmState = VmState.DELETED,
) -> Exploration:
    """Search from `starts` with `operations` (None: all) submitted by all callers, up to `outstanding_max` outstanding.

    One operation that leads to `goal` may exceed that bound, since it must always be admissible.
    """
    started = time.monotonic()
    search = Walk(policy, operations, outstanding_max, states_max, goal)
    search.run(starts, math.inf if seconds_max is None else started + seconds_max)
    return search.result(time.monotonic() - started)


class Walk:
    """The states found so far, and the transitions between them."""

    def __init__(
        self,
        policy: CompiledPolicy,
        operations: Iterable[Operation] | None,
        outstanding_max: int,
        states_max: int,
        goal: VmState,
    ) -> None:
        self.policy = policy
        self.operations = distinct_operations(policy, Operation if operations is None else operations)
        self.outstanding_max = outstanding_max
        self.states_max = states_max
        self.goal = goal
        self.ages = Ages(policy, self.operations)
        self.phases = {operation: distinct_phases(policy, CATALOGUE[operation]) for operation in Operation}
        self.submissions = [
            (operation, given, caller)
            for operation in self.operations
            for given in self._variants(operation)
            for caller in callers([rule for rule in policy.rules if operation in rule.operations])
        ]
        self.nodes: list[_Node] = []
        self.found: dict[_Key, int] = {}
        self.unaided: list[list[int]] = []
        """For each state, its predecessors over transitions that need no report of another worker."""
        self.open_ends: set[int] = set()
        """The states with a transition past the bound of states."""
        self.violations: dict[tuple[int, str], Violation] = {}
        self.transitions = 0
        self.expanded = 0

    def _variants(self, operation: Operation) -> tuple[dict[str, Any], ...]:
        if operation is Operation.RESET_STATE:
            return ({}, {"vm_state": VmState.ACTIVE.value})
        hard = self.phases[operation][1]
        distinguished = any(rule.hard is not None and operation in rule.operations for rule in self.policy.rules)
        return ({}, {"hard": True}) if distinguished or hard else ({},)

    def run(self, starts: Iterable[VmState], until_s: float) -> None:
        for vm_state in starts:
            instance = Instance(
                id="i",
                name="i",
                project="p",
                host="h",
                vm_state=vm_state,
                updated_at_ms=START_MS,
                launched_at_ms=None if vm_state is VmState.BUILDING else START_MS,
                fence=1,
            )
            event = {"instance": {"vm_state": vm_state.value, "role": "member"}}
            self._add(_Node(instance, START_MS, 0, -1, event))
        while self.expanded < len(self.nodes) and time.monotonic() < until_s:
            self._expand(self.expanded)
            self.expanded += 1
        self.open_ends.update(range(self.expanded, len(self.nodes)))
        for index, breach in self.stuck():
            self._report(index, None, breach)

    def _expand(self, index: int) -> None:
        node = self.nodes[index]
        # Once an operation that leads to the goal is queued, nothing else has to be admitted: liveness is checked last.
        hopeful = self._submit_all(index, node) or any(
            CATALOGUE[request.operation].to is self.goal and request.status is Status.QUEUED
            for request in node.instance.outstanding
        )
        if not hopeful and node.instance.vm_state is not self.goal:
            self._report(index, None, Breach(5, f"nothing is ever admitted in {describe(node.instance)}"))
        for step, change in self._other_transitions(node):
            self.transitions += 1
            self._follow(index, node, step, change, node.now_ms)
        later_ms = self._next_moment_ms(node)
        if later_ms is not None:
            self.transitions += 1
            event = {"advance": _duration(later_ms - node.now_ms)}
            change = lifecycle.expire(node.instance, self.policy, later_ms)
            kind = StepKind.ADVANCE if change.instance is node.instance else StepKind.EXPIRE
            self._follow(index, node, Step(kind=kind, event=event), change, later_ms)

    def _submit_all(self, index: int, node: _Node) -> bool:
        """Try every submission. Return whether any is admitted now or at the time that its denial names."""
        hopeful = False
        for operation, parameters, caller in self.submissions:
            submission = self._submission(node, operation, parameters, caller)
            change = admission.admit_there(node.instance, submission, self.policy, node.now_ms)
            self.transitions += 1
            step = Step(kind=StepKind.SUBMIT, event=_submit_event(operation, parameters, caller))
            for breach in (
                *explained(node.instance, change),
                *one_copy(change, submission.host_reachable),
                *self.hastened(node, submission, change),
                *self.answered_otherwise(node, submission),
            ):
                self._report(index, step, breach)
            match change.answer:
                case Admitted():
                    hopeful = hopeful or operation not in _NO_PROGRESS
                    if self._within_bound(change.instance, operation):
                        self._follow(index, node, step, change, node.now_ms)
                case Denied(allowed_at_ms=int(at_ms)) | Redundant(allowed_at_ms=int(at_ms)):
                    hopeful = self._retry_time_holds(index, node, submission, step, at_ms) or hopeful
                case _:
                    pass
        return hopeful

    def hastened(self, node: _Node, submission: Submission, change: Change[Any]) -> Iterator[Breach]:
        """Law 6: what is refused until a time takes nothing over because the clock went back."""
        answer = change.answer
        if isinstance(answer, Denied | Redundant) and answer.allowed_at_ms is not None:
            back = admission.judge(node.instance, submission, self.policy, node.now_ms - _CLOCK_BACK_MS)
            if isinstance(back, Admitted) and back.supersedes:
                yield Breach(6, f"{submission.operation.value} takes over because the clock went back")

    def answered_otherwise(self, node: _Node, submission: Submission) -> Iterator[Breach]:
        """Law 8: the quick answer, from which retry times are computed, is that of the gate."""
        quick = evaluation.would_admit(node.instance, submission, self.policy, node.now_ms)
        answer = admission.judge(node.instance, submission, self.policy, node.now_ms)
        if quick != isinstance(answer, Admitted):
            yield Breach(8, f"whether {submission.operation.value} is admitted is answered in two ways")

    def _submission(
        self, node: _Node, operation: Operation, parameters: dict[str, Any], caller: dict[str, Any]
    ) -> Submission:
        return Submission(
            request_id=f"r{node.admitted + 1}",
            operation=operation,
            parameters=parameters,
            **{"requested_by": "someone", **caller},
        )

    def _within_bound(self, instance: Instance, operation: Operation) -> bool:
        on_top = 1 if CATALOGUE[operation].to is self.goal else 0
        return len(instance.outstanding) <= self.outstanding_max + on_top

    def _retry_time_holds(self, index: int, node: _Node, submission: Submission, step: Step, at_ms: int) -> bool:
        """Return whether a submission is admitted at the time that its denial names; report if not, or if earlier."""
        states = (node.instance, self._later(node.instance, at_ms))
        answers = [admission.judge(instance, submission, self.policy, at_ms) for instance in states]
        then = any(isinstance(answer, Admitted) for answer in answers)
        early = admission.judge(node.instance, submission, self.policy, at_ms - 1)
        name = submission.operation.value
        if not then:
            self._report(index, step, Breach(5, f"{name} is not admitted at the retry time of its denial"))
        elif isinstance(early, Admitted):
            self._report(index, step, Breach(8, f"{name} is admitted before the retry time of its denial"))
        return then

    def _later(self, instance: Instance, at_ms: int) -> Instance:
        """Return the instance at a time, if nothing happens until then but what is due."""
        while (due_ms := lifecycle.next_deadline_ms(instance)) is not None and due_ms <= at_ms:
            instance = lifecycle.expire(instance, self.policy, due_ms).instance
        return instance

    def _other_transitions(self, node: _Node) -> Iterator[tuple[Step, Change[Any]]]:
        """Yield every transition but submissions and the passage of time."""
        instance, policy, now_ms = node.instance, self.policy, node.now_ms
        for lane in (Lane.STATE, Lane.COMPONENT):
            yield Step(kind=StepKind.TAKE, event={"take": lane.value}), lifecycle.take(instance, lane, now_ms)
        for request in instance.outstanding:
            if request.status in SERVED:
                yield from self._reports(node, request)
            step = Step(kind=StepKind.CANCEL, event={"cancel": request.id}, request=request)
            yield step, lifecycle.cancel(instance, request.id, policy, "someone", now_ms)
        for guest in _GUEST_EVENTS:
            step = Step(kind=StepKind.OBSERVE, event={"observe": guest.value})
            yield step, lifecycle.observe(instance, guest, policy, now_ms)
        yield Step(kind=StepKind.ADOPT, event={"adopt": True}), lifecycle.adopt(instance, now_ms)

    def _reports(self, node: _Node, request: Request) -> Iterator[tuple[Step, Change[Any]]]:
        instance, now_ms = node.instance, node.now_ms
        for phase in self._next_phases(request):
            event: dict[str, Any] = {"progress": request.id}
            if phase is not None:
                event["phase"] = phase
            step = Step(kind=StepKind.PROGRESS, event=event, request=request)
            yield step, lifecycle.progress(instance, request.id, request.fence, now_ms, phase=phase)
        for outcome in Outcome:
            event = {"finish": request.operation.value, "outcome": outcome.value}
            step = Step(kind=StepKind.FINISH, event=event, request=request, outcome=outcome)
            yield step, lifecycle.finish(instance, request.id, request.fence, outcome, self.policy, now_ms)
        if request.operation in ARRIVES:
            outcome = Outcome.SUCCEEDED
            event = {"finish": request.operation.value, "outcome": outcome.value, "arrived": True}
            step = Step(kind=StepKind.FINISH, event=event, request=request, outcome=outcome, arrived=True)
            yield (
                step,
                lifecycle.finish(instance, request.id, request.fence, outcome, self.policy, now_ms, arrived=True),
            )

    def _next_phases(self, request: Request) -> tuple[str | None, ...]:
        soft, hard = self.phases[request.operation]
        phases = hard if request.hard and hard else soft
        if request.phase not in phases:
            return (None,)
        return (None, *phases[phases.index(request.phase) + 1 :][:1])

    def _next_moment_ms(self, node: _Node) -> int | None:
        """Return when an age bound or a deadline is next passed, if nothing else happens."""
        moments = list(self.ages.moments_ms(node.instance, node.now_ms))
        deadline_ms = lifecycle.next_deadline_ms(node.instance)
        if deadline_ms is not None:
            moments.append(deadline_ms)
        return min((moment for moment in moments if moment > node.now_ms), default=None)

    def _follow(self, index: int, node: _Node, step: Step, change: Change[Any], now_ms: int) -> None:
        """Check a transition against the laws, and record its target state."""
        if change.instance is node.instance and now_ms == node.now_ms and not change.events:
            return
        for breach in check(node.instance, change, step, self.policy, now_ms):
            self._report(index, step, breach)
        admitted = node.admitted + (1 if isinstance(change.answer, Admitted) else 0)
        target = self._add(_Node(change.instance, now_ms, admitted, index, step.event))
        if target is None:
            self.open_ends.add(index)
        elif target != index and self._is_unaided(step):
            self.unaided[target].append(index)

    def _is_unaided(self, step: Step) -> bool:
        if step.kind in {StepKind.SUBMIT, StepKind.TAKE, StepKind.ADVANCE, StepKind.EXPIRE}:
            return True
        leads_there = step.request is not None and CATALOGUE[step.request.operation].to is self.goal
        return leads_there and step.outcome is Outcome.SUCCEEDED and not step.arrived

    def _add(self, node: _Node) -> int | None:
        key = self._key(node)
        known = self.found.get(key)
        if known is not None:
            return known
        if len(self.nodes) >= self.states_max:
            return None
        self.found[key] = len(self.nodes)
        self.nodes.append(node)
        self.unaided.append([])
        return len(self.nodes) - 1

    def _key(self, node: _Node) -> _Key:
        instance = node.instance
        return (
            instance.vm_state,
            instance.state_stack,
            instance.locked_by is None,
            instance.launched,
            self.ages.idle_class(instance, node.now_ms),
            tuple(self._request_key(instance, request, node.now_ms) for request in instance.outstanding),
        )

    def _request_key(self, instance: Instance, request: Request, now_ms: int) -> _Key:
        deadline_ms = request.interrupt_deadline_ms
        return (
            request.operation,
            request.status,
            request.phase,
            (request.hard, request.preempts, request.in_turn),
            tuple(getattr(request, condition.reads) for condition in CALLER),
            self.ages.served_class(instance, request, now_ms),
            (request.interrupt_at_ms is None, request.interrupted_for is None),
            None if deadline_ms is None else deadline_ms <= now_ms,
        )

    def stuck(self) -> Iterator[tuple[int, Breach]]:
        """Check law 5: search backwards from the goal over transitions that need no other worker."""
        safe = {index for index, node in enumerate(self.nodes) if node.instance.vm_state is self.goal}
        # States past the bound were not explored and do not count as violations.
        safe |= self.open_ends
        pending = list(safe)
        while pending:
            for origin in self.unaided[pending.pop()]:
                if origin not in safe:
                    safe.add(origin)
                    pending.append(origin)
        for index, node in enumerate(self.nodes):
            if index not in safe:
                what = f"{self.goal.value} cannot be reached from {describe(node.instance)} without its worker's help"
                yield index, Breach(5, what)

    def _report(self, index: int, step: Step | None, breach: Breach) -> None:
        key = (breach.law, breach.what)
        if key in self.violations:
            return
        story = [] if step is None else [step.event]
        while index >= 0:
            story.append(self.nodes[index].event)
            index = self.nodes[index].parent
        lines = tuple(_encode(event).decode() for event in reversed(story))
        self.violations[key] = Violation(law=breach.law, what=breach.what, story=lines)

    def result(self, seconds: float) -> Exploration:
        return Exploration(
            states=len(self.nodes),
            transitions=self.transitions,
            complete=not self.open_ends,
            operations=self.operations,
            outstanding_max=self.outstanding_max,
            violations=tuple(sorted(self.violations.values(), key=lambda violation: len(violation.story))),
            seconds=seconds,
        )


def _submit_event(operation: Operation, parameters: dict[str, Any], caller: dict[str, Any]) -> dict[str, Any]:
    event: dict[str, Any] = {"submit": operation.value, **caller}
    if parameters:
        event["parameters"] = parameters
    return event


def _duration(milliseconds: int) -> str:
    return f"{milliseconds // 1000}s" if milliseconds % 1000 == 0 else f"{milliseconds}ms"
