"""Consoles, displays and screenshots over HTTP: who may, what comes, and how it is told why it ended."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import structlog
import uvicorn
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Origin, Subprotocol

from interlock.api.http.revocation import REVOKED
from interlock.api.routes.console import BEARER, MESSAGE_BYTES_MAX
from interlock.core.errors import GuestNotFound
from interlock.core.roles import Role
from interlock.hypervisors.qemu.console.console_log import tail
from interlock.hypervisors.remote.protocol import FRAME_BYTES_MAX
from interlock.service import console_service
from interlock.service.server_log import CAUSED_BY_CLIENTS
from waiting import PATIENCE_S

from .conftest import OPERATOR, ApiServer, make


class Listening:
    """The api, listening on a port of its own."""

    def __init__(self, api: ApiServer, port: int) -> None:
        self.api = api
        self.port = port

    async def secret(self, name: str, role: Role = Role.MEMBER, project: str = "default") -> str:
        host = name if role is Role.AGENT else None
        _, secret = await self.api.server.tokens.make(OPERATOR, name, role, project, host)
        return secret

    def call(self, path: str, secret: str | None = None, **options: object) -> connect:
        headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
        url = f"ws://127.0.0.1:{self.port}/v1/instances/{path}"
        return connect(url, additional_headers=headers, **options)  # type: ignore[arg-type]


class Serving(uvicorn.Server):
    """uvicorn's server, telling when it listens, and leaving signals alone."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listens = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens.set()

    def install_signal_handlers(self) -> None:
        pass


@pytest.fixture
async def listening(api: ApiServer) -> AsyncIterator[Listening]:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        config = uvicorn.Config(
            api.app,
            ws="websockets-sansio",
            ws_max_size=FRAME_BYTES_MAX,
            lifespan="off",
            log_config=None,
            timeout_graceful_shutdown=1,
        )
        server = Serving(config)
        task = asyncio.create_task(server._serve([bound]))
        await server.listens.wait()
        yield Listening(api, bound.getsockname()[1])
        server.should_exit = True
        await task


@pytest.fixture
async def secret(listening: Listening, admin: httpx.AsyncClient) -> str:
    """A member's token; there is an instance `one` that runs."""
    await make(admin, "one")
    return await listening.secret("member")


async def until(talk: ClientConnection, expected: bytes) -> bytes:
    said = b""
    async with asyncio.timeout(PATIENCE_S):
        while expected not in said:
            message = await talk.recv()
            assert isinstance(message, bytes), "output comes as binary messages"
            said += message
    return said


async def read_on(talk: ClientConnection) -> None:
    while True:
        await talk.recv()


async def closed(talk: ClientConnection) -> tuple[int, str]:
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ConnectionClosed) as ended:
            await read_on(talk)
    assert ended.value.rcvd is not None
    return ended.value.rcvd.code, ended.value.rcvd.reason


async def test_what_is_typed_reaches_the_guest_and_what_it_says_comes_back(listening: Listening, secret: str) -> None:
    async with listening.call("one/console/live", secret) as talk:
        await talk.send(b"hello\r")
        await until(talk, b"hello")
        await talk.send("as text\r")
        await until(talk, b"as text")


async def test_who_opens_a_console_or_tries_to_is_in_the_audit_log(
    listening: Listening, secret: str, admin: httpx.AsyncClient
) -> None:
    async with listening.call("one/console/live", secret) as talk:
        await talk.send(b"secret words\r")
    with pytest.raises(InvalidStatus):
        async with listening.call("other/display", secret):
            pass
    with pytest.raises(InvalidStatus):
        async with listening.call("one/display", "ilk_guessed"):
            pass
    found = (await admin.get("/v1/audit", params={"limit": 3})).json()
    assert [(one["action"], one["outcome"], one["who"], one["target"]) for one in found["items"]] == [
        ("authenticate", "refused", "", "/v1/instances/one/display"),
        ("display.open", "refused", "member", "other"),
        ("console.open", "succeeded", "member", "one"),
    ]
    assert "secret words" not in str(found)


