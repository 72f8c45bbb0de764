"""Which hosts are taken for alive, and until when: in virtual time, with a store and agents that do as they are told.

What becomes of real guests is seen in `tests/hosts/test_leases.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, cast

import msgspec
import pytest

from in_process.virtual_time import VirtualTimeLoop, run_in_virtual_time
from interlock.core.errors import HostTaken, Invalid, NotFound, OperationRejected, StoreError
from interlock.driver.host_admission import HostAdmission
from interlock.driver.host_registry import HostRegistry
from interlock.driver.leases import Leases
from interlock.ports import Drain, Host, HostCondition, HostIdentity, HostState, Hypervisor, Limits, RemoteHost, Store

LEASE_S, MARGIN_S, SILENCE_S = 10, 2, 30
LOST_S = LEASE_S * 2 / 3
PATIENCE_S = LEASE_S + MARGIN_S
DRAIN = Drain(by="ann", since_ms=0)


class KeptHosts:
    """The hosts of a store; each change takes `seconds`, and fails `failures` times."""

    def __init__(self, *hosts: Host) -> None:
        self.hosts: Any = self
        """It has the methods of `ports.HostRecords`."""
        self.kept = {host.name: host for host in hosts}
        self.seconds = 0.0
        self.failures = 0
        self.changing = 0
        self.puts = 0

    def now_ms(self) -> int:
        return 1_000_000 + round(asyncio.get_running_loop().time() * 1000)

    async def all(self) -> tuple[Host, ...]:
        return tuple(self.kept.values())

    async def put(self, host: Host) -> None:
        self.puts += 1
        self.changing += 1
        try:
            await asyncio.sleep(self.seconds)
        finally:
            # What has begun ends, as a transaction does, also for who is cancelled.
            await asyncio.shield(asyncio.sleep(self.seconds))
            self.changing -= 1
        if self.failures:
            self.failures -= 1
            raise StoreError("The disk is full.", remedy="Free some space.")
        self.kept[host.name] = host

    async def delete(self, name: str) -> None:
        del self.kept[name]


class AnAgent:
    """As much of a remote host as is looked at."""

    def __init__(self) -> None:
        self.linked = True
        self.answering = False
        self.disconnected = 0
        self.closed = False
        self.disk_free_mib = 7
        self.fences: list[tuple[str, int]] = []
        self.renewed_s = 0.0
        """As its connection's thread has it."""
        self.renewing_s: float | None = None
        """A renewal that comes between the judgement and the end of the lease."""
        self.ended = 0
        self.resumed = 0
        self.certificate_name: str | None = None
        self.names: tuple[str, frozenset[str]] | None = None

    async def answers(self) -> bool:
        return self.answering

    def disconnect(self) -> None:
        self.disconnected += 1

    def rename(self, name: str, former: frozenset[str]) -> None:
        self.names = (name, former)

    def end_lease(self, unless_after_s: float | None = None) -> bool:
        if self.renewing_s is not None:
            self.renewed_s, self.renewing_s = self.renewing_s, None
        self.ended += 1
        return unless_after_s is None or self.renewed_s <= unless_after_s

    def resume_lease(self) -> None:
        self.resumed += 1

    def superseded(self, instance_id: str, fence: int) -> None:
        self.fences.append((instance_id, fence))

    async def close(self) -> None:
        self.closed = True


class Yard:
    """Leases on a store, with an agent for each host that is named."""

    def __init__(self, *hosts: Host, lease_s: int = LEASE_S) -> None:
        self.store = KeptHosts(*hosts)
        self.own = AnAgent()
        self.hosts = HostRegistry("here", cast("Hypervisor", self.own), self._make, self._reachable)
        self.told: list[Host] = []
        self.fenced: list[str] = []
        self.hosts.listen(self.told.append)
        self.leases = Leases(
            cast("Store", self.store),
            self.hosts,
            lease_ms=lease_s * 1000,
            margin_ms=MARGIN_S * 1000,
            silence_ms=SILENCE_S * 1000,
            fenced=self._note_fenced,
        )

    async def _note_fenced(self, name: str) -> None:
        self.fenced.append(name)

    def _reachable(self, name: str) -> bool:
        return self.leases.reachable(name)

    def _make(self, name: str) -> RemoteHost:
        return cast("RemoteHost", AnAgent())

    def agent(self, name: str) -> AnAgent:
        return cast("AnAgent", self.hosts.remote(name))

    def state(self, name: str) -> HostState:
        return self.leases.host(name).state


