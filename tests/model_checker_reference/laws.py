"""The laws as invariants on one transition of the core, numbered as in the design.

Each check compares an instance before and after a step, and shares no code with the core beyond the catalogue and the
policy's lookup. `walk` enumerates the steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Any

import msgspec

from interlock.core import lifecycle
from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.policy import CompiledPolicy, Verdict
from interlock.core.records import (
    ENDS,
    SERVED,
    Admitted,
    Change,
    Denied,
    Instance,
    Outcome,
    Redundant,
    Request,
    StaleFence,
    Status,
)
from interlock.core.states import EXECUTING_STATES, Target, VmState
from interlock.core.views import Foreseen
from interlock.policies.model_checker.results import Breach


class StepKind(StrEnum):
    """What can happen to an instance."""

    SUBMIT = "submit"
    TAKE = "take"
    PROGRESS = "progress"
    FINISH = "finish"
    ADOPT = "adopt"
    OBSERVE = "observe"
    CANCEL = "cancel"
    ADVANCE = "advance"
    EXPIRE = "expire"


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened, as a call of the core and as an event of `interlock rehearse`."""

    kind: StepKind
    event: dict[str, Any]
    request: Request | None = None
    """The request that progresses, is finished or is cancelled."""
    outcome: Outcome | None = None
    arrived: bool = False
    """Whether the worker reports that the instance has moved to another host; see `ARRIVES`."""


def check(before: Instance, change: Change[Any], step: Step, policy: CompiledPolicy, now_ms: int) -> Iterator[Breach]:
    """Yield every law that this step violated."""
    after = change.instance
    yield from one_at_a_time(after)
    yield from one_end(before, change)
    yield from kept_promise(before, change, step, policy)
    yield from held_fence(before, change, step, policy, now_ms)
    yield from settled_success(before, after, step)
    yield from served_in_turn(before, change, step)
    yield from written(before, change)
    yield from unknown_waits(before, change.instance, step)


def one_at_a_time(after: Instance) -> Iterator[Breach]:
    """Law 1: at most one request is served per lane, under the instance's fence, ahead of queued requests."""
    served = [request for request in after.outstanding if request.status in SERVED]
    lanes = [request.lane for request in served]
    for lane in Lane:
        if lanes.count(lane) > 1:
            yield Breach(1, f"two requests are served in the lane {lane.value}")
    for request in served:
        if request.fence != after.fence:
            yield Breach(1, f"{request.operation.value} is served under a fence that is not the instance's")
    state = next((request for request in served if request.lane is Lane.STATE), None)
    component = next((request for request in served if request.lane is Lane.COMPONENT), None)
    beside = CATALOGUE[component.operation].compatible_with if component else ()
    if state is not None and component is not None and state.operation not in beside:
        yield Breach(1, f"{component.operation.value} is served beside {state.operation.value}")
    if list(after.outstanding[: len(served)]) != served:
        yield Breach(1, "a queued request precedes one in service")


def one_end(before: Instance, change: Change[Any]) -> Iterator[Breach]:
    """Law 3: a request that is no longer outstanding has ended once, stored and with an event in the same change."""
    outstanding = {request.id for request in change.instance.outstanding}
    kept = {request.id: request for request in change.requests}
    ended = {request.id: request for request in change.requests if request.status in ENDS}
    told = [event for event in change.events if event.kind in _END_KINDS]
    if len(kept) != len(change.requests):
        yield Breach(3, "a request is stored twice in one change")
    for request in before.outstanding:
        if request.id not in outstanding and request.id not in ended:
            yield Breach(3, f"{request.operation.value} is gone without an end")
    for request in change.instance.outstanding:
        if request.status in ENDS or request.id in ended:
            yield Breach(3, f"{request.operation.value} has ended and is still outstanding")
    for request in ended.values():
        ends = [event.kind for event in told if event.request_id == request.id]
        if ends != [f"request.{request.status.value}"]:
            yield Breach(3, f"the end of {request.operation.value} has not exactly one event")
    if len(told) > len(ended):
        yield Breach(3, "an end has an event and was not stored")


