"""`/v1/events`: what happens in the project, as it happens, as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from interlock.api import asking, views
from interlock.api.doors import ApiParts, Door, Parameter
from interlock.api.problems import Bad
from interlock.service.callers import Caller

HEARTBEAT_MS: Final = 15_000
"""After how long without an event a comment is sent, so that a connection that is gone is noticed."""
_ENCODE: Final = msgspec.json.Encoder().encode


async def follow(parts: ApiParts, caller: Caller, request: Request) -> Response:
    asking.only(request.query_params, "after", "instance")
    after = await _after(parts, request)
    reference = request.query_params.get("instance")
    instance_id = None if reference is None else (await parts.instances.describe(caller, reference)).id
    return StreamingResponse(
        _stream(parts, caller, after, instance_id),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _after(parts: ApiParts, request: Request) -> int:
    """Where to go on: behind the last event that the client has seen, or behind the last there is."""
    seen = request.headers.get("last-event-id")
    if seen is not None:
        if not seen.isascii() or not seen.isdecimal() or len(seen) > 18:  # noqa: PLR2004
            raise Bad("bad-header", f"Last-Event-ID: {seen[:80]!r}; expected the id of an event.")
        # What was seen may be of a history that was put back since: what comes from now on is told in any case.
        return min(int(seen), await parts.instances.last_event())
    if "after" in request.query_params:
        return asking.number(request.query_params, "after", 0, 0, 2**53)
    return await parts.instances.last_event()


async def _stream(parts: ApiParts, caller: Caller, after: int, instance_id: str | None) -> AsyncIterator[bytes]:
    yield b": interlock\n\n"
    async for events in parts.instances.follow(caller, after, HEARTBEAT_MS, instance_id):
        if not events:
            yield b": still here\n\n"
        for event in events:
            head = f"id: {event.sequence}\nevent: {event.kind}\ndata: ".encode()
            yield head + _ENCODE(views.event(event)) + b"\n\n"


DOORS: Final = (
    Door(
        method="GET",
        path="/v1/events",
        endpoint=follow,
        summary="Follow what happens in the project (server-sent events)",
        answers={200: "text/event-stream"},
        parameters=(
            Parameter("after", "Begin behind this sequence; without it, now.", {"type": "integer", "minimum": 0}),
            Parameter("instance", "Only the events of this instance."),
            Parameter("Last-Event-ID", "Go on behind this event.", {"type": "integer", "minimum": 0}, "header"),
        ),
        problems=(404,),
        tag="events",
    ),
)
