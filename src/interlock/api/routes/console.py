"""`/v1/instances/{reference}/console/live`, `/display`, `/screenshot` and `/dumps`: what a guest shows, and its memory.

The first two are WebSockets. Errors are sent as an HTTP response (denial response) before the handshake; to a browser,
which cannot read that, as a close code right after it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from interlock.api.http import audit_entries, problems, request_parsing
from interlock.api.http.authentication import authenticated, bearer
from interlock.api.http.revocation import REVOKED, revocable_receive
from interlock.api.http.route import ApiParts, Routes
from interlock.api.schemas import serializers
from interlock.api.schemas.inventory import DumpList, MemoryDump
from interlock.core.errors import Forbidden, GuestNotFound, InterlockError
from interlock.core.roles import Role
from interlock.core.specs import repr_hiding
from interlock.ports import Stream
from interlock.service.auth import Caller

routes = Routes("instances")

BEARER: Final = "interlock.bearer."
"""Prefix of a subprotocol that carries a token, for browsers, which cannot send headers."""
PROTOCOLS: Final = ("interlock", "binary")
"""Supported subprotocols, without effect. VNC clients offer `binary`."""
HISTORY_LINES_MAX: Final = 10_000
MESSAGE_BYTES_MAX: Final = 1024 * 1024
"""The largest message that a console or a display accepts."""

ENDED: Final = 1000
PROBLEM: Final = 4000
"""Base of close codes for errors: 4000 plus the HTTP status, such as 4401 or 4403."""
_REASON_BYTES_MAX: Final = 120

WEBSOCKETS_DESCRIPTION: Final = f"""\
Two paths are WebSockets (RFC 6455), which OpenAPI cannot describe.

`/v1/instances/{{reference}}/console/live?history=N`: the serial console. Output is sent as binary messages, starting
with the last N lines of the log (0 to {HISTORY_LINES_MAX}; default 0); messages from the client are input. Readers
cannot write.

`/v1/instances/{{reference}}/display`: the guest's VNC (RFB) display in binary messages, as noVNC uses it. For members.

Authenticate with the `Authorization` header, or offer the subprotocol `{BEARER}TOKEN` in addition to `interlock`. Only
same-origin pages may connect. Close code {ENDED}: the guest or its display has ended; 4401, 4403, 4404 or 4503: 4000
plus the HTTP status. A client that does not answer a ping within 20 s is disconnected.
"""

_LOG = structlog.get_logger(__name__)


class _Close(msgspec.Struct, frozen=True):
    """Why the server closes a connection."""

    code: int
    reason: str


class _Client(msgspec.Struct, frozen=True):
    """An authenticated client."""

    __repr__ = repr_hiding("secret")

    caller: Caller
    secret: str


OpenStream = Callable[[ApiParts, Caller, WebSocket], Awaitable[tuple[bytes, Stream]]]


async def _console(parts: ApiParts, caller: Caller, socket: WebSocket) -> tuple[bytes, Stream]:
    request_parsing.check_parameters(socket.query_params, "history")
    lines = request_parsing.integer(socket.query_params, "history", 0, 0, HISTORY_LINES_MAX)
    return await parts.consoles.console(caller, socket.path_params["reference"], lines)


async def _display(parts: ApiParts, caller: Caller, socket: WebSocket) -> tuple[bytes, Stream]:
    request_parsing.check_parameters(socket.query_params)
    return b"", await parts.consoles.display(caller, socket.path_params["reference"])


class _Socket:
    """ASGI application of one WebSocket path."""

    def __init__(self, parts: ApiParts, open_stream: OpenStream, action: str) -> None:
        self._parts = parts
        self._action = action
        self._open_stream = open_stream

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        socket = WebSocket(scope, receive, send)
        try:
            client = _authenticate(self._parts, socket)
        except InterlockError as error:
            await audit_entries.record_failure(self._parts.audit, socket, error)
            await _reject(socket, error)
            return
        with self._parts.callers.using(client.caller) as use:
            await self._open(client, WebSocket(scope, revocable_receive(use, scope, receive), send))

    async def _open(self, client: _Client, socket: WebSocket) -> None:
        try:
            first, stream = await self._open_stream(self._parts, client.caller, socket)
        except InterlockError as error:
            await self._record(client, socket, problems.problem_type_of(error).status)
            await _reject(socket, error)
            return
        try:
            await self._record(client, socket, 200)
            await socket.accept(_subprotocol(socket))
            await self._serve(socket, client, first, stream)
        except (WebSocketDisconnect, OSError):
            pass  # disconnected before the handshake, or during the close
        finally:
            await stream.close()

    async def _record(self, client: _Client, socket: WebSocket, status: int) -> None:
        await audit_entries.record(self._parts.audit, client.caller, socket, self._action, status)

    async def _serve(self, socket: WebSocket, client: _Client, first: bytes, stream: Stream) -> None:
        if first:
            await _send(socket, first)
        either: set[asyncio.Task[_Close | None]] = {
            asyncio.create_task(self._forward_input(socket, client, stream)),
            asyncio.create_task(self._forward_output(socket, client, stream)),
        }
        try:
            done, _ = await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in either:
                task.cancel()
            await asyncio.wait(either)
        closes = [task.result() for task in done if task.exception() is None]
        for task in done:
            failure = task.exception()
            if failure is not None and not isinstance(failure, (WebSocketDisconnect, OSError)):
                _LOG.error("internal error", path=socket.url.path, exc_info=failure)
                closes.append(_Close(1011, "Internal server error."))
        if closes and closes[0] is not None and len(closes) == len(done):
            with contextlib.suppress(RuntimeError):  # already closed because of an invalid frame
                await socket.close(closes[0].code, closes[0].reason)

    async def _forward_input(self, socket: WebSocket, client: _Client, stream: Stream) -> _Close | None:
        """Write the client's messages to the stream. Return None if it disconnected, or why to close."""
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return _TOKEN_INVALID if self._parts.callers.authenticate(client.secret) is None else None
            data = message.get("bytes") or (message.get("text") or "").encode()
            if not data:
                continue
            if len(data) > MESSAGE_BYTES_MAX:
                return _MESSAGE_TOO_LARGE
            if self._parts.callers.authenticate(client.secret) is None:
                return _TOKEN_INVALID
            if client.caller.role is Role.READER:
                return _Close(PROBLEM + 403, "Permission denied: a token with the role reader is read-only.")
            try:
                await stream.write(data)
            except GuestNotFound:
                return _GUEST_ENDED

    async def _forward_output(self, socket: WebSocket, client: _Client, stream: Stream) -> _Close | None:
        while data := await stream.read():
            if self._parts.callers.authenticate(client.secret) is None:
                return _TOKEN_INVALID
            await _send(socket, data)
        return _GUEST_ENDED


