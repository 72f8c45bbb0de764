"""Instances that leave hosts in bulk: evacuation, drain, anti-affinity and rebalancing, each by ordinary requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from in_process.embedded import IMAGE, Embedded, admitted
from in_process.in_memory_agent import Neighbour
from interlock.config import HostsConfig, UpkeepConfig
from interlock.core.errors import Forbidden, InsufficientCapacity, InUse, Invalid, NotFound
from interlock.core.operations import Operation
from interlock.core.records import Instance
from interlock.core.restart_policy import Evacuate
from interlock.core.roles import Role
from interlock.core.states import PowerState, VmState
from interlock.hypervisors.simulated import Method, SimulatedHost, Slow
from interlock.ports import Limits
from interlock.service.host_moves import Move
from interlock.service.request_models import Labels, NewInstance
from waiting import PATIENCE_S

O = Operation  # noqa: E741


async def until(so: Callable[[], Awaitable[object]]) -> object:
    """What `so` finds, as soon as it finds something."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if found := await so():
                return found
            await asyncio.sleep(0.02)


class Street:
    """A server's host `here`, and two others."""

    def __init__(self, folder: Path, hosts: HostsConfig | None = None, own_mib: int = 4096) -> None:
        settings = {"host_memory_mib": own_mib, "hosts": hosts or HostsConfig(), "upkeep": UpkeepConfig(retry_ms=200)}
        self.house = Embedded(folder / "data", SimulatedHost(), settings=settings)
        limits = Limits(memory_mib=1024, vcpus=16, disk_mib=10 * 1024)
        self.north = Neighbour("north", folder / "north", limits)
        self.south = Neighbour("south", folder / "south", limits)
        self.others: tuple[Neighbour, ...] = (self.north, self.south)

    async def open(self) -> None:
        for other in self.others:
            await other.open()
        await self.start()

    async def start(self) -> None:
        await self.house.start()
        for other in self.others:
            await other.connect(self.house)

    async def restart(self) -> None:
        for other in self.others:
            await other.disconnect()
        await self.house.crash()
        await self.start()

    async def close(self) -> None:
        for other in self.others:
            await other.close()
        await self.house.server.close()

    async def create(self, name: str, host: str = "here", **more: object) -> str:
        body = {"name": name, "image": IMAGE.name, "memory_mib": 64, "host": host, **more}
        wish = msgspec.convert(body, NewInstance)
        answer = await self.house.server.instances.create(self.house.caller, wish)
        await self.house.ended(admitted(answer))
        return answer.instance.id

    async def host_of(self, vm: str) -> str:
        instance = await self.house.server.store.instance(vm)
        assert instance is not None
        return instance.host

    async def fence(self, other: Neighbour) -> None:
        await other.disconnect()
        await self.house.server.other_hosts.fence(self.house.caller, other.name)

    async def evacuate(self, host: str, *, dry_run: bool = False, **parameters: object) -> tuple[Move, ...]:
        return await self.house.server.moves.evacuate(self.house.caller, host, parameters, dry_run=dry_run)

    async def drain(self, host: str, *, cold: bool = False) -> None:
        await self.house.server.moves.drain(self.house.caller, host, cold=cold)

    async def until_gone(self, host: str) -> None:
        """Return when nothing is left on a host."""

        async def empty() -> bool:
            return not await self.house.server.moves.left(self.house.caller, host)

        await until(empty)

    async def until_moved(self, vm: str, source: str = "north") -> None:
        async def elsewhere() -> bool:
            return await self.host_of(vm) != source

        await until(elsewhere)
        await self.house.until(vm, outstanding=())

    async def until_reason(self, host: str) -> str:
        """Why the only instance that is left on a host stays there, as soon as that is known."""

        async def known() -> str | None:
            (move,) = await self.house.server.moves.left(self.house.caller, host)
            return move.reason

        return str(await until(known))


@pytest.fixture
async def street(tmp_path: Path) -> AsyncIterator[Street]:
    one = Street(tmp_path)
    await one.open()
    yield one
    await one.close()


def by_name(moves: tuple[Move, ...]) -> dict[str, Move]:
    return {move.instance.name: move for move in moves}


# ------------------------------------------------------------------------------------------------------ evacuation


