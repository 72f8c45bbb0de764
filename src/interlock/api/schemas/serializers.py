"""Conversion of records to wire types. Pure: the present time is an argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import cache, lru_cache
from typing import Any, Final, TypeVar

import msgspec

from interlock.api.schemas import inventory, networks, responses
from interlock.api.schemas.wire import Wire
from interlock.core import records, scheduled_actions
from interlock.core.networks import mac_of, rule_text
from interlock.core.operations import Operation
from interlock.core.specs import PRIMARY
from interlock.core.states import PowerState, VmState
from interlock.ports import GuestInterface, HostState, Page, Token, Volume
from interlock.service.request_models import NewForward
from interlock.service.submission_results import TROUBLES, Stuck, SubmissionResult, host_trouble

WireT = TypeVar("WireT", bound=Wire)

WALL_CLOCK: Final[ContextVar[Callable[[int], int]]] = ContextVar("WALL_CLOCK", default=int)
"""Converts a store time to milliseconds since the epoch of the wall clock. Set for each request."""


def timestamp(at_ms: int) -> str:
    """Format a store time as RFC 3339."""
    return rfc3339(WALL_CLOCK.get()(at_ms))


def rfc3339(wall_ms: int) -> str:
    """Format milliseconds since the epoch of the wall clock."""
    seconds, ms = divmod(wall_ms, 1000)
    return f"{_to_seconds(seconds)}.{ms:03d}Z"


@lru_cache(maxsize=256)
def _to_seconds(wall_s: int) -> str:
    """Format without a fraction. Most times in a response are of the same few seconds."""
    return datetime.fromtimestamp(wall_s, UTC).isoformat()[:19]


def optional_timestamp(at_ms: int | None) -> str | None:
    return None if at_ms is None else timestamp(at_ms)


def wire(kind: type[WireT], record: object, **facts: Any) -> WireT:
    """Return a record as a wire type: `facts`, fields of the same name, and store times (`created_at_ms`) as text."""
    source: Any = type(record)
    same, times = _fields_in_common(kind, source, tuple(facts))
    facts.update({name: getattr(record, name) for name in same})
    facts.update({name: optional_timestamp(getattr(record, at_ms)) for name, at_ms in times})
    return kind(**facts)


@cache
def _fields_in_common(
    kind: type[msgspec.Struct], source: type, given: tuple[str, ...]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the fields that both types have, and the pairs of a time as text and in milliseconds, without `given`."""
    names = [name for name in kind.__struct_fields__ if name not in given]
    times = ((name, f"{stem}_ms") for name in names for stem in {name, name.removesuffix("_at")})
    return [name for name in names if hasattr(source, name)], [pair for pair in times if hasattr(source, pair[1])]


def request(one: records.Request) -> responses.Request:
    """Return a request. Field by field, since it is the body of most responses."""
    return responses.Request(
        id=one.id,
        instance=one.instance_id,
        operation=one.operation,
        parameters=one.parameters,
        status=one.status,
        requested_by=one.requested_by,
        role=one.role,
        project=one.project,
        groups=one.groups,
        windows=one.windows,
        approvals=tuple(wire(responses.Approval, each) for each in one.approvals),
        rule=one.rule,
        preempts=one.preempts,
        phase=one.phase,
        progress=one.progress,
        bytes_done=one.bytes_done,
        bytes_total=one.bytes_total,
        bytes_per_s=one.bytes_per_s,
        detail=one.detail,
        warning=one.warning,
        admitted_at=timestamp(one.admitted_at_ms),
        held_until_at=optional_timestamp(one.held_until_ms),
        taken_at=optional_timestamp(one.taken_at_ms),
        last_sign_of_life_at=optional_timestamp(one.last_progress_at_ms),
        interrupt_at=optional_timestamp(one.interrupt_at_ms),
        interrupt_deadline_at=optional_timestamp(one.interrupt_deadline_ms),
        interrupted_for=one.interrupted_for,
        ended_at=optional_timestamp(one.ended_at_ms),
        duration_s=None if one.ended_at_ms is None else (one.ended_at_ms - one.admitted_at_ms) / 1000,
        reason=one.reason,
        message=one.message,
    )


