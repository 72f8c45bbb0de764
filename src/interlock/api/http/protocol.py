"""The protocol of an HTTP connection: uvicorn's, with limits on sizes and times, and each response in one packet.

llhttp bounds neither the size of a head nor the time that it takes, so this counts what has been received since the
parser last completed something. A request that is refused here never reaches the application.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any, Final

from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from interlock.api.http import problems
from interlock.config import HttpConfig
from interlock.ports.hosts import certified_host

_GATHERED_BYTES_MAX: Final = 64 * 1024
"""Gathered output beyond this is written at once."""
_LINGER_S: Final = 1.0
_LINGER_BYTES_MAX: Final = 1024 * 1024
"""For how long, and how much, of a refused request is still received. Closing at once would reset the connection, and
the client would not see the response."""
BODY_STEP_BYTES: Final = 64 * 1024
"""The part of a body for which `body_timeout_ms` holds."""
CERTIFIED_HOST: Final = "certified_host"
"""In the state of a request or WebSocket: the host that the client's certificate names, or None."""
_PATH_SHOWN_MAX: Final = 200
_NOT_IN_A_FIELD: Final = re.compile(b"[\x00-\x08\x0a-\x1f\x7f]")
"""Characters that no name or value of a response's header has: with a line break it would be two."""

STREAM_BUFFER_BYTES: Final = 32 * 1024
"""How much is kept of an event stream that is not read, here and in the kernel, which keeps some MiB by default."""
CONNECTION: Final = "interlock.connection"
"""Key in a request's scope: its `HttpProtocol`."""


class _Refused(Exception):
    """Ends the parsing of a request that is refused."""