_END_KINDS = frozenset(f"request.{status.value}" for status in ENDS)
_GOES_AS_FORESEEN = frozenset({StepKind.TAKE, StepKind.PROGRESS, StepKind.ADOPT, StepKind.ADVANCE})


def _around(before: Instance) -> set[tuple[VmState, bool]]:
    """Return the states, each with launched, in which a component change may be served.

    These are the present state, the foreseen state, and the target of the state change in service.
    """
    serving = before.served(Lane.STATE)
    all_of_it = [request for request in before.outstanding if request.lane is Lane.STATE]
    return {_after(before, ()), _after(before, all_of_it), _after(before, () if serving is None else (serving,))}


def _after(before: Instance, requests: Iterable[Request]) -> tuple[VmState, bool]:
    """Return the vm_state, and launched, after some requests have succeeded."""
    state, memory, launched = before.vm_state, _remembered(before), before.launched
    for request in requests:
        state, memory = _landing(request, state, memory)
        launched = launched or state in EXECUTING_STATES
    return state, launched


def kept_promise(before: Instance, change: Change[Any], step: Step, policy: CompiledPolicy) -> Iterator[Breach]:
    """Law 2: nothing is cancelled while all goes as foreseen, and a request is permitted when it is taken.

    A request admitted with `in_turn = false` may be cancelled; it only has to be permitted when it is taken.
    """
    for request in change.requests:
        if request.status is Status.CANCELLED and not _may_be_cancelled(before, change, step, request):
            yield Breach(2, f"{request.operation.value} was cancelled although all went as foreseen")
    taken = change.answer if step.kind is StepKind.TAKE else None
    if isinstance(taken, Request):
        states = {(before.vm_state, before.launched)} if taken.lane is Lane.STATE else _around(before)
        # A preempting request was admitted on the task in service, and stays wherever it can be performed.
        performable = taken.preempts and before.vm_state in CATALOGUE[taken.operation].sources
        if not performable and not any(_permitted(policy, taken, *there, before.tags) for there in states):
            yield Breach(2, f"{taken.operation.value} is served in {before.vm_state.value}, where it is not permitted")


def _may_be_cancelled(before: Instance, change: Change[Any], step: Step, request: Request) -> bool:
    if not request.in_turn:
        return True
    if step.kind in _GOES_AS_FORESEEN:
        return False
    if step.kind is StepKind.SUBMIT:
        # Only a preempting request may cancel others, and never itself.
        answer = change.answer
        if not isinstance(answer, Admitted) or answer.request.id == request.id:
            return False
        return answer.request.preempts or answer.request.lane is Lane.RECORD
    if step.outcome is Outcome.UNKNOWN:
        return False
    # What was to be interrupted has ended otherwise: not what was foreseen for what preempts it.
    asked = step.request is not None and step.request.interrupt_deadline_ms is not None
    if asked and any(other.preempts for other in change.requests if other.status is Status.CANCELLED):
        return True
    # An instance that arrived on another host is not in the foreseen state.
    return step.outcome is not Outcome.SUCCEEDED or step.arrived


def served_in_turn(before: Instance, change: Change[Any], step: Step) -> Iterator[Breach]:
    """Law 12: nothing is taken before an earlier request, unless it preempts or runs beside what that one waits for."""
    taken = change.answer
    if step.kind is not StepKind.TAKE or not isinstance(taken, Request) or taken.preempts:
        return
    queued = [request for request in before.outstanding if request.status is Status.QUEUED]
    serving = before.served(Lane.STATE)
    for other in queued[: [request.id for request in queued].index(taken.id)]:
        promised = other.in_turn or other.lane is Lane.STATE
        beside = taken.lane is Lane.COMPONENT and serving is not None and not other.preempts
        if promised and not (beside and other.lane is Lane.STATE):
            yield Breach(12, f"{taken.operation.value} is served before {other.operation.value}, which came first")