def instance(
    one: records.Instance, times: scheduled_actions.UpkeepTimes, host_state: HostState = HostState.UP
) -> responses.Instance:
    """Return an instance on a host in `host_state`, with its next scheduled action."""
    spec = one.spec
    due = scheduled_actions.due(one, times)
    return wire(
        responses.Instance,
        one,
        power_state=power_state(one, host_state),
        host_state=host_state,
        state_since_at=optional_timestamp(one.state_since_ms or None),
        lock_role=None if one.locked_by is None else one.lock_role,
        error=one.error if one.vm_state is VmState.ERROR else None,
        restarts=0 if one.restarts is None else one.restarts.count,
        restart_due_at=optional_timestamp(None if one.restarts is None else one.restarts.due_at_ms),
        image=None if spec is None else wire(responses.ImageReference, spec.image),
        vcpus=0 if spec is None else spec.vcpus,
        memory_mib=0 if spec is None else spec.memory_mib,
        root_gib=0 if spec is None else spec.root_gib,
        evacuated=one.evacuated and wire(responses.Evacuated, one.evacuated),
        root_shared=spec is not None and spec.has_root and spec.shared is not None,
        forwards=tuple(
            msgspec.convert(forward, NewForward, from_attributes=True)
            for forward in (spec.forwards if spec is not None else ())
        ),
        seeded=spec is not None and spec.seed is not None,
        volumes=tuple(disk.id for disk in (spec.disks if spec is not None else ())),
        primary=None if spec is None or spec.primary is None else interface(spec.primary),
        interfaces=tuple(interface(plugged) for plugged in (spec.interfaces if spec is not None else ())),
        prior_size=one.prior_spec and wire(responses.Size, one.prior_spec),
        due=None if due is None else responses.Due(operation=due.alternatives[0].operation, at=timestamp(due.at_ms)),
        shelved_image=one.shelved_image and wire(responses.ImageReference, one.shelved_image),
        outstanding=tuple(request(outstanding) for outstanding in one.outstanding),
        held=tuple(request(held) for held in one.held),
    )


def interface(one: records.Interface) -> networks.Interface:
    return wire(
        networks.Interface,
        one,
        network=None if one.network is None else one.network.name,
        allow=tuple(map(rule_text, one.ingress)),
    )


def addresses(one: records.Instance, reported: Sequence[GuestInterface], detail: str) -> networks.AddressList:
    first = records.Interface(id=PRIMARY, mac=mac_of(one.id))
    own = () if one.spec is None else (one.spec.primary or first, *one.spec.interfaces)
    return networks.AddressList(
        items=tuple(
            networks.InterfaceAddresses(
                id=interface.id,
                mac=interface.mac,
                network=None if interface.network is None else interface.network.name,
                leased=interface.addresses,
                reported=tuple(text for found in reported if found.mac == interface.mac for text in found.addresses),
            )
            for interface in own
        ),
        detail=detail,
    )


def power_state(one: records.Instance, host_state: HostState) -> PowerState:
    """Return the power state; unknown if the guest ran on a host that is lost or fenced."""
    ran = one.executing or one.power_state is not PowerState.NONE
    return one.power_state if host_state is HostState.UP or not ran else PowerState.UNKNOWN


def instance_page(
    page: Page, times: scheduled_actions.UpkeepTimes, host_state: Callable[[str], HostState]
) -> responses.InstancePage:
    """Return a page of instances; `host_state` returns the state of a host by name."""
    items = tuple(instance(one, times, host_state(one.host)) for one in page.items)
    return responses.InstancePage(items=items, next_cursor=page.next_cursor)


def request_page(page: Page) -> responses.RequestPage:
    return responses.RequestPage(items=tuple(request(one) for one in page.items), next_cursor=page.next_cursor)


