"""The files that agents download and upload: only those of a transfer, and only the agent of its host."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from api.conftest import OPERATOR, ApiServer
from interlock.core.roles import Role
from interlock.hypervisors.remote.adapter import RemoteHypervisor
from interlock.hypervisors.remote.file_transfer import _Incoming
from interlock.ports import Host

URL = "/v1/hosts/north/files/the-transfer"
CONTENT = b"0123456789"


class Files:
    """A host whose agent downloads one file and uploads another, and clients of agents."""

    def __init__(self, api: ApiServer, folder: Path) -> None:
        self.api = api
        self.received = folder / "received"
        (folder / "sent").write_bytes(CONTENT)
        adapter = api.server.hosts.remote("north")
        assert isinstance(adapter, RemoteHypervisor)
        adapter._files._outgoing["the-transfer"] = folder / "sent"
        self.content = self.received.open("w+b")
        adapter._files._incoming["the-transfer"] = _Incoming(self.content)

    async def agent(self, host: str) -> httpx.AsyncClient:
        tokens = self.api.server.tokens
        _, secret = await tokens.make(OPERATOR, f"agent-{host}", Role.AGENT, "default", host)
        return self.api.client(secret)


@pytest.fixture
async def files(api: ApiServer, tmp_path: Path) -> AsyncIterator[Files]:
    for name in ("north", "south"):
        await api.server.leases.keep(Host(name=name, joined_at_ms=0, last_seen_at_ms=0))
    one = Files(api, tmp_path)
    yield one
    one.content.close()


async def test_an_agent_downloads_a_file_or_a_range_of_it(files: Files) -> None:
    north = await files.agent("north")
    whole = await north.get(URL)
    assert (whole.status_code, whole.content) == (200, CONTENT)
    part = await north.get(URL, headers={"Range": "bytes=3-6"})
    assert (part.status_code, part.content) == (206, b"3456")
    assert part.headers["content-range"] == "bytes 3-6/10"
    beyond = await north.get(URL, headers={"Range": "bytes=10-"})
    assert beyond.status_code == 416


async def test_an_agent_uploads_ranges_in_any_order_and_again(files: Files) -> None:
    north = await files.agent("north")
    for first, piece in ((5, b"56789"), (0, b"01234"), (5, b"56789")):
        content_range = f"bytes {first}-{first + len(piece) - 1}/*"
        written = await north.put(URL, content=piece, headers={"Content-Range": content_range})
        assert written.status_code == 204, written.text
    assert files.received.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content_range", "body"),
    [
        (None, b"1"),
        ("bytes 1-0/*", b""),
        ("bytes 0-9/*", b"short"),
        ("bytes 0-2/*", b"too long"),
        ("bytes 0-/*", b"1"),
        ("items 0-0/*", b"1"),
        ("bytes 0-9999999999999999999999/*", b"1"),
    ],
)
async def test_a_range_that_is_not_that_of_the_body_is_rejected(
    files: Files, content_range: str | None, body: bytes
) -> None:
    north = await files.agent("north")
    headers = {} if content_range is None else {"Content-Range": content_range}
    rejected = await north.put(URL, content=body, headers=headers)
    assert rejected.status_code == 400
    assert "Invalid Content-Range" in rejected.json()["detail"]


@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_nobody_but_the_agent_of_the_host_may_have_its_files(files: Files, method: str) -> None:
    headers = {"Content-Range": "bytes 0-0/*"}
    clients = {
        "no token": (files.api.client(None), 401),
        "admin": (await files.api.token("chief", Role.ADMIN), 403),
        "another host's agent": (await files.agent("south"), 403),
    }
    for who, (client, status) in clients.items():
        answer = await client.request(method, URL, content=b"1", headers=headers)
        assert answer.status_code == status, who
        assert answer.headers["content-type"] == "application/problem+json"
    assert files.received.read_bytes() == b""


@pytest.mark.parametrize("method", ["GET", "PUT"])
@pytest.mark.parametrize(
    "path",
    [
        "/v1/hosts/north/files/another",
        "/v1/hosts/south/files/the-transfer",
        "/v1/hosts/west/files/the-transfer",
        "/v1/hosts/north/files/%2E%2E%2Fsent",
        "/v1/hosts/north/files/%2Fetc%2Fpasswd",
    ],
)
async def test_a_transfer_that_does_not_exist_is_not_found(files: Files, method: str, path: str) -> None:
    client = await files.agent(path.split("/")[3])
    answer = await client.request(method, path, content=b"1", headers={"Content-Range": "bytes 0-0/*"})
    assert answer.status_code == 404


async def test_an_agent_may_use_no_other_path(files: Files) -> None:
    north = await files.agent("north")
    assert (await north.get("/v1/instances")).status_code == 403
    assert (await north.delete(URL)).status_code == 405
