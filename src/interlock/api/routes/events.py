"""`/v1/events`: a project's events as a stream of server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from interlock.api.http import request_parsing
from interlock.api.http.problems import HttpProblem
from interlock.api.http.route import ApiParts, Parameter, Routes
from interlock.api.schemas import serializers
from interlock.service.auth import Caller

routes = Routes("events")

HEARTBEAT_MS: Final = 15_000
"""After how long without an event a comment is sent, so that a closed connection is noticed."""
_ENCODE: Final = msgspec.json.Encoder().encode


@routes.add(
    "GET /v1/events",
    "Follow the project's events (server-sent events)",
    {200: "text/event-stream"},
    problems=(404,),
    parameters=(
        Parameter("after", "Start after this sequence; default: now.", {"type": "integer", "minimum": 0}),
        Parameter("instance", "Only events of this instance."),
        Parameter("Last-Event-ID", "Resume after this event.", {"type": "integer", "minimum": 0}, "header"),
    ),
)
async def follow(parts: ApiParts, caller: Caller, request: Request) -> Response:
    after = await _after(parts, request)
    reference = request.query_params.get("instance")
    instance_id = None if reference is None else (await parts.instances.describe(caller, reference)).id
    return StreamingResponse(
        _stream(parts, caller, after, instance_id),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _after(parts: ApiParts, request: Request) -> int:
    """Return the sequence after which to start: of the client's last event, or of the latest event."""
    seen = request.headers.get("last-event-id")
    if seen is not None:
        if not seen.isascii() or not seen.isdecimal() or len(seen) > 18:  # noqa: PLR2004
            raise HttpProblem("bad-header", f"Invalid Last-Event-ID {seen[:80]!r}: expected the id of an event.")
        # After a restored backup the client's id may be greater than the last one: new events are sent in any case.
        return min(int(seen), await parts.instances.last_event())
    if "after" in request.query_params:
        return request_parsing.integer(request.query_params, "after", 0, 0, 2**53)
    return await parts.instances.last_event()


async def _stream(parts: ApiParts, caller: Caller, after: int, instance_id: str | None) -> AsyncIterator[bytes]:
    yield b": interlock\n\n"
    async for events in parts.instances.follow(caller, after, HEARTBEAT_MS, instance_id):
        if not events:
            yield b": still here\n\n"
        for event in events:
            head = f"id: {event.sequence}\nevent: {event.kind}\ndata: ".encode()
            yield head + _ENCODE(serializers.event(event)) + b"\n\n"
