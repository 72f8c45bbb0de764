"""Files over HTTP ranges: resumed after a break, checked by their digest, holes not sent; and a server that fails."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from conformance.hypervisor import GivenPermit, Told
from conformance.remote_host import RemoteUnderTest
from conformance.simulated_host import SimulatedUnderTest
from interlock.core.errors import Fenced, NotFound, OperationRejected
from interlock.core.records import Image, Spec
from interlock.hypervisors.remote.adapter import RemoteHypervisor
from interlock.hypervisors.remote.file_cache import FileCache, cached_name
from interlock.hypervisors.remote.range_transfer import RANGE_BYTES, RangeTransfers

MIB = 1 << 20
CONTENT = "1-2-3"


class FilesOfServer:
    """Has one file, and fails as it is told to."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = content
        self.requested: list[tuple[int, int]] = []
        self.break_after: list[int] = []
        """After how many bytes each of the next downloads breaks."""
        self.failures = 0
        """How many of the next uploads break after they took effect."""
        self.uploaded: list[int] = []

    @contextlib.asynccontextmanager
    async def download(self, transfer: str, start: int, end: int) -> AsyncIterator[AsyncIterator[bytes]]:
        self.requested.append((start, end))
        length = self.break_after.pop(0) if self.break_after else end - start

        async def chunks() -> AsyncIterator[bytes]:
            for offset in range(start, min(end, start + length), 100_000):
                yield self.content[offset : min(end, start + length, offset + 100_000)]
            if length < end - start:
                raise ConnectionError("reset by peer")

        yield chunks()

    async def upload(self, transfer: str, offset: int, piece: bytes) -> None:
        self.uploaded.append(offset)
        self.content = self.content[:offset] + piece + self.content[offset + len(piece) :]
        if self.failures:
            self.failures -= 1
            raise ConnectionError("reset by peer")


class Agent:
    """The files of a host, with transfers from and to a server."""

    def __init__(self, folder: Path, server: FilesOfServer) -> None:
        self.server = server
        self.cache = FileCache(folder, None)
        self.cache.open()
        self.transfers = RangeTransfers(self.cache, server, backoff_s=0.0)
        self.images = folder / "images"

    async def download(self, extents: tuple[tuple[int, int], ...] | None = None, content: str = CONTENT) -> list[int]:
        progress: list[int] = []
        size = len(self.server.content)
        await self.transfers.file_download(
            "cache",
            "image",
            "transfer",
            content,
            size,
            ((0, size),) if extents is None else extents,
            lambda done, _total=None: progress.append(done),
        )
        await self.cache.file_keep("cache", "image", size, hashlib.sha256(self.server.content).hexdigest())
        return progress

    def names(self) -> list[str]:
        return sorted(one.name for one in self.images.iterdir())


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    return Agent(tmp_path, FilesOfServer(os.urandom(5 * MIB + 7)))


async def test_a_download_that_breaks_goes_on_where_it_broke(agent: Agent) -> None:
    size = len(agent.server.content)
    agent.server.break_after = [3 * MIB, 0, MIB]
    progress = await agent.download()
    assert agent.server.requested == [(0, size), (3 * MIB, size), (3 * MIB, size), (4 * MIB, size)]
    assert (agent.images / "image").read_bytes() == agent.server.content
    assert progress == sorted(progress)
    assert progress[-1] == size
    assert agent.names() == ["image"]


async def test_a_download_goes_on_after_the_agent_was_started_again(agent: Agent, tmp_path: Path) -> None:
    agent.server.break_after = [2 * MIB] + [0] * 20
    with pytest.raises(OperationRejected, match="Cannot download image: reset by peer"):
        await agent.download()
    assert agent.names() == [f"image.{CONTENT}.part"]
    another = Agent(tmp_path, agent.server)
    agent.server.break_after, agent.server.requested = [], []
    await another.download()
    assert agent.server.requested == [(2 * MIB, len(agent.server.content))]
    assert another.names() == ["image"]


async def test_a_download_of_another_content_begins_anew(agent: Agent) -> None:
    agent.server.break_after = [2 * MIB] + [0] * 20
    with pytest.raises(OperationRejected):
        await agent.download()
    agent.server.break_after, agent.server.requested = [], []
    await agent.download(content="1-2-4")
    assert agent.server.requested == [(0, len(agent.server.content))]


@pytest.mark.parametrize("when", ["the connection ends", "copies are listed"])
async def test_a_download_that_nobody_resumes_is_removed(tmp_path: Path, when: str) -> None:
    agent = Agent(tmp_path, FilesOfServer())
    spool = tmp_path / "spool"
    hour_ago_s = time.time() - 3601
    for place in (agent.images, spool):
        for name in ("old", "young"):
            (place / f"{name}.{CONTENT}.part").touch()
        os.utime(place / f"old.{CONTENT}.part", (hour_ago_s, hour_ago_s))
    (agent.images / "image").touch()
    if when == "the connection ends":
        (agent.images / "message.part").touch()
        (spool / "one.source").touch()
        agent.cache.clear()
    else:
        assert list(await agent.cache.image_copies()) == ["image"]
    assert agent.names() == ["image", f"young.{CONTENT}.part"]
    assert [one.name for one in spool.iterdir()] == [f"young.{CONTENT}.part"]


