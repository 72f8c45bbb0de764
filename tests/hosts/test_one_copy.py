"""Law 11: no instance runs twice, with two folders under one name, stopped and cut-off agents, in every order."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from in_process.embedded import IMAGE, Embedded, admitted
from in_process.in_memory_agent import LinkEnd, agent_of, linked_ends
from interlock.config import HostsConfig
from interlock.core.errors import InterlockError, NotResponding
from interlock.core.operations import Operation
from interlock.core.records import Admitted, Instance
from interlock.core.restart_policy import OnCrash, RestartPolicy
from interlock.core.states import PowerState
from interlock.hypervisors.host_identity import FILE, host_id
from interlock.hypervisors.remote.agent_service import AgentService
from interlock.hypervisors.remote.exchange import Exchange
from interlock.hypervisors.remote.protocol import Renew, Welcome
from interlock.hypervisors.simulated import SimulatedHost, SimulatedHypervisor
from interlock.ports import HostState
from interlock.service.request_models import NewInstance

pytestmark = pytest.mark.virtual_time

LEASE_S = 0.2
MARGIN_S = 0.1
RUNNING = {PowerState.RUNNING, PowerState.PAUSED}


class Machine:
    """An agent that says it is `north`, and a watchdog that ends its guests when its lease is over."""

    def __init__(self, house: Embedded, folder: Path) -> None:
        self.house = house
        self.host = SimulatedHost()
        self.lease_ends_s = 0.0
        self.refusals: list[str] = []
        self._welcomed = False
        self._goes = asyncio.Event()
        """Cleared while the agent is stopped, as SIGSTOP does."""
        self._reaches = asyncio.Event()
        """Cleared while the server is cut off. What was sent meanwhile arrives later, as TCP has it."""
        self._goes.set()
        self._reaches.set()
        self._sent_s: dict[int, float] = {}
        self._service = AgentService(
            "north",
            SimulatedHypervisor(self.host),
            folder,
            reaches=lambda path: path.startswith("simulated:"),
            may_hold=self._may_hold,
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self._service.open()
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._serve())]

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._service.close()

    def stop(self) -> None:
        self._goes.clear()

    def cut(self) -> None:
        self._reaches.clear()

    def come_back(self) -> None:
        self._goes.set()
        self._reaches.set()

    @property
    def serves(self) -> bool:
        """Whether the server has let it in, and it answers."""
        return self._welcomed and self._goes.is_set() and self._reaches.is_set()

    def runs(self, instance_id: str) -> bool:
        guest = self.host.guests.get(instance_id)
        return guest is not None and guest.power in RUNNING

    def _may_hold(self) -> None:
        if asyncio.get_running_loop().time() >= self.lease_ends_s:
            raise NotResponding("The lease is over.")

    async def _watch(self) -> None:
        while True:
            if asyncio.get_running_loop().time() >= self.lease_ends_s:
                for instance_id in tuple(self.host.guests):
                    if self.runs(instance_id):
                        self.host.vanish(instance_id)
            await asyncio.sleep(0.005)

    async def _serve(self) -> None:
        while True:
            await self._goes.wait()
            await self._reaches.wait()
            agents, servers = linked_ends(self._flows)
            serving = asyncio.create_task(
                self.house.server.other_hosts.link(await agent_of(self.house, "north"), "north", servers)
            )
            try:
                await self._converse(agents)
            except ConnectionError:
                pass
            except InterlockError as refused:
                self.refusals.append(refused.message)
            finally:
                await agents.close()
                await asyncio.gather(serving, return_exceptions=True)
            await asyncio.sleep(0.05)

    async def _flows(self) -> None:
        await self._goes.wait()
        await self._reaches.wait()

    async def _converse(self, link: LinkEnd) -> None:
        renewing: list[asyncio.Task[None]] = []

        def welcomed(exchange: Exchange, _: Welcome) -> None:
            self._welcomed = True
            renewing.append(asyncio.create_task(self._renew(exchange, link)))

        try:
            await self._service.run(link, welcomed, self._renewed)
        finally:
            self._welcomed = False
            for task in renewing:
                task.cancel()

    async def _renew(self, exchange: Exchange, link: LinkEnd) -> None:
        for number in itertools.count(1):
            await self._goes.wait()
            self._sent_s[number] = asyncio.get_running_loop().time()
            exchange.post(Renew(number=number))
            await asyncio.sleep(LEASE_S / 3)
            if number - 3 in self._sent_s:  # three were not answered
                await link.close()

    def _renewed(self, number: int) -> None:
        self.lease_ends_s = max(self.lease_ends_s, self._sent_s.pop(number, 0.0) + LEASE_S)


class Scene:
    """A server, a first and a second machine of one name, and who looks for doubles."""

    def __init__(self, folder: Path, *, copied: bool) -> None:
        self.house = Embedded(folder / "data", SimulatedHost())
        wait = HostsConfig(lease_ms=int(LEASE_S * 1000), lease_margin_ms=int(MARGIN_S * 1000), silence_ms=60_000)
        self.house._config = msgspec.structs.replace(self.house._config, hosts=wait)
        self.first, self.second = (Machine(self.house, folder / name) for name in ("first", "second"))
        if copied:
            (folder / "second" / "guests").mkdir(parents=True)
            (folder / "second" / "guests" / FILE).write_text(host_id(folder / "first" / "guests"))
        self.instance_id = ""
        self.doubles: list[str] = []

    @asynccontextmanager
    async def playing(self) -> AsyncIterator[None]:
        await self.first.start()
        await self.until_connected()
        restart = RestartPolicy(on_crash=OnCrash.RESTART)
        wish = NewInstance(name="one", image=IMAGE.name, host="north", restart=restart)
        answer = await self.house.server.instances.create(self.house.caller, wish)
        assert (await self.house.ended(admitted(answer))).status == "succeeded"
        self.instance_id = answer.instance.id
        looking = asyncio.create_task(self._look())
        try:
            yield
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
            for machine in (self.first, self.second):
                await machine.end()
            await self.house.server.close()

    async def _look(self) -> None:
        while True:
            own = self.house.host.guests.get(self.instance_id)
            here = own is not None and own.power in RUNNING
            found = [here, self.first.runs(self.instance_id), self.second.runs(self.instance_id)]
            if sum(found) > 1:
                self.doubles.append(f"here, first, second: {found}")
            await asyncio.sleep(0.001)

    async def until_connected(self) -> None:
        async with asyncio.timeout(20):
            while "north" not in self.house.server.hosts.all_linked():  # noqa: ASYNC110 - agents redial by the clock
                await asyncio.sleep(0.005)

    async def record(self) -> Instance:
        found = await self.house.server.store.instance(self.instance_id)
        assert found is not None
        return found

    async def evacuate(self) -> None:
        """Take the VM up on the server's host as soon as that is allowed; not at all if an agent is let in before."""
        async with asyncio.timeout(20):
            while (await self.record()).host == "north":
                if self.house.server.leases.host("north").state is HostState.FENCED:
                    break
                if self.first.serves or self.second.serves:
                    return
                await asyncio.sleep(0.005)
        answer = await self.house.submit(self.instance_id, Operation.EVACUATE, host="here", from_image=True)
        if isinstance(answer.disposition, Admitted):
            await self.house.ended(answer.disposition.request)

    async def play(self, trouble: str, order: tuple[str, ...]) -> None:
        {"stopped": self.first.stop, "cut off": self.first.cut}[trouble]()
        for step in order:
            match step:
                case "second starts":
                    await self.second.start()
                case "first comes back":
                    self.first.come_back()
                case _:
                    await self.evacuate()
            await asyncio.sleep(LEASE_S / 4)
        await asyncio.sleep(2 * (LEASE_S + MARGIN_S))
        self.first.come_back()
        await self.until_connected()
        await asyncio.sleep(LEASE_S)


STEPS = ("second starts", "first comes back", "the VM is evacuated")


@pytest.mark.parametrize("copied", [False, True], ids=["its own folder", "a copied folder"])
@pytest.mark.parametrize("trouble", ["stopped", "cut off"])
@pytest.mark.parametrize("order", list(itertools.permutations(STEPS)), ids="-".join)
async def test_no_order_of_troubles_has_an_instance_run_twice(
    tmp_path: Path, order: tuple[str, ...], trouble: str, *, copied: bool
) -> None:
    scene = Scene(tmp_path, copied=copied)
    await scene.house.start()
    async with scene.playing():
        await scene.play(trouble, order)
        assert scene.doubles == []
        record = await scene.record()
        if record.host == "north" and not copied:
            assert not scene.second.runs(record.id), "the second never had it"
        refusals = scene.first.refusals + scene.second.refusals
        assert refusals, "one of both was told that the other has the name"