def host(name: str, **more: Any) -> Host:
    return Host(name=name, **{"joined_at_ms": 1, "last_seen_at_ms": 2, **more})


def in_yard(story: Callable[[Yard], Coroutine[Any, Any, None]], *hosts: Host, lease_s: int = LEASE_S) -> None:
    async def main() -> None:
        yard = Yard(*hosts, lease_s=lease_s)
        await yard.leases.open()
        await story(yard)
        await yard.leases.close()

    run_in_virtual_time(main())


# ------------------------------------------------------------------------------------------------------ ends of leases


def test_a_host_is_fenced_when_its_lease_and_the_margin_are_over_and_not_before() -> None:
    async def story(yard: Yard) -> None:
        agent = yard.agent("north")
        await asyncio.sleep(PATIENCE_S - 0.1)
        assert (yard.state("north"), yard.leases.reachable("north")) == (HostState.UP, True)
        assert yard.leases.ends_in_ms("north") == 100
        await asyncio.sleep(0.2)
        assert (yard.state("north"), yard.hosts.reachable("north")) == (HostState.FENCED, False)
        assert yard.store.kept["north"].fenced_by == "lease"
        assert yard.fenced == ["north"]
        assert agent.disconnected == 1
        assert yard.told[-1].state is HostState.FENCED
        await asyncio.sleep(PATIENCE_S)
        assert yard.leases.ends_in_ms("north") == 0
        assert yard.store.puts == 1

    in_yard(story, host("north"))


def test_a_lease_counts_from_the_open_of_the_server_also_where_its_clock_has_run() -> None:
    async def main() -> None:
        await asyncio.sleep(1000)
        yard = Yard(host("north"))
        await yard.leases.open()
        await asyncio.sleep(PATIENCE_S - 0.1)
        assert yard.state("north") is HostState.UP
        await yard.leases.close()

    run_in_virtual_time(main())


@pytest.mark.parametrize("order", [("early", "late"), ("late", "early")])
def test_of_several_leases_the_earliest_end_is_seen_in_time(order: tuple[str, str]) -> None:
    async def story(yard: Yard) -> None:
        await asyncio.sleep(5)
        yard.leases.renewed("late")
        await asyncio.sleep(PATIENCE_S - 5 + 0.1)
        assert (yard.state("early"), yard.state("late")) == (HostState.FENCED, HostState.UP)
        await asyncio.sleep(5 - 0.2)
        assert yard.state("late") is HostState.UP
        await asyncio.sleep(0.2)
        assert yard.state("late") is HostState.FENCED

    in_yard(story, *map(host, order))


def test_news_of_one_host_ends_no_lease_of_another_early_or_late() -> None:
    async def story(yard: Yard) -> None:
        await asyncio.sleep(PATIENCE_S - 0.1)
        yard.leases.renewed("south")
        await yard.leases.keep(host("south"))
        await asyncio.sleep(0.05)
        assert yard.state("north") is HostState.UP
        await asyncio.sleep(0.1)
        assert (yard.state("north"), yard.state("south")) == (HostState.FENCED, HostState.UP)

    in_yard(story, host("north"), host("south"))


def test_a_renewed_lease_begins_anew() -> None:
    async def story(yard: Yard) -> None:
        for _ in range(5):
            await asyncio.sleep(PATIENCE_S - 1)
            yard.leases.renewed("north")
            assert yard.leases.last_seen_at_ms("north") == yard.store.now_ms()
        assert yard.state("north") is HostState.UP
        await asyncio.sleep(PATIENCE_S + 0.1)
        assert yard.state("north") is HostState.FENCED

    in_yard(story, host("north"))


