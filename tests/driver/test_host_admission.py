"""Who is let in under a host's name, and what is recorded where when a name is given away: in virtual time.

What becomes of real agents and their guests is seen in `tests/hosts/test_host_identity.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, cast

import msgspec
import pytest

from driver.test_lease_times import MARGIN_S, PATIENCE_S, KeptHosts, Yard, host
from in_process.memory_store import MemoryStore
from in_process.virtual_time import LoopClock, run_in_virtual_time
from interlock.core.errors import Forbidden, HostTaken, Invalid, NotFound
from interlock.core.operations import Operation
from interlock.core.records import Change, Image, Instance, Request, Spec
from interlock.core.states import VmState
from interlock.driver.host_admission import HostAdmission
from interlock.ports import Host, HostIdentity, HostState, Store

FIRST = HostIdentity(id="first", machine="m", boot="b", folder="1:1", run="r1")
SECOND = HostIdentity(id="second", machine="m", boot="b", folder="1:2", run="r2")
COPY = msgspec.structs.replace(FIRST, folder="1:3")
REBOOTED = msgspec.structs.replace(FIRST, boot="c")
ELSEWHERE = msgspec.structs.replace(FIRST, machine="n", boot="c")
NOTHING = Image(id="i", name="i", kind="kernel", path="/nowhere", size_bytes=0, sha256="0" * 64)
NORTH = host("north", identity=FIRST)
FENCED = host("north", identity=FIRST, state=HostState.FENCED)


class KeptInstances(MemoryStore, KeptHosts):
    """Hosts that take their time to be kept, and instances."""

    def __init__(self, *hosts: Host) -> None:
        MemoryStore.__init__(self, LoopClock(asyncio.get_running_loop()))
        KeptHosts.__init__(self, *hosts)


class Gate:
    """An admission on a store, and whatever it told."""

    def __init__(self, *hosts: Host, lease_s: int | None = None) -> None:
        self.yard = Yard(*hosts) if lease_s is None else Yard(*hosts, lease_s=lease_s)
        self.store = self.yard.store = KeptInstances(*hosts)
        self.leases = self.yard.leases
        self.leases._store = cast("Store", self.store)
        self.resumed: list[str] = []
        self.joined: list[tuple[str, bool]] = []
        self.admission = HostAdmission(
            cast("Store", self.store), self.yard.hosts, self.leases, join=self._join, resume=self._resume
        )

    async def _join(self, host: str, *, again: bool = False) -> None:
        assert host not in {one.host for one in await self.instances()}, "before anything is recorded there"
        self.joined.append((host, again))

    def _resume(self, instance: Instance) -> None:
        self.resumed.append(instance.id)

    async def put(self, vm: str, on: str, **more: Any) -> None:
        instance = Instance(
            id=vm, name=vm, project="p", host=on, vm_state=VmState.ACTIVE, state_since_ms=1, spec=Spec(image=NOTHING)
        )
        instance = msgspec.structs.replace(instance, **more)
        await self.store.create(lambda _: Change(instance=instance, answer=None))

    async def instances(self) -> tuple[Instance, ...]:
        return tuple(self.store.now(vm) for vm in self.store.ids)

    def places(self) -> dict[str, str]:
        return {vm: self.store.now(vm).host for vm in self.store.ids}

    def identities(self) -> dict[str, HostIdentity | None]:
        """Of the hosts that are known, which must be those that are kept."""
        assert set(self.store.kept) == {one.name for one in self.leases.hosts()}
        return {one.name: one.identity for one in self.leases.hosts()}

    async def ask(self, identity: HostIdentity, name: str = "north") -> None:
        await self.admission.admit(host(name, identity=identity))

    async def refusal(self, identity: HostIdentity, name: str = "north") -> HostTaken:
        before = dict(self.store.kept)
        with pytest.raises(HostTaken) as refused:
            await self.ask(identity, name)
        assert self.store.kept == before
        return refused.value


def at_gate(story: Callable[[Gate], Coroutine[Any, Any, None]], *hosts: Host, lease_s: int | None = None) -> None:
    async def main() -> None:
        gate = Gate(*hosts, lease_s=lease_s)
        await gate.leases.open()
        await gate.admission.open()
        await story(gate)
        await gate.leases.close()

    run_in_virtual_time(main())


# ------------------------------------------------------------------------------------------------------- who is let in


def test_whoever_comes_first_has_a_name_and_has_it_again() -> None:
    async def story(gate: Gate) -> None:
        await gate.ask(FIRST)
        assert gate.identities() == {"north": FIRST}
        again = msgspec.structs.replace(FIRST, run="another process")
        await gate.ask(again)
        assert gate.identities() == {"north": again}

    at_gate(story)


@pytest.mark.parametrize("second", [SECOND, COPY, REBOOTED, ELSEWHERE])
def test_nobody_is_let_in_beside_an_agent_that_answers(second: HostIdentity) -> None:
    async def story(gate: Gate) -> None:
        gate.yard.agent("north").answering = True
        refused = await gate.refusal(second)
        words = "with a copy of this data folder" if second.id == FIRST.id else "with another data folder"
        assert "connected" in refused.message
        assert words in refused.message
        assert refused.retry_ms is None
        assert gate.yard.agent("north").disconnected == 0

    at_gate(story, NORTH)


@pytest.mark.parametrize("second", [SECOND, COPY, REBOOTED, ELSEWHERE])
def test_what_may_not_come_while_a_lease_runs_may_when_it_is_over(second: HostIdentity) -> None:
    async def story(gate: Gate) -> None:
        await asyncio.sleep(1)
        assert (await gate.refusal(second)).retry_ms == (PATIENCE_S - 1) * 1000
        await asyncio.sleep(PATIENCE_S - 1 - MARGIN_S)
        assert (await gate.refusal(second)).retry_ms == MARGIN_S * 1000
        await asyncio.sleep(MARGIN_S + 0.1)
        await gate.ask(second)
        assert gate.identities() == {"north": second}

    at_gate(story, NORTH)


@pytest.mark.parametrize("second", [SECOND, COPY, ELSEWHERE])
def test_without_leases_only_an_admin_can_say_that_guests_have_ended(second: HostIdentity) -> None:
    async def story(gate: Gate) -> None:
        assert (await gate.refusal(second)).retry_ms is None
        await gate.leases.fence("north", "ann")
        await gate.ask(second)
        assert gate.identities() == {"north": second}

    at_gate(story, NORTH, lease_s=0)


def test_without_leases_a_machine_that_was_booted_since_has_none_of_its_guests_left() -> None:
    async def story(gate: Gate) -> None:
        await gate.ask(REBOOTED)
        assert gate.identities() == {"north": REBOOTED}

    at_gate(story, NORTH, lease_s=0)


def test_a_host_that_is_silent_but_not_fenced_keeps_its_name() -> None:
    async def story(gate: Gate) -> None:
        refused = await gate.refusal(SECOND)
        assert "`interlock host replace north --i-am-sure`" in (refused.remedy or "")

    at_gate(story, host("north", identity=FIRST, state=HostState.LOST), lease_s=0)


def test_one_folder_is_one_host() -> None:
    async def story(gate: Gate) -> None:
        for name in ("south", "west"):
            with pytest.raises(Forbidden, match=f"belongs to the host north, and not to {name}"):
                await gate.ask(FIRST, name)
        assert gate.identities() == {"north": FIRST, "south": SECOND}

    at_gate(story, NORTH, host("south", identity=SECOND))


def test_a_name_from_before_there_were_identities_is_the_first_agents() -> None:
    async def story(gate: Gate) -> None:
        with pytest.raises(Forbidden):
            await gate.ask(SECOND, "north")
        await gate.ask(FIRST)
        assert gate.identities() == {"north": FIRST, "south": SECOND}
        await gate.refusal(msgspec.structs.replace(SECOND, id="third"))

    at_gate(story, host("north"), host("south", identity=SECOND))


def test_of_two_agents_that_ask_for_one_name_at_once_one_has_it() -> None:
    async def story(gate: Gate) -> None:
        gate.store.seconds = 1.0
        ends = await asyncio.gather(gate.ask(FIRST), gate.ask(SECOND), return_exceptions=True)
        assert ends[0] is None
        assert isinstance(ends[1], HostTaken)
        assert gate.identities() == {"north": FIRST}

    at_gate(story)


def test_a_fenced_host_that_is_let_back_in_is_up_before_it_gets_a_lease() -> None:
    async def story(gate: Gate) -> None:
        await asyncio.sleep(10)
        await gate.ask(FIRST)
        assert gate.store.kept["north"].state is HostState.UP
        assert gate.leases.ends_in_ms("north") == PATIENCE_S * 1000, "or it would be fenced again at once"
        refusal = await gate.refusal(SECOND)
        assert "Its agent is disconnected, and its VMs may run." in refusal.message

    at_gate(story, FENCED)


def test_what_is_recorded_while_an_agent_is_asked_whether_it_answers_decides() -> None:
    async def story(gate: Gate) -> None:
        silent = asyncio.Event()

        async def answers() -> bool:
            await silent.wait()
            return False

        gate.yard.agent("north").answers = answers  # type: ignore[method-assign]
        asking = asyncio.create_task(gate.ask(SECOND))
        await asyncio.sleep(0)
        await gate.leases.on_connected(NORTH)
        silent.set()
        with pytest.raises(HostTaken):
            await asking
        assert gate.identities() == {"north": FIRST}

    at_gate(story, FENCED)


def test_one_folder_that_asks_for_two_names_at_once_has_one() -> None:
    async def story(gate: Gate) -> None:
        gate.store.seconds = 1.0
        ends = await asyncio.gather(gate.ask(FIRST), gate.ask(FIRST, "south"), return_exceptions=True)
        assert ends[0] is None
        assert isinstance(ends[1], Forbidden)
        assert gate.identities() == {"north": FIRST}

    at_gate(story)


def test_who_was_refused_one_name_may_have_another() -> None:
    async def story(gate: Gate) -> None:
        await gate.refusal(SECOND)
        await gate.ask(SECOND, "south")
        assert gate.identities() == {"north": FIRST, "south": SECOND}

    at_gate(story, NORTH)


# --------------------------------------------------------------------------------------------------- names given away


def test_a_fenced_host_of_which_nothing_is_recorded_is_forgotten_with_its_name() -> None:
    async def story(gate: Gate) -> None:
        agent = gate.yard.agent("north")
        await gate.put("other", "south")
        await asyncio.sleep(1)
        await gate.ask(SECOND)
        assert gate.leases.ends_in_ms("north") == PATIENCE_S * 1000, "a lease of its own"
        assert [one.kind for one in gate.leases.host("north").history] == ["joined"]
        assert gate.identities() == {"north": SECOND}
        assert gate.leases.host("north").state is HostState.UP
        assert agent.disconnected == 1
        assert (gate.places(), gate.resumed, gate.joined) == ({"other": "south"}, [], [])

    at_gate(story, FENCED)


def test_what_is_recorded_stays_with_the_host_whose_name_is_taken() -> None:
    async def story(gate: Gate) -> None:
        agent = gate.yard.agent("north")
        for vm, on in (("one", "north"), ("two", "north"), ("other", "south")):
            await gate.put(vm, on)
        await asyncio.sleep(1)
        await gate.ask(SECOND)
        assert gate.leases.ends_in_ms("north") == PATIENCE_S * 1000, "a lease of its own"
        assert gate.identities() == {"north": SECOND, "north-old": FIRST}
        old = gate.leases.host("north-old")
        assert (old.state, old.replaces) == (HostState.FENCED, None)
        assert gate.store.kept["north-old"].replaces is None
        assert gate.places() == {"one": "north-old", "two": "north-old", "other": "south"}
        assert (gate.resumed, gate.joined) == (["one", "two"], [("north-old", False)])
        assert agent.disconnected == 1

    at_gate(story, FENCED)


def test_the_name_that_a_replaced_host_gets_is_free_and_not_too_long() -> None:
    async def story(gate: Gate) -> None:
        for vm, on in (("one", "north"), ("two", "n" * 63)):
            await gate.put(vm, on)
        assert (await gate.admission.replace("north", "ann")).name == "north-old-3"
        assert (await gate.admission.replace("n" * 63, "ann")).name == "n" * 59 + "-old"

    taken = (host("north-old"), host("north-old-2"), host("n" * 63))
    at_gate(story, NORTH, *taken)


def test_the_name_of_the_servers_own_host_is_not_given_to_another() -> None:
    async def story(gate: Gate) -> None:
        gate.yard.hosts.own = "north-old"
        assert (await gate.admission.replace("north", "ann")).name == "north-old-2"

    at_gate(story, NORTH)


def test_an_admin_gives_a_name_away_unless_its_agent_answers() -> None:
    async def story(gate: Gate) -> None:
        await gate.put("one", "north")
        gate.yard.agent("north").answering = True
        with pytest.raises(Invalid, match="is connected"):
            await gate.admission.replace("north", "ann")
        assert gate.places() == {"one": "north"}
        gate.yard.agent("north").answering = False
        replaced = await gate.admission.replace("north", "ann")
        assert (replaced.name, replaced.state, replaced.fenced_by) == ("north-old", HostState.FENCED, "ann")
        assert gate.identities() == {"north-old": FIRST}
        assert gate.places() == {"one": "north-old"}
        await gate.ask(SECOND)
        with pytest.raises(Forbidden, match="belongs to the host north-old"):
            await gate.ask(FIRST)
        with pytest.raises(NotFound):
            await gate.admission.replace("nowhere", "ann")

    at_gate(story, NORTH)


def test_who_asks_while_a_name_is_given_away_has_it_afterwards() -> None:
    async def story(gate: Gate) -> None:
        gate.store.seconds = 1.0
        await asyncio.gather(gate.admission.replace("north", "ann"), gate.ask(SECOND))
        assert gate.identities() == {"north": SECOND, "north-old": FIRST}

    at_gate(story, NORTH)


def test_what_was_half_given_away_is_finished_when_the_server_starts() -> None:
    async def main() -> None:
        half = host("north-old", identity=FIRST, state=HostState.FENCED, replaces="north")
        gate = Gate(FENCED, half, host("south", identity=SECOND))
        for vm, on in (("one", "north-old"), ("two", "north"), ("other", "south")):
            await gate.put(vm, on)
        await gate.leases.open()
        await gate.admission.open()
        assert gate.places() == {"one": "north-old", "two": "north-old", "other": "south"}
        assert gate.identities() == {"north-old": FIRST, "south": SECOND}
        assert gate.leases.host("north-old").replaces is None
        assert gate.resumed == ["two"]
        await gate.leases.close()

    run_in_virtual_time(main())


def test_what_was_half_given_away_goes_on_under_the_name_that_it_has() -> None:
    async def story(gate: Gate) -> None:
        await gate.put("one", "north")
        half = host("north-old", identity=FIRST, state=HostState.FENCED, replaces="north")
        await gate.leases.keep(half)
        await gate.ask(SECOND)
        assert gate.identities() == {"north": SECOND, "north-old": FIRST}
        assert gate.places() == {"one": "north-old"}
        assert gate.joined == []

    at_gate(story, FENCED)


def test_an_instance_that_left_meanwhile_is_recorded_where_it_is() -> None:
    async def story(gate: Gate) -> None:
        await gate.put("one", "north")
        change = gate.store.change

        async def late(instance_id: str, decide: Any, key: Any = None) -> Any:
            await gate.put("one", "south")
            return await change(instance_id, decide, key)

        gate.store.change = late  # type: ignore[method-assign]
        await gate.ask(SECOND)
        assert gate.places() == {"one": "south"}

    at_gate(story, FENCED)


# ------------------------------------------------------------------------------------------------------------ renaming


def test_a_host_is_called_otherwise_with_all_that_is_recorded_there() -> None:
    async def story(gate: Gate) -> None:
        agent = gate.yard.agent("north")
        for vm, on in (("one", "north"), ("other", "south")):
            await gate.put(vm, on)
        renamed = await gate.admission.rename("north", "east")
        assert (renamed.name, renamed.former, renamed.replaces) == ("east", "north", None)
        assert gate.identities() == {"east": FIRST, "south": SECOND}
        assert gate.places() == {"one": "east", "other": "south"}
        assert (gate.joined, gate.resumed, agent.disconnected) == ([("east", True)], ["one"], 0)
        with pytest.raises(NotFound):
            await gate.admission.rename("nowhere", "west")

    at_gate(story, NORTH, host("south", identity=SECOND))


def test_of_two_new_names_at_once_a_host_gets_the_first() -> None:
    async def story(gate: Gate) -> None:
        gate.store.seconds = 1.0
        renames = (gate.admission.rename("north", name) for name in ("east", "west"))
        ends = await asyncio.gather(*renames, return_exceptions=True)
        assert isinstance(ends[0], Host)
        assert isinstance(ends[1], NotFound)
        assert gate.identities() == {"east": FIRST}

    at_gate(story, NORTH)


@pytest.mark.parametrize(
    ("taken", "why"),
    [
        ("here", "Host here already exists"),
        ("south", "Host south already exists"),
        ("former", "former is a former name of the host west, whose agent may still use it"),
        ("former2", "former2 is a former name of the host west, whose agent may still use it"),
    ],
)
def test_a_name_that_means_another_host_is_not_given(taken: str, why: str) -> None:
    async def story(gate: Gate) -> None:
        await gate.admission.rename("former", "former2")
        await gate.admission.rename("former2", "west")
        with pytest.raises(Invalid, match=why):
            await gate.admission.rename("north", taken)
        assert "north" in gate.identities()

    at_gate(story, NORTH, host("south", identity=SECOND), host("former"))


def names(gate: Gate, name: str) -> tuple[str | None, set[str]]:
    """Under which former name the agent runs, and all that it may use: in the record and in the registry alike."""
    record = gate.leases.host(name)
    assert gate.store.kept[name] == record
    assert all(gate.leases.current_name(one) == name for one in record.former_names)
    told = gate.yard.agent(name).names
    assert told == (name, record.former_names) or (told is None and not record.former_names)
    return record.former, set(record.former_names)


def test_an_agent_may_use_every_name_since_it_connected() -> None:
    async def story(gate: Gate) -> None:
        agent = gate.yard.agent("north")
        await gate.admission.rename("north", "east")
        await gate.admission.rename("east", "west")
        assert names(gate, "west") == ("north", {"north", "east"})
        assert (gate.yard.agent("west"), agent.disconnected) == (agent, 0)
        with pytest.raises(Invalid, match="Host west already exists"):
            await gate.admission.rename("west", "west")
        await gate.leases.close()
        again = Gate(*gate.store.kept.values())
        await again.leases.open()
        assert names(again, "west") == ("north", {"north", "east"})
        await again.leases.on_connected(host("west", identity=FIRST, former="north"))
        assert names(again, "west") == ("north", {"north"})
        assert again.leases.current_name("east") == "east"
        await again.leases.on_connected(host("west", identity=FIRST))
        assert names(again, "west") == (None, set())
        assert again.leases.current_name("north") == "north"
        await again.leases.close()

    at_gate(story, NORTH)


def test_a_host_gets_a_former_name_of_its_own_back() -> None:
    async def story(gate: Gate) -> None:
        agent = gate.yard.agent("north")
        await gate.put("one", "north")
        await gate.admission.rename("north", "east")
        await gate.admission.rename("east", "north")
        assert names(gate, "north") == (None, {"east"})
        assert gate.places() == {"one": "north"}
        assert (gate.yard.agent("north"), agent.disconnected, gate.identities()) == (agent, 0, {"north": FIRST})
        await gate.admission.rename("north", "west")
        await gate.admission.rename("west", "east")
        assert names(gate, "east") == ("north", {"north", "west"})

    at_gate(story, NORTH)


def test_an_agent_that_connects_under_the_new_name_during_a_rename_frees_the_former_one() -> None:
    async def story(gate: Gate) -> None:
        await gate.put("one", "north")
        change = gate.store.change

        async def meanwhile(instance_id: str, decide: Any, key: Any = None) -> Any:
            await gate.leases.on_connected(host("east", identity=FIRST))
            return await change(instance_id, decide, key)

        gate.store.change = meanwhile  # type: ignore[method-assign]
        await gate.admission.rename("north", "east")
        assert names(gate, "east") == (None, set())
        assert gate.places() == {"one": "east"}

    at_gate(story, NORTH)


def test_a_record_with_one_former_name_is_read() -> None:
    async def story(gate: Gate) -> None:
        assert names(gate, "north") == ("nord", {"nord"})
        await gate.admission.rename("north", "east")
        assert names(gate, "east") == ("nord", {"nord", "north"})

    at_gate(story, host("north", identity=FIRST, former="nord"))


def test_a_second_rename_that_was_interrupted_keeps_all_names() -> None:
    async def story(gate: Gate) -> None:
        assert gate.places() == {}
        assert names(gate, "east") == ("nord", {"nord", "west"})

    half = host("east", identity=FIRST, former="nord", other_former=("west",), replaces="west")
    at_gate(story, half, host("west", identity=FIRST, former="nord"))


def test_the_names_of_a_host_that_is_gone_are_free() -> None:
    async def story(gate: Gate) -> None:
        await gate.leases.forget("west")
        await gate.admission.rename("north", "nord")
        assert names(gate, "nord") == ("north", {"north"})

    at_gate(story, NORTH, host("west", former="nord", state=HostState.FENCED))


def test_who_replaces_a_host_runs_under_its_former_name() -> None:
    async def story(gate: Gate) -> None:
        await gate.put("one", "north")
        await gate.admission.admit(host("north", identity=SECOND, former="nord"))
        assert names(gate, "north") == ("nord", {"nord"})
        assert names(gate, "north-old") == (None, set())

    at_gate(story, host("north", identity=FIRST, former="nord", state=HostState.FENCED))


def test_a_host_keeps_its_connection_under_the_name_of_a_refused_agent() -> None:
    async def story(gate: Gate) -> None:
        agent, refused = gate.yard.agent("north"), gate.yard.agent("east")
        await gate.admission.rename("north", "east")
        assert gate.yard.agent("east") is agent
        assert (agent.disconnected, refused.disconnected) == (0, 1)

    at_gate(story, NORTH)


def on_its_way(operation: Operation, **parameters: str) -> Request:
    return Request(
        id="r",
        instance_id="vm",
        operation=operation,
        parameters=parameters,
        requested_by="ann",
        rule="",
        admitted_at_ms=0,
    )


@pytest.mark.parametrize(
    ("on", "more"),
    [
        ("south", {"left_host": "north", "outstanding": (on_its_way(Operation.REBOOT),)}),
        ("north", {"outstanding": (on_its_way(Operation.MIGRATE, host="south"),)}),
        ("south", {"outstanding": (on_its_way(Operation.LIVE_MIGRATE, host="north"),)}),
        ("south", {"held": (on_its_way(Operation.EVACUATE, host="north"),)}),
    ],
)
def test_a_host_is_not_renamed_while_an_instance_is_on_its_way_to_or_from_it(on: str, more: dict[str, Any]) -> None:
    async def story(gate: Gate) -> None:
        await gate.put("vm", on, **more)
        with pytest.raises(Invalid, match="to or from host north: vm"):
            await gate.admission.rename("north", "east")
        assert set(gate.identities()) == {"north", "south"}

    at_gate(story, NORTH, host("south", identity=SECOND))


@pytest.mark.parametrize(
    ("on", "more"),
    [
        ("north", {"outstanding": (on_its_way(Operation.REBOOT, host="north"),)}),
        ("south", {"outstanding": (on_its_way(Operation.MIGRATE, host="west"),)}),
        ("south", {"left_host": "west", "outstanding": (on_its_way(Operation.REBOOT),)}),
    ],
)
def test_a_host_is_renamed_whatever_goes_on_elsewhere(on: str, more: dict[str, Any]) -> None:
    async def story(gate: Gate) -> None:
        await gate.put("vm", on, **more)
        await gate.admission.rename("north", "east")
        assert gate.places() == {"vm": "east" if on == "north" else on}

    at_gate(story, NORTH, host("south", identity=SECOND))