async def test_a_dry_run_says_for_each_where_it_would_go_or_why_not_and_changes_nothing(street: Street) -> None:
    """Room that one takes is not promised to the next."""
    for number in range(2):
        await street.create(f"vm{number}", "north", memory_mib=450)
    await street.create("disk", "north", root_gib=1)
    await street.create("there", "south", memory_mib=400)
    street.house.server.capacity._limits = Limits(memory_mib=0)
    before = [await street.house.server.store.instance_named("default", f"vm{n}") for n in range(2)]
    moves = by_name(await street.evacuate("north", dry_run=True))
    assert (moves["vm0"].target, moves["vm0"].request, moves["vm0"].reason) == ("south", None, None)
    assert moves["vm1"].target is None
    assert "fits on none of 2 hosts" in str(moves["vm1"].reason)
    assert "root disk of disk is on host north" in str(moves["disk"].reason)
    assert [await street.house.server.store.instance_named("default", f"vm{n}") for n in range(2)] == before
    again = by_name(await street.evacuate("north", dry_run=True, from_image=True))
    assert again["disk"].losses


async def test_all_of_a_fenced_host_are_asked_for_each_by_itself(street: Street) -> None:
    vms = [await street.create(f"vm{number}", "north") for number in range(3)]
    await street.create("disk", "north", root_gib=1)
    with pytest.raises(Invalid, match="The host north is not fenced"):
        await street.evacuate("north")
    await street.fence(street.north)
    moves = by_name(await street.evacuate("north"))
    assert "Use from_image" in str(moves["disk"].reason)
    for name in ("vm0", "vm1", "vm2"):
        request = moves[name].request
        assert request is not None
        assert (await street.house.ended(request)).status == "succeeded"
    assert "north" not in {await street.host_of(vm) for vm in vms}
    assert {move.instance.name for move in await street.evacuate("north")} == {"disk"}


async def test_only_an_admin_moves_the_instances_of_hosts(street: Street) -> None:
    reader = msgspec.structs.replace(street.house.caller, role=Role.MEMBER)
    moves = street.house.server.moves
    for asked in (
        moves.evacuate(reader, "north", {}, dry_run=True),
        moves.drain(reader, "north", cold=False),
        moves.undrain(reader, "north"),
        moves.drain_plan(reader, "north", cold=False),
        moves.rebalance(reader, dry_run=True),
        moves.progress(reader, ()),
    ):
        with pytest.raises(Forbidden):
            await asked
    with pytest.raises(NotFound):
        await moves.drain(street.house.caller, "nowhere", cold=False)
    with pytest.raises(NotFound):
        await street.evacuate("nowhere", dry_run=True)


async def test_those_that_want_it_are_evacuated_by_themselves_and_once(street: Street) -> None:
    auto = await street.create("auto", "north", evacuate="auto")
    never = await street.create("never", "north", evacuate="never")
    unsaid = await street.create("unsaid", "north")
    lossy = await street.create("lossy", "north", evacuate="auto", root_gib=1)
    again = await street.create("again", "north", evacuate="from-image", root_gib=1)
    await street.fence(street.north)
    for vm in (auto, again):
        await street.until_moved(vm)
        asked = [one for one in await street.house.events(vm) if one.kind == "request.admitted"]
        evacuations = [one for one in asked if one.data["operation"] == "evacuate"]
        assert [one.data["by"] for one in evacuations] == ["interlock"]
        assert await street.host_of(vm) != "north"
    for vm in (never, unsaid, lossy):
        assert await street.host_of(vm) == "north"
    labels = Labels(evacuate=Evacuate.AUTO)
    await street.house.server.instances.relabel(street.house.caller, never, labels)
    await street.until_moved(never)


async def test_the_configuration_says_it_for_those_that_say_nothing(tmp_path: Path) -> None:
    street = Street(tmp_path, HostsConfig(evacuate="auto"))
    await street.open()
    unsaid = await street.create("unsaid", "north")
    never = await street.create("never", "north", evacuate="never")
    await street.fence(street.north)
    await street.until_moved(unsaid)
    assert await street.host_of(never) == "north"
    await street.close()


async def test_it_goes_on_after_a_restart_of_the_server_and_nothing_is_evacuated_twice(tmp_path: Path) -> None:
    street = Street(tmp_path, HostsConfig(evacuate="auto", moves_max=1))
    await street.open()
    vms = [await street.create(f"vm{number}", "north") for number in range(6)]
    await street.fence(street.north)
    await street.house.crash()
    street.others = (street.south,)
    await street.south.disconnect()
    await street.start()
    await street.until_gone("north")
    for vm in vms:
        await street.house.until(vm, outstanding=())
        kinds = [(one.kind, one.data.get("operation")) for one in await street.house.events(vm)]
        assert kinds.count(("request.succeeded", "evacuate")) == 1
    await street.close()


