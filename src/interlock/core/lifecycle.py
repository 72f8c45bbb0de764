"""The life cycle of admitted requests: taken, in progress, finished, cancelled, expired.

Each function takes an instance and an event, and returns the change. A worker that reports with another fence than the
instance's has lost the right to act, and gets `StaleFence`.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from interlock.core import restarts
from interlock.core.errors import BrokenInvariant
from interlock.core.guest_events import STATE_UNCHANGED, after_event, with_trouble_noted
from interlock.core.holds import NOT_COUNTED, Counts, judge_held
from interlock.core.labels import check_lock, check_tags
from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.outcomes import end_of, fail_overdue, interrupt_overdue, move, next_limit_ms, settle
from interlock.core.policy import CompiledPolicy
from interlock.core.reconciliation import without_devices
from interlock.core.records import (
    SERVED,
    Cancellation,
    Change,
    Evacuated,
    GuestEvent,
    Instance,
    InstanceUpdate,
    Outcome,
    Request,
    Spec,
    StaleFence,
    Status,
    TransferProgress,
)
from interlock.core.request_queue import Draft, first_phase, is_judged, judge_again, next_served, replace
from interlock.core.restart_policy import Evacuate, RestartPolicy
from interlock.core.roles import Role
from interlock.core.state_stack import without_guest
from interlock.core.states import LEFT_AT_END, GuestTrouble, PowerState


def take(instance: Instance, lane: Lane | None, now_ms: int, *, host_reachable: bool = True) -> Change[Request | None]:
    """Give the next request of `lane` (None: of any) to a worker, with the instance's present fence.

    The answer is None if no request can be performed now; the instance is then unchanged. Nor is one given before the
    queue has been evaluated for a host that was fenced or is back since, which `expire` does.
    """
    request = next_served(instance, lane) if is_judged(instance, host_reachable=host_reachable) else None
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
    draft.emit("request.taken", taken.id, operation=taken.operation.value, phase=taken.phase, fence=taken.fence)
    return draft.change(taken)


def progress(
    instance: Instance,
    request_id: str,
    fence: int,
    now_ms: int,
    *,
    phase: str | None = None,
    moved: TransferProgress | None = None,
    detail: str | None = None,
    kept: InstanceUpdate | None = None,
) -> Change[Request | StaleFence]:
    """Record progress of a request in flight: a new phase, bytes transferred, a detail, or only a heartbeat.

    `kept` updates the instance, for an operation that changes it step by step.

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
            detail=moved.detail or changed.detail,
            warning=moved.warning,
        )
    if detail is not None:
        changed = replace(changed, detail=detail)
    draft.put(changed)
    draft.alive()
    if kept is not None:
        draft.instance = apply_update(draft.instance, kept, request.lane)
        if isinstance(kept.evacuated, Evacuated):
            lost = list(kept.evacuated.lost)
            draft.emit("instance.evacuated", request_id, from_host=instance.host, host=draft.instance.host, lost=lost)
    if replace(changed, last_progress_at_ms=request.last_progress_at_ms) != request:
        draft.emit(
            "request.progress",
            request_id,
            operation=request.operation.value,
            phase=changed.phase,
            progress=changed.progress,
            detail=changed.detail,
            **({} if changed.bytes_done is None else _bytes(changed)),
            **({} if changed.warning is None else {"warning": changed.warning}),
        )
    return draft.change(changed)


_NOTHING_MOVED: Final[dict[str, Any]] = {
    "progress": None,
    "bytes_done": None,
    "bytes_total": None,
    "bytes_per_s": None,
    "warning": None,
}


def _bytes(request: Request) -> dict[str, int | None]:
    return {"bytes_done": request.bytes_done, "bytes_total": request.bytes_total, "bytes_per_s": request.bytes_per_s}