def test_a_host_that_is_given_up_already_is_left_as_it_is() -> None:
    async def story(yard: Yard) -> None:
        await asyncio.sleep(2 * PATIENCE_S)
        assert yard.leases.hosts() == (host("gone", state=HostState.FENCED, fenced_by="ann"),)
        assert yard.store.puts == 0

    in_yard(story, host("gone", state=HostState.FENCED, fenced_by="ann"))


def test_without_leases_a_silent_host_is_lost_and_its_guests_may_run_still() -> None:
    async def story(yard: Yard) -> None:
        agent = yard.agent("north")
        assert yard.leases.ends_in_ms("north") is None
        await asyncio.sleep(2 * (SILENCE_S + MARGIN_S))
        assert yard.state("north") is HostState.UP, "its agent is connected"
        yard.leases.renewed("north")
        agent.linked = False
        await asyncio.sleep(SILENCE_S + MARGIN_S - 0.1)
        assert yard.leases.condition("north") == HostCondition(name="north", state=HostState.UP)
        yard.leases.renewed("north")
        await asyncio.sleep(SILENCE_S + MARGIN_S + 0.1)
        assert (yard.state("north"), yard.leases.reachable("north")) == (HostState.LOST, True)
        assert yard.leases.host("north").fenced_by is None

    in_yard(story, host("north"), lease_s=0)


def test_without_leases_a_connection_that_ends_without_a_word_is_noticed_in_time() -> None:
    async def story(yard: Yard) -> None:
        agent = yard.agent("north")
        for _ in range(3):
            await asyncio.sleep(SILENCE_S)
            yard.leases.renewed("north")
        await asyncio.sleep(1)
        agent.linked = False
        await asyncio.sleep(SILENCE_S + MARGIN_S - 1.1)
        assert yard.state("north") is HostState.UP
        await asyncio.sleep(0.2)
        assert yard.state("north") is HostState.LOST

    in_yard(story, host("north"), lease_s=0)


def test_a_loss_that_cannot_be_kept_is_kept_later_and_promised_to_nobody_before() -> None:
    async def story(yard: Yard) -> None:
        agent = yard.agent("north")
        yard.store.failures = 1
        await asyncio.sleep(PATIENCE_S + 0.1)
        assert (yard.state("north"), yard.store.puts, agent.disconnected) == (HostState.UP, 1, 0)
        await asyncio.sleep(PATIENCE_S - 0.2)
        assert yard.store.puts == 1
        await asyncio.sleep(0.2)
        assert yard.state("north") is HostState.FENCED

    in_yard(story, host("north"))


def test_a_renewal_that_another_thread_has_granted_counts_as_soon_as_it_is_granted() -> None:
    async def story(yard: Yard) -> None:
        agent = yard.agent("north")
        await asyncio.sleep(PATIENCE_S - 0.1)
        agent.renewed_s = PATIENCE_S - 1
        await asyncio.sleep(PATIENCE_S - 1)
        assert (yard.state("north"), yard.leases.ends_in_ms("north")) == (HostState.UP, 100)
        await asyncio.sleep(0.2)
        assert yard.state("north") is HostState.FENCED

    in_yard(story, host("north"))


def test_a_renewal_between_the_judgement_and_the_end_of_a_lease_keeps_the_host() -> None:
    async def story(yard: Yard) -> None:
        agent = yard.agent("north")
        agent.renewing_s = PATIENCE_S
        await asyncio.sleep(PATIENCE_S - 0.1)
        agent.linked = False
        await asyncio.sleep(1.1)
        assert (yard.state("north"), yard.store.puts, agent.disconnected) == (HostState.UP, 0, 0)
        await asyncio.sleep(PATIENCE_S)
        assert yard.state("north") is HostState.FENCED

    in_yard(story, host("north"))


