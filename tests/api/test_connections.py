"""How many connections a server accepts and from whom, and which of them its thread serves."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from websockets.asyncio.client import connect

from interlock.api.http import listener
from interlock.api.http.listener import ConnectionSlots, client_of, is_agent
from interlock.api.http.loop_relay import REPLY_AT_ONCE
from interlock.api.http.server import HttpServer
from interlock.config import HttpConfig
from interlock.ports.hosts import LINK_ALPN
from waiting import PATIENCE_S, eventually

LIMITS = HttpConfig(connections_max=6, connections_per_client_max=3, header_timeout_ms=300, idle_timeout_ms=60_000)
REQUEST = b"GET /v1/x HTTP/1.1\r\nHost: x\r\n\r\n"
LINK = "/v1/hosts/north/link"


class Application:
    """Answers with the name of the thread, and echoes on WebSockets, some of it at once."""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.block = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.threads.append(threading.current_thread().name)
        if scope["type"] == "http":
            await PlainTextResponse(threading.current_thread().name)(scope, receive, send)
            return
        await receive()
        if REPLY_AT_ONCE in scope:
            scope[REPLY_AT_ONCE](lambda frame: threading.current_thread().name.encode() if frame == b"who" else None)
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "bytes": b"echo " + message["bytes"]})


@pytest.fixture
async def application() -> Application:
    return Application()


@pytest.fixture
async def port(application: Application) -> AsyncIterator[int]:
    with listener.bind("127.0.0.1", 0) as listening:
        server = HttpServer(application, LIMITS, timeout_graceful_shutdown=1)
        serving = asyncio.create_task(server.serve_on(listening))
        yield int(listening.getsockname()[1])
        server.should_exit = True
        await asyncio.wait_for(serving, PATIENCE_S)


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int, source: str = "127.0.0.1") -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0)))

    async def ask(self) -> tuple[int, bytes]:
        with contextlib.suppress(ConnectionError):
            self.writer.write(REQUEST)
            await self.writer.drain()
        return await self.answer()

    async def answer(self) -> tuple[int, bytes]:
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return int(head.split()[1]), head + await self.reader.readexactly(length)

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


async def test_more_connections_than_one_address_may_have_are_refused_and_others_are_not(port: int) -> None:
    mine = [await Client.open(port) for _ in range(3)]
    assert [(await one.ask())[0] for one in mine] == [200] * 3
    began_s = time.monotonic()
    refused = await Client.open(port)
    status, answer = await refused.ask()
    assert (status, time.monotonic() - began_s < PATIENCE_S / 10) == (503, True)
    assert b"\r\nretry-after: 1\r\n" in answer
    assert b"urn:interlock:problem:overloaded" in answer
    assert b"\r\nconnection: close\r\n" in answer
    others = [await Client.open(port, "127.0.0.2") for _ in range(3)]
    assert [(await one.ask())[0] for one in others] == [200] * 3
    full = await Client.open(port, "127.0.0.3")
    assert (await full.ask())[0] == 503, "as many as there may be in all"
    for one in (*mine, refused, *others, full):
        await one.close()


async def test_a_connection_that_has_ended_makes_room_for_another(port: int) -> None:
    for _ in range(3):
        clients = [await Client.open(port) for _ in range(2)]
        assert [(await one.ask())[0] for one in clients] == [200, 200]
        silent = await Client.open(port)
        assert await asyncio.wait_for(silent.reader.read(), PATIENCE_S) == b"", "it sent nothing and was closed"
        async with connect(f"ws://127.0.0.1:{port}/echo") as upgraded:
            await upgraded.send(b"a")
            assert await upgraded.recv() == b"echo a"
            third = await Client.open(port)
            assert (await third.ask())[0] == 503, "a WebSocket counts"
        for one in (*clients, silent, third):
            await one.close()
        await asyncio.sleep(0.05)


async def test_an_agent_is_admitted_where_clients_are_refused_and_served_by_the_thread(
    port: int, application: Application
) -> None:
    clients = [await Client.open(port) for _ in range(3)]
    assert all([b"MainThread" in (await one.ask())[1] for one in clients])
    async with connect(f"ws://127.0.0.1:{port}{LINK}") as agent:
        await agent.send(b"who")
        assert [await agent.recv(), await agent.recv()] == [b"connections", b"echo who"]
        await agent.send(b"x" * 1_000_000)
        assert len(await agent.recv()) == 1_000_005
    assert set(application.threads) == {"MainThread"}
    for one in clients:
        await one.close()


async def test_an_answer_at_once_needs_no_loop_of_the_application(port: int) -> None:
    async with connect(f"ws://127.0.0.1:{port}{LINK}", compression=None) as agent:
        await agent.send(b"a")
        assert await agent.recv() == b"echo a"
        client = agent.transport.get_extra_info("socket")

        def ask() -> bytes:
            """As a client of another process, since this loop is blocked too."""
            with socket.socket(fileno=socket.dup(client.fileno())) as raw:
                raw.setblocking(True)
                raw.settimeout(PATIENCE_S)
                raw.sendall(b"\x82\x83\0\0\0\0who")  # a frame with an empty mask
                return raw.recv(100)

        asking = threading.Thread(target=lambda: answers.append(ask()))
        answers: list[bytes] = []
        asking.start()
        asking.join()  # blocks the loop
        assert answers == [b"\x82\x0bconnections"]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    path = tmp_path / "certificate.pem"
    request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=interlock"
    command = ("openssl", *request.split(), "-addext", "subjectAltName=IP:127.0.0.1")
    subprocess.run((*command, "-keyout", path.with_name("key.pem"), "-out", path), check=True, capture_output=True)
    return path


async def test_with_tls_an_agent_is_known_before_its_connection_is_decrypted(
    application: Application, certificate: Path
) -> None:
    def settings() -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.load_cert_chain(certificate, certificate.with_name("key.pem"))
        return made

    with listener.bind("127.0.0.1", 0) as listening:
        server = HttpServer(application, LIMITS, settings, timeout_graceful_shutdown=1)
        serving = asyncio.create_task(server.serve_on(listening))
        answers = []
        for protocols in ([LINK_ALPN, "http/1.1"], ["http/1.1"]):
            tls = ssl.create_default_context(cafile=certificate)
            tls.set_alpn_protocols(protocols)
            url = f"wss://127.0.0.1:{listening.getsockname()[1]}{LINK}"
            async with connect(url, ssl=tls) as agent:
                await agent.send(b"who")
                answers.append(await agent.recv())
        assert answers == [b"connections", b"echo who"], "one that does not say so is served by the other loop"
        server.should_exit = True
        await asyncio.wait_for(serving, PATIENCE_S)


async def test_a_request_on_an_agents_path_that_is_no_websocket_is_answered_as_any(port: int) -> None:
    client = await Client.open(port)
    client.writer.write(f"GET {LINK} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert (await client.answer())[0] == 200
    await client.close()


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (b"GET /v1/hosts/north/link HTTP/1.1\r\n", True),
        (b"GET /v1/hosts/north/link?x=1 HTTP/1.1\r\n", True),
        (b"GET /v1/hosts/north HTTP/1.1\r\n", False),
        (b"GET /v1/hosts/north/files/1 HTTP/1.1\r\n", False),
        (b"GET /v1/hosts/a/b/link HTTP/1.1\r\n", False),
        (b"PUT /v1/hosts/north/link HTTP/1.1\r\n", False),
        (b"POST /", False),
        (b"\x16\x03\x01", False),
        (b"G", None),
        (b"GET /v1/hosts/nor", None),
        (b"GET /v1/hosts/" + b"a" * listener.PEEK_BYTES_MAX, False),
    ],
)
def test_an_agent_is_known_by_the_path_that_it_asks_for(seen: bytes, expected: bool | None) -> None:
    assert is_agent(seen, tls=False) is expected


@pytest.mark.parametrize(
    ("protocols", "expected"), [([LINK_ALPN, "http/1.1"], True), (["http/1.1"], False), ([], False)]
)
def test_an_agent_is_known_by_its_protocol_in_a_tls_handshake(protocols: list[str], expected: bool) -> None:
    settings = ssl.create_default_context()
    if protocols:
        settings.set_alpn_protocols(protocols)
    outgoing = ssl.MemoryBIO()
    handshake = settings.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="interlock")
    with contextlib.suppress(ssl.SSLWantReadError):
        handshake.do_handshake()
    hello = outgoing.read()
    assert is_agent(hello, tls=True) is expected
    assert [is_agent(hello[:length], tls=True) for length in (1, 5, len(hello) - 1)] == [None] * 3
    assert is_agent(REQUEST, tls=True) is False


def test_connections_are_counted_by_address_and_by_the_network_of_ipv6() -> None:
    assert client_of("::ffff:10.0.0.1") == client_of("10.0.0.1") == "10.0.0.1"
    assert client_of("2001:db8::1") == client_of("2001:db8::ffff:1") != client_of("2001:db8:0:1::1")
    assert client_of("fe80::1%eth0") == client_of("fe80::2")
    slots = ConnectionSlots(3, 2)
    first, second = slots.take("a"), slots.take("a")
    assert (slots.take("a"), first is None, second is None) == (None, False, False)
    assert first is not None
    first()
    first()
    assert slots.take("a") is not None
    assert slots.take("a") is None, "a second call changes nothing"
    assert slots.take("b") is not None
    assert slots.take("c") is None


async def test_a_server_that_stops_lets_agents_know(application: Application) -> None:
    with listener.bind("127.0.0.1", 0) as listening:
        server = HttpServer(application, LIMITS, timeout_graceful_shutdown=1)
        serving = asyncio.create_task(server.serve_on(listening))
        async with connect(f"ws://127.0.0.1:{listening.getsockname()[1]}{LINK}") as agent:
            await agent.send(b"a")
            assert await agent.recv() == b"echo a"
            server.should_exit = True
            await asyncio.wait_for(agent.wait_closed(), PATIENCE_S)
            assert agent.close_code == 1012
        await asyncio.wait_for(serving, PATIENCE_S)
    await eventually(lambda: not [one for one in threading.enumerate() if one.name == "connections"])
