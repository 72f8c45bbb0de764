"""`/v1/instances`: create, list, read, ask."""

from __future__ import annotations

import math
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from interlock.api import asking, problems, schemas, views
from interlock.api.doors import CURSOR, IF_MATCH, KEY, LIMIT, PREFER, WAIT, ApiParts, Door, Parameter, answer, etag
from interlock.api.patience import while_connected
from interlock.core import records
from interlock.core.errors import Invalid
from interlock.core.records import ENDS, Admitted, Denied, Held, Redundant
from interlock.core.states import VmState
from interlock.ports import InstanceFilter
from interlock.service.answers import Answer
from interlock.service.callers import Caller
from interlock.service.wishes import Labels, NewInstance, NewRequest

_REFERENCE: Final = "reference"
_TAIL_BYTES: Final = 64 * 1024
_TAIL_BYTES_MAX: Final = 1024 * 1024
_FILTERS: Final = ("vm_state", "task_state", "host", "tag", "name")


async def create(parts: ApiParts, caller: Caller, request: Request) -> Response:
    wish = await asking.body(request, NewInstance, parts.config.request_body_bytes_max)
    made = await parts.instances.create(caller, wish, asking.idempotency_key(request))
    if isinstance(made.disposition, Denied):
        return _refuse(parts, request, parts.instances.with_ways_out(caller, made))
    assert not isinstance(made.disposition, Held), "a creation is never held"
    headers = {"Location": f"/v1/instances/{made.instance.id}", **etag(made.instance.generation)}
    asked = made.disposition.request if isinstance(made.disposition, Admitted) else None
    if asked is not None:
        asked, applied = await _wait(parts, caller, request, asked)
        headers |= applied
    instance = await parts.instances.describe(caller, made.instance.id)
    created = schemas.Created(
        instance=views.instance(instance, parts.config.upkeep.times),
        request=None if asked is None else views.request(asked),
        rule=made.disposition.rule,
        because=made.disposition.because,
    )
    return answer(created, 201 if asked is None or asked.status in ENDS else 202, headers)


async def listing(parts: ApiParts, caller: Caller, request: Request) -> Response:
    query = request.query_params
    asking.only(query, *_FILTERS, "limit", "cursor")
    values = {name: query.get(name) for name in _FILTERS}
    state = values.pop("vm_state")
    if state is not None and state not in list(VmState):
        raise Invalid(f"vm_state: {state[:80]!r}; expected one of {', '.join(VmState)}.")
    where = InstanceFilter(vm_state=None if state is None else VmState(state), **values)
    limit = asking.number(query, "limit", 100, 1, 500)
    page = await parts.instances.list(caller, where, limit, query.get("cursor"))
    return answer(views.instance_page(page, parts.config.upkeep.times))


async def read(parts: ApiParts, caller: Caller, request: Request) -> Response:
    query = request.query_params
    asking.only(query, "after_generation", "wait")
    reference = request.path_params[_REFERENCE]
    wait_ms = asking.wait_ms(query)
    if "after_generation" in query:
        after = asking.number(query, "after_generation", 0, 0, 2**53)
        instance = await while_connected(request, parts.instances.wait(caller, reference, after, wait_ms))
    else:
        instance = await parts.instances.describe(caller, reference)
    return answer(views.instance(instance, parts.config.upkeep.times), 200, etag(instance.generation))


async def relabel(parts: ApiParts, caller: Caller, request: Request) -> Response:
    labels = await asking.body(request, Labels, parts.config.request_body_bytes_max)
    reference = request.path_params[_REFERENCE]
    instance = await parts.instances.relabel(caller, reference, labels, asking.if_generation(request))
    return answer(views.instance(instance, parts.config.upkeep.times), 200, etag(instance.generation))


async def submit(parts: ApiParts, caller: Caller, request: Request) -> Response:
    """Ask for an operation. The path that matters most for speed."""
    wish = await asking.body(request, NewRequest, parts.config.request_body_bytes_max)
    said = await parts.instances.submit(
        caller,
        request.path_params[_REFERENCE],
        wish,
        asking.idempotency_key(request),
        asking.if_generation(request),
    )
    disposition = said.disposition
    match disposition:
        case Admitted():
            asked, headers = await _wait(parts, caller, request, disposition.request)
            headers["Location"] = f"/v1/requests/{asked.id}"
            admitted = msgspec.structs.replace(views.admitted(disposition, asked), password=said.password)
            return answer(admitted, 200 if asked.status in ENDS else 202, headers)
        case Redundant():
            return answer(views.redundant(disposition, parts.instances.now_ms()))
        case Held():
            asked, headers = await _wait(parts, caller, request, disposition.request)
            headers["Location"] = f"/v1/requests/{asked.id}"
            held = views.held(said.instance, disposition, asked, parts.instances.now_ms())
            held = msgspec.structs.replace(held, password=said.password)
            return answer(held, 200 if asked.status in ENDS else 202, headers)
        case Denied():
            return _refuse(parts, request, said)


async def _wait(
    parts: ApiParts, caller: Caller, request: Request, asked: records.Request
) -> tuple[records.Request, dict[str, str]]:
    """The request as it is after so long as the caller prefers to wait, and the header that says it was waited."""
    seconds = asking.preferred_wait_s(request)
    if seconds is None:
        return asked, {}
    waited = await while_connected(request, parts.instances.request(caller, asked.id, seconds * 1000))
    return waited, {"Preference-Applied": f"wait={seconds}"}