def apply_update(instance: Instance, kept: InstanceUpdate, lane: Lane) -> Instance:
    """Return the instance with an update by a request of that lane.

    Component changes own the disks, interfaces and forwards of the spec, and state changes the rest: the two may run
    concurrently, and neither must overwrite the other's changes.
    """
    values = ((name, getattr(kept, name)) for name in kept.__struct_fields__)
    named = {name: value for name, value in values if value is not msgspec.UNSET}
    if isinstance(kept.spec, Spec) and instance.spec is not None:
        mine, theirs = (instance.spec, kept.spec) if lane is Lane.COMPONENT else (kept.spec, instance.spec)
        owned = {name: getattr(theirs, name) for name in ("disks", "interfaces", "primary", "forwards")}
        named["spec"] = replace(mine, **owned)
    after = replace(instance, **named)
    if after.detaching and after.spec is not None:
        there = {one.id for one in after.spec.disks} | {one.id for one in after.spec.interfaces}
        after = replace(after, detaching=tuple(one for one in after.detaching if one in there))
    return after


def complete_detachments(instance: Instance, now_ms: int) -> Change[Instance]:
    """Complete pending detachments after the guest was powered off."""
    if not instance.detaching:
        return Change(instance=instance, answer=instance)
    draft = Draft(instance, now_ms)
    _complete_detachments(draft)
    change = draft.change(None)
    return Change(instance=change.instance, events=change.events, answer=change.instance)


def _complete_detachments(draft: Draft) -> None:
    devices = draft.instance.detaching
    if devices:
        draft.instance = without_devices(draft.instance, devices)
        draft.emit("guest.changed", None, detached=list(devices))


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
    host_reachable: bool = True,
) -> Change[Request | StaleFence]:
    """Record the outcome of a request, and re-evaluate the queue.

    `power_state` is the hypervisor's, if the worker knows it; `arrived` says that the instance is now on another host
    of this server with its vm_state unchanged (operations in `ARRIVES`). An unknown outcome does not end the request
    (law 10): it keeps its place until it is finished with another.
    """
    request = _held(instance, request_id, fence)
    if request is None:
        return _stale(instance, request_id, fence, now_ms, "finish")
    draft = Draft(instance, now_ms, host_reachable=host_reachable)
    if power_state is not None:
        draft.instance = replace(draft.instance, power_state=power_state)
    if outcome is Outcome.UNKNOWN:
        # Not a sign of life: the hypervisor call timed out, and the request may be taken over.
        kept = draft.put(replace(request, status=Status.UNKNOWN, message=message))
        draft.emit("request.unknown", request.id, operation=request.operation.value, message=message)
        return draft.change(kept)
    draft.alive()
    if outcome is Outcome.SUCCEEDED and draft.instance.guest_trouble is GuestTrouble.NOT_RESPONDING:
        draft.instance = replace(draft.instance, guest_trouble=None, guest_trouble_since_ms=None)
    if request.lane is Lane.STATE:
        settle(draft, request, outcome, message, arrived=arrived)
        restarts.on_request_end(draft, request, outcome)
    draft.end(request, *end_of(request, outcome, message))
    judge_again(draft, policy)
    return draft.change(draft.requests[request.id])


def observe(
    instance: Instance, event: GuestEvent, policy: CompiledPolicy, now_ms: int, *, host_reachable: bool = True
) -> Change[None]:
    """Record a hypervisor event, and re-evaluate the queue.

    An instance whose guest powers itself off is stopped; one whose guest panicked or whose QEMU process is gone is in
    error, and its restart policy is applied. A resized instance stays resized, and can still be confirmed or reverted.
    Requests in flight go on.

    `changed` changes nothing here: the guest has to be inspected, see `reconciliation`. Neither does an end that is on
    record: a hypervisor may report it twice, and an inspection may find it before it is reported.
    """
    if event in STATE_UNCHANGED:
        return _note_trouble(instance, event, now_ms)
    state, power, error = after_event(instance, event)
    on_record = not instance.executing and instance.power_state is power and not instance.detaching
    # The guest that a worker has just started may end before its request does: that end is not on record yet.
    served = any(one.status in SERVED for one in instance.outstanding)
    if on_record and not served and event is not GuestEvent.RESET:
        return Change(instance=instance, answer=None)
    draft = Draft(instance, now_ms, host_reachable=host_reachable)
    memory = instance.state_stack
    if instance.vm_state not in LEFT_AT_END:
        state, error = instance.vm_state, None
    if event is not GuestEvent.RESET:
        memory = without_guest(state, memory)
    draft.alive()
    draft.emit(f"guest.{event.value}")
    if event in {GuestEvent.STOPPED, GuestEvent.VANISHED, GuestEvent.LEASE_ENDED}:
        # The QEMU process of a crashed guest is kept, with its disks open.
        _complete_detachments(draft)
    draft.instance = replace(draft.instance, power_state=power)
    move(draft, state, memory, error)
    restarts.on_guest_end(draft, instance, event)
    if event is not GuestEvent.RESET:
        judge_again(draft, policy)
    return draft.change(None)