async def test_a_reader_may_look_on_and_not_type(listening: Listening, secret: str, admin: httpx.AsyncClient) -> None:
    assert secret
    reader = await listening.secret("reader", Role.READER)
    async with listening.call("one/console/live", reader) as watching:
        await admin.post("/v1/instances/one/requests", json={"operation": "pause"})
        await until(watching, b"paused")
        await watching.send(b"typed\r")
        assert await closed(watching) == (4403, "Permission denied: a token with the role reader is read-only.")


@pytest.mark.parametrize("path", ["console/live", "display"])
async def test_a_quiet_connection_ends_as_soon_as_its_token_is_deleted(
    listening: Listening, secret: str, path: str
) -> None:
    async with listening.call(f"one/{path}", secret) as talk:
        if path == "display":
            await talk.recv()  # what the screen says first
        await listening.api.server.tokens.delete(OPERATOR, "member")
        assert await closed(talk) == (4401, REVOKED)


async def test_the_end_of_the_guest_closes_the_console_with_a_reason(
    listening: Listening, secret: str, admin: httpx.AsyncClient
) -> None:
    async with listening.call("one/console/live", secret) as talk:
        await admin.post("/v1/instances/one/requests", json={"operation": "stop", "parameters": {"hard": True}})
        assert await closed(talk) == (1000, "The guest has ended or closed the connection.")


async def test_a_token_that_is_deleted_can_type_no_more(listening: Listening, secret: str) -> None:
    async with listening.call("one/console/live", secret) as talk:
        await listening.api.server.tokens.delete(OPERATOR, "member")
        await talk.send(b"hello\r")
        assert await closed(talk) == (4401, REVOKED)


@pytest.mark.parametrize(
    ("path", "who", "status"),
    [
        ("one/console/live", None, 401),
        ("one/console/live", "wrong", 401),
        ("one/display", None, 401),
        ("none/console/live", "member", 404),
        ("one/console/live", "stranger", 404),
        ("one/display", "stranger", 404),
        ("one/display", "reader", 403),
        ("one/display", "agent", 403),
        ("one/console/live", "agent", 403),
        ("one/console/live?history=-1", "member", 422),
        ("one/console/live?history=10001", "member", 422),
        ("one/console/live?histori=1", "member", 422),
        ("off/console/live", "member", 404),
        ("off/display", "member", 404),
    ],
)
async def test_who_cannot_be_served_is_told_before_the_connection_and_by_code_in_a_browser(
    listening: Listening, secret: str, admin: httpx.AsyncClient, path: str, who: str | None, status: int
) -> None:
    await make(admin, "off", start=False)
    secrets = {
        "member": secret,
        "wrong": "ilk_wrong",
        "reader": await listening.secret("reader", Role.READER),
        "agent": await listening.secret("agent", Role.AGENT),
        "stranger": await listening.secret("stranger", project="other"),
    }
    with pytest.raises(InvalidStatus) as refused:
        async with listening.call(path, None if who is None else secrets[who]):
            pass
    assert refused.value.response.status_code == status
    assert refused.value.response.headers["content-type"] == "application/problem+json"
    if who is not None:
        offered = [Subprotocol("interlock"), Subprotocol(BEARER + secrets[who])]
        async with listening.call(path, subprotocols=offered) as talk:
            code, reason = await closed(talk)
        assert code == 4000 + status
        assert reason


async def test_a_browser_shows_its_token_as_a_subprotocol(listening: Listening, secret: str) -> None:
    offered = [Subprotocol(BEARER + secret), Subprotocol("interlock")]
    async with listening.call("one/console/live", subprotocols=offered) as talk:
        assert talk.subprotocol == "interlock"
        await talk.send(b"hello\r")
        await until(talk, b"hello")
    async with listening.call("one/console/live", subprotocols=offered[:1]) as talk:
        assert talk.subprotocol == BEARER + secret