# ----------------------------------------------------------------------------------------------------------- drain


async def test_nothing_new_is_put_on_a_host_that_is_drained(street: Street) -> None:
    vm = await street.create("web")
    await street.drain("north")
    with pytest.raises(Invalid, match="The host north is being drained"):
        await street.create("more", "north")
    with pytest.raises(Invalid, match="The host north is being drained"):
        await street.house.submit(vm, O.MIGRATE, host="north")
    assert (await street.house.carry_out(vm, O.MIGRATE, host="any")).parameters["host"] == "south"
    seen = await street.house.server.other_hosts.show(street.house.caller, "north")
    assert seen.drain is not None
    assert (seen.drain.left, seen.drain.drain.by) == (0, "tester")
    await street.house.server.moves.undrain(street.house.caller, "north")
    await street.create("more", "north")


async def test_the_servers_own_host_can_be_drained(street: Street) -> None:
    vm = await street.create("web")
    await street.drain("here", cold=True)
    await street.until_gone("here")
    assert await street.host_of(vm) != "here"
    with pytest.raises(Invalid, match="The host here is being drained"):
        await street.create("more")
    await street.restart()
    with pytest.raises(Invalid, match="The host here is being drained"):
        await street.create("more")
    assert [one.host.name for one in await street.house.server.other_hosts.list(street.house.caller)] == [
        "north",
        "south",
    ]
    await street.house.server.moves.undrain(street.house.caller, "here")
    await street.create("more")


async def test_what_cannot_be_moved_as_it_runs_stays_with_the_reason_unless_cold_is_asked_for(street: Street) -> None:
    vm = await street.create("web", "north")
    await street.house.carry_out(vm, O.STOP)
    await street.drain("north")
    assert await street.until_reason("north") == "It is stopped, and is moved only by a drain with --cold."
    plan = await street.house.server.moves.drain_plan(street.house.caller, "north", cold=True)
    assert [(move.operation, move.reason) for move in plan] == [(O.MIGRATE, None)]
    await street.drain("north", cold=True)
    await street.until_gone("north")
    assert await street.host_of(vm) != "north"


async def test_a_drain_goes_on_after_a_restart_and_when_there_is_room_again(tmp_path: Path) -> None:
    street = Street(tmp_path, own_mib=1)
    await street.open()
    vm = await street.create("web", "north", memory_mib=600)
    other = await street.create("other", "south", memory_mib=600)
    await street.house.carry_out(vm, O.STOP)
    await street.drain("north", cold=True)
    assert "fits on none of 2 hosts" in await street.until_reason("north")
    await street.restart()
    await street.house.carry_out(other, O.DELETE)
    await street.until_gone("north")
    assert await street.host_of(vm) == "south"
    await street.close()


async def test_a_refusal_of_the_gate_keeps_one_and_not_the_others(street: Street) -> None:
    await street.create("kept", "north", blocked_operations=["migrate", "live_migrate"])
    vm = await street.create("web", "north")
    await street.house.carry_out(vm, O.STOP)
    await street.drain("north", cold=True)
    await street.until_moved(vm)
    assert "migrate denied" in await street.until_reason("north")
    refused = [one for one in await street.house.events(vm) if one.kind == "request.denied"]
    assert refused == []


# ---------------------------------------------------------------------------------------------------- anti-affinity


async def test_two_of_one_group_are_never_on_one_host(street: Street) -> None:
    group = {"apart_from": ["db"]}
    vms = [await street.create(f"db{number}", "any", **group) for number in range(3)]
    assert sorted([await street.host_of(vm) for vm in vms]) == ["here", "north", "south"]
    with pytest.raises(InsufficientCapacity, match=r"db3 fits on none of 3 hosts.*another VM of its group db"):
        await street.create("db3", "any", **group)
    with pytest.raises(InUse, match="db3 cannot be on the host north, which has another VM of its group db"):
        await street.create("db3", "north", **group)
    assert await street.house.server.store.instance_named("default", "db3") is None
    (target,) = {"north", "south"} - {await street.host_of(vm) for vm in vms[:2]}
    with pytest.raises(InUse, match="another VM of its group db"):
        await street.house.submit(vms[0], O.MIGRATE, host=target)
    with pytest.raises(InsufficientCapacity, match="another VM of its group db"):
        await street.house.submit(vms[0], O.MIGRATE, host="any")
    await street.restart()
    with pytest.raises(InsufficientCapacity, match="another VM of its group db"):
        await street.create("db3", "any", **group)