def test_a_lease_that_was_ended_goes_on_if_the_fencing_cannot_be_kept() -> None:
    async def story(yard: Yard) -> None:
        agent = yard.agent("north")
        yard.store.failures = 1
        await asyncio.sleep(PATIENCE_S + 0.1)
        assert (yard.state("north"), agent.resumed) == (HostState.UP, 1)
        yard.store.failures = 1
        with pytest.raises(StoreError):
            await yard.leases.fence("north", "ann")
        assert agent.resumed == 2

    in_yard(story, host("north"))


@pytest.mark.parametrize(("received_after_s", "state"), [(0.5, HostState.UP), (1.5, HostState.FENCED)])
def test_a_server_that_was_busy_receives_what_agents_have_sent_before_it_judges_them(
    received_after_s: float, state: HostState
) -> None:
    async def story(yard: Yard) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        await asyncio.sleep(1)
        loop._jumping.elapsed_s += 2 * PATIENCE_S
        loop.call_later(received_after_s, yard.leases.renewed, "north")
        await asyncio.sleep(2)
        assert yard.state("north") is state

    in_yard(story, host("north"))


def test_a_host_that_misses_two_renewals_is_lost_since_then_and_says_when_it_is_fenced() -> None:
    async def story(yard: Yard) -> None:
        leases, up = yard.leases, HostCondition(name="north", state=HostState.UP)
        assert (leases.fenced_at_ms("north"), leases.fenced_at_ms("nowhere")) == (None, None), "it is connected"
        yard.agent("north").linked = False
        fenced_at_ms = yard.store.now_ms() + PATIENCE_S * 1000
        assert leases.fenced_at_ms("north") == fenced_at_ms
        await asyncio.sleep(LOST_S - 0.1)
        assert leases.condition("north") == up
        await asyncio.sleep(0.2)
        lost = leases.condition("north")
        assert lost == HostCondition(
            name="north", state=HostState.LOST, since_ms=leases.history("north")[-1].at_ms, fenced_at_ms=fenced_at_ms
        )
        await asyncio.sleep(PATIENCE_S - LOST_S)
        assert [event.kind for event in yard.store.kept["north"].history] == ["lost", "fenced"]
        fenced = HostCondition(name="north", state=HostState.FENCED, since_ms=leases.history("north")[-1].at_ms)
        assert leases.condition("north") == fenced
        assert fenced.since_ms > lost.since_ms
        assert leases.fenced_at_ms("north") is None
        assert leases.condition("nowhere") == HostCondition(name="nowhere", state=HostState.UP)
        assert leases.condition("gone") == HostCondition(name="gone", state=HostState.FENCED, since_ms=2)

    in_yard(story, host("north"), host("gone", state=HostState.FENCED, last_seen_at_ms=2))


def test_a_lost_host_whose_agent_connects_is_back_and_can_be_lost_again() -> None:
    async def story(yard: Yard) -> None:
        await yard.leases.on_connected(host("north"))
        for kinds in (["joined", "lost"], ["joined", "lost", "back", "lost"]):
            yard.agent("north").linked = False
            await asyncio.sleep(LOST_S + 0.1)
            assert yard.leases.condition("north").state is HostState.LOST
            assert [event.kind for event in yard.store.kept["north"].history] == kinds
            await yard.leases.on_connected(host("north"))
            assert yard.leases.condition("north").state is HostState.UP

    in_yard(story, host("north"))


def test_a_name_that_is_free_again_is_not_that_of_a_lost_host() -> None:
    async def story(yard: Yard) -> None:
        yard.agent("north").linked = False
        await asyncio.sleep(LOST_S + 0.1)
        await yard.leases.drop("north")
        await yard.leases.keep(host("north"))
        assert yard.leases.condition("north").state is HostState.UP

    in_yard(story, host("north"))


