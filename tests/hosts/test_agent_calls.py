"""What a server may have an agent do: only declared methods, with arguments of their types, and no path of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from in_process.in_memory_agent import LinkEnd, linked_ends
from interlock.core.records import Disk, Image, Spec
from interlock.hypervisors.remote.agent_service import AgentService
from interlock.hypervisors.remote.protocol import (
    Call,
    CallResult,
    CaughtUp,
    Hello,
    Superseded,
    Welcome,
    decode,
    encode,
    packed,
)
from interlock.hypervisors.simulated import SimulatedHost, SimulatedHypervisor

OUTSIDE = ("../outside", "..", "a/../../outside", "/etc/outside", ".hidden", "", "x" * 200, "a\0b")
"""Instance ids that would be other files, as file names."""


class Recording(SimulatedHypervisor):
    """Notes the specs that guests are defined with."""

    def __init__(self, host: SimulatedHost) -> None:
        super().__init__(host)
        self.defined: list[Spec] = []

    async def define(self, permit: Any, instance_id: str, spec: Spec) -> None:
        self.defined.append(spec)
        await super().define(permit, instance_id, spec)


class Server:
    """The other end of an agent's connection."""

    def __init__(self, link: LinkEnd, hypervisor: Recording, folder: Path) -> None:
        self.link = link
        self.hypervisor = hypervisor
        self.folder = folder
        self._number = 0

    async def call(
        self, method: str, *arguments: Any, instance_id: str = "", fence: int | None = None
    ) -> tuple[Any, str]:
        """The answer, and the message of the failure; one of them is empty."""
        self._number += 1
        call = Call(
            number=self._number, method=method, instance_id=instance_id, fence=fence, arguments=packed(arguments)
        )
        await self.link.send(encode(call))
        result = decode(await self.link.receive())
        assert isinstance(result, CallResult)
        assert result.number == self._number
        return msgspec.msgpack.decode(result.value), "" if result.failure is None else result.failure.message

    def files(self) -> list[str]:
        return sorted(str(one.relative_to(self.folder.parent)) for one in self.folder.parent.rglob("*"))


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    folder, shared = tmp_path / "agent", tmp_path / "shared"
    folder.mkdir()
    shared.mkdir()
    hypervisor = Recording(SimulatedHost())
    agent = AgentService("north", hypervisor, folder, shared=shared)
    await agent.open()
    agents, servers = linked_ends()
    running = asyncio.create_task(agent.run(agents, lambda *_: None, lambda _: None))
    assert isinstance(decode(await servers.receive()), Hello)
    await servers.send(encode(Welcome(lease_ms=0)))
    assert isinstance(decode(await servers.receive()), CaughtUp)
    yield Server(servers, hypervisor, folder)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await agent.close()


@pytest.mark.parametrize(
    "method",
    ["open", "close", "crash", "host", "__init__", "__class__", "_guest", "file_download", "", "pause ", "x" * 1000],
)
async def test_a_method_that_is_not_declared_is_not_called(server: Server, method: str) -> None:
    _, failure = await server.call(method, instance_id="one", fence=1)
    assert failure == f"The agent of north does not support {method[:80]!r}."


@pytest.mark.parametrize(
    "arguments",
    [(), ("text",), (1, 2), (None,), ({"image": 1},), ("x", "y", "z")],
)
async def test_arguments_of_other_types_are_rejected_by_name(server: Server, arguments: tuple[Any, ...]) -> None:
    _, failure = await server.call("define", *arguments, instance_id="one", fence=1)
    assert failure.startswith("Invalid arguments of define: ")
    assert server.hypervisor.defined == []


@pytest.mark.parametrize("instance_id", OUTSIDE)
@pytest.mark.parametrize("method", ["undefine", "pause", "inspect", "open_console"])
async def test_an_instance_id_leads_out_of_no_folder(server: Server, method: str, instance_id: str) -> None:
    before = server.files()
    _, failure = await server.call(method, instance_id=instance_id, fence=1)
    assert failure.startswith("Invalid instance id ")
    await server.link.send(encode(Superseded(instance_id=instance_id, fence=5)))
    assert await server.call("known") == ([], "")
    assert server.files() == before


async def test_a_call_for_an_instance_is_not_one_for_the_host(server: Server) -> None:
    _, failure = await server.call("known", instance_id="one")
    assert failure == "Invalid instance id 'one' in a call of known."


async def test_a_change_without_a_fence_is_rejected(server: Server) -> None:
    _, failure = await server.call("undefine", instance_id="one")
    assert failure == "Invalid call of undefine: it has no fence."


@pytest.mark.parametrize("place", [lambda folder: "/etc/shadow", lambda folder: f"{folder}/shared/../agent/fences"])
async def test_only_copies_and_the_shared_folder_are_opened_as_images(
    server: Server, place: Callable[[Path], str]
) -> None:
    path = place(server.folder.parent)
    image = Image(id="i", name="i", kind="disk", path=path, size_bytes=1, sha256="0" * 64)
    _, failure = await server.call("define", Spec(image=image), instance_id="one", fence=1)
    assert failure == ""
    (spec,) = server.hypervisor.defined
    assert Path(spec.image.path).parent == server.folder / "images"


async def test_an_image_in_the_shared_folder_is_used_there(server: Server) -> None:
    path = server.folder.parent / "shared" / "image.disk"
    path.touch()
    image = Image(id="i", name="i", kind="disk", path=str(path), size_bytes=1, sha256="0" * 64)
    await server.call("define", Spec(image=image), instance_id="one", fence=1)
    assert [spec.image.path for spec in server.hypervisor.defined] == [str(path)]


async def test_a_volume_outside_the_shared_folder_is_not_attached(server: Server) -> None:
    volume = Disk(id="data", path=f"{server.folder.parent}/shared/../agent/fences")
    _, failure = await server.call("attach_disk", volume, instance_id="one", fence=1)
    assert failure == "The host north cannot reach the volume data."