async def _send(socket: WebSocket, data: bytes) -> None:
    """Send a message. Raises `WebSocketDisconnect`, also if the server closed the connection on an invalid frame."""
    try:
        await socket.send_bytes(data)
    except RuntimeError as closed:
        raise WebSocketDisconnect(1002) from closed


_TOKEN_INVALID: Final = _Close(PROBLEM + 401, REVOKED)
_MESSAGE_TOO_LARGE: Final = _Close(1009, f"Message too large: the limit is {MESSAGE_BYTES_MAX} bytes.")
_GUEST_ENDED: Final = _Close(ENDED, "The guest has ended or closed the connection.")


def _authenticate(parts: ApiParts, socket: WebSocket) -> _Client:
    """Return the client. Raises `HttpProblem` without a valid token, `Forbidden` for a cross-origin page."""
    origin = socket.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != socket.headers.get("host", "").lower():
        raise Forbidden(
            f"Cross-origin connection from {origin[:80]} denied.",
            remedy="Serve the page from the server's own address.",
        )
    secret = bearer(socket.headers.get("authorization", ""))
    if not secret:
        offered = (name for name in socket.scope["subprotocols"] if name.startswith(BEARER))
        secret = next(offered, "").removeprefix(BEARER).strip()
    caller = authenticated(
        parts,
        socket,
        secret,
        detail="Bearer token missing or invalid, in the Authorization header or as a subprotocol.",
        remedy=f"Send `Authorization: Bearer <secret>`, or offer the subprotocol `{BEARER}<secret>`.",
    )
    return _Client(caller, secret)


def _subprotocol(socket: WebSocket) -> str | None:
    """Select the subprotocol: a browser that offers some disconnects if none is selected."""
    offered = list(socket.scope["subprotocols"])
    known = [name for name in offered if name in PROTOCOLS] or [name for name in offered if name.startswith(BEARER)]
    return known[0] if known else None


async def _reject(socket: WebSocket, error: InterlockError) -> None:
    if any(name.startswith(BEARER) for name in socket.scope["subprotocols"]):
        await socket.accept(_subprotocol(socket))
        reason = error.message.encode()[:_REASON_BYTES_MAX].decode(errors="ignore")
        await socket.close(PROBLEM + problems.problem_type_of(error).status, reason)
        return
    await socket.send_denial_response(problems.from_error(error, socket.url.path))


def socket_routes(parts: ApiParts) -> list[WebSocketRoute]:
    """Return the WebSocket routes."""
    return [
        WebSocketRoute(f"/v1/instances/{{reference}}/{path}", _Socket(parts, open_stream, action))
        for path, open_stream, action in (
            ("console/live", _console, "console.open"),
            ("display", _display, "display.open"),
        )
    ]


@routes.add(
    "GET /v1/instances/{reference}/screenshot",
    "Take a screenshot of the guest's display",
    {200: "image/png"},
    audited="display.read",
)
async def screenshot(parts: ApiParts, caller: Caller, request: Request) -> Response:
    picture = await parts.consoles.screenshot(caller, request.path_params["reference"])
    return Response(picture, media_type="image/png", headers={"Cache-Control": "no-store"})


@routes.add("GET /v1/instances/{reference}/dumps", "List an instance's memory dumps, oldest first", {200: DumpList})
async def dumps(parts: ApiParts, caller: Caller, request: Request) -> DumpList:
    found = await parts.dumps.of(caller, request.path_params["reference"])
    items = tuple(
        MemoryDump(id=dump.id, size_bytes=dump.size_bytes, made_at=serializers.rfc3339(dump.made_at_ms))
        for dump in found
    )
    return DumpList(items=items)


@routes.add(
    "GET /v1/instances/{reference}/dumps/{id}",
    "Download a memory dump",
    {200: "application/octet-stream"},
    audited="dump.read",
)
async def download_dump(parts: ApiParts, caller: Caller, request: Request) -> Response:
    dump = await parts.dumps.find(caller, request.path_params["reference"], request.path_params["id"])
    return FileResponse(dump.path, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})


@routes.add("DELETE /v1/instances/{reference}/dumps/{id}", "Delete a memory dump", {204: None}, audited="dump.delete")
async def delete_dump(parts: ApiParts, caller: Caller, request: Request) -> None:
    await parts.dumps.delete(caller, request.path_params["reference"], request.path_params["id"])