async def test_a_download_to_the_spool_is_removed_with_its_file(agent: Agent, tmp_path: Path) -> None:
    for name in ("one.source", f"one.source.{CONTENT}.part", f"one.sourcerer.{CONTENT}.part"):
        (tmp_path / "spool" / name).touch()
    await agent.cache.file_drop("one.source")
    assert [one.name for one in (tmp_path / "spool").iterdir()] == [f"one.sourcerer.{CONTENT}.part"]


async def test_holes_are_not_sent_and_stay_holes(agent: Agent) -> None:
    data = agent.server.content
    agent.server.content = bytes(8 * MIB) + data + bytes(20 * MIB)
    extents = ((8 * MIB, 8 * MIB + len(data)),)
    agent.server.break_after = [MIB]
    await agent.download(extents)
    assert agent.server.requested == [extents[0], (9 * MIB, extents[0][1])]
    kept = agent.images / "image"
    assert kept.read_bytes() == agent.server.content
    assert kept.stat().st_blocks * 512 < len(data) + MIB


async def test_what_was_not_received_as_it_was_sent_is_not_kept(agent: Agent) -> None:
    await agent.transfers.file_download("cache", "image", "t", CONTENT, MIB, ((0, MIB),), lambda *_: None)
    with pytest.raises(OperationRejected, match="image was not received as it was sent"):
        await agent.cache.file_keep("cache", "image", MIB, "0" * 64)
    assert agent.names() == []


@pytest.mark.parametrize("name", ["../image", "", "a/b", ".image", "x" * 300])
@pytest.mark.parametrize("place", ["cache", "spool", "..", "/"])
async def test_a_name_on_the_wire_leads_out_of_no_folder(agent: Agent, name: str, place: str) -> None:
    with pytest.raises(OperationRejected, match="Invalid file name"):
        await agent.transfers.file_download(place, name, "t", CONTENT, 1, ((0, 1),), lambda *_: None)
    with pytest.raises(OperationRejected, match="Invalid content id"):
        await agent.transfers.file_download("cache", "image", "t", "../1-2-3", 1, ((0, 1),), lambda *_: None)
    assert agent.server.requested == []


async def test_an_upload_is_retried_range_by_range(agent: Agent, tmp_path: Path) -> None:
    content = os.urandom(2 * RANGE_BYTES + 5)
    (tmp_path / "spool" / "one.target").write_bytes(content)
    agent.server.content, agent.server.failures = b"", 2
    digest = await agent.transfers.file_upload("one.target", "t", lambda *_: None)
    assert digest == hashlib.sha256(content).hexdigest()
    assert agent.server.content == content
    assert agent.server.uploaded == [0, 0, 0, RANGE_BYTES, 2 * RANGE_BYTES]


# ------------------------------------------------------------------------------------- through a server and an agent


PERMIT = GivenPermit()


@contextlib.asynccontextmanager
async def serving(host: RemoteUnderTest) -> AsyncIterator[RemoteHypervisor]:
    one = host.make()
    assert isinstance(one, RemoteHypervisor)
    await one.open(Told())
    try:
        yield one
    finally:
        await one.close()


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[RemoteUnderTest]:
    (tmp_path / "host").mkdir()
    one = RemoteUnderTest(SimulatedUnderTest(), tmp_path / "host", ranges=True)
    await one.begin()
    yield one
    await one.end()


def spec_of(path: Path) -> Spec:
    return Spec(image=Image(id="i", name="i", kind="disk", path=str(path), size_bytes=1, sha256="0" * 64))


async def test_an_image_is_sent_once_and_over_ranges(host: RemoteUnderTest, tmp_path: Path) -> None:
    image = tmp_path / "image.disk"
    with image.open("wb") as file:
        file.truncate(1 << 30)
        os.pwrite(file.fileno(), b"data", 900 * MIB)
    copy = tmp_path / "host" / "images" / cached_name(str(image))
    async with serving(host) as adapter:
        await asyncio.gather(*(adapter.define(PERMIT, name, spec_of(image)) for name in ("one", "two")))
    assert host.ranges_requested == [(900 * MIB, 900 * MIB + 4096)]
    assert copy.stat().st_size == 1 << 30
    assert copy.stat().st_blocks * 512 < MIB


async def test_a_worker_that_is_fenced_downloads_nothing_more(host: RemoteUnderTest, tmp_path: Path) -> None:
    image = tmp_path / "image.disk"
    image.write_bytes(os.urandom(4 * MIB))
    permit = GivenPermit()
    host.before_chunk = permit.revoke
    async with serving(host) as adapter:
        with pytest.raises(Fenced):
            await adapter.define(permit, "one", spec_of(image))
        assert adapter._files._outgoing == {}


async def test_a_transfer_that_has_ended_takes_and_gives_nothing(host: RemoteUnderTest, tmp_path: Path) -> None:
    image = tmp_path / "image.disk"
    image.write_bytes(b"content")

    async def chunks() -> AsyncIterator[bytes]:
        yield b"late"

    async with serving(host) as adapter:
        await adapter.define(PERMIT, "one", spec_of(image))
        (transfer,) = host.transfers
        with pytest.raises(NotFound, match="Transfer not found"):
            adapter.outgoing_file(transfer)
        with pytest.raises(NotFound, match="Transfer not found"):
            await adapter.receive_range(transfer, 0, chunks())
