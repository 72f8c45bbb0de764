"""A host behind a connection, as the conformance suite can be run against it: the agent's side and a real socket.

The agent lives on while the server's adapters come and go, as it does in real life.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from websockets.asyncio.client import connect
from websockets.asyncio.server import Server, ServerConnection, serve

from interlock.core.records import Disk, Spec
from interlock.hypervisors.remote import HostService, RemoteHypervisor
from interlock.hypervisors.remote.dialling import WebSocketLink
from interlock.hypervisors.remote.wire import FRAME_BYTES_MAX
from interlock.ports import Hypervisor, HypervisorEvent
from interlock.ports.hosts import Host
from interlock.testing.check_hypervisor import HypervisorUnderTest

NAME = "elsewhere"


class _Adapter(RemoteHypervisor):
    """One that is open when its agent is connected, as the suite expects it."""

    def __init__(self, meet: Callable[[RemoteHypervisor], None], part: Callable[[], None]) -> None:
        super().__init__(NAME, lease_ms=0, silence_ms=30_000, now_ms=lambda: 0, renewed=lambda _: None)
        self._meet = meet
        self._part = part

    async def open(self, listener: Callable[[HypervisorEvent], None]) -> None:
        await super().open(listener)
        self._meet(self)
        await self.until_linked()

    async def close(self) -> None:
        self._part()
        await super().close()


class RemoteUnderTest:
    """Satisfies `check_hypervisor.HypervisorUnderTest`, with another host behind the connection."""

    def __init__(self, behind: HypervisorUnderTest, folder: Path) -> None:
        self.behind = behind
        self.patience_s = behind.patience_s
        self.notice_s = behind.notice_s
        self._service = HostService(NAME, behind.make(), folder, reaches=lambda _: True)
        self._adapter: asyncio.Future[RemoteHypervisor] | None = None
        self._server: Server | None = None
        self._agent: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Start the agent."""
        await self._service.open()
        self._adapter = asyncio.get_running_loop().create_future()
        self._server = await serve(self._greet, "127.0.0.1", 0, max_size=FRAME_BYTES_MAX, compression=None)
        self._agent = asyncio.create_task(self._run())

    async def end(self) -> None:
        """End the agent, and let go of its guests."""
        assert self._agent is not None
        assert self._server is not None
        self._agent.cancel()
        await asyncio.wait({self._agent})
        if self._adapter is not None:
            self._adapter.cancel()  # a connection may wait for one that does not come any more
        self._server.close()
        await self._server.wait_closed()
        await self._service.close()

    async def _run(self) -> None:
        assert self._server is not None
        port = next(iter(self._server.sockets)).getsockname()[1]
        while True:
            async with connect(f"ws://127.0.0.1:{port}", max_size=FRAME_BYTES_MAX, compression=None) as connection:
                with contextlib.suppress(ConnectionError):
                    await self._service.run(WebSocketLink(connection), lambda _exchange, _welcome: None, lambda _: None)

    async def _greet(self, connection: ServerConnection) -> None:
        assert self._adapter is not None
        adapter = await asyncio.shield(self._adapter)
        await adapter.serve(WebSocketLink(connection), _nothing)

    def _meet(self, adapter: RemoteHypervisor) -> None:
        assert self._adapter is not None
        self._adapter.set_result(adapter)

    def _part(self) -> None:
        self._adapter = asyncio.get_running_loop().create_future()

    def make(self) -> Hypervisor:
        return _Adapter(self._meet, self._part)

    async def abandon(self, hypervisor: Hypervisor) -> None:
        """The server is gone: so is the connection."""
        await hypervisor.close()

    def spec(self) -> Spec:
        return self.behind.spec()

    def disk(self, disk_id: str) -> Disk:
        return self.behind.disk(disk_id)

    def __getattr__(self, name: str) -> Any:
        """What is done to the guests is done behind the connection."""
        return getattr(self.behind, name)


async def _nothing(_host: Host) -> None:
    return
