"""A host behind a connection, as the conformance suite can be run against it: the agent's side and a real socket.

The agent lives on while the server's adapters come and go, as it does in real life.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from websockets.asyncio.client import connect
from websockets.asyncio.server import Server, ServerConnection, serve

from conformance.hypervisor import HypervisorUnderTest
from interlock.core.records import Disk, Spec
from interlock.hypervisors.remote.adapter import RemoteHypervisor
from interlock.hypervisors.remote.agent_service import AgentService
from interlock.hypervisors.remote.protocol import FRAME_BYTES_MAX
from interlock.hypervisors.remote.reconnect import WebSocketLink
from interlock.ports import Hypervisor, HypervisorEvent
from interlock.ports.hosts import Host

NAME = "elsewhere"
_CHUNK_BYTES = 1 << 18


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
    """Satisfies `conformance.hypervisor.HypervisorUnderTest`, with another host behind the connection.

    Args:
        behind: what the agent drives.
        folder: the agent's.
        ranges: whether files go over ranges, or as messages of the oldest version of the protocol.
    """

    def __init__(self, behind: HypervisorUnderTest, folder: Path, *, ranges: bool = False) -> None:
        self.ranges_requested: list[tuple[int, int]] = []
        self.transfers: set[str] = set()
        self.before_chunk: Callable[[], None] = lambda: None
        self.behind = behind
        self.patience_s = behind.patience_s
        self.notice_s = behind.notice_s
        self._service = AgentService(
            NAME, behind.make(), folder, reaches=lambda _: True, ranges=self if ranges else None
        )
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
        await adapter.serve(WebSocketLink(connection), _nothing, _nothing)

    @contextlib.asynccontextmanager
    async def download(self, transfer: str, start: int, end: int) -> AsyncIterator[AsyncIterator[bytes]]:
        """The server's files, as HTTP has them: see `range_transfer.RangeServer`."""
        assert self._adapter is not None
        self.ranges_requested.append((start, end))
        self.transfers.add(transfer)
        content = self._adapter.result().outgoing_file(transfer).read_bytes()[start:end]

        async def chunks() -> AsyncIterator[bytes]:
            for offset in range(0, len(content), _CHUNK_BYTES):
                self.before_chunk()
                yield content[offset : offset + _CHUNK_BYTES]
                await asyncio.sleep(0)

        yield chunks()

    async def upload(self, transfer: str, offset: int, piece: bytes) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            yield piece

        assert self._adapter is not None
        await self._adapter.result().receive_range(transfer, offset, chunks())

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