def admitted(disposition: records.Admitted, now: records.Request, result: SubmissionResult) -> responses.Admitted:
    """Return an admission, with the present state of its request."""
    return responses.Admitted(
        rule=disposition.rule,
        because=disposition.because,
        request=request(now),
        supersedes=disposition.supersedes,
        cancels=disposition.cancels,
        loses=result.loses,
        waits_for_host=result.waits_for_host,
        password=result.password,
    )


def redundant(disposition: records.Redundant, now_ms: int) -> responses.Redundant:
    return wire(
        responses.Redundant,
        disposition,
        request=disposition.request and request(disposition.request),
        retry_after_s=_until(disposition.allowed_at_ms, now_ms),
    )


def held(of: records.Instance, disposition: records.Held, now: records.Request, now_ms: int) -> responses.Held:
    """Return a held disposition, with the present state of its request."""
    denied = disposition.denied
    return wire(
        responses.Held,
        denied,
        request=request(now),
        detail=sentence(of, denied, now_ms),
        blocked_by=blocker(denied.blocked_by),
        retry_after_s=_until(denied.allowed_at_ms, now_ms),
        until_at=timestamp(disposition.request.held_until_ms or now_ms),
    )


def refusal(result: SubmissionResult, path: str, now_ms: int) -> responses.Refusal:
    denied = result.disposition
    assert isinstance(denied, records.Denied)
    return wire(
        responses.Refusal,
        denied,
        type="urn:interlock:problem:denied",
        title="Operation denied",
        status=409,
        detail=sentence(result.instance, denied, now_ms),
        instance=path,
        blocked_by=blocker(denied.blocked_by),
        retry_after_s=_until(denied.allowed_at_ms, now_ms),
        allowed_instead=result.allowed_instead,
    )


def blocker(one: records.Request | None) -> responses.Blocker | None:
    if one is None:
        return None
    return responses.Blocker(
        request=one.id,
        operation=one.operation,
        phase=one.phase,
        status=one.status,
        since=timestamp(one.taken_at_ms or one.admitted_at_ms),
        last_sign_of_life=optional_timestamp(one.last_progress_at_ms),
        by=one.requested_by,
    )


def sentence(of: records.Instance, denied: records.Denied, now_ms: int) -> str:
    """Describe a denial in one line: the state, the blocking request, and when to retry."""
    will = "will be" if denied.foreseen else "is"
    parts = [f"{denied.operation.value} denied: {of.name} {will} {denied.vm_state.value}"]
    one = denied.blocked_by
    if one is not None:
        doing = f"in {one.phase}" if one.phase else one.status.value
        since = max(0, now_ms - (one.taken_at_ms or one.admitted_at_ms)) / 1000
        parts.append(f"{one.operation.value} {one.id} by {one.requested_by} has been {doing} for {since:.0f} s")
        if one.last_progress_at_ms is not None:
            parts[-1] += f", last progress {max(0, now_ms - one.last_progress_at_ms) / 1000:.0f} s ago"
    if denied.allowed_at_ms is not None:
        left = max(0, denied.allowed_at_ms - now_ms) / 1000
        silent = " if it makes no progress until then" if denied.allowed_if_silent else ""
        parts.append(f"allowed at {timestamp(denied.allowed_at_ms)}, in {left:.0f} s{silent}")
        if denied.allowed_if_silent and denied.allowed_latest_at_ms is not None:
            parts[-1] += f", at the latest at {timestamp(denied.allowed_latest_at_ms)}"
    return "; ".join(parts) + "." + (f" {denied.because}" if denied.because else "")


def _until(at_ms: int | None, now_ms: int) -> float | None:
    return None if at_ms is None else max(0, at_ms - now_ms) / 1000


def allowed(
    of: records.Instance, answers: dict[Operation, records.Disposition], now_ms: int, *, host_reachable: bool
) -> responses.AllowedOperations:
    return wire(
        responses.AllowedOperations,
        of,
        instance=of.id,
        at=timestamp(now_ms),
        host_reachable=host_reachable,
        operations=tuple(allowed_operation(of, operation, one, now_ms) for operation, one in answers.items()),
    )


