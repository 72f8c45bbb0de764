"""What happens to requests after they were admitted: taken, progressing, finished, cancelled, expired.

Each function takes an instance and what happened, and returns what that leads to. Workers are told apart by fence: one
that reports under another fence than the instance's has lost the right to act, and gets `StaleFence`.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from interlock.core import restarting
from interlock.core.errors import BrokenInvariant
from interlock.core.holding import judge_held
from interlock.core.operations import ARRIVES, CATALOGUE, Lane, Memory, Operation, land, without_guest
from interlock.core.policy import CompiledPolicy
from interlock.core.records import (
    SERVED,
    Cancellation,
    Change,
    GuestEvent,
    Instance,
    Kept,
    Moved,
    Outcome,
    Request,
    Spec,
    StaleFence,
    Status,
)
from interlock.core.request_queue import Draft, first_phase, judge_again, next_served, replace
from interlock.core.restart_policy import RestartPolicy
from interlock.core.states import LEFT_AT_END, PowerState, VmState


def take(instance: Instance, lane: Lane | None, now_ms: int) -> Change[Request | None]:
    """Give the next request of `lane` (None: of any) to a worker, under the instance's present fence.

    The answer is None where nothing can be served now; the instance is then unchanged.
    """
    request = next_served(instance, lane)
    if request is None:
        return Change(instance=instance, answer=None)
    draft = Draft(instance, now_ms)
    taken = replace(
        request,
        status=Status.IN_FLIGHT,
        phase=first_phase(request.operation, hard=request.hard),
        fence=instance.fence,
        taken_at_ms=now_ms,
        last_progress_at_ms=now_ms,
    )
    draft.put(taken)
    rest = tuple(other for other in draft.instance.outstanding if other.id != taken.id)
    served = tuple(other for other in rest if other.status in SERVED)
    queued = tuple(other for other in rest if other.status not in SERVED)
    draft.instance = replace(draft.instance, outstanding=(*served, taken, *queued))
    draft.alive()
    draft.tell("request.taken", taken.id, operation=taken.operation.value, phase=taken.phase, fence=taken.fence)
    return draft.change(taken)


def progress(
    instance: Instance,
    request_id: str,
    fence: int,
    now_ms: int,
    *,
    phase: str | None = None,
    moved: Moved | None = None,
    detail: str | None = None,
    kept: Kept | None = None,
) -> Change[Request | StaleFence]:
    """Note a sign of life of a request in flight: a new phase, how far it is, or only that it lives.

    `kept` is what the instance is known by from now on, for an operation that changes that step by step.

    Raises:
        BrokenInvariant: the operation has no such phase.
    """
    request = _held(instance, request_id, fence)
    if request is None:
        return _stale(instance, request_id, fence, now_ms, "progress")
    entry = CATALOGUE[request.operation]
    if phase is not None and phase not in entry.phases + entry.hard_phases:
        raise BrokenInvariant(f"{request.operation.value} has no phase {phase!r}.")
    draft = Draft(instance, now_ms)
    changed = replace(request, last_progress_at_ms=now_ms)
    if phase is not None:
        changed = replace(changed, phase=phase, detail=None, **_NOTHING_MOVED)
    if moved is not None:
        changed = replace(
            changed,
            progress=moved.fraction,
            bytes_done=moved.done,
            bytes_total=moved.total,
            bytes_per_s=moved.per_s,
        )
    if detail is not None:
        changed = replace(changed, detail=detail)
    draft.put(changed)
    draft.alive()
    if kept is not None:
        draft.instance = known_by(draft.instance, kept, request.lane)
    if replace(changed, last_progress_at_ms=request.last_progress_at_ms) != request:
        draft.tell(
            "request.progress",
            request_id,
            operation=request.operation.value,
            phase=changed.phase,
            progress=changed.progress,
            detail=changed.detail,
            **({} if changed.bytes_done is None else _bytes(changed)),
        )
    return draft.change(changed)


_NOTHING_MOVED: Final[dict[str, Any]] = {
    "progress": None,
    "bytes_done": None,
    "bytes_total": None,
    "bytes_per_s": None,
}


def _bytes(request: Request) -> dict[str, int | None]:
    return {"bytes_done": request.bytes_done, "bytes_total": request.bytes_total, "bytes_per_s": request.bytes_per_s}


def known_by(instance: Instance, kept: Kept, lane: Lane) -> Instance:
    """The instance with what is to be kept of it by a request of that lane.

    What is plugged in is the component changes' to say, and all the rest of the spec the state changes': the two may be
    served beside each other, and neither must undo what the other has kept since it read the spec.
    """
    values = ((name, getattr(kept, name)) for name in kept.__struct_fields__)
    named = {name: value for name, value in values if value is not msgspec.UNSET}
    if isinstance(kept.spec, Spec) and instance.spec is not None:
        mine, theirs = (instance.spec, kept.spec) if lane is Lane.COMPONENT else (kept.spec, instance.spec)
        named["spec"] = replace(mine, disks=theirs.disks, interfaces=theirs.interfaces)
    return replace(instance, **named)


def finish(
    instance: Instance,
    request_id: str,
    fence: int,
    outcome: Outcome,
    policy: CompiledPolicy,
    now_ms: int,
    *,
    message: str | None = None,
    power_state: PowerState | None = None,
    arrived: bool = False,
) -> Change[Request | StaleFence]:
    """Note how serving a request came out, and judge what waits again.

    `power_state` is what the hypervisor shows now, where the worker knows; `arrived` says of one of `ARRIVES` that
    succeeded that the instance is on another host of ours, where its vm_state is what it was. An unknown outcome is not
    an end (law 10): the request keeps its place until it is finished with another.
    """
    request = _held(instance, request_id, fence)
    if request is None:
        return _stale(instance, request_id, fence, now_ms, "finish")
    draft = Draft(instance, now_ms)
    if power_state is not None:
        draft.instance = replace(draft.instance, power_state=power_state)
    if outcome is Outcome.UNKNOWN:
        # No sign of life: its worker lives, but what it asked for gave no answer, and may be taken over.
        kept = draft.put(replace(request, status=Status.UNKNOWN, message=message))
        draft.tell("request.unknown", request.id, operation=request.operation.value, message=message)
        return draft.change(kept)
    draft.alive()
    if request.lane is Lane.STATE:
        _settle(draft, request, outcome, message, arrived=arrived)
        restarting.heed_request(draft, request, outcome)
    draft.end(request, *_end(request, outcome, message))
    judge_again(draft, policy)
    return draft.change(draft.requests[request.id])


def _end(request: Request, outcome: Outcome, message: str | None) -> tuple[Status, str | None, str | None]:
    match outcome:
        case Outcome.SUCCEEDED:
            return Status.SUCCEEDED, None, message
        case Outcome.INTERRUPTED if request.interrupted_for is not None:
            return Status.SUPERSEDED, "superseded", message or f"Stopped half-way for {request.interrupted_for}."
        case Outcome.INTERRUPTED:
            return Status.CANCELLED, "interrupted", message or "Stopped half-way, and undone."
        case _:
            return Status.FAILED, "failed", message


def _settle(draft: Draft, request: Request, outcome: Outcome, message: str | None, *, arrived: bool) -> None:
    """Move the instance to where the outcome leads."""
    before = draft.instance
    state, memory = before.vm_state, before.memory
    if outcome is Outcome.SUCCEEDED and not (arrived and request.operation in ARRIVES):
        state, memory = land(request.operation, state, memory)
    elif outcome is Outcome.FAILED:
        state = CATALOGUE[request.operation].on_failure or state
    _move(draft, state, memory, message if outcome is Outcome.FAILED else None, request.id)


def _move(draft: Draft, state: VmState, memory: Memory, error: str | None, request_id: str | None = None) -> None:
    before = draft.instance
    after = before.come_to(state, memory)
    in_error = VmState.ERROR in (state, *after.memory)
    draft.instance = replace(after, error=(error or before.error) if in_error else None)
    if state is not before.vm_state:
        draft.instance = replace(draft.instance, state_since_ms=draft.now_ms)
        draft.tell("instance.state", request_id, vm_state=state.value, before=before.vm_state.value)


def observe(instance: Instance, event: GuestEvent, policy: CompiledPolicy, now_ms: int) -> Change[None]:
    """Note what the hypervisor told of its own accord, and judge what waits again.

    A guest that powers itself off is stopped; one that panicked, or whose process is gone, is in error, since only its
    owner can say what it should be: what they said beforehand (`restart`) is planned here. One that was resized stays
    so, and can be confirmed or reverted as before. What is in flight goes on: its worker finds what is there.
    """
    draft = Draft(instance, now_ms)
    state, memory = instance.vm_state, instance.memory
    power, error = instance.power_state, None
    match event:
        case GuestEvent.STOPPED:
            state, power = VmState.STOPPED, PowerState.SHUTDOWN
        case GuestEvent.CRASHED:
            state, power, error = VmState.ERROR, PowerState.CRASHED, "The guest crashed."
        case GuestEvent.VANISHED:
            state, power, error = VmState.ERROR, PowerState.NONE, "What held the guest ended unexpectedly."
        case GuestEvent.RESET:
            pass
    if instance.vm_state not in LEFT_AT_END:
        state, error = instance.vm_state, None
    if event is not GuestEvent.RESET:
        memory = without_guest(state, memory)
    draft.alive()
    draft.tell(f"guest.{event.value}")
    draft.instance = replace(draft.instance, power_state=power)
    _move(draft, state, memory, error)
    restarting.heed_end(draft, instance, event)
    if event is not GuestEvent.RESET:
        judge_again(draft, policy)
    return draft.change(None)


def cancel(instance: Instance, request_id: str, policy: CompiledPolicy, by: str, now_ms: int) -> Change[Cancellation]:
    """Withdraw a request: at once if it waits, by asking its worker if that can stop half-way, else not at all."""
    known = (*instance.outstanding, *instance.held)
    request = next((other for other in known if other.id == request_id), None)
    if request is None:
        return Change(instance=instance, answer=Cancellation.TOO_LATE)
    draft = Draft(instance, now_ms)
    if request.status not in SERVED:
        draft.end(request, Status.CANCELLED, "cancelled", f"Cancelled by {by}.")
        judge_again(draft, policy)
        return draft.change(Cancellation.CANCELLED)
    if not CATALOGUE[request.operation].interruptible:
        return Change(instance=instance, answer=Cancellation.TOO_LATE)
    if request.interrupt_at_ms is None:
        draft.put(replace(request, interrupt_at_ms=now_ms))
        draft.tell("request.interrupting", request.id, by=by)
        return draft.change(Cancellation.STOPPING)
    return Change(instance=instance, answer=Cancellation.STOPPING)


def expire(
    instance: Instance, policy: CompiledPolicy, now_ms: int, *, host_reachable: bool = True
) -> Change[tuple[str, ...]]:
    """Do what time demands: fence what was asked to stop and did not confirm, and judge what is held.

    The answer is the ids of the requests that ended or were admitted. Where there is nothing to do, the instance comes
    back as it is; otherwise there may be more to do.
    """
    deadline = _interrupt_deadline_ms(instance)
    if deadline is None or deadline > now_ms:
        if instance.held_due_ms is not None and instance.held_due_ms <= now_ms:
            return judge_held(instance, policy, now_ms, host_reachable=host_reachable)
        return Change(instance=instance, answer=())
    draft = Draft(instance, now_ms)
    due = next(request for request in instance.outstanding if request.interrupt_deadline_ms == deadline)
    fenced = draft.fence_off(due.interrupted_for, "It was asked to stop and did not confirm in time.")
    judge_again(draft, policy)
    return draft.change(fenced)


def stir(instance: Instance, now_ms: int) -> Change[None]:
    """Have `expire` judge what is held at once: something has changed that is not kept with the instance."""
    if not instance.held:
        return Change(instance=instance, answer=None)
    return Draft(instance, now_ms).change(None)


def next_deadline_ms(instance: Instance) -> int | None:
    """When `expire` has something to do next, or None."""
    moments = (_interrupt_deadline_ms(instance), instance.held_due_ms)
    return min((moment for moment in moments if moment is not None), default=None)


def _interrupt_deadline_ms(instance: Instance) -> int | None:
    deadlines = [
        request.interrupt_deadline_ms for request in instance.outstanding if request.interrupt_deadline_ms is not None
    ]
    return min(deadlines, default=None)


def rejudge(instance: Instance, policy: CompiledPolicy, now_ms: int) -> Change[tuple[str, ...]]:
    """Judge what waits again, by a policy that has just come into force; the answer is the ids of what is cancelled."""
    draft = Draft(instance, now_ms)
    cancelled = judge_again(draft, policy)
    if not cancelled and not instance.held:
        return Change(instance=instance, answer=())
    return draft.change(cancelled)


def relabel(
    instance: Instance,
    by: str,
    now_ms: int,
    *,
    tags: tuple[str, ...] | None = None,
    blocked_operations: tuple[Operation, ...] | None = None,
    restart: RestartPolicy | None = None,
) -> Change[Instance]:
    """Change the tags of an instance, what is blocked for it, or its restart policy; None leaves them as they are."""
    named = {
        name: value
        for name, value in (("tags", tags), ("blocked_operations", blocked_operations), ("restart", restart))
        if value is not None and value != getattr(instance, name)
    }
    if not named:
        return Change(instance=instance, answer=instance)
    draft = Draft(replace(instance, **named), now_ms)
    draft.tell("instance.relabelled", None, by=by, **msgspec.to_builtins(named))
    change = draft.change(None)
    return Change(instance=change.instance, events=change.events, answer=change.instance)


def adopt(instance: Instance, now_ms: int) -> Change[tuple[Request, ...]]:
    """Take over what a worker that is gone was serving; the answer is what has to be looked into.

    The fence grows, so that the old worker cannot act if it was only thought gone, and each request waits in `unknown`
    under the new fence. Its age starts afresh: how long nobody watched says nothing about the guest (law 6).
    """
    if not any(request.status in SERVED for request in instance.outstanding):
        return Change(instance=instance, answer=())
    draft = Draft(instance, now_ms)
    fence = instance.fence + 1
    draft.instance = replace(instance, fence=fence)
    for request in instance.outstanding:
        if request.status in SERVED:
            draft.put(replace(request, status=Status.UNKNOWN, fence=fence, last_progress_at_ms=now_ms))
    draft.alive()
    served = tuple(request for request in draft.instance.outstanding if request.status in SERVED)
    draft.tell("instance.adopted", None, fence=fence, requests=[request.id for request in served])
    return draft.change(served)


def _held(instance: Instance, request_id: str, fence: int) -> Request | None:
    """The request, if its worker still has the right to act on it."""
    if fence != instance.fence:
        return None
    for request in instance.outstanding:
        if request.id == request_id and request.status in SERVED and request.fence == fence:
            return request
    return None


def _stale(instance: Instance, request_id: str, fence: int, now_ms: int, attempt: str) -> Change[Request | StaleFence]:
    """Refuse a worker that has lost its right, and record that it tried (law 4)."""
    draft = Draft(instance, now_ms)
    draft.generation = instance.generation
    draft.tell("request.fenced", request_id, fence=fence, current_fence=instance.fence, attempt=attempt)
    answer = StaleFence(request_id=request_id, fence=fence, current_fence=instance.fence)
    return Change(instance=instance, events=tuple(draft.events), answer=answer)