async def allowed(parts: ApiParts, caller: Caller, request: Request) -> Response:
    asking.only(request.query_params)
    instance, answers = await parts.instances.allowed(caller, request.path_params[_REFERENCE])
    reachable = parts.hosts.reachable(instance.host)
    return answer(views.allowed(instance, answers, parts.instances.now_ms(), host_reachable=reachable))


async def requests(parts: ApiParts, caller: Caller, request: Request) -> Response:
    query = request.query_params
    asking.only(query, "limit", "cursor")
    limit = asking.number(query, "limit", 100, 1, 500)
    page = await parts.instances.requests(caller, request.path_params[_REFERENCE], limit, query.get("cursor"))
    return answer(views.request_page(page))


async def events(parts: ApiParts, caller: Caller, request: Request) -> Response:
    query = request.query_params
    asking.only(query, "after", "limit")
    after = asking.number(query, "after", 0, 0, 2**53)
    limit = asking.number(query, "limit", 100, 1, 500)
    found = await parts.instances.events(caller, request.path_params[_REFERENCE], after, limit)
    next_after = found[-1].sequence if found else after
    return answer(schemas.EventList(items=tuple(views.event(one) for one in found), next_after=next_after))


async def console(parts: ApiParts, caller: Caller, request: Request) -> Response:
    """The end of what the guest wrote on its serial console, as it wrote it."""
    query = request.query_params
    asking.only(query, "tail_bytes")
    tail = asking.number(query, "tail_bytes", _TAIL_BYTES, 1, _TAIL_BYTES_MAX)
    text = await parts.seeing.written(caller, request.path_params[_REFERENCE], tail)
    return Response(text, media_type="text/plain; charset=utf-8", headers={"X-Content-Type-Options": "nosniff"})


def _refuse(parts: ApiParts, request: Request, said: Answer) -> Response:
    refusal = views.refusal(said, request.url.path, parts.instances.now_ms())
    seconds = refusal.retry_after_s
    headers = {} if seconds is None else {"Retry-After": str(max(1, math.ceil(seconds)))}
    response = answer(refusal, 409, headers)
    response.headers["content-type"] = problems.MEDIA_TYPE
    return response


DOORS: Final = (
    Door(
        method="POST",
        path="/v1/instances/{reference}/requests",
        endpoint=submit,
        summary="Ask for an operation",
        body=NewRequest,
        answers={200: schemas.Admitted | schemas.Redundant | schemas.Held, 202: schemas.Admitted | schemas.Held},
        parameters=(KEY, PREFER, IF_MATCH),
        problems=(404, 412),
        refuses=True,
        tag="instances",
    ),
    Door(
        method="GET",
        path="/v1/instances/{reference}",
        endpoint=read,
        summary="Read an instance, or wait for it to change",
        answers={200: schemas.Instance},
        parameters=(
            Parameter(
                "after_generation",
                "Answer as soon as the generation is greater, or when the time has passed.",
                {"type": "integer", "minimum": 0},
            ),
            WAIT,
        ),
        problems=(404,),
        tag="instances",
    ),
    Door(
        method="POST",
        path="/v1/instances",
        endpoint=create,
        summary="Create an instance",
        body=NewInstance,
        answers={201: schemas.Created, 202: schemas.Created},
        parameters=(KEY, PREFER),
        problems=(404, 409),
        refuses=True,
        tag="instances",
    ),
    Door(
        method="GET",
        path="/v1/instances",
        endpoint=listing,
        summary="List instances, oldest first",
        answers={200: schemas.InstancePage},
        parameters=(*(Parameter(name, f"Only those of this {name}.") for name in _FILTERS), LIMIT, CURSOR),
        tag="instances",
    ),
    Door(
        method="PATCH",
        path="/v1/instances/{reference}",
        endpoint=relabel,
        summary="Change an instance's tags, blocked operations or restart policy",
        body=Labels,
        answers={200: schemas.Instance},
        parameters=(IF_MATCH,),
        problems=(404, 412),
        tag="instances",
    ),
    Door(
        method="GET",
        path="/v1/instances/{reference}/allowed",
        endpoint=allowed,
        summary="What the gate would answer to every operation now",
        answers={200: schemas.AllowedOperations},
        problems=(404,),
        tag="instances",
    ),
    Door(
        method="GET",
        path="/v1/instances/{reference}/requests",
        endpoint=requests,
        summary="List an instance's requests, newest first",
        answers={200: schemas.RequestPage},
        parameters=(LIMIT, CURSOR),
        problems=(404,),
        tag="instances",
    ),
    Door(
        method="GET",
        path="/v1/instances/{reference}/events",
        endpoint=events,
        summary="Read what happened to an instance",
        answers={200: schemas.EventList},
        parameters=(
            Parameter("after", "Only events with a greater sequence.", {"type": "integer", "minimum": 0}),
            LIMIT,
        ),
        problems=(404,),
        tag="instances",
    ),
    Door(
        method="GET",
        path="/v1/instances/{reference}/console",
        endpoint=console,
        summary="Read the end of the serial console",
        answers={200: "text/plain"},
        parameters=(
            Parameter(
                "tail_bytes",
                "How much of its end, in bytes.",
                {"type": "integer", "minimum": 1, "maximum": _TAIL_BYTES_MAX, "default": _TAIL_BYTES},
            ),
        ),
        problems=(404,),
        tag="instances",
    ),
)
