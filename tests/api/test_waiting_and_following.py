"""Those who wait are answered when something happens, and those who go away are forgotten. Over real connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import uvicorn

from api.conftest import OPERATOR, ApiServer, make
from interlock.core.roles import Role
from interlock.hypervisors.simulated.faults import Hangs, Method
from waiting import PATIENCE_S


class Loopback:
    """The application behind a real HTTP server on loopback."""

    def __init__(self, api: ApiServer) -> None:
        self.api = api
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        settings = uvicorn.Config(api.app, http="httptools", log_config=None, lifespan="off")
        settings.timeout_graceful_shutdown = 5
        self.http = uvicorn.Server(settings)
        self.http.install_signal_handlers = lambda: None  # type: ignore[attr-defined]

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Loopback]:
        task = asyncio.create_task(self.http._serve([self.listening]))
        try:
            yield self
        finally:
            self.api.server.instances.watch.close()
            self.api.server.feed.close()
            self.http.should_exit = True
            await asyncio.wait_for(task, PATIENCE_S)

    def client(self, secret: str) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {secret}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=PATIENCE_S)


@pytest.fixture
def secret(api: ApiServer) -> str:
    return (api.server.folder / "admin.token").read_text().strip()


@pytest.fixture
async def loopback(api: ApiServer) -> AsyncIterator[Loopback]:
    async with Loopback(api).serving() as serving:
        yield serving


@pytest.fixture
async def client(loopback: Loopback, secret: str) -> AsyncIterator[httpx.AsyncClient]:
    async with loopback.client(secret) as client:
        yield client


async def stream(answer: httpx.Response, count: int) -> list[dict[str, Any]]:
    """The next events of a stream: what `data:` holds, with the `id` and `event` lines checked against it."""
    events: list[dict[str, Any]] = []
    fields: dict[str, str] = {}
    lines = answer.aiter_lines()
    async with asyncio.timeout(PATIENCE_S):
        async for line in lines:
            if not line and "data" in fields:
                event = json.loads(fields["data"])
                assert (fields["id"], fields["event"]) == (str(event["sequence"]), event["kind"])
                events.append(event)
                fields = {}
                if len(events) == count:
                    break
            elif line and not line.startswith(":"):
                name, _, value = line.partition(": ")
                fields[name] = value
    return events


def waiting(api: ApiServer) -> int:
    held = sum(len(one) for one in api.server.instances.watch._waiting.values())
    return held + len(api.server.feed._waiting)


async def until_waiting(api: ApiServer, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while waiting(api) != count:  # noqa: ASYNC110 - nothing tells of those who wait
            await asyncio.sleep(0.005)


async def test_a_wait_for_the_next_generation_ends_when_it_comes(api: ApiServer, client: httpx.AsyncClient) -> None:
    instance = await make(client, "vm", start=False)
    path = "/v1/instances/vm"
    held = asyncio.create_task(client.get(path, params={"after_generation": instance["generation"], "wait": "20s"}))
    await until_waiting(api, 1)
    await client.post(f"{path}/requests", json={"operation": "lock"})
    answer = await held
    assert answer.json()["generation"] > instance["generation"]
    assert answer.json()["locked_by"]


async def test_a_wait_that_nothing_ends_answers_with_what_there_is(client: httpx.AsyncClient) -> None:
    instance = await make(client, "vm", start=False)
    answer = await client.get("/v1/instances/vm", params={"after_generation": instance["generation"], "wait": "30ms"})
    assert (answer.status_code, answer.json()["generation"]) == (200, instance["generation"])


async def test_one_who_goes_away_waits_no_longer(api: ApiServer, loopback: Loopback, secret: str) -> None:
    async with loopback.client(secret) as client:
        instance = await make(client, "vm")
        api.host.faults.script(str(instance["id"]), Method.PAUSE, Hangs())
        asked = await client.post("/v1/instances/vm/requests", json={"operation": "pause"})
        before = waiting(api)
        long = {"wait": "100s"}
        tasks = [
            asyncio.create_task(client.get("/v1/instances/vm", params={**long, "after_generation": 10**6})),
            asyncio.create_task(client.get(asked.headers["location"], params=long)),
            asyncio.create_task(
                client.post("/v1/instances/vm/requests", json={"operation": "unpause"}, headers={"Prefer": "wait=100"})
            ),
            asyncio.create_task(client.get("/v1/events")),
        ]
        await until_waiting(api, before + len(tasks))
        for task in tasks:
            task.cancel()
        await until_waiting(api, before)


async def test_whoever_waits_or_follows_is_turned_away_as_soon_as_the_token_is_deleted(
    api: ApiServer, loopback: Loopback, client: httpx.AsyncClient
) -> None:
    callers = api.server.callers
    _, secret = await api.server.tokens.make(OPERATOR, "guest", Role.MEMBER, "default")
    instance = await make(client, "vm")
    api.host.faults.script(str(instance["id"]), Method.PAUSE, Hangs())
    asked = await client.post("/v1/instances/vm/requests", json={"operation": "pause"})
    before = waiting(api)
    async with loopback.client(secret) as guest, guest.stream("GET", "/v1/events") as stream_:
        long = {"wait": "100s"}
        lines = stream_.aiter_lines()
        assert await anext(lines) == ": interlock"
        held = [
            asyncio.create_task(guest.get("/v1/instances/vm", params={**long, "after_generation": 10**6})),
            asyncio.create_task(guest.get(asked.headers["location"], params=long)),
            asyncio.create_task(
                guest.post("/v1/instances/vm/requests", json={"operation": "unpause"}, headers={"Prefer": "wait=100"})
            ),
        ]
        other = asyncio.create_task(client.get(asked.headers["location"], params={"wait": "1s"}))
        await until_waiting(api, before + len(held) + 2)
        await api.server.tokens.delete(OPERATOR, "guest")
        async with asyncio.timeout(PATIENCE_S):
            async for _ in lines:
                pass  # what was told before it ended
            assert [(await one).status_code for one in held] == [401, 401, 401]
        assert (await other).status_code == 200, "it was asked with another token"
    assert callers._uses == set()


async def test_events_are_told_as_they_come_and_can_be_taken_up_again(client: httpx.AsyncClient) -> None:
    async with client.stream("GET", "/v1/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        await make(client, "vm")
        told = await stream(answer, 4)
    assert told[0]["kind"] == "instance.created"
    assert [one["sequence"] for one in told] == sorted(one["sequence"] for one in told)
    async with client.stream("GET", "/v1/events", headers={"Last-Event-ID": str(told[1]["sequence"])}) as answer:
        again = await stream(answer, 2)
    assert again == told[2:4]
    async with client.stream("GET", "/v1/events", params={"after": 0, "instance": "vm"}) as answer:
        assert await stream(answer, 4) == told


async def test_events_of_another_project_are_not_told(
    api: ApiServer, loopback: Loopback, client: httpx.AsyncClient
) -> None:
    _, secret = await api.server.tokens.make(OPERATOR, "stranger", Role.MEMBER, "elsewhere")
    await make(client, "vm")
    async with loopback.client(secret) as stranger, stranger.stream("GET", "/v1/events?after=0") as answer:
        await make(client, "other", start=False)
        await make(stranger, "theirs", start=False)
        (first,) = await stream(answer, 1)
    assert first["data"]["name"] == "theirs"


async def test_streams_and_waits_end_with_the_server(api: ApiServer, secret: str) -> None:
    async with Loopback(api).serving() as serving, serving.client(secret) as client:
        instance = await make(client, "vm", start=False)
        path = "/v1/instances/vm"
        held = asyncio.create_task(
            client.get(path, params={"after_generation": instance["generation"], "wait": "100s"})
        )
        async with client.stream("GET", "/v1/events") as answer:
            await until_waiting(api, 2)
            api.server.instances.watch.close()
            api.server.feed.close()
            async with asyncio.timeout(PATIENCE_S):
                assert [line async for line in answer.aiter_lines() if not line.startswith(":")] == [""]
        assert (await held).status_code == 200


async def test_a_connection_is_used_again_after_an_error(client: httpx.AsyncClient) -> None:
    for _ in range(3):
        assert (await client.get("/v1/instances/none")).status_code == 404
        assert (await client.post("/v1/instances", json={"name": "a"})).status_code == 422
    pool = client._transport._pool  # type: ignore[attr-defined]
    assert len(pool.connections) == 1


async def test_a_chunked_body_that_is_too_large_is_cut_off(client: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b" " * 1024

    headers = {"Content-Type": "application/json"}
    answer = await client.post("/v1/instances", content=chunks(), headers=headers)
    assert (answer.status_code, answer.headers["connection"]) == (413, "close")