def allowed_operation(
    of: records.Instance, operation: Operation, one: records.Disposition, now_ms: int
) -> responses.AllowedOperation:
    facts: dict[str, Any] = {
        "reason": None,
        "vm_state": of.vm_state,
        "foreseen": False,
        "blocked_by": None,
        "remedy": None,
        "allowed_at": None,
        "retry_after_s": None,
        "allowed_if_silent": False,
        "allowed_latest_at": None,
        "supersedes": (),
        "cancels": (),
    }
    assert not isinstance(one, records.Held), "an evaluation without submission is never held"
    match one:
        case records.Admitted():
            facts |= {"disposition": "admitted", "supersedes": one.supersedes, "cancels": one.cancels}
            facts["detail"] = f"{operation.value} would be admitted."
        case records.Redundant():
            facts |= {"disposition": "redundant", "reason": one.reason, "blocked_by": blocker(one.request)}
            facts |= _times(one, now_ms)
            facts["detail"] = one.because or f"{operation.value} would change nothing."
        case records.Denied():
            facts |= {"disposition": "denied", "reason": one.reason, "blocked_by": blocker(one.blocked_by)}
            facts |= {"vm_state": one.vm_state, "foreseen": one.foreseen, "detail": sentence(of, one, now_ms)}
            facts |= {"remedy": one.remedy, **_times(one, now_ms)}
    return responses.AllowedOperation(operation=operation, rule=one.rule, because=one.because, **facts)


def _times(one: records.Redundant | records.Denied, now_ms: int) -> dict[str, Any]:
    return {
        "allowed_at": optional_timestamp(one.allowed_at_ms),
        "retry_after_s": _until(one.allowed_at_ms, now_ms),
        "allowed_if_silent": one.allowed_if_silent,
        "allowed_latest_at": optional_timestamp(one.allowed_latest_at_ms),
    }


def stuck(one: Stuck, now_ms: int) -> responses.Stuck:
    silent_s = max(0, now_ms - one.silent_since_ms) / 1000
    doing, trouble = one.request, one.instance.guest_trouble
    sentences, remedy = [], None
    if one.host is not None:
        why, remedy = host_trouble(one.host, one.instance)
        sentences.append(why)
    if doing is not None and one.takes_over:
        phase = doing.phase or "its phase"
        sentences.append(f"{doing.operation.value} has made no progress in {phase} for {silent_s:.0f} s.")
        sentences += [doing.message] if doing.message else []
    elif doing is not None and doing.warning is not None:
        sentences.append(f"{doing.operation.value} {doing.warning}.")
    if trouble is not None:
        sentences.append(f"{one.instance.name} {TROUBLES[trouble].why}.")
        remedy = remedy or TROUBLES[trouble].remedy.format(name=one.instance.name)
    return wire(
        responses.Stuck,
        one.instance,
        instance=one.instance.id,
        host_state=HostState.UP if one.host is None else one.host.state,
        fenced_at=None if one.host is None else optional_timestamp(one.host.fenced_at_ms),
        request=None if doing is None else request(doing),
        why=" ".join(sentences),
        remedy=remedy,
        silent_since_at=timestamp(one.silent_since_ms),
        silent_s=silent_s,
        allowed=one.allowed,
        takes_over=one.takes_over,
    )


_TIME_FIELDS: Final = frozenset({"at_ms", "until_ms", "deadline_ms"})
"""Fields of an event's data that are store times."""


def event(one: records.Event) -> responses.Event:
    return wire(
        responses.Event,
        one,
        instance=one.instance_id,
        request=one.request_id,
        data={name: WALL_CLOCK.get()(value) if name in _TIME_FIELDS else value for name, value in one.data.items()},
    )


def image(one: records.Image) -> inventory.Image:
    return wire(inventory.Image, one)


def volume(one: Volume) -> inventory.Volume:
    return wire(inventory.Volume, one)


def token(one: Token, now_ms: int) -> inventory.Token:
    expired = one.expires_at_ms is not None and now_ms >= one.expires_at_ms
    former_until_ms = one.former_until_ms if one.former_until_ms and one.former_until_ms > now_ms else None
    return wire(inventory.Token, one, expired=expired, former_until_at=optional_timestamp(former_until_ms))
