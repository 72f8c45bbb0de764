"""The request queue of one instance: its order, the foreseen state, and re-evaluation of queued requests.

Requests in flight come first, then preempting ones, then the rest in the order admitted, state changes and component
changes alike (law 12). The queue is evaluated again whenever the state is not the foreseen one; `admission` decides
whether a new request may enter it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from interlock.core.errors import Invalid
from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.policy import GONE, HOST_NOT_FENCED, TO_BE_DELETED, CompiledPolicy, Rule, Verdict
from interlock.core.preconditions import RULE, unmet
from interlock.core.records import NO_FACTS, SERVED, AnswerT, Change, Event, Instance, Request, Status
from interlock.core.states import EXECUTING_STATES, VmState
from interlock.core.view_classes import names_tags
from interlock.core.views import Foreseen, View, at_present

replace = msgspec.structs.replace

_STATE_OPERATIONS = frozenset(entry.operation for entry in CATALOGUE.values() if entry.lane is Lane.STATE)


class Draft:
    """Builder of a `Change`: the new instance, the changed requests and the events.

    Lives only inside one call of the core, and is the single place where a request ends.
    """

    __slots__ = ("events", "generation", "host_reachable", "instance", "now_ms", "recording", "requests")

    def __init__(self, instance: Instance, now_ms: int, *, host_reachable: bool = True, recording: bool = True) -> None:
        """Start with an instance.

        Args:
            instance: the instance before.
            now_ms: the time of the change.
            host_reachable: as the attribute.
            recording: whether events and ended requests are built; not for a question about the instance alone.

        Raises:
            Invalid: the vm_state is a text: no rule would match it, nor any comparison of the core.
        """
        if type(instance.vm_state) is not VmState:
            raise Invalid(f"Invalid vm_state {instance.vm_state!r} of instance {instance.id}: expected a VmState.")
        self.instance = instance
        self.now_ms = now_ms
        self.host_reachable = host_reachable
        """False where the instance's host is fenced."""
        self.generation = instance.generation + 1
        self.recording = recording
        self.requests: dict[str, Request] = {}
        self.events: list[Event] = []

    def emit(self, kind: str, request_id: str | None = None, /, **data: Any) -> None:
        self.emit_facts(kind, request_id, data)

    def emit_facts(self, kind: str, request_id: str | None, data: dict[str, Any]) -> None:
        """As `emit`, with the data in a dictionary that belongs to the event from now on."""
        if not self.recording:
            return
        self.events.append(
            Event(
                kind=kind,
                instance_id=self.instance.id,
                at_ms=self.now_ms,
                generation=self.generation,
                request_id=request_id,
                data=data,
            )
        )

    def put(self, request: Request) -> Request:
        """Replace an outstanding request by its new version."""
        self.requests[request.id] = request
        outstanding = tuple(request if other.id == request.id else other for other in self.instance.outstanding)
        self.instance = replace(self.instance, outstanding=outstanding)
        return request

    def enqueue(self, request: Request) -> None:
        """Add a request to the queue: a preempting one before every queued one."""
        self.requests[request.id] = request
        waiting = self.instance.outstanding
        if not request.preempts:
            self.instance = replace(self.instance, outstanding=(*waiting, request))
            return
        served = tuple(other for other in waiting if other.status in SERVED)
        queued = tuple(other for other in waiting if other.status not in SERVED)
        self.instance = replace(self.instance, outstanding=(*served, request, *queued))

    def end(
        self, request: Request, status: Status, reason: str | None = None, message: str | None = None, /, **more: Any
    ) -> None:
        """End a request, the only way to do so (law 3); `more` is added to the event."""
        self.instance = replace(
            self.instance,
            failures=_failures_after(self.instance.failures, request.operation, status),
            outstanding=_without(self.instance.outstanding, request),
            held=_without(self.instance.held, request),
        )
        if not self.recording:
            return
        self.requests[request.id] = replace(
            request,
            status=status,
            reason=reason,
            message=message,
            ended_at_ms=self.now_ms,
            interrupt_deadline_ms=None,
        )
        self.emit(
            f"request.{status.value}",
            request.id,
            operation=request.operation.value,
            reason=reason,
            message=message,
            **more,
        )

    def fence_off(self, by: str | None, message: str) -> tuple[str, ...]:
        """Fence every worker of the instance, and end their requests as superseded; return the ids.

        There is one fence per instance, because a worker must not build on what another left unfinished.
        """
        served = [request for request in self.instance.outstanding if request.status in SERVED]
        self.instance = replace(self.instance, fence=self.instance.fence + 1)
        for request in served:
            self.end(request, Status.SUPERSEDED, "superseded", message)
        self.emit("instance.fenced", by, fence=self.instance.fence, superseded=[request.id for request in served])
        return tuple(request.id for request in served)

    def alive(self) -> None:
        """Record a sign of life of the instance."""
        self.instance = replace(self.instance, updated_at_ms=self.now_ms)

    def conclude(self) -> Instance:
        """Note what follows from the new state, and return the instance, with its generation unchanged."""
        self._note_launch()
        if self.instance.guest_trouble is not None and not self.instance.executing:
            self.instance = replace(self.instance, guest_trouble=None, guest_trouble_since_ms=None)
        if self.instance.held:
            self._note_held()
        return self.instance

    def change(self, answer: AnswerT) -> Change[AnswerT]:
        return Change(
            instance=replace(self.conclude(), generation=self.generation),
            requests=tuple(self.requests.values()),
            events=tuple(self.events),
            answer=answer,
        )

    def _note_launch(self) -> None:
        if self.instance.launched_at_ms is None and self.instance.vm_state in EXECUTING_STATES:
            self.instance = replace(self.instance, launched_at_ms=self.now_ms)

    def _note_held(self) -> None:
        """Have held requests evaluated again after any change; cancel them if the instance is deleted."""
        if self.instance.vm_state is VmState.DELETED:
            for request in self.instance.held:
                self.end(request, Status.CANCELLED, GONE.code, GONE.because)
        self.instance = replace(self.instance, held_due_ms=self.now_ms if self.instance.held else None)