async def test_a_page_from_elsewhere_may_not_connect(listening: Listening, secret: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with listening.call("one/console/live", secret, origin=Origin("https://evil.example")):
            pass
    assert refused.value.response.status_code == 403
    here = Origin(f"http://127.0.0.1:{listening.port}")
    async with listening.call("one/console/live", secret, origin=here) as talk:
        await talk.send(b"hello\r")
        await until(talk, b"hello")


async def test_the_console_of_another_project_cannot_be_told_from_an_unknown_one(
    listening: Listening, secret: str, admin: httpx.AsyncClient
) -> None:
    assert secret
    foreign = (await admin.get("/v1/instances/one")).json()["id"]
    stranger = await listening.secret("stranger", Role.PROJECT_ADMIN, "elsewhere")
    for path in ("console/live", "display"):
        said = []
        for reference in (foreign, foreign[:-12] + "0123456789ab"):
            with pytest.raises(InvalidStatus) as refused:
                async with listening.call(f"{reference}/{path}", stranger):
                    pass
            response = refused.value.response
            said.append((response.status_code, (response.body or b"").replace(reference.encode(), b"ID")))
        assert said[0] == said[1]
        assert said[0][0] == 404


@pytest.mark.parametrize("ends", ["delete", "rotate"])
async def test_the_connection_of_an_agent_ends_with_its_secret(listening: Listening, ends: str) -> None:
    tokens = listening.api.server.tokens
    secret = await listening.secret("north", Role.AGENT)
    address = f"ws://127.0.0.1:{listening.port}/v1/hosts/north/link"
    async with connect(address, additional_headers={"Authorization": f"Bearer {secret}"}) as link:
        await (tokens.delete(OPERATOR, "north") if ends == "delete" else tokens.rotate(OPERATOR, "north"))
        assert (await closed(link))[0] == 4401
    with pytest.raises(InvalidStatus) as refused:
        await connect(address, additional_headers={"Authorization": f"Bearer {secret}"})
    assert refused.value.response.status_code == 401


async def test_a_display_speaks_vnc(listening: Listening, secret: str) -> None:
    async with listening.call("one/display", secret, subprotocols=[Subprotocol("binary")]) as talk:
        assert talk.subprotocol == "binary"
        assert await until(talk, b"\n") == b"RFB 003.008\n"


async def test_a_message_that_is_too_large_ends_the_connection(listening: Listening, secret: str) -> None:
    async with listening.call("one/console/live", secret) as talk:
        await talk.send(b"x" * (MESSAGE_BYTES_MAX + 1))
        code, _ = await closed(talk)
    assert code == 1009


class Silent:
    """A console that never says anything."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def read(self) -> bytes:
        await asyncio.Event().wait()
        return b""

    async def write(self, data: bytes) -> None:
        pass

    async def close(self) -> None:
        self.closed.set()


class Talkative(Silent):
    """A console that never stops."""

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        return b"x"


def frame(opcode: int, data: bytes, *, first: int = 0x80) -> bytes:
    """A masked WebSocket frame with a payload of up to 65,535 bytes."""
    length = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + len(data).to_bytes(2)
    return bytes([first | opcode]) + length + bytes(4) + data


GARBAGE = {
    "invalid UTF-8": frame(1, b"\xff\xfe"),
    "reserved opcode": frame(3, b"a"),
    "oversized ping": frame(9, b"a" * 200),
    "continuation of nothing": frame(0, b"a"),
    "compressed without agreement": frame(2, b"a", first=0xC0),
    "endless": b"\x82\xff" + b"\x7f" * 8,
    "not masked": b"\x82\x05hello",
    "close without a code": frame(8, b"a"),
    "not a frame": b"GET / HTTP/1.1\r\n\r\n" * 100,
    "nothing more": b"",
}


@pytest.mark.parametrize("talks", [False, True], ids=["a silent guest", "a guest that writes"])
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
async def test_garbage_on_a_connection_is_no_defect_of_the_server(
    listening: Listening,
    secret: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    garbage: bytes,
    talks: bool,
) -> None:
    """Found with a raw VNC client: what it sent came out as a traceback in the log."""
    stream = Talkative() if talks else Silent()

    async def open_stream(_instance_id: str) -> Silent:
        return stream

    monkeypatch.setattr(listening.api.server.hypervisor, "open_display", open_stream)
    with structlog.testing.capture_logs() as logged:
        reader, writer = await asyncio.open_connection("127.0.0.1", listening.port)
        writer.write(
            b"GET /v1/instances/one/display HTTP/1.1\r\nHost: here\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            b"Authorization: Bearer " + secret.encode() + b"\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        writer.write(garbage)
        writer.write_eof()
        async with asyncio.timeout(PATIENCE_S):
            await stream.closed.wait()
        writer.close()
    assert [line for line in logged if line["log_level"] == "error"] == []
    tracebacks = [one.getMessage() for one in caplog.records if one.exc_info]
    assert [message for message in tracebacks if message not in CAUSED_BY_CLIENTS] == []


async def test_a_connection_that_is_gone_leaves_nothing_open(
    listening: Listening, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = Silent()

    async def open_console(_instance_id: str) -> Silent:
        return silent

    monkeypatch.setattr(listening.api.server.hypervisor, "open_console", open_console)
    async with listening.call("one/console/live", secret):
        assert not silent.closed.is_set()
    async with asyncio.timeout(PATIENCE_S):
        await silent.closed.wait()


async def test_a_screenshot_is_a_png_and_a_guest_that_is_off_has_none(
    listening: Listening, secret: str, admin: httpx.AsyncClient
) -> None:
    reader = listening.api.client(await listening.secret("reader", Role.READER))
    answer = await reader.get("/v1/instances/one/screenshot")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert answer.content.startswith(b"\x89PNG\r\n")
    stranger = listening.api.client(await listening.secret("stranger", project="other"))
    assert (await stranger.get("/v1/instances/one/screenshot")).status_code == 404
    await make(admin, "off", start=False)
    gone = await admin.get("/v1/instances/off/screenshot")
    assert gone.status_code == 404
    assert "not running" in gone.json()["detail"]


async def test_the_description_says_what_it_has_no_words_for(admin: httpx.AsyncClient) -> None:
    described = (await admin.get("/openapi.json")).json()
    assert "/console/live" in described["info"]["description"]
    answer = described["paths"]["/v1/instances/{reference}/screenshot"]["get"]["responses"]["200"]
    assert list(answer["content"]) == ["image/png"]


# --------------------------------------------------------------------------------------------------------- history


@pytest.mark.parametrize(
    ("text", "lines", "expected"),
    [
        (b"a\nb\nc\n", 2, b"b\nc\n"),
        (b"a\nb\nc", 2, b"b\nc"),
        (b"a\nb\nc\n", 9, b"a\nb\nc\n"),
        (b"", 3, b""),
        (b"one", 1, b"one"),
    ],
)
def test_history_is_the_last_lines(text: bytes, lines: int, expected: bytes) -> None:
    assert console_service.last_lines(text, lines) == expected


def test_the_end_of_a_log_has_a_limit_and_one_that_is_not_there_has_none(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    assert tail(path, 1) is None
    path.write_bytes(b"one, two")
    assert (tail(path, 3), tail(path, 100)) == (b"two", b"one, two")


class Said:
    """A console that has said something already, and then says more."""

    def __init__(self, *said: bytes) -> None:
        self._said = list(said)
        self.closed = False

    async def read(self) -> bytes:
        return self._said.pop(0) if self._said else b""

    async def write(self, data: bytes) -> None:
        raise GuestNotFound("This one cannot be typed into.")

    async def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("log", "live", "more"),
    [
        (b"one\ntwo\n", b"two\nthree\n", b"three\n"),
        (b"one\ntwo\n", b"three\n", b"three\n"),
        (b"one\ntwo\n", b"two\n", b"end\n"),
        (b"one\nabab", b"abc", b"c"),
    ],
)
async def test_what_was_written_while_both_were_fetched_comes_once(
    api: ApiServer, admin: httpx.AsyncClient, log: bytes, live: bytes, more: bytes
) -> None:
    await make(admin, "one")

    class Hypervisor:
        async def open_console(self, _instance_id: str) -> Said:
            return Said(live, b"end\n")

        async def console_tail(self, _instance_id: str, length: int) -> bytes:
            assert length == console_service.HISTORY_BYTES_MAX
            return log

    looking = console_service.ConsoleService(api.server.instances, lambda _host: Hypervisor())  # type: ignore[arg-type, return-value]
    history, stream = await looking.console(OPERATOR, "one", 100)
    assert history == log
    assert await stream.read() == more
