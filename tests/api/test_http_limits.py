"""What one connection may send, and how slowly. Over real connections, with an application that reads and answers."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import msgspec
import pytest
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from uvicorn.server import ServerState
from websockets.asyncio.client import connect

from interlock.api.http.protocol import BODY_STEP_BYTES, HttpProtocol
from interlock.config import HttpConfig
from waiting import PATIENCE_S

LIMITS = HttpConfig(
    url_bytes_max=300,
    header_bytes_max=1_000,
    headers_max=20,
    header_timeout_ms=200,
    body_timeout_ms=200,
    idle_timeout_ms=200,
    send_timeout_ms=200,
)
HEAD = b"POST /v1/x HTTP/1.1\r\nHost: x\r\n"


class Application:
    """Answers with the length of the body, or for `/large` with more than any buffer takes."""

    LARGE_BYTES = 100 << 20

    def __init__(self) -> None:
        self.refused: list[str] = []
        self.served = 0
        self.disconnects = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            while (message := await receive())["type"] == "websocket.receive":
                await send({"type": "websocket.send", "text": message["text"]})
            return
        self.served += 1
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            self.disconnects += 1
            return
        content = bytes(self.LARGE_BYTES) if scope["path"] == "/large" else str(len(body)).encode()
        await Response(content)(scope, receive, send)


@pytest.fixture
async def application() -> Application:
    return Application()


@pytest.fixture
async def port(application: Application) -> AsyncIterator[int]:
    settings = uvicorn.Config(application, ws="websockets-sansio", log_config=None)
    settings.load()
    protocol = partial(
        HttpProtocol,
        config=settings,
        server_state=ServerState(),
        app_state={},
        limits=LIMITS,
        on_refused=application.refused.append,
    )
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
    yield int(server.sockets[0].getsockname()[1])
    server.close()


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def status(self) -> int:
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        self.body = await self.reader.readexactly(int(fields[b"content-length"]))
        self.fields = fields
        return int(head.split()[1])

    async def closed(self) -> bytes:
        """What else comes until the server has closed the connection."""
        with contextlib.suppress(ConnectionError):
            return await asyncio.wait_for(self.reader.read(), PATIENCE_S)
        return b""

    async def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            self.writer.write(data)
            await self.writer.drain()


@pytest.fixture
async def client(port: int) -> AsyncIterator[Client]:
    made = Client(*await asyncio.open_connection("127.0.0.1", port))
    yield made
    made.writer.close()


def is_problem(client: Client, name: str) -> bool:
    problem = msgspec.json.decode(client.body)
    assert client.fields[b"content-type"] == b"application/problem+json"
    assert client.fields[b"connection"] == b"close"
    return bool(problem["type"] == f"urn:interlock:problem:{name}" and problem["detail"])


@pytest.mark.parametrize(
    ("sent", "status", "name"),
    [
        (b"GET /" + b"a" * 300 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "url-too-long"),
        (b"GET /" + b"a" * 2_000, 414, "url-too-long"),
        (HEAD + b"X-Long: " + b"a" * 1_000 + b"\r\n\r\n", 431, "headers-too-large"),
        (HEAD + b"X-Growing: " + b"a" * 2_000, 431, "headers-too-large"),
        (HEAD + b"".join(b"X-%d: 1\r\n" % n for n in range(20)) + b"\r\n", 431, "headers-too-large"),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400, "malformed"),
        (b"GET / HTTP/9.9\r\n\r\n", 400, "malformed"),
    ],
    ids=["long URL", "growing URL", "large header", "growing header", "many headers", "no HTTP", "another version"],
)
async def test_a_head_beyond_a_limit_is_refused_at_once_with_a_problem(
    client: Client, application: Application, sent: bytes, status: int, name: str
) -> None:
    await client.send(sent)
    assert await client.status() == status
    assert is_problem(client, name)
    assert await client.closed() == b""
    assert (application.served, application.refused) == (0, [name])


async def test_what_the_limits_allow_is_served_and_so_is_the_next_request(client: Client) -> None:
    most = HEAD + b"X-Long: " + b"a" * 900 + b"\r\nContent-Length: 3\r\n\r\nabc"
    await client.send(most)
    assert (await client.status(), client.body) == (200, b"3")
    await client.send(most + most)
    assert [await client.status(), await client.status()] == [200, 200]


@pytest.mark.parametrize("begun", [b"GET / HT", HEAD, b"\r\n", HEAD + b"Content-Length: 0\r\n\r\nGET /"])
async def test_a_head_that_does_not_end_is_answered_with_a_time_out(client: Client, begun: bytes) -> None:
    await client.send(begun)
    if begun.endswith(b"GET /"):
        assert await client.status() == 200, "the request before it"
    assert await client.status() == 408
    assert is_problem(client, "request-timeout")
    assert await client.closed() == b""


async def test_a_head_that_comes_in_drops_has_no_more_time_than_another(client: Client) -> None:
    async def drop() -> None:
        while True:
            await client.send(b"X: 1\r\n")
            await asyncio.sleep(0.05)

    await client.send(HEAD)
    dropping = asyncio.create_task(drop())
    assert await client.status() == 408
    dropping.cancel()


async def test_a_connection_without_a_request_is_closed_without_a_word(client: Client) -> None:
    assert await client.closed() == b""
    await client.send(HEAD)


async def test_a_connection_is_closed_when_no_further_request_comes(client: Client) -> None:
    await client.send(HEAD + b"Content-Length: 0\r\n\r\n")
    assert await client.status() == 200
    assert await client.closed() == b""


@pytest.mark.parametrize("body", [b"Content-Length: 10\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"])
async def test_a_body_that_does_not_end_is_answered_with_a_time_out_and_the_application_learns_of_it(
    client: Client, application: Application, body: bytes
) -> None:
    await client.send(HEAD + body)
    assert await client.status() == 408
    assert is_problem(client, "request-timeout")
    assert await client.closed() == b""
    assert (application.served, application.disconnects) == (1, 1)


async def test_a_long_body_has_its_time_for_each_part(client: Client) -> None:
    parts = 5
    await client.send(HEAD + b"Content-Length: %d\r\n\r\n" % (parts * BODY_STEP_BYTES))
    for _ in range(parts):
        await asyncio.sleep(0.15)
        await client.send(bytes(BODY_STEP_BYTES))
    assert (await client.status(), client.body) == (200, b"%d" % (parts * BODY_STEP_BYTES))


@pytest.mark.parametrize("growing", [b"1;", b"0\r\nX-Growing: "], ids=["chunk extension", "trailer"])
async def test_what_is_in_a_chunked_body_beside_the_body_is_limited_too(client: Client, growing: bytes) -> None:
    async def grow() -> None:
        while True:
            await client.send(b"x" * 500)
            await asyncio.sleep(0.01)

    await client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + growing)
    sending = asyncio.create_task(grow())
    assert await client.status() == 431
    sending.cancel()
    assert await client.closed() == b""


async def test_a_client_that_does_not_read_its_response_is_disconnected(port: int) -> None:
    def received() -> int:
        """Read only when the server has given up, which a byte that it does not accept shows."""
        with socket.create_connection(("127.0.0.1", port)) as lazy:
            lazy.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                while not select.select([], [], [lazy], 0.02)[2]:
                    lazy.sendall(b"\r\n")
            total = 0
            with contextlib.suppress(ConnectionError):
                while part := lazy.recv(1 << 20):
                    total += len(part)
            return total

    assert await asyncio.to_thread(received) < Application.LARGE_BYTES


async def test_a_websocket_outlives_the_time_outs_of_requests(port: int) -> None:
    async with connect(f"ws://127.0.0.1:{port}/") as socket_:
        await asyncio.sleep(3 * LIMITS.header_timeout_ms / 1000)
        await socket_.send("still here")
        assert await socket_.recv() == "still here"
