"""Records as they go over the wire. Pure: the present time is an argument."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

from interlock.api import schemas
from interlock.core import records, upkeep
from interlock.core.operations import Operation
from interlock.core.states import VmState
from interlock.ports import Page, Token, Volume
from interlock.service.answers import Answer, Stuck
from interlock.service.wishes import NewForward


def timestamp(at_ms: int) -> str:
    """Whole milliseconds since the epoch as RFC 3339."""
    return f"{datetime.fromtimestamp(at_ms // 1000, UTC).isoformat()[:19]}.{at_ms % 1000:03d}Z"


def maybe(at_ms: int | None) -> str | None:
    return None if at_ms is None else timestamp(at_ms)


def request(one: records.Request) -> schemas.Request:
    return schemas.Request(
        id=one.id,
        instance=one.instance_id,
        operation=one.operation,
        parameters=one.parameters,
        status=one.status,
        requested_by=one.requested_by,
        role=one.role,
        rule=one.rule,
        preempts=one.preempts,
        phase=one.phase,
        progress=one.progress,
        bytes_done=one.bytes_done,
        bytes_total=one.bytes_total,
        bytes_per_s=one.bytes_per_s,
        detail=one.detail,
        admitted_at=timestamp(one.admitted_at_ms),
        held_until_at=maybe(one.held_until_ms),
        taken_at=maybe(one.taken_at_ms),
        last_sign_of_life_at=maybe(one.last_progress_at_ms),
        interrupt_at=maybe(one.interrupt_at_ms),
        interrupt_deadline_at=maybe(one.interrupt_deadline_ms),
        interrupted_for=one.interrupted_for,
        ended_at=maybe(one.ended_at_ms),
        duration_s=None if one.ended_at_ms is None else (one.ended_at_ms - one.admitted_at_ms) / 1000,
        reason=one.reason,
        message=one.message,
    )


def instance(one: records.Instance, times: upkeep.UpkeepTimes) -> schemas.Instance:
    """An instance, with what will happen to it by itself after those times."""
    spec = one.spec
    due = upkeep.due(one, times)
    return schemas.Instance(
        id=one.id,
        name=one.name,
        project=one.project,
        host=one.host,
        vm_state=one.vm_state,
        prior_vm_state=one.prior_vm_state,
        further_vm_states=one.further_vm_states,
        task_state=one.task_state,
        power_state=one.power_state,
        generation=one.generation,
        created_at=timestamp(one.created_at_ms),
        updated_at=timestamp(one.updated_at_ms),
        locked_by=one.locked_by,
        blocked_operations=one.blocked_operations,
        tags=one.tags,
        metadata=one.metadata,
        error=one.error if one.vm_state is VmState.ERROR else None,
        launched_at=maybe(one.launched_at_ms),
        restart=one.restart,
        restarts=0 if one.restarts is None else one.restarts.count,
        restart_due_at=maybe(None if one.restarts is None else one.restarts.due_at_ms),
        image=None if spec is None else _reference(spec.image),
        vcpus=0 if spec is None else spec.vcpus,
        memory_mib=0 if spec is None else spec.memory_mib,
        root_gib=0 if spec is None else spec.root_gib,
        root_shared=spec is not None and spec.has_root and spec.shared is not None,
        forwards=tuple(
            NewForward(host_port=forward.host_port, guest_port=forward.guest_port)
            for forward in (spec.forwards if spec is not None else ())
        ),
        seeded=spec is not None and spec.seed is not None,
        volumes=tuple(disk.id for disk in (spec.disks if spec is not None else ())),
        interfaces=tuple(
            schemas.Interface(id=plugged.id, mac=plugged.mac)
            for plugged in (spec.interfaces if spec is not None else ())
        ),
        prior_size=None if one.prior_spec is None else _size(one.prior_spec),
        due=None if due is None else schemas.Due(operation=due.wishes[0].operation, at=timestamp(due.at_ms)),
        shelved_image=None if one.shelved_image is None else _reference(one.shelved_image),
        outstanding=tuple(request(outstanding) for outstanding in one.outstanding),
        held=tuple(request(held) for held in one.held),
    )


def _size(spec: records.Spec) -> schemas.Size:
    return schemas.Size(vcpus=spec.vcpus, memory_mib=spec.memory_mib, root_gib=spec.root_gib)


def _reference(image: records.Image) -> schemas.ImageReference:
    return schemas.ImageReference(id=image.id, name=image.name)


def instance_page(page: Page, times: upkeep.UpkeepTimes) -> schemas.InstancePage:
    return schemas.InstancePage(items=tuple(instance(one, times) for one in page.items), next_cursor=page.next_cursor)


def request_page(page: Page) -> schemas.RequestPage:
    return schemas.RequestPage(items=tuple(request(one) for one in page.items), next_cursor=page.next_cursor)


def admitted(answer: records.Admitted, now: records.Request | None = None) -> schemas.Admitted:
    """An admission, with its request as it is by now if that is known."""
    return schemas.Admitted(
        rule=answer.rule,
        because=answer.because,
        request=request(now or answer.request),
        supersedes=answer.supersedes,
        cancels=answer.cancels,
    )


def redundant(answer: records.Redundant, now_ms: int) -> schemas.Redundant:
    return schemas.Redundant(
        rule=answer.rule,
        reason=answer.reason,
        because=answer.because,
        request=None if answer.request is None else request(answer.request),
        allowed_at=maybe(answer.allowed_at_ms),
        retry_after_s=_until(answer.allowed_at_ms, now_ms),
    )


def held(of: records.Instance, answer: records.Held, now: records.Request, now_ms: int) -> schemas.Held:
    """What is held, with its request as it is by now."""
    denied = answer.denied
    return schemas.Held(
        request=request(now),
        rule=denied.rule,
        reason=denied.reason,
        because=denied.because,
        detail=sentence(of, denied, now_ms),
        blocked_by=blocker(denied.blocked_by),
        allowed_at=maybe(denied.allowed_at_ms),
        retry_after_s=_until(denied.allowed_at_ms, now_ms),
        until_at=timestamp(answer.request.held_until_ms or now_ms),
    )


def refusal(answer: Answer, path: str, now_ms: int) -> schemas.Refusal:
    denied = answer.disposition
    assert isinstance(denied, records.Denied)
    return schemas.Refusal(
        type="urn:interlock:problem:denied",
        title="The operation is not allowed now",
        status=409,
        detail=sentence(answer.instance, denied, now_ms),
        instance=path,
        operation=denied.operation,
        reason=denied.reason,
        rule=denied.rule,
        because=denied.because,
        vm_state=denied.vm_state,
        foreseen=denied.foreseen,
        blocked_by=blocker(denied.blocked_by),
        allowed_at=maybe(denied.allowed_at_ms),
        retry_after_s=_until(denied.allowed_at_ms, now_ms),
        allowed_instead=answer.allowed_instead,
    )


def blocker(one: records.Request | None) -> schemas.Blocker | None:
    if one is None:
        return None
    return schemas.Blocker(
        request=one.id,
        operation=one.operation,
        phase=one.phase,
        status=one.status,
        since=timestamp(one.taken_at_ms or one.admitted_at_ms),
        last_sign_of_life=maybe(one.last_progress_at_ms),
        by=one.requested_by,
    )


def sentence(of: records.Instance, denied: records.Denied, now_ms: int) -> str:
    """A refusal in one line for people: what blocks, whose it is, since when, and when to come back."""
    will = "will be" if denied.foreseen else "is"
    parts = [f"{denied.operation.value} is refused: {of.name} {will} {denied.vm_state.value}"]
    one = denied.blocked_by
    if one is not None:
        doing = f"in {one.phase}" if one.phase else one.status.value
        since = max(0, now_ms - (one.taken_at_ms or one.admitted_at_ms)) / 1000
        parts.append(f"{one.operation.value} {one.id} by {one.requested_by} has been {doing} for {since:.0f} s")
        if one.last_progress_at_ms is not None:
            parts[-1] += f" and last showed life {max(0, now_ms - one.last_progress_at_ms) / 1000:.0f} s ago"
    if denied.allowed_at_ms is not None:
        left = max(0, denied.allowed_at_ms - now_ms) / 1000
        parts.append(f"it is allowed at {timestamp(denied.allowed_at_ms)}, in {left:.0f} s")
    return "; ".join(parts) + "." + (f" {denied.because}" if denied.because else "")


def _until(at_ms: int | None, now_ms: int) -> float | None:
    return None if at_ms is None else max(0, at_ms - now_ms) / 1000


def allowed(
    of: records.Instance, answers: dict[Operation, records.Disposition], now_ms: int, *, host_reachable: bool
) -> schemas.AllowedOperations:
    return schemas.AllowedOperations(
        instance=of.id,
        name=of.name,
        generation=of.generation,
        vm_state=of.vm_state,
        task_state=of.task_state,
        at=timestamp(now_ms),
        host_reachable=host_reachable,
        operations=tuple(_allowed(of, operation, one, now_ms) for operation, one in answers.items()),
    )


def _allowed(
    of: records.Instance, operation: Operation, one: records.Disposition, now_ms: int
) -> schemas.AllowedOperation:
    facts: dict[str, Any] = {
        "reason": None,
        "vm_state": of.vm_state,
        "foreseen": False,
        "blocked_by": None,
        "allowed_at": None,
        "retry_after_s": None,
        "supersedes": (),
        "cancels": (),
    }
    assert not isinstance(one, records.Held), "nothing is held that is only asked about"
    match one:
        case records.Admitted():
            facts |= {"disposition": "admitted", "supersedes": one.supersedes, "cancels": one.cancels}
            facts["detail"] = f"{operation.value} would be admitted."
        case records.Redundant():
            facts |= {"disposition": "redundant", "reason": one.reason, "blocked_by": blocker(one.request)}
            facts |= {"allowed_at": maybe(one.allowed_at_ms), "retry_after_s": _until(one.allowed_at_ms, now_ms)}
            facts["detail"] = one.because or f"{operation.value} would change nothing."
        case records.Denied():
            facts |= {"disposition": "denied", "reason": one.reason, "blocked_by": blocker(one.blocked_by)}
            facts |= {"vm_state": one.vm_state, "foreseen": one.foreseen, "detail": sentence(of, one, now_ms)}
            facts |= {"allowed_at": maybe(one.allowed_at_ms), "retry_after_s": _until(one.allowed_at_ms, now_ms)}
    return schemas.AllowedOperation(operation=operation, rule=one.rule, because=one.because, **facts)


def stuck(one: Stuck, now_ms: int) -> schemas.Stuck:
    silent_s = max(0, now_ms - one.silent_since_ms) / 1000
    doing = one.request
    why = f"{doing.operation.value} has shown no life in {doing.phase or 'its phase'} for {silent_s:.0f} s."
    return schemas.Stuck(
        instance=one.instance.id,
        name=one.instance.name,
        vm_state=one.instance.vm_state,
        task_state=one.instance.task_state,
        request=request(doing),
        why=f"{why} {doing.message}" if doing.message else why,
        silent_since_at=timestamp(one.silent_since_ms),
        silent_s=silent_s,
        allowed=one.allowed,
        takes_over=one.takes_over,
    )


def event(one: records.Event) -> schemas.Event:
    return schemas.Event(
        sequence=one.sequence,
        kind=one.kind,
        instance=one.instance_id,
        request=one.request_id,
        at=timestamp(one.at_ms),
        generation=one.generation,
        data=one.data,
    )


def image(one: records.Image) -> schemas.Image:
    return schemas.Image(
        id=one.id,
        name=one.name,
        kind=cast("Any", one.kind),
        format=one.format,
        cmdline=one.cmdline,
        size_bytes=one.size_bytes,
        stored_bytes=one.stored_bytes,
        sha256=one.sha256,
        converted_from=one.converted_from,
        created_at=timestamp(one.created_at_ms),
        project=one.project,
        source_instance=one.source_instance,
        backup_type=one.backup_type,
    )


def volume(one: Volume) -> schemas.Volume:
    return schemas.Volume(
        id=one.id,
        name=one.name,
        project=one.project,
        size_bytes=one.size_bytes,
        attached_to=one.attached_to,
        created_at=timestamp(one.created_at_ms),
    )


def token(one: Token) -> schemas.Token:
    return schemas.Token(
        id=one.id, name=one.name, role=one.role, project=one.project, created_at=timestamp(one.created_at_ms)
    )