class HttpProtocol(HttpToolsProtocol):
    """One connection of a client.

    Args:
        limits: sizes and times; the defaults of the configuration without.
        on_lost: called when the connection has ended, also if it became a WebSocket.
        on_refused: called with the name of the problem when a request is refused here.
        others: the arguments of uvicorn's protocol.
    """

    def __init__(
        self,
        *others: Any,
        limits: HttpConfig | None = None,
        on_lost: Callable[[], None] = lambda: None,
        on_refused: Callable[[str], None] = lambda _: None,
        **more: Any,
    ) -> None:
        super().__init__(*others, **more)
        self._on_lost = on_lost
        self._on_refused = on_refused
        self._limits = limits = limits or HttpConfig()
        self._head_begun = False
        self._in_body = False
        self._head_bytes = 0
        """Size of the header fields of the present request, as far as they are parsed."""
        self._unparsed_bytes = 0
        """Size of what has been received since the parser completed a head, a piece of a body, or a request."""
        self._body_bytes = 0
        self._body_mark = 0
        """How much of the body had been received when its timer was started."""
        self._refusal: tuple[problems.ProblemType, str] | None = None
        self._lingering_bytes: int | None = None
        """How much was discarded since the request was refused; None: it was not."""
        self._idle_since_s = 0.0
        """When the last response was complete, by the event loop's clock."""
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------------------------------ the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        secured = transport.get_extra_info("ssl_object")
        if secured is not None:
            # Also for a WebSocket that this connection becomes.
            self.app_state = {**self.app_state, CERTIFIED_HOST: certified_host(secured.getpeercert())}
        gathering = _GatheringTransport(transport, self._limits.send_timeout_ms / 1000)
        super().connection_made(gathering)  # type: ignore[arg-type]
        self._start_receiving(self._limits.header_timeout_ms, self._on_head_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_receiving()
        self._stop_sending()
        self._stop_idling()
        super().connection_lost(exc)
        self._on_lost()

    def handle_websocket_upgrade(self) -> None:
        self._stop_receiving()
        self._stop_sending()
        self._stop_idling()
        super().handle_websocket_upgrade()
        upgraded = self.transport.get_protocol()
        if isinstance(upgraded, WebSocketProtocol):
            upgraded.on_lost = self._on_lost

    def data_received(self, data: bytes) -> None:
        if self._lingering_bytes is not None:
            self._lingering_bytes += len(data)
            if self._lingering_bytes > _LINGER_BYTES_MAX:
                self.transport.abort()
            return
        self._unparsed_bytes += len(data)
        super().data_received(data)
        if not (self._unparsed_bytes or self._head_begun or self._in_body or self._is_idle()):
            return  # a whole request, as nearly always
        if not self._receives_requests():
            return
        if self._unparsed_bytes > self._limits.header_bytes_max + self._limits.url_bytes_max:
            self._refuse("headers-too-large", self._headers_too_large())
        elif self._receiving is None and self._in_body:
            self._body_mark = self._body_bytes
            self._start_receiving(self._limits.body_timeout_ms, self._on_body_timeout)
        elif self._receiving is None and (self._head_begun or self._is_idle()):
            self._start_receiving(self._limits.header_timeout_ms, self._on_head_timeout)

    def _receives_requests(self) -> bool:
        """Whether the connection is open, no request was refused, and it has not become a WebSocket."""
        if self._lingering_bytes is not None or self.transport.is_closing():
            return False
        return self.transport.get_protocol() is self

    def _is_idle(self) -> bool:
        """Whether no request awaits its response."""
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.response_complete

    # -------------------------------------------------------------------------------------------------- parsing

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[CONNECTION] = self  # type: ignore[typeddict-unknown-key]
        self._head_begun = True
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self._limits.url_bytes_max:
            self._end_parsing("url-too-long", f"The URL is longer than {self._limits.url_bytes_max} bytes.")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Also called for the trailer fields after a body."""
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > self._limits.header_bytes_max:
            self._end_parsing("headers-too-large", self._headers_too_large())
        if len(self.headers) > self._limits.headers_max:
            self._end_parsing("headers-too-large", f"The request has more than {self._limits.headers_max} headers.")

    def on_headers_complete(self) -> None:
        self._stop_receiving()
        self._head_begun, self._in_body = False, True
        self._unparsed_bytes = self._body_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = 0
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop_receiving()
        self._in_body = False
        self._unparsed_bytes = 0
        super().on_message_complete()

    def _headers_too_large(self) -> str:
        return f"The headers are larger than {self._limits.header_bytes_max} bytes."

    def _end_parsing(self, name: str, detail: str) -> None:
        self._refusal = problems.HTTP_PROBLEM_TYPES[name], detail
        raise _Refused

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's text
        """Refuse a request that the parser rejected, or that is beyond a limit."""
        kind, detail = self._refusal or (problems.HTTP_PROBLEM_TYPES["malformed"], "The request is not valid HTTP/1.1.")
        self._refuse(kind.name, detail)

    # -------------------------------------------------------------------------------------------------- refusing

    def _refuse(self, name: str, detail: str) -> None:
        """Answer with a problem, and close the connection."""
        self._on_refused(name)
        self._stop_receiving()
        if self._responding():
            # Another response has begun on this connection, or will.
            self.transport.abort()
            return
        path = getattr(self, "url", b"").partition(b"?")[0][:_PATH_SHOWN_MAX].decode("latin-1")
        response = problems.response(problems.HTTP_PROBLEM_TYPES[name], detail, path)
        self.transport.write(refusal(response, self.server_state.default_headers))
        self._lingering_bytes = 0
        if not self._is_idle():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.abort)

    def _responding(self) -> bool:
        """Whether a response to an earlier request, or the beginning of one to this request, is on its way."""
        if self._is_idle():
            return False
        return bool(self.pipeline) or not self._in_body or self.cycle.response_started

    # ------------------------------------------------------------------------------------------- whole messages

    def take_body(self, scope: Any) -> bytes | None:
        """Return the body of a request if all of it has been received, and none of it read; else None."""
        cycle = self.cycle
        if cycle.scope is not scope or cycle.more_body or not cycle.message_event.is_set():
            return None
        if cycle.disconnected or cycle.response_complete or self.flow.read_paused:
            return None
        cycle.message_event.clear()
        body, cycle.body = cycle.body, bytearray()
        return bytes(body)

    def respond(self, scope: Any, response: Response) -> bool:
        """Send a whole response in one write. Return False, and send nothing, if that is not possible now.

        Then it is sent by ASGI, which checks and copies each of two messages: more than it takes to parse a request.
        """
        cycle = self.cycle
        if cycle.scope is not scope or cycle.disconnected or cycle.response_started or not cycle.keep_alive:
            return False
        if self.flow.write_paused or scope["method"] == "HEAD":
            return False
        fields = [*cycle.default_headers, *response.raw_headers]
        if _NOT_IN_A_FIELD.search(b"".join([part for field in fields for part in field])):
            return False
        head = [name + b": " + value + b"\r\n" for name, value in fields]
        cycle.response_started = cycle.response_complete = True
        packet = b"".join([STATUS_LINE[response.status_code], *head, b"\r\n", response.body])
        self.transport.write_at_once(packet)  # type: ignore[attr-defined]
        cycle.message_event.set()
        cycle.on_response()
        return True

    # ------------------------------------------------------------------------------------------------ streams

    def limit_send_buffer(self) -> None:
        """Keep little of what the client does not read, here and in the kernel."""
        self.transport.set_write_buffer_limits(high=STREAM_BUFFER_BYTES)
        connection = self.transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, STREAM_BUFFER_BYTES)

    def finish_stalled(self, last: bytes) -> None:
        """End a chunked response that is not read with a last chunk, which the client gets if it reads on in time."""
        if not self.cycle.disconnected:
            self.cycle.disconnected = True
            self.transport.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(last), last))
            self.transport.close()

    # -------------------------------------------------------------------------------------------------- time-outs

    def _start_receiving(self, timeout_ms: int, on_timeout: Callable[[], None]) -> None:
        self._receiving = self.loop.call_later(timeout_ms / 1000, on_timeout)

    def _stop_receiving(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._idle_since_s = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._wait_for_request(self._idle_since_s)

    def _unset_keepalive_if_required(self) -> None:
        """Leave the timer of an idle connection alone. It looks itself whether a request has come."""

    def _wait_for_request(self, now_s: float) -> None:
        wait_s = self._idle_since_s + self._limits.idle_timeout_ms / 1000 - now_s
        self.timeout_keep_alive_task = self.loop.call_later(wait_s, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        self.timeout_keep_alive_task = None
        now_s = self.loop.time()
        if self._head_begun or self._unparsed_bytes or self._in_body or not self._is_idle():
            return  # started again when that request has been answered
        if now_s - self._idle_since_s < self._limits.idle_timeout_ms / 1000:
            self._wait_for_request(now_s)
        elif self._receives_requests():
            self.transport.close()

    def _stop_idling(self) -> None:
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None

    def _on_head_timeout(self) -> None:
        self._receiving = None
        if self._head_begun or self._unparsed_bytes:
            seconds = self._limits.header_timeout_ms / 1000
            self._refuse("request-timeout", f"The head of the request was not complete after {seconds:g} s.")
        else:
            self.transport.close()

    def _on_body_timeout(self) -> None:
        self._receiving = None
        if self.flow.read_paused or self._body_bytes - self._body_mark >= BODY_STEP_BYTES:
            # It waits for the application, or is fast enough.
            self._body_mark = self._body_bytes
            self._start_receiving(self._limits.body_timeout_ms, self._on_body_timeout)
            return
        seconds = self._limits.body_timeout_ms / 1000
        self._refuse(
            "request-timeout", f"Less than {BODY_STEP_BYTES >> 10} KiB of the body arrived within {seconds:g} s."
        )

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._sending is None:
            self._sending = self.loop.call_later(self._limits.send_timeout_ms / 1000, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_sending()
        super().resume_writing()

    def _stop_sending(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None


def received_body(scope: Any) -> bytes | None:
    """Return the body of a request if all of it has been received, and none of it read; else None."""
    connection: HttpProtocol | None = scope.get(CONNECTION)
    return None if connection is None else connection.take_body(scope)


def respond_at_once(scope: Any, response: Response) -> bool:
    """Send a response that is complete, as `HttpProtocol.respond`. Return False if it must be sent by ASGI."""
    connection: HttpProtocol | None = scope.get(CONNECTION)
    return connection is not None and type(response) is Response and connection.respond(scope, response)


def refusal(response: Response, headers: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """Return a response after which the connection is closed, as it is sent."""
    status = HTTPStatus(response.status_code)
    fields = [*headers, *response.raw_headers, (b"connection", b"close")]
    head = [f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode()]
    head += [field + b": " + value + b"\r\n" for field, value in fields]
    return b"".join([*head, b"\r\n", response.body])


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's protocol of a WebSocket, which says when its connection has ended."""

    on_lost: Callable[[], None] = staticmethod(lambda: None)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.on_lost()


class _GatheringTransport:
    """A transport that gathers what is written in one turn of the event loop.

    Args:
        transport: of the connection.
        send_timeout_s: how long a closed connection may take to send the rest, in seconds.
    """

    def __init__(self, transport: asyncio.Transport, send_timeout_s: float) -> None:
        self._transport = transport
        self._send_timeout_s = send_timeout_s
        self._gathered: list[bytes] = []
        self._bytes = 0
        self._loop = asyncio.get_running_loop()

    def write(self, data: bytes) -> None:
        if not self._gathered:
            self._loop.call_soon(self._flush)
        self._gathered.append(data)
        self._bytes += len(data)
        if self._bytes > _GATHERED_BYTES_MAX:
            self._flush()

    def write_at_once(self, data: bytes) -> None:
        """Write what nothing follows, after what is gathered."""
        self._flush()
        self._transport.write(data)

    def _flush(self) -> None:
        if self._gathered:
            data = b"".join(self._gathered)
            self._gathered.clear()
            self._bytes = 0
            self._transport.write(data)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._transport.get_protocol()

    def write_eof(self) -> None:
        self._flush()
        self._transport.write_eof()

    def close(self) -> None:
        self._flush()
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self._loop.call_later(self._send_timeout_s, self._transport.abort)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
