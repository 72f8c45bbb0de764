"""`/v1/requests` and `/v1/stuck`: what was asked, what became of it, and what shows no life."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from interlock.api import asking, schemas, views
from interlock.api.doors import WAIT, ApiParts, Door, answer
from interlock.api.patience import while_connected
from interlock.api.problems import Bad
from interlock.core.records import ENDS, Cancellation
from interlock.service.callers import Caller


async def read(parts: ApiParts, caller: Caller, request: Request) -> Response:
    asking.only(request.query_params, "wait")
    wait_ms = asking.wait_ms(request.query_params)
    waiting = parts.instances.request(caller, request.path_params["id"], wait_ms)
    return answer(views.request(await (while_connected(request, waiting) if wait_ms else waiting)))


async def cancel(parts: ApiParts, caller: Caller, request: Request) -> Response:
    asking.only(request.query_params)
    outcome, one = await parts.instances.cancel(caller, request.path_params["id"])
    if outcome is Cancellation.TOO_LATE:
        why = (
            f"has ended: {one.status.value}"
            if one.status in ENDS
            else "is being served, and cannot be stopped half-way"
        )
        raise Bad("too-late", f"{one.operation.value} {one.id} {why}.")
    cancelled = schemas.Cancelled(outcome=outcome, request=views.request(one))
    return answer(cancelled, 200 if outcome is Cancellation.CANCELLED else 202)


async def stuck(parts: ApiParts, caller: Caller, request: Request) -> Response:
    asking.only(request.query_params)
    found = await parts.instances.stuck(caller)
    now_ms = parts.instances.now_ms()
    return answer(schemas.StuckList(items=tuple(views.stuck(one, now_ms) for one in found)))


DOORS: Final = (
    Door(
        method="GET",
        path="/v1/requests/{id}",
        endpoint=read,
        summary="Read a request, or wait for its end",
        answers={200: schemas.Request},
        parameters=(WAIT,),
        problems=(404,),
        tag="requests",
    ),
    Door(
        method="DELETE",
        path="/v1/requests/{id}",
        endpoint=cancel,
        summary="Cancel a request",
        answers={200: schemas.Cancelled, 202: schemas.Cancelled},
        problems=(404, 409),
        tag="requests",
    ),
    Door(
        method="GET",
        path="/v1/stuck",
        endpoint=stuck,
        summary="Everything without a sign of life past its threshold",
        answers={200: schemas.StuckList},
        tag="requests",
    ),
)