def test_a_fenced_host_that_is_admitted_is_up_and_has_a_lease_and_one_that_is_up_gets_none() -> None:
    async def story(yard: Yard) -> None:
        yard.agent("north").linked = False
        await asyncio.sleep(PATIENCE_S - 1)
        yard.leases.renewed("south")
        await asyncio.sleep(4)
        for name in ("north", "south"):
            assert (await yard.leases.admit(yard.leases.host(name))).state is HostState.UP
        assert yard.store.kept["north"] == yard.leases.host("north")
        assert yard.leases.host("north").fenced_by is None
        assert yard.leases.condition("north").state is HostState.UP
        assert [yard.leases.ends_in_ms(name) for name in ("north", "south")] == [12_000, 8_000]
        await yard.leases.on_connected(host("north"))
        assert [event.kind for event in yard.leases.history("north")] == ["lost", "fenced", "back"]

    in_yard(story, host("north"), host("south"))


def test_a_host_that_comes_to_be_known_has_its_lease_from_then_on() -> None:
    async def story(yard: Yard) -> None:
        await asyncio.sleep(100)
        await yard.leases.keep(host("new"))
        assert yard.store.kept["new"] == yard.leases.host("new") == yard.told[-1]
        await asyncio.sleep(5)
        await yard.leases.keep(host("new", address="a:1"))  # grants nothing
        await asyncio.sleep(PATIENCE_S - 5 - 0.1)
        assert yard.state("new") is HostState.UP
        await asyncio.sleep(0.2)
        assert yard.state("new") is HostState.FENCED

    in_yard(story)