async def test_two_that_are_asked_for_at_once_do_not_both_get_the_last_host(street: Street) -> None:
    made = await asyncio.gather(
        *(street.create(f"db{number}", "any", apart_from=["db"]) for number in range(5)), return_exceptions=True
    )
    assert sum(isinstance(one, InsufficientCapacity) for one in made) == 2
    hosts = [await street.host_of(vm) for vm in made if isinstance(vm, str)]
    assert sorted(hosts) == ["here", "north", "south"]


async def test_an_evacuation_keeps_them_apart(street: Street) -> None:
    first = await street.create("db0", "north", apart_from=["db"], evacuate="auto")
    await street.create("db1", "south", apart_from=["db"])
    await street.fence(street.north)
    await street.until_moved(first)
    assert await street.host_of(first) == "here"


async def test_a_vm_comes_into_a_group_only_where_it_is_alone_and_leaves_it(street: Street) -> None:
    await street.create("db0", "north", apart_from=["db"])
    vm = await street.create("web", "north")
    relabel = street.house.server.instances.relabel
    with pytest.raises(InUse, match="another VM of its group db"):
        await relabel(street.house.caller, vm, Labels(apart_from=("db",)))
    there: Instance = await relabel(street.house.caller, vm, Labels(apart_from=("cache",)))
    assert there.apart_from == ("cache",)
    with pytest.raises(InUse):
        await street.create("cache1", "north", apart_from=["cache"])
    await relabel(street.house.caller, vm, Labels(apart_from=()))
    await street.create("cache1", "north", apart_from=["cache"])


async def test_what_was_offloaded_comes_back_where_it_may_be(street: Street) -> None:
    vm = await street.create("db0", "north", apart_from=["db"])
    await street.house.carry_out(vm, O.SHELVE)
    await street.house.carry_out(vm, O.SHELVE_OFFLOAD)
    await street.create("db1", "north", apart_from=["db"])
    await street.house.carry_out(vm, O.UNSHELVE)
    assert await street.host_of(vm) in {"here", "south"}
    await street.house.carry_out(vm, O.SHELVE)
    await street.house.carry_out(vm, O.SHELVE_OFFLOAD)
    await street.drain(await street.host_of(vm))
    left = await street.host_of(vm)
    await street.house.carry_out(vm, O.UNSHELVE)
    assert await street.host_of(vm) not in {left, "north"}


# ----------------------------------------------------------------------------------------- `any`, and rebalancing


async def test_the_servers_own_host_can_be_kept_out_of_any(tmp_path: Path) -> None:
    street = Street(tmp_path, HostsConfig(own_in_any=False))
    await street.open()
    hosts = {await street.host_of(await street.create(f"vm{number}", "any")) for number in range(4)}
    assert hosts == {"north", "south"}
    await street.create("named", "here")
    for other in street.others:
        await other.disconnect()
    with pytest.raises(Invalid, match="No host is available"):
        await street.create("more", "any")
    await street.close()


async def test_rebalancing_says_which_would_go_where_and_keeps_what_must_be_apart(street: Street) -> None:
    for number in range(5):
        await street.create(f"vm{number}", "north")
    await street.create("db0", "north", apart_from=["db"])
    await street.create("db1", "south", apart_from=["db"])
    stopped = await street.create("stopped", "north")
    await street.house.carry_out(stopped, O.STOP)
    moves = await street.house.server.moves.rebalance(street.house.caller, dry_run=True)
    targets = [str(move.target) for move in moves]
    assert {move.instance.host for move in moves} == {"north"}
    assert all(move.operation is O.LIVE_MIGRATE and move.request is None for move in moves)
    count = {"here": targets.count("here"), "south": 1 + targets.count("south"), "north": 7 - len(moves)}
    assert max(count.values()) - min(count.values()) <= 1, count
    named = by_name(moves)
    assert "stopped" not in named
    assert "db0" not in named or named["db0"].target == "here"


# ------------------------------------------------------------------------------------------------------------ renaming