def _without(requests: tuple[Request, ...], one: Request) -> tuple[Request, ...]:
    return tuple([other for other in requests if other.id != one.id]) if requests else ()


def _failures_after(failures: dict[Operation, int], operation: Operation, status: Status) -> dict[Operation, int]:
    """Return how often each operation has failed since its last success, after a request has ended."""
    if status is Status.FAILED:
        return {**failures, operation: failures.get(operation, 0) + 1}
    if status is Status.SUCCEEDED and operation in failures:
        return {other: count for other, count in failures.items() if other is not operation}
    return failures


def foresee(instance: Instance, *, host_reachable: bool = True) -> Foreseen:
    """Return the foreseen state: after everything outstanding has succeeded."""
    state = at_present(instance, host_reachable=host_reachable)
    for request in instance.outstanding:
        if request.operation in _STATE_OPERATIONS:
            state = state.after(request.operation)
    return state


def cause_of(foreseen: Foreseen, instance: Instance) -> Request | None:
    """Return the last outstanding request that changes the vm_state to the foreseen one; None if none does."""
    state = at_present(instance)
    found = None
    for request in instance.outstanding:
        if request.lane is Lane.STATE:
            before, state = state.vm_state, state.after(request.operation)
            if state.vm_state is foreseen.vm_state and before is not foreseen.vm_state:
                found = request
    return found


def latest_of(instance: Instance, operation: Operation) -> Request | None:
    """Return the latest held or outstanding request for an operation, or None."""
    known = (*instance.held, *instance.outstanding)
    return next((request for request in reversed(known) if request.operation is operation), None)


def preempting(instance: Instance, view: View) -> Request | None:
    """Return the same preempting request if one is queued. They have no queue limit, so they must not pile up."""
    for request in instance.outstanding:
        waits = request.preempts and request.status is Status.QUEUED
        if waits and request.operation is view.operation and request.hard is view.hard:
            return request
    return None


def blocker_of(instance: Instance, rule: Rule) -> Request | None:
    """Return the outstanding request that a refusal names: the one the rule is about, or the one in flight."""
    if rule.outstanding:
        for request in reversed(instance.outstanding):
            if request.operation in rule.outstanding:
                return request
    return instance.served(Lane.STATE) or (instance.outstanding[0] if instance.outstanding else None)


