"""`/v1/instances/{reference}/console/live`, `/display` and `/screenshot`: a guest's console and screen.

The first two are WebSockets. Whoever cannot be served is told so before the connection is made, with the problem that
any other path would answer; a browser, which cannot see that, is told by the code with which it is closed at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from interlock.api import asking, problems
from interlock.api.doors import ApiParts, Door
from interlock.api.problems import Bad
from interlock.core.errors import Forbidden, InterlockError, NotThere
from interlock.ports import Role, Stream
from interlock.service.callers import Caller

BEARER: Final = "interlock.bearer."
"""A subprotocol that begins so carries a token, for browsers, which can send no headers."""
PROTOCOLS: Final = ("interlock", "binary")
"""Subprotocols that are agreed to if they are offered; they change nothing. `binary` is what VNC clients offer."""
HISTORY_LINES_MAX: Final = 10_000
MESSAGE_BYTES_MAX: Final = 1024 * 1024
"""The largest message that a console or a display takes."""

ENDED: Final = 1000
PROBLEM: Final = 4000
"""A close code from here on is 4000 and the status that another path would answer, such as 4401 or 4403."""
_REASON_BYTES_MAX: Final = 120

IN_WORDS: Final = f"""\
Two paths are WebSockets (RFC 6455), which this document's language cannot describe.

`/v1/instances/{{reference}}/console/live?history=N`: the serial console. Output comes as binary messages, first the
last N lines of what was written before (0 to {HISTORY_LINES_MAX}; default 0); what is sent is typed. A
reader may look on and not type.

`/v1/instances/{{reference}}/display`: the guest's screen, VNC (RFB) in binary messages, as noVNC speaks it. For
members.

