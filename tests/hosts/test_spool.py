"""What is on its way to a host or back leaves nothing there, wherever it is broken off."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conformance.hypervisor import GivenPermit, Told
from conformance.remote_host import RemoteUnderTest
from conformance.simulated_host import SimulatedUnderTest
from interlock.core.records import Spec
from interlock.hypervisors.remote.adapter import RemoteHypervisor
from interlock.images.image_folder import ImageFolder

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


async def test_what_a_server_was_fetching_as_it_was_killed_goes_with_the_image(
    host: RemoteUnderTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ImageFolder(tmp_path / "images")
    layer = msgspec.structs.replace(host.spec(), root_gib=1)
    async with serving(host) as adapter:
        await adapter.define(PERMIT, "one", layer)
        with monkeypatch.context() as killed:
            for name in ("rename", "unlink"):
                killed.setattr(Path, name, dying(getattr(Path, name)))
            with pytest.raises(Killed):
                await adapter.export_root_disk(PERMIT, "one", layer, images.draft_path("two"), UnderWay())
    assert len(list((tmp_path / "images").iterdir())) == 1
    assert await images.ids() == {"two"}
    await images.discard("two")
    assert list((tmp_path / "images").iterdir()) == []


class Killed(Exception):
    """Ends whatever is done, as the end of its process does: nothing is tidied up."""


def dying(function: Callable[..., None]) -> Callable[..., None]:
    """The function, which ends the process where it would be called with what is being fetched."""

    def die(path: Path, *words: Any, **named: Any) -> None:
        if path.name.endswith("fetched"):
            raise Killed
        function(path, *words, **named)

    return die