def last_state_change(instance: Instance) -> Request | None:
    """Return the last outstanding state change, or None."""
    return next((request for request in reversed(instance.outstanding) if request.lane is Lane.STATE), None)


def judge_in(policy: CompiledPolicy, request: Request, state: Foreseen) -> Rule:
    """Return the rule for a request in that state, with nothing in flight.

    A lock or a blocked operation that was set after its admission does not count: it restricts new requests only.
    """
    if state.vm_state is VmState.DELETED:
        return TO_BE_DELETED
    return policy.decide(state.view(request, request.admitted_at_ms))


def because_of(rule: Rule, host: str) -> str | None:
    """Return a rule's reason for people; a rule about a fenced host names the host."""
    if rule.host_reachable is not False or rule.because is None:
        return rule.because
    return f"The host {host} is fenced. {rule.because}"


def permits(rule: Rule) -> bool:
    return rule.verdict is Verdict.ADMIT or rule.verdict is Verdict.PREEMPT


def in_service_order(instance: Instance) -> list[Request]:
    """Return the outstanding requests in the order in which they are served if nothing fails.

    Those in flight, then preempting ones, then the rest of both lanes in the order admitted. Component changes that
    were not admitted in turn come last: change 880 serves every state change before them.
    """
    return sorted(instance.outstanding, key=_comes_last)


def _comes_last(request: Request) -> bool:
    in_order = request.in_turn or request.preempts or request.status in SERVED
    return not in_order and request.lane is Lane.COMPONENT


def judge_again(draft: Draft, policy: CompiledPolicy) -> tuple[str, ...]:
    """Cancel queued requests that are no longer permitted, with the reason; return their ids (law 2).

    Each is evaluated on the state after the state changes that are served before it. A preempting request stays as long
    as it can be performed at all, and one that was not admitted in turn stays while the present state permits it.
    """
    instance, policy = draft.instance, policy.for_queue
    if all(request.status is not Status.QUEUED for request in instance.outstanding):
        _note_host(draft)
        return ()
    present = foreseen = at_present(instance, host_reachable=draft.host_reachable)
    halfway = foreseen.vm_state
    host_changed = instance.host_fenced is draft.host_reachable
    is_back = instance.host_fenced and draft.host_reachable
    cancelled: list[str] = []
    before: list[Request] = []
    for request in in_service_order(instance):
        is_state_change = request.lane is Lane.STATE
        if request.status is Status.QUEUED:
            rule, state = _judge_waiting(policy, request, present, foreseen, is_back=is_back)
            around = is_state_change and not is_denied_around(
                request, rule, host_reachable=present.host_reachable, host_changed=host_changed
            )
            stays = around and stays_anyway(request, halfway, foreseen.vm_state)
            if not permits(rule) and not stays:
                cancelled.append(_cancel(draft, request, rule, state, policy))
                continue
            if _lacks(draft, request, before, cancelled):
                continue
        if is_state_change:
            foreseen = foreseen.after(request.operation)
            if request.status is Status.QUEUED or request.interrupt_deadline_ms is None:
                halfway = foreseen.vm_state
        before.append(request)
    _note_host(draft)
    return tuple(cancelled)


def _note_host(draft: Draft) -> None:
    """Note whether the queue was evaluated with the host fenced."""
    if draft.instance.host_fenced is draft.host_reachable:
        draft.instance = replace(draft.instance, host_fenced=not draft.host_reachable)


def is_judged(instance: Instance, *, host_reachable: bool) -> bool:
    """Whether the queue was evaluated with the host as reachable as it is now; true if nothing is queued."""
    if instance.host_fenced is not host_reachable:
        return True
    return all(request.status is not Status.QUEUED for request in instance.outstanding)


def _lacks(draft: Draft, request: Request, before: list[Request], cancelled: list[str]) -> bool:
    """Cancel a queued request if a precondition will not be met after `before`; return whether it was cancelled."""
    found = unmet(draft.instance, request.operation, request.parameters, NO_FACTS, before)
    if found is None:
        return False
    draft.end(request, Status.CANCELLED, found.reason, found.because, rule=RULE)
    cancelled.append(request.id)
    return True


