"""The laws as conditions on one transition of the core, each naming its number in the design's list.

What is here looks at an instance before and after one step, and says which law the step broke. It decides nothing, and
shares no code with what it checks beyond the catalogue and the policy's own look-up. Walking through the steps is not
here: see `exploring`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Any, Final

import msgspec

from interlock.core import lifecycle
from interlock.core.operations import CATALOGUE, Landing, Lane
from interlock.core.policy import CompiledPolicy, Verdict, View
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
from interlock.core.states import EXECUTING_STATES, NO_TASK, VmState

LAWS: Final = {
    1: "one at a time",
    2: "a promise",
    3: "one end",
    4: "the fence holds",
    5: "never stuck",
    7: "success is settled",
    8: "every answer explains itself",
}
"""The names of the laws that are checked here."""


class Deed(StrEnum):
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

    deed: Deed
    event: dict[str, Any]
    request: Request | None = None
    """The request that it is about: the one that progresses, is finished or is cancelled."""
    outcome: Outcome | None = None
    arrived: bool = False
    """Whether the worker says that the instance has come to another host of ours; see `ARRIVES`."""


class Breach(msgspec.Struct, frozen=True):
    """A law that a step broke, and how. `what` names no ids, so that one mistake reads the same wherever it shows."""

    law: int
    what: str


def check(before: Instance, change: Change[Any], step: Step, policy: CompiledPolicy, now_ms: int) -> Iterator[Breach]:
    """Every law that this step broke."""
    after = change.instance
    yield from one_at_a_time(after)
    yield from one_end(before, change)
    yield from kept_promise(before, change, step, policy)
    yield from held_fence(before, change, step, policy, now_ms)
    yield from settled_success(before, after, step)


def one_at_a_time(after: Instance) -> Iterator[Breach]:
    """Law 1: at most one request is served in each lane, under the instance's fence, and stands before what waits."""
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
        yield Breach(1, "something that waits stands before what is served")


def one_end(before: Instance, change: Change[Any]) -> Iterator[Breach]:
    """Law 3: what is no longer outstanding has ended, once, and the end is kept and told in the same change."""
    outstanding = {request.id for request in change.instance.outstanding}
    kept = {request.id: request for request in change.requests}
    ended = {request.id: request for request in change.requests if request.status in ENDS}
    told = [event for event in change.events if event.kind in _END_KINDS]
    if len(kept) != len(change.requests):
        yield Breach(3, "a request is kept twice in one change")
    for request in before.outstanding:
        if request.id not in outstanding and request.id not in ended:
            yield Breach(3, f"{request.operation.value} is gone without an end")
    for request in change.instance.outstanding:
        if request.status in ENDS or request.id in ended:
            yield Breach(3, f"{request.operation.value} has ended and is still outstanding")
    for request in ended.values():
        ends = [event.kind for event in told if event.request_id == request.id]
        if ends != [f"request.{request.status.value}"]:
            yield Breach(3, f"the end of {request.operation.value} is not told exactly once")
    if len(told) > len(ended):
        yield Breach(3, "an end is told that was not kept")


_END_KINDS = frozenset(f"request.{status.value}" for status in ENDS)
_GOES_AS_FORESEEN = frozenset({Deed.TAKE, Deed.PROGRESS, Deed.ADOPT, Deed.ADVANCE})


def _around(before: Instance) -> set[tuple[VmState, bool]]:
    """Where a component change is served: in the present state, where all leads, or where what it is beside leads.

    Each with whether the instance has been launched by then.
    """
    serving = before.served(Lane.STATE)
    all_of_it = [request for request in before.outstanding if request.lane is Lane.STATE]
    return {_after(before, ()), _after(before, all_of_it), _after(before, () if serving is None else (serving,))}


def _after(before: Instance, requests: Iterable[Request]) -> tuple[VmState, bool]:
    """Where an instance is when some requests have succeeded, and whether it has been launched by then."""
    state, memory, launched = before.vm_state, _remembered(before), before.launched
    for request in requests:
        state, memory = _landing(request, state, memory)
        launched = launched or state in EXECUTING_STATES
    return state, launched


def kept_promise(before: Instance, change: Change[Any], step: Step, policy: CompiledPolicy) -> Iterator[Breach]:
    """Law 2: nothing is cancelled while all goes as foreseen, and what is taken is permitted when it is taken.

    A component change is held to it against what was admitted before it: a state change admitted later goes first, and
    what that leads to, or will lead to, is news for the component change.
    """
    for request in change.requests:
        if request.status is Status.CANCELLED and not _may_be_cancelled(before, change, step, request):
            yield Breach(2, f"{request.operation.value} was cancelled although all went as foreseen")
    taken = change.answer if step.deed is Deed.TAKE else None
    if isinstance(taken, Request):
        states = {(before.vm_state, before.launched)} if taken.lane is Lane.STATE else _around(before)
        # What preempts was admitted on what is being done, and stays wherever it can be performed.
        performable = taken.preempts and before.vm_state in CATALOGUE[taken.operation].sources
        if not performable and not any(_permitted(policy, taken, *there, before.tags) for there in states):
            yield Breach(2, f"{taken.operation.value} is served in {before.vm_state.value}, where it is not permitted")


