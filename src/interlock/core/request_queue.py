"""The queue of one instance: its order, what it will lead to, and which of its requests still make sense.

What is in flight stands first, then what preempts, then the rest in the order admitted. The queue is judged again
whenever something did not go as foreseen; deciding whether a new request may enter it is not here (see `admission`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from interlock.core.operations import BIT, CATALOGUE, Lane, Memory, Operation, land
from interlock.core.policy import GONE, CompiledPolicy, Rule, Verdict, View
from interlock.core.records import SERVED, AnswerT, Change, Event, Instance, Request, Status
from interlock.core.states import EXECUTING_STATES, NO_TASK, VmState

replace = msgspec.structs.replace

_STATE_OPERATIONS = frozenset(entry.operation for entry in CATALOGUE.values() if entry.lane is Lane.STATE)


class Draft:
    """One decision in the making: the instance as it becomes, what is to be kept, and what is to be told.

    Lives only inside one call of the core, and is the single place where a request ends.
    """

    __slots__ = ("events", "generation", "instance", "now_ms", "requests")

    def __init__(self, instance: Instance, now_ms: int) -> None:
        self.instance = instance
        self.now_ms = now_ms
        self.generation = instance.generation + 1
        self.requests: dict[str, Request] = {}
        self.events: list[Event] = []

    def tell(self, kind: str, request_id: str | None = None, /, **data: Any) -> None:
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
        """Replace an outstanding request by what it is now."""
        self.requests[request.id] = request
        outstanding = tuple(request if other.id == request.id else other for other in self.instance.outstanding)
        self.instance = replace(self.instance, outstanding=outstanding)
        return request

    def enqueue(self, request: Request) -> None:
        """Add a request at its place: a preempting one before everything that waits."""
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
        """The one way in which a request ends (law 3); `more` is told with it."""
        ended = replace(
            request,
            status=status,
            reason=reason,
            message=message,
            ended_at_ms=self.now_ms,
            interrupt_deadline_ms=None,
        )
        self.requests[request.id] = ended
        self.instance = replace(
            self.instance,
            outstanding=tuple(other for other in self.instance.outstanding if other.id != request.id),
            held=tuple(other for other in self.instance.held if other.id != request.id),
        )
        self.tell(
            f"request.{status.value}",
            request.id,
            operation=request.operation.value,
            reason=reason,
            message=message,
            **more,
        )

    def fence_off(self, by: str | None, message: str) -> tuple[str, ...]:
        """Take the right to act from every worker of the instance, and end what they served; the ids of those.

        The fence is one number an instance, so that nothing of the old world gets through: what one worker left
        half-way, another must not build on.
        """
        served = [request for request in self.instance.outstanding if request.status in SERVED]
        self.instance = replace(self.instance, fence=self.instance.fence + 1)
        for request in served:
            self.end(request, Status.SUPERSEDED, "superseded", message)
        self.tell("instance.fenced", by, fence=self.instance.fence, superseded=[request.id for request in served])
        return tuple(request.id for request in served)

    def alive(self) -> None:
        """Note a sign of life of the instance."""
        self.instance = replace(self.instance, updated_at_ms=self.now_ms)

    def change(self, answer: AnswerT) -> Change[AnswerT]:
        self._note_launch()
        if self.instance.held:
            self._note_held()
        return Change(
            instance=replace(self.instance, generation=self.generation),
            requests=tuple(self.requests.values()),
            events=tuple(self.events),
            answer=answer,
        )

    def _note_launch(self) -> None:
        if self.instance.launched_at_ms is None and self.instance.vm_state in EXECUTING_STATES:
            self.instance = replace(self.instance, launched_at_ms=self.now_ms)

    def _note_held(self) -> None:
        """Whatever has changed, what is held may be admitted now; and nothing will be of what is gone."""
        if self.instance.vm_state is VmState.DELETED:
            for request in self.instance.held:
                self.end(request, Status.CANCELLED, GONE.code, GONE.because)
        self.instance = replace(self.instance, held_due_ms=self.now_ms if self.instance.held else None)


def kinds(requests: tuple[Request, ...]) -> int:
    """The kinds of some requests, as the union of their bits."""
    mask = 0
    for request in requests:
        mask |= BIT[request.operation]
    return mask


class Foreseen(NamedTuple):
    """Where an instance will be when what comes before has succeeded."""

    vm_state: VmState
    memory: Memory
    launched: bool

    def after(self, operation: Operation) -> Foreseen:
        """Where it will be when that state change has succeeded too."""
        vm_state, memory = land(operation, self.vm_state, self.memory)
        return Foreseen(vm_state, memory, self.launched or vm_state in EXECUTING_STATES)


def at_present(instance: Instance) -> Foreseen:
    """Where an instance is, before anything outstanding has succeeded."""
    return Foreseen(instance.vm_state, instance.memory, instance.launched)


def foresee(instance: Instance) -> Foreseen:
    """Where it will be when everything outstanding has succeeded."""
    there = at_present(instance)
    for request in instance.outstanding:
        if request.operation in _STATE_OPERATIONS:
            there = there.after(request.operation)
    return there


def judge_in(policy: CompiledPolicy, request: Request, there: Foreseen, tags: tuple[str, ...]) -> Rule:
    """The rule for a request where nothing is being done.

    Only what serving it depends on counts. A lock or a blocked operation that came after it was admitted is about
    asking, and does not break the promise that was given.
    """
    if there.vm_state is VmState.DELETED:
        return GONE
    return policy.decide(
        View(
            request.operation,
            there.vm_state,
            NO_TASK,
            role=request.role,
            tags=tags,
            hard=request.hard,
            launched=there.launched,
        )
    )


def permits(rule: Rule) -> bool:
    return rule.verdict is Verdict.ADMIT or rule.verdict is Verdict.PREEMPT


def judge_again(draft: Draft, policy: CompiledPolicy) -> tuple[str, ...]:
    """Cancel what waits and no longer makes sense, with the reason; the ids of those (law 2).

    State changes are judged one after the other, each on the state that those before it lead to; one that preempts
    stays wherever it can be performed at all. A component change is judged on where all of them lead, or on the present
    state if it was admitted on that alone.
    """
    instance = draft.instance
    there = at_present(instance)
    halfway = there.vm_state
    cancelled: list[str] = []
    components: list[Request] = []
    for request in instance.outstanding:
        if request.lane is not Lane.STATE:
            if request.status is Status.QUEUED:
                components.append(request)
            continue
        if request.status is Status.QUEUED:
            rule = judge_in(policy, request, there, instance.tags)
            if not permits(rule) and not _holds_anyway(request, halfway, there.vm_state):
                cancelled.append(_cancel(draft, request, rule, there.vm_state, policy))
                continue
            there = there.after(request.operation)
            halfway = there.vm_state
        else:
            there = there.after(request.operation)
    for request in components:
        served_in = there if request.in_turn else at_present(instance)
        rule = judge_in(policy, request, served_in, instance.tags)
        if not permits(rule):
            cancelled.append(_cancel(draft, request, rule, served_in.vm_state, policy))
    return tuple(cancelled)


def _holds_anyway(request: Request, halfway: VmState, foreseen: VmState) -> bool:
    """Whether a preempting request stays although the policy would not admit it into the state it comes to.

    It was admitted on what was being done, not on where that leads. What it stops or takes over may have left the
    guest anywhere: a start that was fenced leaves `stopped` in the record and perhaps a running guest, and the stop
    that ended it must not be dismissed as done already. So it stays where the catalogue lets it be performed: in the
    foreseen state, or in `halfway`, which will hold instead if what is in flight ends without effect.
    """
    return request.preempts and not CATALOGUE[request.operation].sources.isdisjoint((halfway, foreseen))


def _cancel(draft: Draft, request: Request, rule: Rule, state: VmState, policy: CompiledPolicy) -> str:
    because = rule.because or f"{request.operation.value} is not allowed in {state.value}."
    message = f"The instance is or will be {state.value}: {because}"
    draft.end(request, Status.CANCELLED, rule.code, message, rule=rule.id, policy=policy.stamp)
    return request.id


def next_served(instance: Instance, lane: Lane | None) -> Request | None:
    """What a driver serves next in `lane`, or in any lane if None; None if nothing can be served now.

    A preempting request first, then state changes in the order admitted, then component changes. Two may be in flight
    only if the one is a component change that lists the other as compatible.
    """
    state, component = instance.served(Lane.STATE), instance.served(Lane.COMPONENT)
    waiting, change = _first_queued(instance, Lane.STATE), _first_queued(instance, Lane.COMPONENT)
    if waiting is not None and (state is not None or (component is not None and not _beside(component, waiting))):
        now = None
    else:
        now = waiting
    if change is not None and (component is not None or (state is not None and not _beside(change, state))):
        change = None
    if waiting is not None and (state is None or waiting.preempts):
        # State changes go first. And what were taken before one that preempts has no deadline: if it hung, it would be
        # in the way for ever.
        change = None
    match lane:
        case Lane.STATE:
            return now
        case Lane.COMPONENT:
            return change
        case _:
            return now if waiting is not None or state is not None else change


def _first_queued(instance: Instance, lane: Lane) -> Request | None:
    for request in instance.outstanding:
        if request.status is Status.QUEUED and request.lane is lane:
            return request
    return None


def _beside(component: Request, state: Request) -> bool:
    return state.operation in CATALOGUE[component.operation].compatible_with


def first_phase(operation: Operation, *, hard: bool) -> str | None:
    """The task state in which an operation is from the moment it is taken."""
    entry = CATALOGUE[operation]
    phases = entry.hard_phases if hard and entry.hard_phases else entry.phases
    return phases[0] if phases else None
