"""A server on simulated guests, with two other hosts, all in one process."""

from __future__ import annotations

from pathlib import Path

import msgspec

from in_process.embedded import IMAGE, Embedded, admitted
from in_process.in_memory_agent import Neighbour
from interlock.hypervisors.simulated import SimulatedHost
from interlock.ports import Limits
from interlock.service.request_models import NewInstance

LARGE = Limits(memory_mib=4096, vcpus=16, disk_mib=64 * 1024)
SMALL = Limits(memory_mib=1024, vcpus=4, disk_mib=10 * 1024)


class Street:
    """A server's host `here`, and two others."""

    def __init__(self, folder: Path, limits: Limits = SMALL) -> None:
        self.folder = folder
        self.house = Embedded(folder / "data", SimulatedHost())
        self.north = Neighbour("north", folder / "north", limits)
        self.south = Neighbour("south", folder / "south", limits)

    async def start(self) -> None:
        await self.house.start()
        self.house.server.capacity._limits = LARGE
        for other in (self.north, self.south):
            await other.connect(self.house)

    async def restart(self) -> None:
        for other in (self.north, self.south):
            await other.disconnect()
        await self.house.crash()
        await self.start()

    async def create(self, name: str, memory_mib: int = 256, host: str = "here", **more: object) -> str:
        body = {"name": name, "image": IMAGE.name, "memory_mib": memory_mib, "host": host, **more}
        answer = await self.house.server.instances.create(self.house.caller, msgspec.convert(body, NewInstance))
        await self.house.ended(admitted(answer))
        return answer.instance.id

    async def promised_mib(self, host: str) -> int | None:
        return (await self.house.server.capacity.occupancy(host)).claimed.memory_mib

    async def free_mib(self, host: str) -> int | None:
        return (await self.house.server.capacity.occupancy(host)).free.memory_mib

    async def fence(self, other: Neighbour) -> None:
        await other.disconnect()
        await self.house.server.other_hosts.fence(self.house.caller, other.name)