def test_nothing_is_under_way_once_it_is_closed() -> None:
    async def main() -> None:
        yard = Yard(host("north"))
        await yard.leases.open()
        yard.store.seconds = 1.0
        await asyncio.sleep(PATIENCE_S + 0.5)
        assert yard.store.changing == 1
        await yard.leases.close()
        assert yard.store.changing == 0
        assert [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
        await Yard().leases.close()  # one that was never opened

    run_in_virtual_time(main())


# ------------------------------------------------------------------------------------------------------------- agents


def test_an_agent_that_is_heard_renews_its_lease_and_keeps_what_an_admin_has_said() -> None:
    async def story(yard: Yard) -> None:
        await asyncio.sleep(PATIENCE_S - 1)
        await yard.leases.on_connected(host("north", joined_at_ms=9, last_seen_at_ms=9, address="a:1"))
        expected = host("north", last_seen_at_ms=9, address="a:1", drain=DRAIN)
        assert yard.store.kept["north"] == yard.leases.host("north")
        assert msgspec.structs.replace(yard.leases.host("north"), history=()) == expected
        await asyncio.sleep(2)
        assert yard.state("north") is HostState.UP

    in_yard(story, host("north", drain=DRAIN))


@pytest.mark.parametrize("known", [(), (host("north", identity=HostIdentity(id="first")),)])
def test_an_agent_whose_name_was_given_away_is_sent_off_and_renews_nothing(known: tuple[Host, ...]) -> None:
    async def story(yard: Yard) -> None:
        agent = yard.agent("north")
        await asyncio.sleep(1)
        await yard.leases.on_connected(host("north", identity=HostIdentity(id="second")))
        assert agent.disconnected == 1
        assert yard.leases.hosts() == known
        assert yard.leases.find("north") == (known[0] if known else None)
        assert yard.leases.ends_in_ms("north") == ((PATIENCE_S - 1) * 1000 if known else None)
        assert yard.store.puts == 0

    in_yard(story, *known)


def test_a_name_that_is_bound_to_no_identity_yet_is_the_first_agents() -> None:
    async def story(yard: Yard) -> None:
        async def nobody(*_: object) -> None:
            raise AssertionError("the host is known")

        store = cast("Store", yard.store)
        admission = HostAdmission(store, yard.hosts, yard.leases, join=cast("Any", nobody), resume=lambda _: None)
        identity = HostIdentity(id="first", folder="f")
        await admission.admit(host("north", joined_at_ms=9, identity=identity))
        assert msgspec.structs.replace(yard.store.kept["north"], history=()) == host(
            "north", identity=identity, drain=DRAIN
        )
        with pytest.raises(HostTaken):
            await admission.admit(host("north", identity=HostIdentity(id="second")))
        assert yard.store.kept["north"].identity == identity

    in_yard(story, host("north", drain=DRAIN))


# ------------------------------------------------------------------------------------------------- what an admin says


def test_only_a_fenced_host_can_be_forgotten() -> None:
    async def story(yard: Yard) -> None:
        for name in ("up", "lost"):
            with pytest.raises(Invalid, match="not fenced"):
                await yard.leases.forget(name)
        await yard.leases.forget("fenced")
        assert set(yard.store.kept) == {"up", "lost"} == {one.name for one in yard.leases.hosts()}
        assert yard.leases.ends_in_ms("fenced") is None
        with pytest.raises(NotFound, match="Host not found: fenced"):
            await yard.leases.forget("fenced")

    in_yard(story, host("up"), host("lost", state=HostState.LOST), host("fenced", state=HostState.FENCED))


def test_an_admins_word_that_guests_have_ended_is_taken_unless_their_agent_answers() -> None:
    async def story(yard: Yard) -> None:
        agent = yard.agent("north")
        agent.answering = True
        with pytest.raises(Invalid, match="is connected"):
            await yard.leases.fence("north", "ann")
        assert (yard.state("north"), agent.disconnected) == (HostState.UP, 0)
        agent.answering = False
        assert agent.ended == 0
        assert (await yard.leases.fence("north", "ann")).fenced_by == "ann"
        assert agent.ended == 1
        assert yard.store.kept["north"].state is yard.state("north") is HostState.FENCED
        assert agent.disconnected == 1
        assert (await yard.leases.fence("north", "bob")).fenced_by == "ann", "who said it first"
        with pytest.raises(NotFound):
            await yard.leases.fence("nowhere", "ann")

    in_yard(story, host("north"))


def test_who_is_to_become_empty() -> None:
    async def story(yard: Yard) -> None:
        assert [one.name for one in yard.leases.to_leave()] == ["drained", "fenced"]
        assert (yard.leases.drain("here"), yard.leases.drain("drained")) == (None, DRAIN)
        await yard.leases.set_drain("here", DRAIN)
        await yard.leases.set_drain("up", DRAIN)
        await yard.leases.set_drain("drained", None)
        assert [one.name for one in yard.leases.to_leave()] == ["here", "fenced", "up"]
        assert yard.leases.drain("here") == yard.store.kept["here"].drain == DRAIN
        assert yard.told[-3].name == "here"
        await yard.leases.set_drain("here", None)
        assert [one.name for one in yard.leases.to_leave()] == ["fenced", "up"]
        for ask in (yard.leases.drain, yard.leases.host):
            with pytest.raises(NotFound):
                ask("nowhere")

    in_yard(story, host("up"), host("fenced", state=HostState.FENCED), host("drained", drain=DRAIN))


def test_the_drain_of_the_servers_own_host_is_found_again_and_not_that_of_its_former_name() -> None:
    async def story(yard: Yard) -> None:
        assert yard.leases.drain("here") == DRAIN
        assert yard.leases.hosts() == tuple(yard.told) == (host("north"),)
        assert [one.name for one in yard.leases.to_leave()] == ["here"]
        assert yard.leases.ends_in_ms("here") is None

    in_yard(story, host("here", own=True, drain=DRAIN), host("former", own=True), host("north"))


def test_what_happens_to_the_servers_own_host_is_in_its_history_and_recorded() -> None:
    async def story(yard: Yard) -> None:
        assert yard.leases.history("here") == yard.leases.history("north") == ()
        await yard.leases.note_own("disk_full", "No space is left.")
        assert yard.leases.history("here") == yard.store.kept["here"].history
        assert yard.store.kept["here"].own
        event = yard.leases.history("here")[-1]
        assert (event.kind, event.detail, event.at_ms) == ("disk_full", "No space is left.", yard.store.now_ms())
        with pytest.raises(NotFound):
            yard.leases.history("nowhere")

    in_yard(story, host("north"))


def test_a_renamed_host_is_recorded_before_anything_is_moved_and_keeps_its_lease() -> None:
    async def story(yard: Yard) -> None:
        yard.leases.renewed("north")
        await asyncio.sleep(1)
        renamed = await yard.leases.rename(yard.leases.host("north"), "arctic")
        assert renamed == yard.store.kept["arctic"] == yard.leases.host("arctic")
        assert (renamed.replaces, renamed.former, renamed.other_former) == ("north", "north", ("old",))
        assert [one.name for one in yard.leases.hosts()] == ["arctic", "south"]
        assert [yard.leases.current_name(name) for name in ("north", "old", "deep")] == ["arctic", "arctic", "south"]
        assert yard.leases.ends_in_ms("arctic") == (PATIENCE_S - 1) * 1000
        assert yard.leases.last_seen_at_ms("arctic") == yard.store.now_ms() - 1000

    in_yard(story, host("north", other_former=("old",)), host("south", other_former=("deep",)))


def test_what_is_known_of_hosts_is_told_and_what_is_not_is_no_promise() -> None:
    async def story(yard: Yard) -> None:
        assert [one.name for one in yard.told] == ["south", "north"]
        assert [one.name for one in yard.leases.hosts()] == ["north", "south"]
        assert (yard.leases.limits("north"), yard.leases.limits("nowhere")) == (Limits(vcpus=3), Limits())
        assert yard.leases.last_seen_at_ms("north") == 2
        assert yard.leases.reachable("nowhere")
        assert yard.leases.disk_free_mib("north") is None
        assert yard.agent("north").disk_free_mib == yard.leases.disk_free_mib("north") == 7

    in_yard(story, host("south"), host("north", limits=Limits(vcpus=3)))


# ------------------------------------------------------------------------------------------------ the table of hosts


async def test_what_concerns_all_hosts_reaches_each_of_them() -> None:
    yard = Yard()
    assert ("here" in yard.hosts, "north" in yard.hosts, yard.hosts.linked("north")) == (True, False, True)
    assert not await yard.hosts.answers("north")
    yard.hosts.disconnect("north")
    north, south = yard.agent("north"), yard.agent("south")
    assert "north" in yard.hosts
    assert yard.agent("north") is north
    assert [yard.hosts.of(name) for name in ("north", "here", "former")] == list[object]([north, yard.own, yard.own])
    south.linked, south.answering = False, True
    assert (yard.hosts.linked("north"), yard.hosts.linked("south")) == (True, False)
    assert (await yard.hosts.answers("north"), await yard.hosts.answers("south")) == (False, True)
    assert list(yard.hosts.all_linked()) == ["north"]
    yard.hosts.superseded("vm", 4)
    assert north.fences == south.fences == [("vm", 4)]
    await yard.hosts.close()
    assert north.closed
    assert south.closed
    assert yard.own.closed


@pytest.mark.parametrize("lacking", ["north", "south"])
async def test_hosts_migrate_encrypted_under_the_names_in_their_certificates_or_not_at_all(lacking: str) -> None:
    yard = Yard()
    yard.agent("north").certificate_name, yard.agent("south").certificate_name = "n", "s"
    assert yard.hosts.certificate_names("north", "south") == ("n", "s")
    assert yard.hosts.certificate_names("south", "here") == ("s", "here")
    yard.agent(lacking).certificate_name = None
    with pytest.raises(OperationRejected, match=f"the agent of host {lacking} cannot"):
        yard.hosts.certificate_names("north", "south")
    unencrypted = HostRegistry("here", cast("Hypervisor", yard.own), yard._make, yard._reachable, unencrypted=True)
    unencrypted.remote("north")
    assert unencrypted.certificate_names("north", "here") is None
