"""`/v1/requests` and `/v1/stuck`: read, wait for and cancel requests; list stuck operations."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from interlock.api.http import request_parsing
from interlock.api.http.disconnects import cancel_on_disconnect
from interlock.api.http.problems import HttpProblem
from interlock.api.http.route import WAIT, ApiParts, Routes, json_response
from interlock.api.schemas import responses as schemas
from interlock.api.schemas import serializers
from interlock.core.records import ENDS, Cancellation
from interlock.service.auth import Caller

routes = Routes("requests")


@routes.add(
    "GET /v1/requests/{id}", "Read a request, or wait for it to end", {200: schemas.Request}, parameters=(WAIT,)
)
async def read(parts: ApiParts, caller: Caller, request: Request) -> schemas.Request:
    wait_ms = request_parsing.wait_ms(request.query_params)
    waiting = parts.instances.request(caller, request.path_params["id"], wait_ms)
    return serializers.request(await (cancel_on_disconnect(request, waiting) if wait_ms else waiting))


@routes.add(
    "DELETE /v1/requests/{id}", "Cancel a request", {200: schemas.Cancelled, 202: schemas.Cancelled}, problems=(409,)
)
async def cancel(parts: ApiParts, caller: Caller, request: Request) -> Response:
    outcome, one = await parts.instances.cancel(caller, request.path_params["id"])
    if outcome is Cancellation.TOO_LATE:
        why = f"has ended: {one.status.value}" if one.status in ENDS else "is in flight and cannot be interrupted"
        raise HttpProblem("too-late", f"{one.operation.value} {one.id} {why}.")
    cancelled = schemas.Cancelled(outcome=outcome, request=serializers.request(one))
    return json_response(cancelled, 200 if outcome is Cancellation.CANCELLED else 202)


@routes.add(
    "POST /v1/requests/{id}/approve",
    "Approve a held request of another caller",
    {200: schemas.Approved},
    problems=(409,),
)
async def approve(parts: ApiParts, caller: Caller, request: Request) -> schemas.Approved:
    outcome, one = await parts.instances.approve(caller, request.path_params["id"])
    return schemas.Approved(outcome=outcome, request=serializers.request(one))


@routes.add(
    "GET /v1/stuck",
    "List operations without progress past their threshold, and guests in trouble",
    {200: schemas.StuckList},
)
async def stuck(parts: ApiParts, caller: Caller, request: Request) -> schemas.StuckList:
    found = await parts.instances.stuck(caller)
    now_ms = parts.instances.now_ms()
    return schemas.StuckList(items=tuple(serializers.stuck(one, now_ms) for one in found))