def _permitted(policy: CompiledPolicy, request: Request, state: VmState, launched: bool, tags: tuple[str, ...]) -> bool:
    rule = policy.decide(Foreseen(state, (), launched, tags=tags).view(request))
    return rule.verdict in {Verdict.ADMIT, Verdict.PREEMPT}


def _foreseen(instance: Instance) -> VmState:
    return _after(instance, (request for request in instance.outstanding if request.lane is Lane.STATE))[0]


def _remembered(instance: Instance) -> list[VmState]:
    """Return the stack of past vm_states, the latest last."""
    known = instance.further_vm_states[::-1]
    return [*known, *(() if instance.prior_vm_state is None else (instance.prior_vm_state,))]


def _landing(request: Request, state: VmState, memory: list[VmState]) -> tuple[VmState, list[VmState]]:
    """Return the vm_state after a success, and its stack of past vm_states, the latest last."""
    entry = CATALOGUE[request.operation]
    known = memory.copy()
    if entry.to is Target.PRIOR:
        there = known.pop() if known else VmState.ACTIVE
    elif entry.to is Target.PRESENT:
        there = known[0] if known else VmState.ACTIVE
    elif entry.to is Target.EVACUATED:
        there, known = _lost_host(state, known)
    elif isinstance(entry.to, VmState):
        there = entry.to
        if there is not state and state not in entry.sources:
            known = []
        if there is not state and entry.remembers:
            known.append(state)
    else:
        there = VmState.ACTIVE if entry.to is Target.REPAIRED and state is VmState.ERROR else state
    return there, known if there in _UNDOABLE else []


def _lost_host(state: VmState, known: list[VmState]) -> tuple[VmState, list[VmState]]:
    """Return the vm_state after an evacuation, and its stack of past vm_states, the latest last."""
    if state is VmState.RESIZED:
        return (known[0] if known else VmState.ACTIVE), []
    afresh = {
        VmState.BUILDING: VmState.ACTIVE,
        VmState.ERROR: VmState.ACTIVE,
        VmState.SUSPENDED: VmState.STOPPED,
        VmState.SHELVED: VmState.SHELVED_OFFLOADED,
    }
    if VmState.RESIZED in known:
        known = known[:1]
    known = [one if one in {VmState.BUILDING, VmState.ERROR} else afresh.get(one, one) for one in known]
    return afresh.get(state, state), known


_UNDOABLE = {state for entry in CATALOGUE.values() if entry.to is Target.PRIOR for state in entry.sources}


def held_fence(
    before: Instance, change: Change[Any], step: Step, policy: CompiledPolicy, now_ms: int
) -> Iterator[Breach]:
    """Law 4: a worker that lost the right to act was fenced, and its late reports change nothing."""
    after = change.instance
    if after.fence < before.fence or after.generation < before.generation:
        yield Breach(4, "a fence or a generation became smaller")
    if after.generation == before.generation and _bare(after) != _bare(before):
        yield Breach(4, "an instance changed and its generation did not")
    reporter = step.request.id if step.kind is StepKind.FINISH and step.request is not None else None
    served = {request.id for request in after.outstanding if request.status in SERVED}
    for request in before.outstanding:
        if request.status not in SERVED:
            continue
        dismissed = request.id != reporter and (request.id not in served or step.kind is StepKind.ADOPT)
        if dismissed and after.fence == before.fence:
            yield Breach(4, f"the worker of {request.operation.value} was superseded and not fenced")
        if dismissed or request.id not in served:
            yield from _late_report(after, request, policy, now_ms)


def _bare(instance: Instance) -> tuple[Any, ...]:
    return (instance.vm_state, instance.fence, _remembered(instance), instance.locked_by, instance.outstanding)


