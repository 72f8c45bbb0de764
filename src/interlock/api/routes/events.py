"""`/v1/events`: a project's events as a stream of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Final

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from interlock.api.http import problems, request_parsing
from interlock.api.http.problems import HttpProblem
from interlock.api.http.protocol import CONNECTION
from interlock.api.http.route import ApiParts, Parameter, Routes
from interlock.api.schemas import serializers
from interlock.service.auth import Caller
from interlock.service.event_feed import FeedEvent

routes = Routes("events")

HEARTBEAT_MS: Final = 15_000
"""After how long without an event a comment is sent, so that a closed connection is noticed."""
_MEDIA_TYPE: Final = "text/event-stream"
_HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_TOO_SLOW: Final = b": ended: the reader does not keep up; resume with Last-Event-ID\n\n"
_LOG = structlog.get_logger(__name__)
_ENCODE: Final = msgspec.json.Encoder().encode


@routes.add(
    "GET /v1/events",
    "Follow the project's events (server-sent events)",
    {200: "text/event-stream"},
    problems=(404, 429, 503),
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
    limits = parts.config.http
    if request.method == "HEAD":
        return Response(headers=_HEADERS, media_type=_MEDIA_TYPE)
    if not parts.load.streams.take(caller.token_id):
        if parts.load.streams.full_for(caller.token_id):
            raise problems.too_many(
                f"This token has {limits.token_streams_max} event streams, and may have no more.",
                "Close one, or use one stream for all instances.",
            )
        raise problems.overloaded("The server has too many event streams.")
    return _EventStream(
        _stream(parts, caller, after, instance_id),
        stall_s=limits.stream_stall_ms / 1000,
        release=partial(parts.load.streams.release, caller.token_id),
    )


class _EventStream(StreamingResponse):
    """A response of server-sent events, which ends when its reader does not keep up."""

    def __init__(self, content: AsyncIterator[bytes], *, stall_s: float, release: Callable[[], None]) -> None:
        super().__init__(content, media_type=_MEDIA_TYPE, headers=_HEADERS)
        self._stall_s = stall_s
        self._release = release
        self._connection: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self._connection = scope.get(CONNECTION)
        if self._connection is not None:
            self._connection.limit_send_buffer()
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._release()

    async def stream_response(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self.body_iterator:
            try:
                async with asyncio.timeout(self._stall_s):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except TimeoutError:
                if self._connection is None:
                    raise
                _LOG.info("event stream ended: its reader does not keep up")
                self._connection.finish_stalled(_TOO_SLOW)
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


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
    async for events in parts.feed.follow(caller.project, after, HEARTBEAT_MS, instance_id):
        yield b"".join(map(_text, events)) if events else b": still here\n\n"


def _text(one: FeedEvent) -> bytes:
    """Return an event as it is sent; it is encoded once for all streams."""
    if one.text is None:
        event = one.event
        head = f"id: {event.sequence}\nevent: {event.kind}\ndata: ".encode()
        one.text = head + _ENCODE(serializers.event(event)) + b"\n\n"
    return one.text
