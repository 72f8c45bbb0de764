"""More than a token may ask, or a server can serve, is refused at once, with a time after which to retry."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn
from uvicorn.server import ServerState

from api.conftest import ApiServer, make
from interlock.api.http import protocol
from interlock.api.http.protocol import HttpProtocol
from interlock.config import HttpConfig
from interlock.core.roles import Role
from interlock.service.load_limits import LoadLimits
from waiting import PATIENCE_S, eventually


def limit(api: ApiServer, **limits: Any) -> LoadLimits:
    """Build the application anew, with these limits."""
    msgspec.structs.force_setattr(api.server.config, "http", HttpConfig(**limits))
    api.server.load = LoadLimits(api.server.config.http)
    api.app = api.server.app()
    return api.server.load


def is_refused(answer: httpx.Response, status: int, name: str) -> bool:
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["remedy"]
    return (answer.status_code, answer.json()["type"]) == (status, f"urn:interlock:problem:{name}")


async def test_a_token_that_asks_too_often_waits_and_another_does_not(api: ApiServer) -> None:
    limit(api, token_requests_per_s=0.01, token_requests_burst=3)
    one, other = await api.token("one"), await api.token("other")
    answers = [await one.get("/v1/instances") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert is_refused(answers[-1], 429, "rate-limited")
    assert int(answers[-1].headers["retry-after"]) == 100
    figures = (await (api.client((api.server.folder / "admin.token").read_text().strip())).get("/metrics")).text
    assert 'interlock_http_refused_total{problem="rate-limited"} 1.0' in figures.splitlines()
    assert (await other.get("/v1/instances")).status_code == 200


async def test_an_address_without_a_valid_token_is_slowed_down_and_a_valid_token_is_not(api: ApiServer) -> None:
    limit(api, auth_failures_per_s=0.01, auth_failures_burst=2)
    stranger, member = api.client("ilk_wrong"), await api.token("member")
    answers = [await stranger.get("/v1/instances") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [401, 401, 429]
    assert is_refused(answers[-1], 429, "rate-limited")
    assert (await member.get("/v1/instances")).status_code == 200


@pytest.fixture
async def waiting_read(api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Reads of lists wait for this event, as they would for a processor."""
    go_on = asyncio.Event()
    listed = api.server.instances.list

    async def slow(*args: Any, **more: Any) -> Any:
        await go_on.wait()
        return await listed(*args, **more)

    monkeypatch.setattr(api.server.instances, "list", slow)
    return go_on


async def test_more_than_is_served_at_a_time_is_refused_at_once(api: ApiServer, waiting_read: asyncio.Event) -> None:
    load = limit(api, requests_max=3, token_requests_max=2)
    one, other = await api.token("one"), await api.token("other")
    serving = [asyncio.create_task(one.get("/v1/instances")) for _ in range(2)]
    await eventually(lambda: load.requests.most - 1 == load.requests.taken)
    assert is_refused(await one.get("/v1/policy"), 429, "rate-limited")
    serving.append(asyncio.create_task(other.get("/v1/instances")))
    await eventually(lambda: load.requests.most == load.requests.taken)
    assert is_refused(await other.get("/v1/policy"), 503, "overloaded")
    waiting_read.set()
    assert [answer.status_code for answer in await asyncio.gather(*serving)] == [200] * 3
    assert (await other.get("/v1/policy")).status_code == 200