def _late_report(after: Instance, request: Request, policy: CompiledPolicy, now_ms: int) -> Iterator[Breach]:
    """Check late reports of the worker of `request`, which has lost the right to act."""
    name = request.operation.value
    reports = (
        lifecycle.finish(after, request.id, request.fence, Outcome.SUCCEEDED, policy, now_ms),
        lifecycle.progress(after, request.id, request.fence, now_ms),
    )
    for report in reports:
        if not isinstance(report.answer, StaleFence) or report.instance != after or report.requests:
            yield Breach(4, f"a late report of {name} was accepted")
        elif [event.kind for event in report.events] != ["request.fenced"]:
            yield Breach(4, f"a late report of {name} was refused and not recorded")


def written(before: Instance, change: Change[Any]) -> Iterator[Breach]:
    """Law 9: every request that changed is in the change that a store writes before anybody is answered."""
    known = {request.id: request for request in (*before.outstanding, *before.held)}
    kept = {request.id: request for request in change.requests}
    for request in (*change.instance.outstanding, *change.instance.held):
        if request != known.get(request.id) and request != kept.get(request.id):
            yield Breach(9, f"{request.operation.value} changed and is not in what is written")


def unknown_waits(before: Instance, after: Instance, step: Step) -> Iterator[Breach]:
    """Law 10: a request whose outcome is unknown has not ended, and has changed nothing."""
    if step.outcome is not Outcome.UNKNOWN or step.request is None:
        return
    waiting = [request.status for request in after.outstanding if request.id == step.request.id]
    if waiting != [Status.UNKNOWN] or after.vm_state is not before.vm_state:
        yield Breach(10, f"{step.request.operation.value} ended although its outcome is unknown")


def one_copy(change: Change[Any], host_reachable: bool) -> Iterator[Breach]:
    """Law 11, as far as the core decides on it: nothing is evacuated from a host that is not fenced."""
    answer = change.answer
    if isinstance(answer, Admitted) and answer.request.operation is Operation.EVACUATE and host_reachable:
        yield Breach(11, "an evacuation was admitted although the host is not fenced")


def settled_success(before: Instance, after: Instance, step: Step) -> Iterator[Breach]:
    """Law 7: when a success is reported, the instance is in the operation's target state."""
    request = step.request
    if step.outcome is not Outcome.SUCCEEDED or request is None or request.lane is not Lane.STATE:
        return
    expected, memory = before.vm_state, _remembered(before)
    if not step.arrived:
        expected, memory = _landing(request, expected, memory)
    if (after.vm_state, _remembered(after)) != (expected, memory):
        yield Breach(
            7, f"{request.operation.value} succeeded in {before.vm_state.value} and left {after.vm_state.value}"
        )
    if after.task_state == request.phase:
        yield Breach(7, f"{request.operation.value} succeeded and its task state still holds")


def explained(instance: Instance, change: Change[Any]) -> Iterator[Breach]:
    """Laws 7 and 8 of one answer: it is about the present instance, and names its reason."""
    answer = change.answer
    outstanding = {request.id for request in instance.outstanding}
    if isinstance(answer, Denied):
        name = answer.operation.value
        if not (answer.rule and answer.reason):
            yield Breach(8, f"{name} was refused without a rule or a reason")
        if outstanding and answer.blocked_by is None:
            yield Breach(8, f"{name} was refused without naming the blocking request")
        if answer.blocked_by is not None and answer.blocked_by.id not in outstanding:
            yield Breach(7, f"{name} was refused for a request that has ended")
        if answer.vm_state is not (_foreseen(instance) if answer.foreseen else instance.vm_state):
            yield Breach(7, f"{name} was refused on a state that does not hold")
    elif isinstance(answer, Redundant) and answer.request is not None and answer.request.id not in outstanding:
        yield Breach(7, "an answer was redundant to a request that has ended")
    if not isinstance(answer, Admitted) and change.instance != instance:
        yield Breach(8, "a submission that was not admitted changed the instance")