Authenticate with the `Authorization` header, or offer the subprotocol `{BEARER}TOKEN` beside `interlock`. A page may
connect only to the server that it came from. Closed with {ENDED}: the guest or its display has ended; with 4401, 4403,
4404 or 4503: what the HTTP status without the 4000 says. A client that does not answer a ping within 20 s is let go.
"""

_LOG = structlog.get_logger(__name__)


class _End(msgspec.Struct, frozen=True):
    """Why a connection is closed by us."""

    code: int
    reason: str


class _Arrival(msgspec.Struct, frozen=True):
    """Who connects, and how that was shown."""

    caller: Caller
    secret: str


Opening = Callable[[ApiParts, Caller, WebSocket], Awaitable[tuple[bytes, Stream]]]


async def _console(parts: ApiParts, caller: Caller, socket: WebSocket) -> tuple[bytes, Stream]:
    asking.only(socket.query_params, "history")
    lines = asking.number(socket.query_params, "history", 0, 0, HISTORY_LINES_MAX)
    return await parts.seeing.console(caller, socket.path_params["reference"], lines)


async def _display(parts: ApiParts, caller: Caller, socket: WebSocket) -> tuple[bytes, Stream]:
    asking.only(socket.query_params)
    return b"", await parts.seeing.display(caller, socket.path_params["reference"])


class _Socket:
    """One WebSocket path, as an ASGI application."""

    def __init__(self, parts: ApiParts, opening: Opening) -> None:
        self._parts = parts
        self._opening = opening

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        socket = WebSocket(scope, receive, send)
        try:
            arrival = _arrive(self._parts, socket)
            first, stream = await self._opening(self._parts, arrival.caller, socket)
        except InterlockError as error:
            await _refuse(socket, error)
            return
        try:
            await socket.accept(_agreed(socket))
            await self._serve(socket, arrival, first, stream)
        except (WebSocketDisconnect, OSError):
            pass  # it went before it was accepted, or while it was closed
        finally:
            await stream.close()

    async def _serve(self, socket: WebSocket, arrival: _Arrival, first: bytes, stream: Stream) -> None:
        if first:
            await socket.send_bytes(first)
        either: set[asyncio.Task[_End | None]] = {
            asyncio.create_task(self._take(socket, arrival, stream)),
            asyncio.create_task(self._show(socket, arrival, stream)),
        }
        try:
            done, _ = await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in either:
                task.cancel()
            await asyncio.wait(either)
        ends = [task.result() for task in done if task.exception() is None]
        for task in done:
            failure = task.exception()
            if failure is not None and not isinstance(failure, (WebSocketDisconnect, OSError)):
                _LOG.error("internal error", path=socket.url.path, exc_info=failure)
                ends.append(_End(1011, "The server has met a defect of its own."))
        if ends and ends[0] is not None and len(ends) == len(done):
            await socket.close(ends[0].code, ends[0].reason)

    async def _take(self, socket: WebSocket, arrival: _Arrival, stream: Stream) -> _End | None:
        """Pass on what is typed. Returns when the client has gone (None) or must be let go."""
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return None
            data = message.get("bytes") or (message.get("text") or "").encode()
            if not data:
                continue
            if len(data) > MESSAGE_BYTES_MAX:
                return _TOO_LONG
            if self._parts.callers.authenticate(arrival.secret) is None:
                return _TOKEN_GONE
            if arrival.caller.role is Role.READER:
                return _End(PROBLEM + 403, "A token with the role reader may look on, and not type.")
            try:
                await stream.write(data)
            except NotThere:
                return _GUEST_GONE

    async def _show(self, socket: WebSocket, arrival: _Arrival, stream: Stream) -> _End | None:
        while data := await stream.read():
            if self._parts.callers.authenticate(arrival.secret) is None:
                return _TOKEN_GONE
            await socket.send_bytes(data)
        return _GUEST_GONE


_TOKEN_GONE: Final = _End(PROBLEM + 401, "The token was deleted.")
_TOO_LONG: Final = _End(1009, f"A message may have {MESSAGE_BYTES_MAX} bytes.")
_GUEST_GONE: Final = _End(ENDED, "The guest has ended.")


def _arrive(parts: ApiParts, socket: WebSocket) -> _Arrival:
    """Who connects. Raises `Bad` without a valid token, `Forbidden` for a page from elsewhere."""
    origin = socket.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != socket.headers.get("host", "").lower():
        raise Forbidden(
            f"A page from {origin[:80]} may not connect to this server.",
            remedy="Serve the page from the address under which the server is reached.",
        )
    scheme, _, secret = socket.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        offered = (name for name in socket.scope["subprotocols"] if name.startswith(BEARER))
        secret = next(offered, "").removeprefix(BEARER)
    caller = parts.callers.authenticate(secret.strip()) if secret else None
    if caller is None:
        raise Bad(
            "unauthorized",
            "There is no valid bearer token, in the Authorization header or as a subprotocol.",
            remedy=f"Send `Authorization: Bearer <secret>`, or offer the subprotocol `{BEARER}<secret>`.",
            WWW_Authenticate='Bearer realm="interlock"',
        )
    return _Arrival(caller, secret.strip())


def _agreed(socket: WebSocket) -> str | None:
    """The subprotocol to agree to: a browser that offered some hangs up where none is agreed to."""
    offered = list(socket.scope["subprotocols"])
    agreed = [name for name in offered if name in PROTOCOLS] or [name for name in offered if name.startswith(BEARER)]
    return agreed[0] if agreed else None


async def _refuse(socket: WebSocket, error: InterlockError) -> None:
    if any(name.startswith(BEARER) for name in socket.scope["subprotocols"]):
        await socket.accept(_agreed(socket))
        reason = error.message.encode()[:_REASON_BYTES_MAX].decode(errors="ignore")
        await socket.close(PROBLEM + problems.kind_of(error).status, reason)
        return
    await socket.send_denial_response(problems.of_error(error, socket.url.path))


def routes(parts: ApiParts) -> list[WebSocketRoute]:
    """The WebSocket paths."""
    openings: dict[str, Opening] = {"console/live": _console, "display": _display}
    return [
        WebSocketRoute(f"/v1/instances/{{reference}}/{path}", _Socket(parts, opening))
        for path, opening in openings.items()
    ]


async def screenshot(parts: ApiParts, caller: Caller, request: Request) -> Response:
    asking.only(request.query_params)
    picture = await parts.seeing.screenshot(caller, request.path_params["reference"])
    return Response(picture, media_type="image/png", headers={"Cache-Control": "no-store"})


DOORS: Final = (
    Door(
        method="GET",
        path="/v1/instances/{reference}/screenshot",
        endpoint=screenshot,
        summary="See what the guest's screen shows",
        answers={200: "image/png"},
        problems=(404,),
        tag="instances",
    ),
)