def _judge_waiting(
    policy: CompiledPolicy, request: Request, present: Foreseen, foreseen: Foreseen, *, is_back: bool
) -> tuple[Rule, VmState]:
    """Return the rule for a queued request, and the vm_state on which it decided.

    A request that was not admitted in turn was admitted without regard to the foreseen state: it is cancelled only if
    the present state does not permit it either. No policy has an instance evacuated whose fenced host is back.
    """
    if request.operation is Operation.EVACUATE and is_back:
        return HOST_NOT_FENCED, present.vm_state
    rule = judge_in(policy, request, foreseen)
    if request.in_turn or permits(rule):
        return rule, foreseen.vm_state
    return judge_in(policy, request, present), present.vm_state


def stays_anyway(request: Request, halfway: VmState, foreseen: VmState) -> bool:
    """Whether a preempting request stays although the policy would not admit it in the foreseen state.

    It was admitted because of the request in flight, whose fencing or interruption may have left the guest in any
    state: a fenced start leaves `stopped` in the record and perhaps a running guest, and the stop that ended it must
    not be cancelled as redundant. So it stays if the catalogue allows it in the foreseen state, or in `halfway`, the
    state if the request in flight has no effect, unless `is_denied_around` says otherwise.
    """
    return request.preempts and not CATALOGUE[request.operation].sources.isdisjoint((halfway, foreseen))


def is_denied_around(request: Request, rule: Rule, *, host_reachable: bool, host_changed: bool) -> bool:
    """Whether a preempting request is denied for the tags of the instance, or for its host.

    A rule about the host counts when the host is lost or back: what the policy admitted on the lost host since was
    admitted although it is lost. An evacuation does not stay once the host is reachable.
    """
    if host_reachable and request.operation is Operation.EVACUATE:
        return True
    named = names_tags(rule) or (host_changed and rule.host_reachable is not None)
    return named and rule.verdict is Verdict.DENY


def _cancel(draft: Draft, request: Request, rule: Rule, state: VmState, policy: CompiledPolicy) -> str:
    because = because_of(rule, draft.instance.host) or f"{request.operation.value} is not allowed in {state.value}."
    message = f"The VM is or will be {state.value}: {because}"
    if names_tags(rule):
        message = f"The VM has the tags {', '.join(draft.instance.tags) or '(none)'}: {because}"
    draft.end(request, Status.CANCELLED, rule.code, message, rule=rule.id, policy=policy.stamp)
    return request.id


def next_served(instance: Instance, lane: Lane | None) -> Request | None:
    """Return the request to perform next in `lane`, or in any lane if None; None if none can be performed now.

    The next one is the first that waits, of both lanes (law 12). Only a component change that is compatible with the
    state change in flight may be served earlier, and only before requests that have to wait for that state change: a
    component change served before a preempting request has no deadline, and would block the queue if it hung.
    """
    state, component = instance.served(Lane.STATE), instance.served(Lane.COMPONENT)
    waiting = [request for request in in_service_order(instance) if request.status is Status.QUEUED]
    if not waiting:
        return None
    first = waiting[0]
    now = change = None
    if first.lane is Lane.STATE:
        now = first if state is None and (component is None or _beside(component, first)) else None
    if component is None and (first.lane is Lane.COMPONENT or (state is not None and not first.preempts)):
        change = next((request for request in waiting if request.lane is Lane.COMPONENT), None)
        if change is not None and state is not None and not _beside(change, state):
            change = None
    match lane:
        case Lane.STATE:
            return now
        case Lane.COMPONENT:
            return change
        case Lane.RECORD:
            return None  # done when it is admitted, and never queued
        case None:
            return None if state is not None else now or change


def _beside(component: Request, state: Request) -> bool:
    return state.operation in CATALOGUE[component.operation].compatible_with


def first_phase(operation: Operation, *, hard: bool) -> str | None:
    """Return the task state of an operation from the moment it is taken."""
    entry = CATALOGUE[operation]
    phases = entry.hard_phases if hard and entry.hard_phases else entry.phases
    return phases[0] if phases else None
