"""Requests find their endpoint by path segments, and responses leave in one write."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from starlette.responses import Response
from starlette.routing import Match
from uvicorn.server import ServerState

from api.conftest import ApiServer
from interlock.api.app import ROUTES
from interlock.api.http.protocol import (
    _GATHERED_BYTES_MAX,
    HttpProtocol,
    _GatheringTransport,
    received_body,
    respond_at_once,
)
from interlock.config import HttpConfig


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
async def test_every_path_has_the_endpoint_and_parameters_that_starlette_finds(api: ApiServer, route: object) -> None:
    assert isinstance(route, ROUTES[0].__class__)
    path = re.sub("{(.*?)}", r"a-\1", route.path)
    for method in (route.method, "HEAD") if route.method == "GET" else (route.method,):
        scope = {"type": "http", "path": path, "method": method, "headers": []}
        endpoint = api.app.find(scope)
        expected = next(
            found for found in (one.matches(dict(scope)) for one in api.app.routes) if found[0] is Match.FULL
        )
        assert endpoint is expected[1]["endpoint"]
        assert scope["path_params"] == expected[1]["path_params"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/v1/instances"),
        ("GET", "/v1/instances/"),
        ("GET", "/v1/instances/{}/nothing"),
        ("GET", "/v1"),
        ("GET", "/v1/instances//requests"),
        ("POST", "/v1/instances/a/requests/"),
        ("GET", "//"),
    ],
)
async def test_everything_else_is_left_to_starlette(api: ApiServer, method: str, path: str) -> None:
    assert api.app.find({"type": "http", "path": path, "method": method, "headers": []}) is None


class Wire:
    """A transport that keeps each write."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False
        self.protocol: Any = None

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.writes.append(data)

    def close(self) -> None:
        self.closed = True

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, _name: str) -> None:
        return None

    def is_closing(self) -> bool:
        return self.closed

    def get_protocol(self) -> Any:
        return self.protocol


async def test_a_head_and_its_body_are_one_write() -> None:
    wire = Wire()
    transport = _GatheringTransport(wire, 1.0)  # type: ignore[arg-type]
    transport.write(b"head")
    transport.write(b"body")
    assert wire.writes == []
    await asyncio.sleep(0)
    assert wire.writes == [b"headbody"]


async def test_what_nothing_follows_is_written_at_once_after_what_was_gathered() -> None:
    wire = Wire()
    transport = _GatheringTransport(wire, 1.0)  # type: ignore[arg-type]
    transport.write(b"earlier")
    transport.write_at_once(b"whole")
    await asyncio.sleep(0)
    assert wire.writes == [b"earlier", b"whole"]


async def test_much_is_not_gathered_and_closing_writes_what_is_left() -> None:
    wire = Wire()
    transport = _GatheringTransport(wire, 1.0)  # type: ignore[arg-type]
    transport.write(b"x" * _GATHERED_BYTES_MAX)
    transport.write(b"y")
    assert wire.writes == [b"x" * _GATHERED_BYTES_MAX + b"y"]
    transport.write(b"last")
    transport.close()
    assert (wire.writes[1:], wire.closed) == ([b"last"], True)


# ------------------------------------------------------------------------------------------------- whole messages


class Clock:
    """An event loop whose time is set by a test."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Any:
        timer = (self.now_s + delay_s, call)
        self.timers.append(timer)
        return SimpleNamespace(cancel=lambda: self.timers.remove(timer))

    def create_task(self, coroutine: Any) -> asyncio.Task[Any]:
        return asyncio.get_running_loop().create_task(coroutine)

    def advance(self, until_s: float) -> None:
        while due := [timer for timer in self.timers if timer[0] <= until_s]:
            first = min(due, key=lambda timer: timer[0])
            self.timers.remove(first)
            self.now_s = first[0]
            first[1]()
        self.now_s = until_s


def connection(
    application: Callable[[Any, Any, Any], Awaitable[None]],
    clock: Clock | None = None,
    limits: HttpConfig | None = None,
) -> tuple[HttpProtocol, Wire]:
    """A connection with an application, on a wire that keeps what is written."""
    settings = uvicorn.Config(application, log_config=None)
    settings.load()
    wire = Wire()
    loop: Any = clock
    wire.protocol = HttpProtocol(settings, ServerState(), {}, loop, limits=limits)
    wire.protocol.connection_made(wire)
    return wire.protocol, wire


POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"


async def answered(wire: Wire, writes: int) -> bytes:
    for _ in range(10):
        if len(wire.writes) >= writes:
            break
        await asyncio.sleep(0)
    return b"".join(wire.writes)


async def test_a_request_that_has_come_as_a_whole_is_read_and_answered_at_once() -> None:
    read: list[Any] = []

    async def application(scope: Any, receive: Any, _send: Any) -> None:
        read.extend((received_body(scope), received_body(scope)))
        assert respond_at_once(scope, Response(b"done", 202, {"X-Rule": "r"}))
        read.append((await receive())["type"])

    protocol, wire = connection(application)
    protocol.data_received(POST + b"body")
    head, _, body = (await answered(wire, 1)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 202 Accepted\r\n")
    assert b"\r\nx-rule: r" in head
    assert (b"\r\ncontent-length: 4" in head, body, len(wire.writes)) == (True, b"done", 1)
    assert read == [b"body", None, "http.disconnect"], "a body is read once"


async def test_a_body_that_is_still_coming_is_waited_for() -> None:
    read: list[Any] = []

    async def application(scope: Any, receive: Any, _send: Any) -> None:
        read.append(received_body(scope))
        while not read[-1] or read[-1]["more_body"]:
            read.append(await receive())
        respond_at_once(scope, Response(b"done"))

    protocol, wire = connection(application)
    protocol.data_received(POST + b"bo")
    await asyncio.sleep(0)
    assert read[0] is None
    protocol.data_received(b"dy")
    assert (await answered(wire, 1)).endswith(b"done")
    assert b"".join(one["body"] for one in read[1:]) == b"body"


@pytest.mark.parametrize(
    ("request_head", "response"),
    [
        (b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n", Response(b"done")),
        (b"GET / HTTP/1.0\r\n\r\n", Response(b"done")),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", Response(b"done", headers={"location": "a\r\nset-cookie: b"})),
    ],
    ids=["without a body", "then closed", "line break in a header"],
)
async def test_what_is_no_plain_response_is_left_to_asgi(request_head: bytes, response: Response) -> None:
    sent: list[bool] = []

    async def application(scope: Any, _receive: Any, send: Any) -> None:
        sent.append(respond_at_once(scope, response))
        await response(scope, _receive, send)

    protocol, wire = connection(application)
    protocol.data_received(request_head)
    answer = await answered(wire, 1)
    assert sent == [False]
    assert b"set-cookie" not in answer
    assert answer.endswith(b"done") is (request_head.startswith(b"GET") and "location" not in response.headers)


async def test_a_connection_is_idle_from_its_last_response_on() -> None:
    async def application(scope: Any, _receive: Any, _send: Any) -> None:
        respond_at_once(scope, Response(b"done"))

    clock = Clock()
    protocol, wire = connection(application, clock, HttpConfig(idle_timeout_ms=10_000))
    for number, at_s in enumerate((1, 9, 18)):
        clock.advance(at_s)
        protocol.data_received(POST + b"body")
        await answered(wire, number + 1)
    clock.advance(27.9)
    assert not wire.closed
    clock.advance(28.1)
    assert wire.closed
