"""Another host of an embedded server, in the same process: its agent, with simulated guests, over a link in memory."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path

from in_process.embedded import Embedded
from interlock.core.roles import Role
from interlock.hypervisors.remote.agent_service import AgentService
from interlock.hypervisors.remote.exchange import Exchange
from interlock.hypervisors.remote.protocol import Renew, Welcome
from interlock.hypervisors.simulated import SimulatedHost, SimulatedHypervisor
from interlock.ports import Host, Limits
from interlock.ports.hosts import NetworkAbility
from interlock.service.auth import Caller
from waiting import PATIENCE_S

_CLOSED = b""
_NUMBERS = itertools.count(1)


class LinkEnd:
    """Satisfies `ports.Link`: one end of a link in memory."""

    def __init__(
        self,
        incoming: asyncio.Queue[bytes],
        outgoing: asyncio.Queue[bytes],
        flows: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._flows = flows

    async def send(self, frame: bytes) -> None:
        self._outgoing.put_nowait(frame)

    async def receive(self) -> bytes:
        frame = await self._incoming.get()
        if self._flows is not None:
            await self._flows()
        if frame == _CLOSED:
            raise ConnectionError("the link was closed")
        return frame

    async def close(self, reason: str = "") -> None:
        for end in (self._incoming, self._outgoing):
            end.put_nowait(_CLOSED)


def linked_ends(flows: Callable[[], Awaitable[None]] | None = None) -> tuple[LinkEnd, LinkEnd]:
    """Both ends of a link; what is sent arrives when `flows` returns."""
    one, other = asyncio.Queue[bytes](), asyncio.Queue[bytes]()
    return LinkEnd(one, other, flows), LinkEnd(other, one, flows)


async def agent_of(house: Embedded, host: str) -> Caller:
    """The agent of a host, with a token of its own."""
    callers = house.server.callers
    _, secret = await house.server.tokens.make(house.caller, f"agent-{next(_NUMBERS)}", Role.AGENT, "default", host)
    caller = callers.authenticate(secret)
    assert caller is not None
    return caller


class Neighbour:
    """A host that has an agent. It outlives servers, and may be connected with one after the other."""

    def __init__(
        self,
        name: str,
        folder: Path,
        limits: Limits | None = None,
        *,
        disk_free_mib: int | None = None,
        kind: Callable[[SimulatedHost], SimulatedHypervisor] = SimulatedHypervisor,
    ) -> None:
        """`kind` makes what drives the host, each time that its agent is begun."""
        self.name = name
        self.host = SimulatedHost()
        self.limits = limits or Limits()
        self.networks: tuple[NetworkAbility, ...] = ()
        self._disk_free_mib = disk_free_mib
        self.copies = folder / "images"
        """Where the copies of images are."""
        self.images_in_use: frozenset[str] = frozenset()
        """The files of images that a guest here needs, as the host finds out by itself."""
        self._folder = folder
        self._kind = kind
        self._service = self._make()
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    def _make(self) -> AgentService:
        self.hypervisor = hypervisor = self._kind(self.host)
        return AgentService(
            self.name,
            hypervisor,
            self._folder,
            shared=Path("simulated:"),
            reaches=lambda path: path.startswith("simulated:"),
            limits=lambda: self.limits,
            networks=lambda: self.networks,
            images_in_use=lambda: self.images_in_use,
        )

    async def open(self) -> None:
        await self._service.open()

    async def connect(self, house: Embedded) -> None:
        """Be connected with the server; it can ask this host when this returns. Raises what the server refuses with."""
        agents, servers = linked_ends()
        hosts = house.server.other_hosts
        serving = hosts.link(await agent_of(house, self.name), self.name, servers)
        speaking = self._service.run(agents, self._welcomed, lambda _number: None)
        known = asyncio.Event()
        everywhere = house.server.hosts

        def hear(host: Host) -> None:
            if self.name in {host.name, host.former} and everywhere.linked(host.name):
                known.set()

        everywhere.listen(hear)
        self._tasks = (asyncio.create_task(serving), asyncio.create_task(speaking))
        connected = asyncio.create_task(known.wait())
        try:
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.wait({connected, self._tasks[0]}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            connected.cancel()
        if not known.is_set():
            await self._tasks[0]

    def _welcomed(self, exchange: Exchange, _welcome: Welcome) -> None:
        exchange.post(Renew(number=1, disk_free_mib=self._disk_free_mib))

    async def rename(self, name: str) -> None:
        """Have another agent on the same folder, that calls the host otherwise."""
        await self.close()
        self.name = name
        self._service = self._make()
        await self.open()

    async def disconnect(self) -> None:
        """The connection breaks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = ()

    async def close(self) -> None:
        await self.disconnect()
        await self._service.close()