def _note_trouble(instance: Instance, event: GuestEvent, now_ms: int) -> Change[None]:
    """Record the beginning or end of a guest's fault: not responding, or halted. Repeated events change nothing."""
    after = with_trouble_noted(instance, event, now_ms)
    if after is instance:
        return Change(instance=instance, answer=None)
    draft = Draft(after, now_ms)
    draft.emit(f"guest.{event.value}")
    return draft.change(None)


def cancel(
    instance: Instance, request_id: str, policy: CompiledPolicy, by: str, now_ms: int, *, host_reachable: bool = True
) -> Change[Cancellation]:
    """Cancel a request: at once if it is queued or held, by interrupting its worker if that is possible, else not."""
    known = (*instance.outstanding, *instance.held)
    request = next((other for other in known if other.id == request_id), None)
    if request is None:
        return Change(instance=instance, answer=Cancellation.TOO_LATE)
    draft = Draft(instance, now_ms, host_reachable=host_reachable)
    if request.status not in SERVED:
        draft.end(request, Status.CANCELLED, "cancelled", f"Cancelled by {by}.")
        judge_again(draft, policy)
        return draft.change(Cancellation.CANCELLED)
    if not CATALOGUE[request.operation].interruptible:
        return Change(instance=instance, answer=Cancellation.TOO_LATE)
    if request.interrupt_at_ms is None:
        draft.put(replace(request, interrupt_at_ms=now_ms))
        draft.emit("request.interrupting", request.id, by=by)
        return draft.change(Cancellation.STOPPING)
    return Change(instance=instance, answer=Cancellation.STOPPING)


def expire(
    instance: Instance,
    policy: CompiledPolicy,
    now_ms: int,
    *,
    host_reachable: bool = True,
    counts: Counts = NOT_COUNTED,
) -> Change[tuple[str, ...]]:
    """Apply what is due: judge the queue again if its host was fenced or is back, apply deadlines, judge held requests.

    `counts` are the outstanding requests around the instance, if the policy looks at them. The answer is the ids of the
    requests that ended or were admitted. The instance is unchanged if nothing is due; otherwise call again, since there
    may be more to do.
    """
    if not is_judged(instance, host_reachable=host_reachable):
        return rejudge(instance, policy, now_ms, host_reachable=host_reachable)
    limit_ms = next_limit_ms(instance)
    if limit_ms is not None and limit_ms <= now_ms:
        draft = Draft(instance, now_ms, host_reachable=host_reachable)
        interrupt_overdue(draft)
        return draft.change(())
    deadline = _interrupt_deadline_ms(instance)
    if deadline is None or deadline > now_ms:
        if instance.held_due_ms is not None and instance.held_due_ms <= now_ms:
            return judge_held(instance, policy, now_ms, host_reachable=host_reachable, counts=counts)
        return Change(instance=instance, answer=())
    draft = Draft(instance, now_ms, host_reachable=host_reachable)
    due = next(request for request in instance.outstanding if request.interrupt_deadline_ms == deadline)
    if due.overdue and due.interrupted_for is None:
        fenced = fail_overdue(draft, due)
    else:
        fenced = draft.fence_off(due.interrupted_for, "It was interrupted and did not stop in time.")
    judge_again(draft, policy)
    return draft.change(fenced)


