"""What is on its way to a host or back leaves nothing there, wherever it is broken off."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from interlock.core.records import Spec
from interlock.hypervisors.remote import RemoteHypervisor
from interlock.testing.check_hypervisor import GivenPermit, Told
from interlock.testing.remote_host import RemoteUnderTest
from interlock.testing.simulated_host import SimulatedUnderTest

PERMIT = GivenPermit()
SEVERAL_PIECES = 5 << 20


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[RemoteUnderTest]:
    one = RemoteUnderTest(SimulatedUnderTest(), tmp_path / "host")
    (tmp_path / "host").mkdir()
    await one.begin()
    yield one
    await one.end()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(bytes(SEVERAL_PIECES))
    return path


class UnderWay:
    """A report that can be waited for."""

    def __init__(self) -> None:
        self.told = asyncio.Event()

    def __call__(self, done: int, total: int | None = None) -> None:
        self.told.set()


@contextlib.asynccontextmanager
async def serving(host: RemoteUnderTest) -> AsyncIterator[RemoteHypervisor]:
    """One server after the other."""
    one = host.make()
    assert isinstance(one, RemoteHypervisor)
    await one.open(Told())
    try:
        yield one
    finally:
        await one.close()


def spec(host: RemoteUnderTest) -> Spec:
    return msgspec.structs.replace(host.spec(), root_gib=1, root=1, root_is_whole=True)


def spool(tmp_path: Path) -> list[str]:
    return [one.name for one in (tmp_path / "host" / "spool").iterdir()]


async def test_a_disk_that_is_broken_off_on_its_way_there(host: RemoteUnderTest, source: Path, tmp_path: Path) -> None:
    async with serving(host) as adapter:
        under_way = UnderWay()
        sending = asyncio.create_task(adapter.root_disk_from(PERMIT, "one", spec(host), source, under_way))
        await under_way.told.wait()
        sending.cancel()
        await asyncio.wait({sending})
        assert sending.cancelled()
        assert spool(tmp_path) == []


async def test_a_disk_whose_server_went_while_it_was_on_its_way(
    host: RemoteUnderTest, source: Path, tmp_path: Path
) -> None:
    async with serving(host) as adapter:
        under_way = UnderWay()
        sending = asyncio.create_task(adapter.root_disk_from(PERMIT, "one", spec(host), source, under_way))
        await under_way.told.wait()
        assert spool(tmp_path) == ["one.source.part"]
    await asyncio.wait({sending})
    async with serving(host):
        assert spool(tmp_path) == []


async def test_an_export_that_is_broken_off_on_its_way_back(host: RemoteUnderTest, tmp_path: Path) -> None:
    layer = msgspec.structs.replace(host.spec(), root_gib=1)
    async with serving(host) as adapter:
        await adapter.define(PERMIT, "one", layer)
        under_way = UnderWay()
        exporting = asyncio.create_task(adapter.export_root_disk(PERMIT, "one", layer, tmp_path / "copy", under_way))
        await under_way.told.wait()
        exporting.cancel()
        await asyncio.wait({exporting})
        assert exporting.cancelled()
        assert spool(tmp_path) == []