def _may_be_cancelled(before: Instance, change: Change[Any], step: Step, request: Request) -> bool:
    if not request.in_turn:
        return True
    if step.deed in _GOES_AS_FORESEEN:
        return False
    if step.deed is Deed.SUBMIT:
        # Only what overtakes may cancel, and never itself.
        answer = change.answer
        if not isinstance(answer, Admitted) or answer.request.id == request.id:
            return False
        return answer.request.preempts or answer.request.lane is Lane.RECORD
    if step.outcome is Outcome.UNKNOWN:
        return False
    # That it would be gone was foreseen: one that has arrived is where nothing was promised of.
    if step.outcome is Outcome.SUCCEEDED and not step.arrived:
        states = (other for other in before.outstanding if other.lane is Lane.STATE)
        return request.lane is Lane.COMPONENT and any(position(request) < position(other) for other in states)
    return True


def position(request: Request) -> int:
    """When it was admitted among the others of its story: the ids of an exploration count up."""
    return int(request.id.removeprefix("r") or 0)


def _permitted(policy: CompiledPolicy, request: Request, state: VmState, launched: bool, tags: tuple[str, ...]) -> bool:
    view = View(request.operation, state, NO_TASK, role=request.role, tags=tags, hard=request.hard, launched=launched)
    rule = policy.decide(view)
    return rule.verdict in {Verdict.ADMIT, Verdict.PREEMPT}


def _foreseen(instance: Instance) -> VmState:
    return _after(instance, (request for request in instance.outstanding if request.lane is Lane.STATE))[0]


def _remembered(instance: Instance) -> list[VmState]:
    """What it can be brought back to, the nearest last."""
    known = instance.further_vm_states[::-1]
    return [*known, *(() if instance.prior_vm_state is None else (instance.prior_vm_state,))]


def _landing(request: Request, state: VmState, memory: list[VmState]) -> tuple[VmState, list[VmState]]:
    """Where a success leads, and what is remembered there, the nearest last."""
    entry = CATALOGUE[request.operation]
    known = memory.copy()
    if entry.to is Landing.PRIOR:
        there = known.pop() if known else VmState.ACTIVE
    elif entry.to is Landing.PRESENT:
        there = known[0] if known else VmState.ACTIVE
    elif isinstance(entry.to, VmState):
        there = entry.to
        if there is not state and state not in entry.sources:
            known = []
        if there is not state and entry.remembers:
            known.append(state)
    else:
        there = VmState.ACTIVE if entry.to is Landing.REPAIRED and state is VmState.ERROR else state
    return there, known if there in _UNDOABLE else []


_UNDOABLE = {state for entry in CATALOGUE.values() if entry.to is Landing.PRIOR for state in entry.sources}


def held_fence(
    before: Instance, change: Change[Any], step: Step, policy: CompiledPolicy, now_ms: int
) -> Iterator[Breach]:
    """Law 4: whoever lost the right to act was fenced, and what it reports from then on changes nothing."""
    after = change.instance
    if after.fence < before.fence or after.generation < before.generation:
        yield Breach(4, "a fence or a generation became smaller")
    if after.generation == before.generation and _bare(after) != _bare(before):
        yield Breach(4, "an instance changed and its generation did not")
    reporter = step.request.id if step.deed is Deed.FINISH and step.request is not None else None
    served = {request.id for request in after.outstanding if request.status in SERVED}
    for request in before.outstanding:
        if request.status not in SERVED:
            continue
        dismissed = request.id != reporter and (request.id not in served or step.deed is Deed.ADOPT)
        if dismissed and after.fence == before.fence:
            yield Breach(4, f"the worker of {request.operation.value} was dismissed and not fenced")
        if dismissed or request.id not in served:
            yield from _late_report(after, request, policy, now_ms)


def _bare(instance: Instance) -> tuple[Any, ...]:
    return (instance.vm_state, instance.fence, _remembered(instance), instance.locked_by, instance.outstanding)


def _late_report(after: Instance, request: Request, policy: CompiledPolicy, now_ms: int) -> Iterator[Breach]:
    """What the worker of `request`, which has no right to act any more, could still do by reporting."""
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


def settled_success(before: Instance, after: Instance, step: Step) -> Iterator[Breach]:
    """Law 7: with the report of a success the instance is where the operation leads."""
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
    """Laws 7 and 8 of one answer: it is about the instance as it is now, and explains itself."""
    answer = change.answer
    outstanding = {request.id for request in instance.outstanding}
    if isinstance(answer, Denied):
        name = answer.operation.value
        if not (answer.rule and answer.reason):
            yield Breach(8, f"{name} was refused without a rule or a reason")
        if outstanding and answer.blocked_by is None:
            yield Breach(8, f"{name} was refused without saying what is in the way")
        if answer.blocked_by is not None and answer.blocked_by.id not in outstanding:
            yield Breach(7, f"{name} was refused for a request that has ended")
        if answer.vm_state is not (_foreseen(instance) if answer.foreseen else instance.vm_state):
            yield Breach(7, f"{name} was refused on a state that does not hold")
    elif isinstance(answer, Redundant) and answer.request is not None and answer.request.id not in outstanding:
        yield Breach(7, "an answer was redundant to a request that has ended")
    if not isinstance(answer, Admitted) and change.instance != instance:
        yield Breach(8, "a submission that was not admitted changed the instance")