async def test_one_who_waits_for_an_event_or_sends_slowly_takes_nobodys_place(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    await make(admin, "vm")
    slots = limit(api, requests_max=1, token_requests_max=1).requests
    client = await api.token("one")
    one = next(token.id for token in await api.server.store.tokens.all() if token.name == "one")
    generation = (await client.get("/v1/instances/vm")).json()["generation"]
    waiting = asyncio.create_task(client.get(f"/v1/instances/vm?after_generation={generation}&wait=60s"))
    await asyncio.sleep(0)
    await eventually(lambda: not slots.full_for(one))
    sent = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b'{"operation": '
        await sent.wait()
        yield b'"stop", "parameters": {"hard": true}}'

    headers = {"Content-Type": "application/json"}
    slow = asyncio.create_task(client.post("/v1/instances/vm/requests", content=body(), headers=headers))
    await asyncio.sleep(0)
    await eventually(lambda: not slots.full_for(one))
    assert (await client.get("/v1/instances/vm")).status_code == 200
    sent.set()
    assert (await slow).status_code == 202
    assert (await waiting).json()["generation"] > generation


# ------------------------------------------------------------------------------------------------------------ streams


@pytest.fixture
async def port(api: ApiServer) -> AsyncIterator[int]:
    """The application behind HTTP, whatever it is when a connection is made."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await api.app(scope, receive, send)

    settings = uvicorn.Config(application, log_config=None)
    settings.load()
    server = await asyncio.get_running_loop().create_server(
        lambda: HttpProtocol(config=settings, server_state=ServerState(), app_state={}), "127.0.0.1", 0
    )
    yield int(server.sockets[0].getsockname()[1])
    api.server.feed.close()
    server.close()


def stream_request(api: ApiServer, more: str = "") -> bytes:
    secret = (api.server.folder / "admin.token").read_text().strip()
    return f"GET /v1/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {secret}\r\n{more}\r\n".encode()


async def test_streams_are_limited_by_token_and_in_all_and_one_that_ends_makes_room(
    api: ApiServer, admin: httpx.AsyncClient, port: int
) -> None:
    load = limit(api, streams_max=3, token_streams_max=2)
    member = await api.token("member", Role.READER)

    async def follow() -> tuple[asyncio.StreamWriter, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(stream_request(api))
        return writer, await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S)

    streams = [await follow() for _ in range(3)]
    assert [head.split()[1] for _, head in streams] == [b"200", b"200", b"429"]
    assert b"\r\nretry-after: " in streams[-1][1]
    assert load.streams.take("another")
    assert is_refused(await member.get("/v1/events"), 503, "overloaded")
    assert (await admin.head("/v1/events")).headers["content-type"].startswith("text/event-stream")
    for writer, _ in streams:
        writer.close()
    await eventually(lambda: load.streams.taken == 1)


async def test_a_reader_that_does_not_keep_up_is_told_so_and_resumes_without_a_loss(
    api: ApiServer, admin: httpx.AsyncClient, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "STREAM_BUFFER_BYTES", 4_096)
    limit(api, stream_stall_ms=200)
    await make(admin, "vm")
    first = (await admin.get("/v1/instances/vm/events")).json()["items"][0]["sequence"]
    with socket.create_connection(("127.0.0.1", port)) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        lazy.sendall(stream_request(api, f"Last-Event-ID: {first}\r\n"))
        api_feed = api.server.feed
        while api_feed._readers < 1:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.01)
        for number in range(200):
            answer = await admin.patch(
                "/v1/instances/vm", json={"tags": [f"{number}-{letter * 60}" for letter in "abc"]}
            )
            assert answer.status_code == 200
        last = await api.server.instances.last_event()
        await eventually(lambda: api_feed._readers == 0)
        received = await asyncio.to_thread(_rest, lazy)
    assert received.rstrip().endswith(b"0"), "the response is complete"
    assert b": ended: the reader does not keep up; resume with Last-Event-ID" in received
    seen = [int(line[4:]) for line in received.replace(b"\r", b"").split(b"\n") if line.startswith(b"id: ")]
    assert seen == list(range(first + 1, seen[-1] + 1))
    assert seen[-1] < last
    following = await api.server.store.events(seen[-1], 1)
    assert following[0].sequence == seen[-1] + 1


def _rest(connection: socket.socket) -> bytes:
    connection.settimeout(PATIENCE_S)
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            received += part
    return received
