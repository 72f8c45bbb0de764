"""`/v1/instances`: create, list and read instances, and submit operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from interlock.api.http import audit_entries, problems, request_parsing
from interlock.api.http.disconnects import cancel_on_disconnect
from interlock.api.http.route import (
    CURSOR,
    IF_MATCH,
    KEY,
    LIMIT,
    PREFER,
    WAIT,
    ApiParts,
    Parameter,
    Routes,
    etag,
    json_response,
)
from interlock.api.schemas import responses as schemas
from interlock.api.schemas import serializers
from interlock.api.schemas.networks import AddressList
from interlock.core import records
from interlock.core.errors import Invalid
from interlock.core.operations import Operation
from interlock.core.records import ENDS, Admitted, Denied, Held, Instance, Redundant
from interlock.core.scheduled_actions import UpkeepTimes
from interlock.core.states import VmState
from interlock.ports import HostState, InstanceFilter
from interlock.service.auth import Caller
from interlock.service.cloud_init import warnings_of
from interlock.service.request_models import Labels, NewInstance, NewRequest
from interlock.service.submission_results import SubmissionResult

routes = Routes("instances")

_REFERENCE: Final = "reference"
_TAIL_BYTES: Final = 64 * 1024
_TAIL_BYTES_MAX: Final = 1024 * 1024
_FILTERS: Final = ("vm_state", "task_state", "host", "tag", "name")


def _host_state(parts: ApiParts) -> Callable[[str], HostState]:
    return lambda name: parts.hosts.leases.condition(name).state


def _times(parts: ApiParts) -> UpkeepTimes:
    return parts.instances.upkeep_times(parts.config.upkeep.times)


def _view(parts: ApiParts, instance: Instance) -> schemas.Instance:
    return serializers.instance(instance, _times(parts), _host_state(parts)(instance.host))


@routes.add(
    "POST /v1/instances",
    "Create an instance",
    {201: schemas.Created, 202: schemas.Created},
    problems=(404, 409),
    body=NewInstance,
    parameters=(KEY, PREFER),
    can_be_denied=True,
)
async def create(parts: ApiParts, caller: Caller, request: Request) -> Response:
    body = await request_parsing.body(request, NewInstance, parts.config.request_body_bytes_max)
    result = await parts.instances.create(caller, body, request_parsing.idempotency_key(request))
    if isinstance(result.disposition, Denied):
        return _denied_response(parts, request, parts.instances.with_ways_out(caller, result))
    assert not isinstance(result.disposition, Held), "a creation is never held"
    headers = {"Location": f"/v1/instances/{result.instance.id}", **etag(result.instance.generation)}
    submitted = result.disposition.request if isinstance(result.disposition, Admitted) else None
    if submitted is not None:
        submitted, wait_headers = await _wait(parts, caller, request, submitted)
        headers |= wait_headers
    instance = await parts.instances.describe(caller, result.instance.id)
    created = schemas.Created(
        instance=_view(parts, instance),
        request=None if submitted is None else serializers.request(submitted),
        rule=result.disposition.rule,
        because=result.disposition.because,
        warnings=warnings_of(body),
    )
    return json_response(created, 201 if submitted is None or submitted.status in ENDS else 202, headers)


@routes.add(
    "GET /v1/instances",
    "List instances, oldest first",
    {200: schemas.InstancePage},
    parameters=(
        *(Parameter(name, f"Only instances with this {name}.") for name in _FILTERS),
        Parameter("all_projects", "`true`: instances of all projects; for admins.", {"type": "boolean"}),
        LIMIT,
        CURSOR,
    ),
)
async def listing(parts: ApiParts, caller: Caller, request: Request) -> schemas.InstancePage:
    query = request.query_params
    values: dict[str, Any] = {name: query.get(name) for name in _FILTERS}
    state = values.pop("vm_state")
    if state is not None and state not in list(VmState):
        raise Invalid(f"vm_state: {state[:80]!r}; expected one of {', '.join(VmState)}.")
    where = InstanceFilter(vm_state=None if state is None else VmState(state), **values)
    limit = request_parsing.integer(query, "limit", 100, 1, 500)
    page = await parts.instances.list(
        caller, where, limit, query.get("cursor"), all_projects=request_parsing.boolean(query, "all_projects")
    )
    return serializers.instance_page(page, _times(parts), _host_state(parts))


@routes.add(
    "GET /v1/instances/{reference}",
    "Read an instance, or wait for it to change",
    {200: schemas.Instance},
    parameters=(
        Parameter(
            "after_generation",
            "Respond as soon as the generation is greater, or after `wait`.",
            {"type": "integer", "minimum": 0},
        ),
        WAIT,
    ),
)
async def read(parts: ApiParts, caller: Caller, request: Request) -> Response:
    query = request.query_params
    reference = request.path_params[_REFERENCE]
    wait_ms = request_parsing.wait_ms(query)
    if "after_generation" in query:
        after = request_parsing.integer(query, "after_generation", 0, 0, 2**53)
        instance = await cancel_on_disconnect(request, parts.instances.wait(caller, reference, after, wait_ms))
    else:
        instance = await parts.instances.describe(caller, reference)
    return json_response(_view(parts, instance), 200, etag(instance.generation))


@routes.add(
    "PATCH /v1/instances/{reference}",
    "Change an instance's tags, blocked operations or restart policy",
    {200: schemas.Instance},
    problems=(412,),
    body=Labels,
    parameters=(IF_MATCH,),
)
async def relabel(parts: ApiParts, caller: Caller, request: Request) -> Response:
    labels = await request_parsing.body(request, Labels, parts.config.request_body_bytes_max)
    reference = request.path_params[_REFERENCE]
    instance = await parts.instances.relabel(caller, reference, labels, request_parsing.if_generation(request))
    return json_response(_view(parts, instance), 200, etag(instance.generation))


@routes.add(
    "POST /v1/instances/{reference}/requests",
    "Submit an operation",
    {200: schemas.Admitted | schemas.Redundant | schemas.Held, 202: schemas.Admitted | schemas.Held},
    problems=(412,),
    body=NewRequest,
    parameters=(KEY, PREFER, IF_MATCH),
    can_be_denied=True,
)
async def submit(parts: ApiParts, caller: Caller, request: Request) -> Response:
    """Submit an operation. The most performance-critical path."""
    body = await request_parsing.body(request, NewRequest, parts.config.request_body_bytes_max)
    if body.operation is Operation.RESET_STATE:
        audit_entries.note(request, action="instance.reset_state", details={"parameters": body.parameters})
    result = await parts.instances.submit(
        caller,
        request.path_params[_REFERENCE],
        body,
        request_parsing.idempotency_key(request),
        request_parsing.if_generation(request),
    )
    disposition = result.disposition
    match disposition:
        case Admitted():
            submitted, headers = await _wait(parts, caller, request, disposition.request)
            headers["Location"] = f"/v1/requests/{submitted.id}"
            admitted = serializers.admitted(disposition, submitted, result)
            return json_response(admitted, 200 if submitted.status in ENDS else 202, headers)
        case Redundant():
            return json_response(serializers.redundant(disposition, parts.instances.now_ms()))
        case Held():
            submitted, headers = await _wait(parts, caller, request, disposition.request)
            headers["Location"] = f"/v1/requests/{submitted.id}"
            held = serializers.held(result.instance, disposition, submitted, parts.instances.now_ms())
            held = msgspec.structs.replace(held, password=result.password)
            return json_response(held, 200 if submitted.status in ENDS else 202, headers)
        case Denied():
            return _denied_response(parts, request, result)


async def _wait(
    parts: ApiParts, caller: Caller, request: Request, submitted: records.Request
) -> tuple[records.Request, dict[str, str]]:
    """Wait for the request as `Prefer: wait` says; return it, and the header that confirms the wait."""
    seconds = request_parsing.preferred_wait_s(request)
    if seconds is None:
        return submitted, {}
    waited = await cancel_on_disconnect(request, parts.instances.request(caller, submitted.id, seconds * 1000))
    return waited, {"Preference-Applied": f"wait={seconds}"}


@routes.add(
    "GET /v1/instances/{reference}/allowed",
    "Evaluate every operation now, without submitting",
    {200: schemas.AllowedOperations},
)
async def allowed(parts: ApiParts, caller: Caller, request: Request) -> schemas.AllowedOperations:
    instance, answers = await parts.instances.allowed(caller, request.path_params[_REFERENCE])
    reachable = parts.hosts.leases.reachable(instance.host)
    return serializers.allowed(instance, answers, parts.instances.now_ms(), host_reachable=reachable)


@routes.add(
    "POST /v1/instances/{reference}/allowed",
    "Evaluate one submission now, without submitting",
    {200: schemas.AllowedOperation},
    problems=(409,),
    body=NewRequest,
)
async def judge(parts: ApiParts, caller: Caller, request: Request) -> schemas.AllowedOperation:
    body = await request_parsing.body(request, NewRequest, parts.config.request_body_bytes_max)
    result = await parts.instances.judge(caller, request.path_params[_REFERENCE], body)
    now_ms = parts.instances.now_ms()
    return serializers.allowed_operation(result.instance, body.operation, result.disposition, now_ms)


@routes.add(
    "GET /v1/instances/{reference}/addresses",
    "Read the addresses that are leased, and those that the guest reports",
    {200: AddressList},
)
async def addresses(parts: ApiParts, caller: Caller, request: Request) -> AddressList:
    return serializers.addresses(*await parts.instances.reported(caller, request.path_params[_REFERENCE]))


@routes.add(
    "GET /v1/instances/{reference}/requests",
    "List an instance's requests, newest first",
    {200: schemas.RequestPage},
    parameters=(LIMIT, CURSOR),
)
async def requests(parts: ApiParts, caller: Caller, request: Request) -> schemas.RequestPage:
    query = request.query_params
    limit = request_parsing.integer(query, "limit", 100, 1, 500)
    page = await parts.instances.requests(caller, request.path_params[_REFERENCE], limit, query.get("cursor"))
    return serializers.request_page(page)


@routes.add(
    "GET /v1/instances/{reference}/events",
    "List an instance's events",
    {200: schemas.EventList},
    parameters=(
        Parameter("after", "Only events with a greater sequence.", {"type": "integer", "minimum": 0}),
        LIMIT,
    ),
)
async def events(parts: ApiParts, caller: Caller, request: Request) -> schemas.EventList:
    query = request.query_params
    after = request_parsing.integer(query, "after", 0, 0, 2**53)
    limit = request_parsing.integer(query, "limit", 100, 1, 500)
    found = await parts.instances.events(caller, request.path_params[_REFERENCE], after, limit)
    next_after = found[-1].sequence if found else after
    return schemas.EventList(items=tuple(serializers.event(one) for one in found), next_after=next_after)


@routes.add(
    "GET /v1/instances/{reference}/console",
    "Read the end of the serial console's log",
    {200: "text/plain"},
    audited="console.read",
    parameters=(
        Parameter(
            "tail_bytes",
            "Length of the end, in bytes.",
            {"type": "integer", "minimum": 1, "maximum": _TAIL_BYTES_MAX, "default": _TAIL_BYTES},
        ),
    ),
)
async def console(parts: ApiParts, caller: Caller, request: Request) -> Response:
    """Return the end of the serial console's log, unchanged."""
    query = request.query_params
    tail = request_parsing.integer(query, "tail_bytes", _TAIL_BYTES, 1, _TAIL_BYTES_MAX)
    text = await parts.consoles.written(caller, request.path_params[_REFERENCE], tail)
    return Response(text, media_type="text/plain; charset=utf-8", headers={"X-Content-Type-Options": "nosniff"})


def _denied_response(parts: ApiParts, request: Request, result: SubmissionResult) -> Response:
    refusal = serializers.refusal(result, request.url.path, parts.instances.now_ms())
    seconds = refusal.retry_after_s
    headers = {} if seconds is None else {"Retry-After": str(max(1, math.ceil(seconds)))}
    response = json_response(refusal, 409, headers)
    response.headers["content-type"] = problems.MEDIA_TYPE
    return response
