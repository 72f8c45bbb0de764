"""A host is its folder of guests, whatever it is called: who is let in under a name, and what becomes of the loser."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest

from in_process.embedded import IMAGE, Embedded, admitted
from in_process.in_memory_agent import Neighbour, agent_of
from interlock.config import HostsConfig
from interlock.core.errors import Forbidden, HostTaken, Invalid
from interlock.core.operations import Operation
from interlock.core.records import GuestEvent
from interlock.core.restart_policy import OnCrash, RestartPolicy
from interlock.core.roles import Role
from interlock.core.states import PowerState, VmState
from interlock.hypervisors.host_identity import FILE, host_id
from interlock.hypervisors.simulated import SimulatedHost
from interlock.ports import Host, HostState
from interlock.service.request_models import NewInstance
from interlock.stores import sqlite

pytestmark = pytest.mark.virtual_time

O = Operation  # noqa: E741
LEASE_MS = 300
MARGIN_MS = 100


class Site:
    """A server with short leases, and agents that all call themselves `north`."""

    def __init__(self, folder: Path, hosts: HostsConfig) -> None:
        self.folder = folder
        self.house = Embedded(folder / "data", SimulatedHost())
        self.house._config = msgspec.structs.replace(self.house._config, hosts=hosts)
        self.agents: list[Neighbour] = []

    async def agent(self, folder: str, name: str = "north") -> Neighbour:
        agent = Neighbour(name, self.folder / folder)
        await agent.open()
        self.agents.append(agent)
        return agent

    def host(self, name: str = "north") -> Host:
        return self.house.server.leases.host(name)

    async def until_state(self, state: HostState, name: str = "north") -> None:
        async with asyncio.timeout(10):
            while self.host(name).state is not state:  # noqa: ASYNC110 - leases run by the clock
                await asyncio.sleep(0.005)

    async def create(self, name: str, host: str = "north") -> str:
        restart = RestartPolicy(on_crash=OnCrash.RESTART)
        wish = NewInstance(name=name, image=IMAGE.name, host=host, restart=restart)
        answer = await self.house.server.instances.create(self.house.caller, wish)
        assert (await self.house.ended(admitted(answer))).status == "succeeded"
        return answer.instance.id

    async def host_of(self, instance_id: str) -> str:
        instance = await self.house.server.store.instance(instance_id)
        assert instance is not None
        return instance.host

    async def close(self) -> None:
        for agent in self.agents:
            await agent.close()
        await self.house.server.close()


@pytest.fixture
async def open_site(tmp_path: Path) -> AsyncIterator[Callable[..., Site]]:
    opened: list[Site] = []

    def make(lease_ms: int = LEASE_MS, silence_ms: int = 60_000) -> Site:
        hosts = HostsConfig(lease_ms=lease_ms, lease_margin_ms=MARGIN_MS, silence_ms=silence_ms)
        opened.append(Site(tmp_path, hosts))
        return opened[-1]

    yield make
    for site in opened:
        await site.close()


def running(agent: Neighbour, instance_id: str) -> bool:
    guest = agent.host.guests.get(instance_id)
    return guest is not None and guest.power is PowerState.RUNNING


async def test_the_second_folder_under_a_name_is_refused_and_the_first_goes_on(open_site: Callable[..., Site]) -> None:
    site = open_site(lease_ms=60_000)
    await site.house.start()
    first, second = await site.agent("first"), await site.agent("second")
    await first.connect(site.house)
    identity = site.host().identity
    instance = await site.create("one")
    for _ in range(3):
        with pytest.raises(HostTaken, match="with another data folder") as refused:
            await second.connect(site.house)
        assert refused.value.retry_ms is None
        await second.disconnect()
    assert site.host().identity == identity
    assert (await site.house.carry_out(instance, O.PAUSE)).status == "succeeded"
    await first.disconnect()
    with pytest.raises(HostTaken, match="Its agent is disconnected") as waits:
        await second.connect(site.house)
    assert waits.value.retry_ms is not None
    assert 0 < waits.value.retry_ms <= 60_000 + MARGIN_MS
    await second.disconnect()
    await first.connect(site.house)
    assert (await site.house.carry_out(instance, O.UNPAUSE)).status == "succeeded"


async def test_whoever_takes_the_name_of_a_fenced_host_has_none_of_its_guests(open_site: Callable[..., Site]) -> None:
    site = open_site()
    await site.house.start()
    first, second = await site.agent("first"), await site.agent("second")
    await first.connect(site.house)
    instance = await site.create("one")
    held = await site.create("two")
    await first.disconnect()
    pending = admitted(await site.house.submit(held, O.PAUSE))
    await site.until_state(HostState.FENCED)
    await second.connect(site.house)
    assert site.host().state is HostState.UP
    assert await site.host_of(instance) == await site.host_of(held) == "north-old"
    old = site.host("north-old")
    assert (old.state, old.replaces) == (HostState.FENCED, None)
    record = await site.house.server.store.instance(instance)
    assert record is not None
    assert record.vm_state is VmState.ACTIVE, "nobody has told that it vanished"
    assert not running(second, instance)
    kinds = [event.kind for event in await site.house.events(instance)]
    assert "guest.vanished" not in kinds
    assert "instance.host_renamed" in kinds
    capacity = site.house.server.capacity
    promised = [(await capacity.occupancy(name)).claimed.memory_mib for name in ("north", "north-old")]
    assert promised == [0, 2 * 128]
    new = await site.create("three")
    assert running(second, new)
    evacuated = await site.house.carry_out(instance, O.EVACUATE, host="north", from_image=True)
    assert evacuated.status == "succeeded", evacuated.message
    assert await site.host_of(instance) == "north"
    assert running(second, instance)
    assert not running(second, held)
    assert (await site.house.server.store.request(pending.id)).status == "unknown"  # type: ignore[union-attr]
    with pytest.raises(Forbidden, match="belongs to the host north-old"):
        await first.connect(site.house)


async def test_a_host_that_was_replaced_by_mistake_comes_back_under_its_new_name(
    open_site: Callable[..., Site],
) -> None:
    site = open_site()
    await site.house.start()
    first = await site.agent("first")
    await first.connect(site.house)
    instance = await site.create("one")
    with pytest.raises(Invalid, match="is connected"):
        await site.house.server.other_hosts.replace(site.house.caller, "north")
    await first.disconnect()
    seen = await site.house.server.other_hosts.replace(site.house.caller, "north")
    assert (seen.host.name, seen.host.state, seen.host.fenced_by) == ("north-old", HostState.FENCED, "tester")
    assert seen.instances == 1
    with pytest.raises(Forbidden, match="belongs to the host north-old"):
        await first.connect(site.house)
    await first.disconnect()
    await first.rename("north-old")
    await first.connect(site.house)
    await site.until_state(HostState.UP, "north-old")
    assert (await site.house.carry_out(instance, O.PAUSE)).status == "succeeded"


class Killed(BaseException):
    """The end of the process, which nothing in it outlives. An interrupt would end the test run."""


async def test_what_a_killed_server_left_half_renamed_is_finished_by_the_next(
    open_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = open_site()
    await site.house.start()
    first, second = await site.agent("first"), await site.agent("second")
    await first.connect(site.house)
    instances = [await site.create(name) for name in ("one", "two", "three")]
    await first.disconnect()
    await site.until_state(HostState.FENCED)
    changes = 0
    change = sqlite.SqliteStore.change

    async def failing(self: sqlite.SqliteStore, instance_id: str, *arguments: object) -> object:
        nonlocal changes
        # Those of who renames; what drivers do beside it goes on.
        changes += isinstance(arguments[0], partial)
        if changes == 2 and isinstance(arguments[0], partial):
            raise Killed
        return await change(self, instance_id, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(sqlite.SqliteStore, "change", failing)
        with pytest.raises(Killed):
            await site.house.server.host_admission._retire(site.host())
    assert sorted([await site.host_of(one) for one in instances]) == ["north", "north", "north-old"]
    await site.house.crash()
    await site.house.start()
    assert [await site.host_of(one) for one in instances] == ["north-old"] * 3
    assert [host.name for host in site.house.server.leases.hosts()] == ["north-old"]
    await second.connect(site.house)
    assert site.host().state is HostState.UP


async def test_a_copy_of_a_folder_is_refused_until_the_lease_of_the_first_is_over(
    open_site: Callable[..., Site],
) -> None:
    site = open_site(lease_ms=2_000)
    await site.house.start()
    first, copy = await site.agent("first"), await site.agent("copy")
    identity = host_id(site.folder / "first" / "guests")
    (site.folder / "copy" / "guests").mkdir()
    (site.folder / "copy" / "guests" / FILE).write_text(identity)
    await first.connect(site.house)
    with pytest.raises(HostTaken, match="a copy of this data folder"):
        await copy.connect(site.house)
    await copy.disconnect()
    await first.disconnect()
    with pytest.raises(HostTaken, match="at another path") as waits:
        await copy.connect(site.house)
    assert waits.value.retry_ms is not None
    await copy.disconnect()
    await first.connect(site.house)
    await first.disconnect()
    await site.until_state(HostState.FENCED)
    await copy.connect(site.house)
    with pytest.raises(HostTaken, match="a copy of this data folder"):
        await first.connect(site.house)


async def test_one_identity_is_not_let_in_under_a_second_name(open_site: Callable[..., Site]) -> None:
    site = open_site()
    await site.house.start()
    first = await site.agent("first")
    await first.connect(site.house)
    instance = await site.create("one")
    await first.disconnect()
    await first.rename("south")
    with pytest.raises(Forbidden, match="belongs to the host north, and not to south"):
        await first.connect(site.house)
    assert instance in first.host.guests, "what another name's host has is not removed"


async def test_a_token_speaks_for_its_own_host_only(open_site: Callable[..., Site]) -> None:
    site = open_site()
    await site.house.start()
    hosts = site.house.server.other_hosts
    with pytest.raises(Invalid, match="host: required"):
        await site.house.server.tokens.make(site.house.caller, "any", Role.AGENT, "default")
    with pytest.raises(Invalid, match="host: not allowed"):
        await site.house.server.tokens.make(site.house.caller, "any", Role.ADMIN, "default", "north")
    south = await agent_of(site.house, "south")
    with pytest.raises(Forbidden, match="this token is for the host south"):
        hosts.require_may_link(south, "north")
    with pytest.raises(Forbidden, match="may not connect as an agent") as refused:
        hosts.require_may_link(site.house.caller, "north")
    assert refused.value.remedy == "Create one for it: `interlock token create NAME --role agent --host north`."


async def test_an_agents_token_from_before_is_bound_by_its_first_use(open_site: Callable[..., Site]) -> None:
    site = open_site()
    await site.house.start()
    callers, store = site.house.server.callers, site.house.server.store
    made, secret = await site.house.server.tokens.make(site.house.caller, "old", Role.AGENT, "default", "north")
    await store.tokens.replace(msgspec.structs.replace(made, host=None))
    await site.house.crash()
    await site.house.start()
    callers, hosts = site.house.server.callers, site.house.server.other_hosts
    caller = callers.authenticate(secret)
    assert caller is not None
    assert caller.host is None
    await callers.bind(caller, "north")
    with pytest.raises(Forbidden):
        await callers.bind(caller, "south")
    await site.house.crash()
    await site.house.start()
    again = site.house.server.callers.authenticate(secret)
    assert again is not None
    assert again.host == "north"
    with pytest.raises(Forbidden):
        site.house.server.other_hosts.require_may_link(again, "south")
    assert hosts is not site.house.server.other_hosts


async def test_what_the_first_tells_of_its_guests_counts_and_what_the_second_lacks_does_not(
    open_site: Callable[..., Site],
) -> None:
    site = open_site(lease_ms=60_000)
    await site.house.start()
    first, second = await site.agent("first"), await site.agent("second")
    await first.connect(site.house)
    instance = await site.create("one")
    with pytest.raises(HostTaken):
        await second.connect(site.house)
    first.host.vanish(instance)
    await site.house.until_event(instance, f"guest.{GuestEvent.VANISHED.value}")
    await site.house.until(instance, vm_state=VmState.ACTIVE)
    assert running(first, instance)