async def test_a_token_for_a_former_name_is_one_for_the_present_name_once_it_is_used(street: Street) -> None:
    """Such a token is left by a server that was killed during a rename."""
    hosts, caller = street.house.server.other_hosts, street.house.caller
    for name, new in (("north", "berlin"), ("berlin", "bonn")):
        await hosts.rename(caller, name, new)
    for other in street.others:
        await other.disconnect()
        await other.connect(street.house)
    tokens = await street.house.server.tokens.list(caller)
    assert {token.host for token in tokens} == {None, "bonn", "south"}
    seen = await hosts.show(caller, "bonn")
    assert (seen.linked, seen.host.former, seen.host.other_former) == (True, "north", ())
    await hosts.rename(caller, "south", "berlin")
    for refused in ("north", "south"):
        with pytest.raises(Invalid, match=f"host: {refused} is a former name of the host b"):
            hosts.require_present_name(caller, refused)
    hosts.require_present_name(caller, "berlin")


async def test_a_rename_takes_along_what_is_on_the_host_and_its_agent_goes_on(street: Street) -> None:
    vm = await street.create("db0", "north", apart_from=["db"])
    hosts = street.house.server.other_hosts
    seen = await hosts.rename(street.house.caller, "north", "berlin")
    assert (seen.host.name, seen.host.former, seen.instances, seen.linked) == ("berlin", "north", 1, True)
    assert await street.host_of(vm) == "berlin"
    await street.house.carry_out(vm, O.STOP)
    capacity = street.house.server.capacity
    assert ((await capacity.occupancy("berlin")).guests, (await capacity.occupancy("north")).guests) == (1, 0)
    with pytest.raises(InUse, match="the host berlin, which has another VM of its group db"):
        await street.create("db1", "berlin", apart_from=["db"])
    with pytest.raises(NotFound):
        await street.create("db1", "north")
    await street.restart()
    assert [one.host.name for one in await street.house.server.other_hosts.list(street.house.caller)] == [
        "berlin",
        "south",
    ]
    await street.house.carry_out(vm, O.START)
    assert (await street.house.carry_out(vm, O.MIGRATE, host="south")).status == "succeeded"
    assert (await street.house.carry_out(vm, O.MIGRATE, host="berlin")).status == "succeeded"


async def test_a_request_in_flight_is_performed_under_the_new_name_of_its_host(street: Street) -> None:
    vm = await street.create("web", "north")
    street.north.host.faults.script(vm, Method.PAUSE, Slow(5_000))
    pause = admitted(await street.house.submit(vm, O.PAUSE))
    await street.house.until(vm, task_state="pausing")
    await street.house.server.other_hosts.rename(street.house.caller, "north", "berlin")
    assert (await street.house.ended(pause)).status == "succeeded"
    await street.house.until(vm, host="berlin", vm_state=VmState.PAUSED, task_state="none")
    assert street.north.host.guests[vm].power is PowerState.PAUSED


async def test_a_host_with_vms_is_not_forgotten_and_the_way_out_is_one_that_is_open(street: Street) -> None:
    hosts, caller = street.house.server.other_hosts, street.house.caller
    await street.create("web", "north")
    with pytest.raises(Invalid, match="recorded on the host north: 1") as up:
        await hosts.forget(caller, "north")
    assert up.value.remedy == "Migrate (evacuate, once it is fenced) or delete them first."
    await street.fence(street.north)
    with pytest.raises(Invalid) as fenced:
        await hosts.forget(caller, "north")
    assert fenced.value.remedy == "Evacuate or delete them first."


async def test_a_rename_that_cannot_be_is_refused_and_changes_nothing(street: Street) -> None:
    hosts, caller = street.house.server.other_hosts, street.house.caller
    for name in ("here", "south", "any", "No Name"):
        with pytest.raises(Invalid):
            await hosts.rename(caller, "north", name)
    with pytest.raises(Invalid, match="the server's own"):
        await hosts.rename(caller, "here", "there")
    with pytest.raises(NotFound):
        await hosts.rename(caller, "nowhere", "there")
    with pytest.raises(Forbidden):
        await hosts.rename(msgspec.structs.replace(caller, role=Role.MEMBER), "north", "there")
    vm = await street.create("web")
    street.house.host.freeze(vm)
    request = admitted(await street.house.submit(vm, O.MIGRATE, host="north"))
    with pytest.raises(Invalid, match="VMs are migrating to or from host north: web"):
        await hosts.rename(caller, "north", "there")
    street.house.host.thaw(vm)
    assert (await street.house.ended(request)).status == "succeeded"
    assert [one.host.name for one in await hosts.list(caller)] == ["north", "south"]
    await hosts.rename(caller, "north", "there")
    with pytest.raises(Invalid, match="north is a former name of the host there"):
        await hosts.rename(caller, "south", "north")