def next_deadline_ms(instance: Instance) -> int | None:
    """Return when to call `expire` next, or None."""
    if not instance.outstanding:
        return instance.held_due_ms
    moments = (next_limit_ms(instance), _interrupt_deadline_ms(instance), instance.held_due_ms)
    return min((moment for moment in moments if moment is not None), default=None)


def _interrupt_deadline_ms(instance: Instance) -> int | None:
    deadlines = [
        request.interrupt_deadline_ms for request in instance.outstanding if request.interrupt_deadline_ms is not None
    ]
    return min(deadlines, default=None)


def rejudge(
    instance: Instance, policy: CompiledPolicy, now_ms: int, *, host_reachable: bool = True
) -> Change[tuple[str, ...]]:
    """Re-evaluate the queue by a new policy, or for a host that was fenced or is back; return the cancelled ids."""
    draft = Draft(instance, now_ms, host_reachable=host_reachable)
    cancelled = judge_again(draft, policy)
    if draft.instance == instance and not instance.held:
        return Change(instance=instance, answer=())
    return draft.change(cancelled)


def relabel(
    instance: Instance,
    policy: CompiledPolicy,
    by: str,
    now_ms: int,
    *,
    role: Role = Role.MEMBER,
    host_reachable: bool = True,
    tags: tuple[str, ...] | None = None,
    blocked_operations: tuple[Operation, ...] | None = None,
    restart: RestartPolicy | None = None,
    evacuate: Evacuate | None = None,
    apart_from: tuple[str, ...] | None = None,
) -> Change[Instance]:
    """Change settings that an owner may change at any time; None leaves one unchanged.

    With new tags the queue is evaluated again: what `policy` does not permit with them is cancelled at once, and never
    after an earlier request has succeeded (law 2). Blocked operations restrict new submissions only, as locks do.

    Raises:
        Forbidden: a lock binds the caller, or a tag is protected from it (`core.labels`).
    """
    named = {
        name: value
        for name, value in (
            ("tags", tags),
            ("blocked_operations", blocked_operations),
            ("restart", restart),
            ("evacuate", evacuate),
            ("apart_from", apart_from),
        )
        if value is not None and value != getattr(instance, name)
    }
    if not named:
        return Change(instance=instance, answer=instance)
    check_lock(instance, role)
    if tags is not None:
        check_tags(policy, role, instance.tags, tags)
    draft = Draft(replace(instance, **named), now_ms, host_reachable=host_reachable)
    draft.emit("instance.relabelled", None, by=by, **msgspec.to_builtins(named))
    if "tags" in named:
        judge_again(draft, policy)
    change = draft.change(None)
    return Change(instance=change.instance, requests=change.requests, events=change.events, answer=change.instance)


def adopt(instance: Instance, now_ms: int) -> Change[tuple[Request, ...]]:
    """Take over the requests of a worker that is gone; the answer is those whose outcome has to be determined.

    The fence is incremented, so that the old worker cannot act if it still lives, and each request becomes `unknown`
    with the new fence. Its age starts at 0: time without a worker says nothing about the guest (law 6).
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
    draft.emit("instance.adopted", None, fence=fence, requests=[request.id for request in served])
    return draft.change(served)


def _held(instance: Instance, request_id: str, fence: int) -> Request | None:
    """Return the request, if its worker still has the right to act on it."""
    if fence != instance.fence:
        return None
    for request in instance.outstanding:
        if request.id == request_id and request.status in SERVED and request.fence == fence:
            return request
    return None


def _stale(instance: Instance, request_id: str, fence: int, now_ms: int, attempt: str) -> Change[Request | StaleFence]:
    """Reject a fenced worker, and record its attempt (law 4)."""
    draft = Draft(instance, now_ms)
    draft.generation = instance.generation
    draft.emit("request.fenced", request_id, fence=fence, current_fence=instance.fence, attempt=attempt)
    answer = StaleFence(request_id=request_id, fence=fence, current_fence=instance.fence)
    return Change(instance=instance, events=tuple(draft.events), answer=answer)
