"""Another host of an embedded server, in the same process: its agent, with simulated guests, over a link in memory."""

from __future__ import annotations

import asyncio
from pathlib import Path

from interlock.hypervisors.remote import HostService
from interlock.hypervisors.remote.wire import Exchange, Renew, Welcome
from interlock.hypervisors.simulated import SimulatedHost, SimulatedHypervisor
from interlock.ports import Limits
from interlock.testing.embedded import Embedded

_CLOSED = b""


class _End:
    """Satisfies `ports.Link`: one end of a link in memory."""

    def __init__(self, incoming: asyncio.Queue[bytes], outgoing: asyncio.Queue[bytes]) -> None:
        self._incoming = incoming
        self._outgoing = outgoing

    async def send(self, frame: bytes) -> None:
        self._outgoing.put_nowait(frame)

    async def receive(self) -> bytes:
        frame = await self._incoming.get()
        if frame == _CLOSED:
            raise ConnectionError("the link was closed")
        return frame

    async def close(self) -> None:
        for end in (self._incoming, self._outgoing):
            end.put_nowait(_CLOSED)


class Neighbour:
    """A host that has an agent. It outlives servers, and may be connected with one after the other."""

    def __init__(
        self, name: str, folder: Path, limits: Limits | None = None, *, disk_free_mib: int | None = None
    ) -> None:
        self.name = name
        self.host = SimulatedHost()
        self.limits = limits or Limits()
        self._disk_free_mib = disk_free_mib
        self.copies = folder / "images"
        """Where the copies of images are."""
        self.boots_from: frozenset[str] = frozenset()
        """The files of images that a guest here needs, as the host finds out by itself."""
        self._service = HostService(
            name,
            SimulatedHypervisor(self.host),
            folder,
            reaches=lambda path: path.startswith("simulated:"),
            limits=lambda: self.limits,
            boots_from=lambda: self.boots_from,
        )
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    async def open(self) -> None:
        await self._service.open()

    async def connect(self, house: Embedded) -> None:
        """Be connected with the server; it can ask this host when this returns."""
        agents, servers = asyncio.Queue[bytes](), asyncio.Queue[bytes]()
        hosts = house.server.other_hosts
        serving = hosts.link(house.caller, self.name, _End(servers, agents))
        speaking = self._service.run(_End(agents, servers), self._welcomed, lambda _number: None)
        known = asyncio.Event()
        house.server.hosts.listen(lambda host: known.set() if host.name == self.name else None)
        self._tasks = (asyncio.create_task(serving), asyncio.create_task(speaking))
        async with asyncio.timeout(10):
            await known.wait()

    def _welcomed(self, exchange: Exchange, _welcome: Welcome) -> None:
        exchange.post(Renew(number=1, disk_free_mib=self._disk_free_mib))

    async def disconnect(self) -> None:
        """The connection breaks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = ()

    async def close(self) -> None:
        await self.disconnect()
        await self._service.close()
