"""What is asked for without anybody asking: once, in time, through the gate, and over restarts of the server."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from in_process.embedded import IMAGE, Embedded
from in_process.memory_store import MemoryStore
from in_process.virtual_time import LoopClock, run_in_virtual_time
from interlock.config import DriverConfig, UpkeepConfig
from interlock.core import admission, lifecycle
from interlock.core.errors import OperationRejected
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Admitted, Change, Disposition, Event, Image, Instance, Spec, Status, Submission
from interlock.core.restart_policy import OnCrash, OnPowerOff, RestartPolicy
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.driver.dispatcher import Dispatcher
from interlock.driver.host_registry import HostRegistry
from interlock.driver.operation_context import DriverDependencies
from interlock.driver.operations import PERFORMS
from interlock.driver.scheduled_actions import ScheduledActions
from interlock.hypervisors.simulated import SimulatedHost, SimulatedHypervisor
from interlock.hypervisors.simulated.faults import Method, Slow
from interlock.images.image_folder import ImageFolder
from interlock.images.volume_folder import DumpFolder
from interlock.policies.active_policy import PolicyInForce
from interlock.policies.language.bundle import Source
from interlock.ports import Permit, RemoteHost, Store
from interlock.service.passwords import PendingPasswords
from interlock.service.request_models import Labels, NewInstance

O = Operation  # noqa: E741
DAY_MS = 24 * 3_600_000
DAY_S = 24 * 3_600
ALWAYS = RestartPolicy(on_crash=OnCrash.RESTART, on_power_off=OnPowerOff.RESTART)
NOTHING = Image(id="i", name="i", kind="kernel", path="/nowhere", size_bytes=0, sha256="0" * 64)


def _no_other(name: str) -> RemoteHost:
    raise AssertionError(f"asked for the host {name}")


class House:
    """An agent on one store and one host, both of which outlive it."""

    def __init__(self, config: UpkeepConfig | None = None, driver: DriverConfig | None = None) -> None:
        self.clock = LoopClock(asyncio.get_running_loop())
        self.store = MemoryStore(self.clock)
        self.host = SimulatedHost()
        self.config = config or UpkeepConfig()
        self.driver_config = driver or DriverConfig(drain_ms=1)
        self.policy = PolicyInForce(CompiledPolicy(Source.read("standard").policy, PERFORMS))
        self.ids = itertools.count()
        self.agent: Dispatcher
        self.hypervisor: SimulatedHypervisor

    async def start(self) -> None:
        store = cast("Store", self.store)
        upkeep = ScheduledActions(store, self.policy, self.config, lambda: f"upkeep-{next(self.ids)}", lambda _: True)
        self.hypervisor = SimulatedHypervisor(self.host)
        hosts = HostRegistry("here", self.hypervisor, _no_other, lambda _: True)
        images = ImageFolder(Path("/nowhere"))
        means = DriverDependencies(
            store=store,
            hosts=hosts,
            images=images,
            dumps=DumpFolder(Path("/nowhere")),
            passwords=PendingPasswords(),
            config=self.driver_config,
        )
        self.agent = Dispatcher(means, self.policy, upkeep)
        await self.agent.open()

    async def restart(self) -> None:
        await self.agent.close()
        await self.start()

    async def put(self, state: VmState, **more: Any) -> None:
        """Keep an instance in that state since now, of which the host holds nothing."""
        now_ms = self.store.now_ms()
        spec = Spec(image=NOTHING)
        instance = Instance(
            id="vm", name="web", project="p", host="here", vm_state=state, state_since_ms=now_ms, spec=spec, **more
        )
        event = Event(
            kind="instance.state", instance_id="vm", at_ms=now_ms, generation=0, data={"vm_state": state.value}
        )
        await self.store.create(lambda _: Change(instance=instance, events=(event,), answer=None))

    async def ask(self, operation: Operation, **parameters: Any) -> Disposition:
        submission = Submission(
            request_id=f"ann-{next(self.ids)}",
            operation=operation,
            parameters=parameters,
            requested_by="ann",
            role=Role.ADMIN,
        )

        def decide(instance: Instance, now_ms: int) -> Change[Disposition]:
            return admission.admit(instance, submission, self.policy.compiled, now_ms)

        return await self.store.change("vm", decide)

    async def block(self, *operations: Operation) -> None:
        """Block these operations of the instance, and no others."""

        def decide(instance: Instance, now_ms: int) -> Change[Instance]:
            return lifecycle.relabel(instance, self.policy.compiled, "ann", now_ms, blocked_operations=operations)

        await self.store.change("vm", decide)

    @property
    def asked(self) -> list[tuple[Operation, int]]:
        """What was asked for without anybody asking, with the times in ms since the beginning."""
        mine = [one for one in self.store.requests.values() if one.requested_by == "interlock"]
        return [(one.operation, one.admitted_at_ms - self.beginning_ms) for one in mine]

    @property
    def beginning_ms(self) -> int:
        return self.clock.now_ms() - round(asyncio.get_running_loop().time() * 1000)

    def vm(self) -> Instance:
        return self.store.now("vm")


def in_house(
    story: Callable[[House], Coroutine[Any, Any, None]],
    config: UpkeepConfig | None = None,
    driver: DriverConfig | None = None,
) -> None:
    async def main() -> None:
        house = House(config, driver)
        await house.start()
        await story(house)
        await house.agent.close()

    run_in_virtual_time(main())


def test_what_was_deleted_is_reclaimed_after_a_week_and_not_before() -> None:
    async def story(house: House) -> None:
        await house.put(VmState.SOFT_DELETED)
        await asyncio.sleep(7 * DAY_S - 1)
        assert house.asked == []
        await asyncio.sleep(2)
        assert house.asked == [(O.DELETE, 7 * DAY_MS)]
        await asyncio.sleep(30 * DAY_S)
        assert house.vm().vm_state is VmState.DELETED
        assert len(house.asked) == 1

    in_house(story)


def test_a_server_that_was_down_meanwhile_makes_up_for_it_once() -> None:
    async def story(house: House) -> None:
        await house.put(VmState.SOFT_DELETED)
        await house.agent.close()
        await asyncio.sleep(8 * DAY_S)
        await house.start()
        await asyncio.sleep(1)
        assert house.asked == [(O.DELETE, 8 * DAY_MS)]
        await house.restart()
        await asyncio.sleep(DAY_S)
        assert len(house.asked) == 1

    in_house(story)


def test_nothing_is_reclaimed_where_the_operator_says_never() -> None:
    async def story(house: House) -> None:
        await house.put(VmState.SOFT_DELETED)
        await asyncio.sleep(30 * DAY_S)
        assert house.asked == []

    in_house(story, UpkeepConfig(reclaim_after_ms=0))


def test_a_sleeping_upkeep_asks_the_store_for_nothing() -> None:
    """No polling: between two moments the store is not even read, but for what a clock may have been put forward."""

    async def story(house: House) -> None:
        await house.put(VmState.SOFT_DELETED)
        await asyncio.sleep(1)
        reads = 0
        read = house.store.instance

        async def counted(instance_id: str) -> Instance | None:
            nonlocal reads
            reads += 1
            return await read(instance_id)

        house.store.instance = counted  # type: ignore[method-assign]
        await asyncio.sleep(6 * DAY_S)
        assert reads == 0

    in_house(story)


def test_an_instance_for_which_nothing_can_be_due_is_not_read_when_a_request_of_it_ends() -> None:
    async def story(house: House) -> None:
        await house.put(VmState.ACTIVE)
        await asyncio.sleep(1)

        reads, read = [], house.store.instance

        async def noted(instance_id: str) -> Instance | None:
            reads.append(instance_id)
            return await read(instance_id)

        house.store.instance = noted  # type: ignore[method-assign]
        await house.ask(O.SET_METADATA, set={"key": "value"})
        assert house.store.told[-1].kind == "request.succeeded"
        await asyncio.sleep(1)
        assert reads == []

    in_house(story)


def test_what_the_policy_refuses_is_asked_again_with_longer_and_longer_pauses_and_at_once_when_it_may_be() -> None:
    async def story(house: House) -> None:
        await house.put(VmState.SOFT_DELETED, blocked_operations=(O.DELETE,))
        await asyncio.sleep(8 * DAY_S)
        tries = next(house.ids)
        assert house.asked == []
        assert 24 < tries < 40, "about once an hour in the end"
        assert not [event for event in house.store.told if event.kind == "request.denied"], "no history of it"
        await house.block()
        await asyncio.sleep(1)
        assert house.asked == [(O.DELETE, 8 * DAY_MS)]

    in_house(story)


PATIENT = """
[policy]
name = "patient"
extends = "standard"
description = "standard, which deletes nothing that was changed lately."

[[rule]]
id = "changed-lately"
operations = ["delete"]
vm_state = ["soft_deleted"]
verdict = "after"
threshold = "2h"
reason = "changed_lately"
because = "It was changed lately."
"""


def test_what_is_refused_until_some_moment_is_asked_again_then_and_not_before(tmp_path: Path) -> None:
    (tmp_path / "patient.toml").write_text(PATIENT)

    async def story(house: House) -> None:
        house.policy.replace(CompiledPolicy(Source.read(str(tmp_path / "patient.toml")).policy, PERFORMS))
        await house.put(VmState.SOFT_DELETED, updated_at_ms=house.store.now_ms())
        await asyncio.sleep(7_200 + 60)
        assert house.asked == [(O.DELETE, 7_200_000)]
        assert next(house.ids) == 2, "once when it was due, and once when it could be admitted"

    in_house(story, UpkeepConfig(reclaim_after_ms=1_000))


def test_what_failed_is_tried_again_later() -> None:
    async def story(house: House) -> None:
        undefine, refusals = house.hypervisor.undefine, [OperationRejected("No."), OperationRejected("Not yet.")]

        async def reluctant(permit: Permit, instance_id: str) -> None:
            if refusals:
                raise refusals.pop()
            await undefine(permit, instance_id)

        house.hypervisor.undefine = reluctant  # type: ignore[method-assign]
        await house.put(VmState.SOFT_DELETED)
        await asyncio.sleep(7 * DAY_S + 60)
        assert house.asked == [(O.DELETE, 7 * DAY_MS), (O.DELETE, 7 * DAY_MS + 10_000), (O.DELETE, 7 * DAY_MS + 30_000)]
        assert house.vm().vm_state is VmState.DELETED

    in_house(story)


def test_what_fell_due_behind_somebodys_request_is_asked_for_when_that_has_ended() -> None:
    """The request fails, so that no change of state tells of it."""

    async def story(house: House) -> None:
        async def fails_late(_permit: Permit, _instance_id: str, _spec: Spec) -> None:
            await asyncio.sleep(5)
            raise OperationRejected("No.")

        house.hypervisor.define = fails_late  # type: ignore[assignment, method-assign]
        await house.put(VmState.SOFT_DELETED, prior_vm_state=VmState.ACTIVE)
        await asyncio.sleep(0.5)
        await house.ask(O.RESTORE)
        await asyncio.sleep(10)
        assert house.asked == [(O.DELETE, 5_500)]
        assert house.vm().vm_state is VmState.DELETED

    in_house(story, UpkeepConfig(reclaim_after_ms=1_000))


# ------------------------------------------------------------------------------------------------------- restarts


def _panics_at_once(house: House) -> Callable[[], None]:
    """Have the guest panic whenever it has come up; the answer ends that."""

    def heed(events: Sequence[Event]) -> None:
        if any(event.kind == "instance.state" and event.data["vm_state"] == "active" for event in events):
            asyncio.get_running_loop().call_soon(house.host.guest_panics, "vm")

    return house.store.listen(heed)


def test_a_boot_loop_comes_to_an_end() -> None:
    async def story(house: House) -> None:
        await house.put(VmState.STOPPED, restart=ALWAYS)
        _panics_at_once(house)
        await house.ask(O.START)
        await asyncio.sleep(DAY_S)
        assert [operation for operation, _ in house.asked] == [O.START] * 5
        moments = [at_ms for _, at_ms in house.asked]
        pauses = [round((after - before) / 1000) for before, after in itertools.pairwise([0, *moments])]
        assert pauses == [1, 2, 4, 8, 16]
        assert house.vm().vm_state is VmState.ERROR
        assert "It was restarted 5 times within 600 s" in (house.vm().error or "")
        assert [event.kind for event in house.store.told].count("instance.gave_up") == 1

    in_house(story)


@pytest.mark.parametrize("down_at_s", [0.5, 1.0, 1.001, 2.5, 3.0, 8.0, 40.0])
def test_a_restart_of_the_server_neither_forgets_nor_repeats_a_restart(down_at_s: float) -> None:
    async def story(house: House) -> None:
        await house.put(VmState.STOPPED, restart=ALWAYS)
        _panics_at_once(house)
        await house.ask(O.START)
        await asyncio.sleep(down_at_s)
        await house.agent.close()
        await asyncio.sleep(100)
        await house.start()
        await asyncio.sleep(DAY_S)
        assert len(house.asked) == 5
        restarts = house.vm().restarts
        assert restarts is not None
        assert restarts.count == 5

    in_house(story)


def test_a_guest_that_powered_itself_off_is_started_again_and_one_that_was_stopped_is_not() -> None:
    async def story(house: House) -> None:
        await house.put(VmState.STOPPED, restart=ALWAYS)
        await house.ask(O.START)
        await asyncio.sleep(1)
        house.host.guest_powers_off("vm")
        await asyncio.sleep(10)
        assert house.vm().vm_state is VmState.ACTIVE
        assert len(house.asked) == 1
        await house.ask(O.STOP)
        await asyncio.sleep(DAY_S)
        assert house.vm().vm_state is VmState.STOPPED
        assert len(house.asked) == 1

    in_house(story)


async def _resized_and_ended(house: House, *blocked: Operation) -> None:
    """An instance that restarts always, with its resize not settled; its guest has ended an hour after that."""
    await house.put(VmState.STOPPED, restart=ALWAYS)
    await house.ask(O.START)
    await asyncio.sleep(1)
    await house.ask(O.RESIZE, vcpus=2)
    await asyncio.sleep(3_600)
    await house.block(*blocked)
    assert house.vm().vm_state is VmState.RESIZED
    house.host.guest_panics("vm")


def test_a_resized_guest_that_ended_is_started_again_long_before_its_resize_would_be_confirmed() -> None:
    async def story(house: House) -> None:
        await _resized_and_ended(house)
        await asyncio.sleep(10)
        assert [operation for operation, _ in house.asked] == [O.START]
        assert (house.vm().vm_state, house.vm().prior_spec) == (VmState.ACTIVE, None)

    in_house(story)


def test_a_resize_is_confirmed_in_time_also_where_its_guest_may_not_be_started_again() -> None:
    async def story(house: House) -> None:
        await _resized_and_ended(house, O.START, O.REBOOT)
        await asyncio.sleep(22 * 3_600)
        assert (house.asked, house.vm().vm_state) == ([], VmState.RESIZED)
        await asyncio.sleep(2 * 3_600)
        assert [operation for operation, _ in house.asked] == [O.CONFIRM_RESIZE]
        assert (house.vm().vm_state, house.vm().prior_spec) == (VmState.STOPPED, None)
        await asyncio.sleep(DAY_S)
        assert len(house.asked) == 1

    in_house(story)


def test_a_restart_waits_for_nothing_that_was_refused_before_it() -> None:
    """The confirmation of its resize is put off longer and longer; that is no reason to put the restart off."""

    async def story(house: House) -> None:
        blocked = (O.CONFIRM_RESIZE,)
        await house.put(VmState.STOPPED, restart=ALWAYS, blocked_operations=blocked)
        await house.ask(O.START)
        await asyncio.sleep(1)
        await house.ask(O.RESIZE, vcpus=2)
        await asyncio.sleep(DAY_S)
        assert house.asked == []
        tries = next(house.ids)
        assert tries > 3, "it was refused again and again"
        house.host.guest_panics("vm")
        await asyncio.sleep(2)
        assert [operation for operation, _ in house.asked] == [O.START]

    in_house(story, UpkeepConfig(resize_confirm_window_ms=1_000))


def test_a_crashed_guest_can_be_powered_off() -> None:
    async def story(house: House) -> None:
        await house.put(VmState.STOPPED, restart=RestartPolicy(on_crash=OnCrash.STOP))
        await house.ask(O.START)
        await asyncio.sleep(1)
        house.host.guest_panics("vm")
        await asyncio.sleep(1)
        assert house.vm().vm_state is VmState.STOPPED
        assert [operation for operation, _ in house.asked] == [O.STOP]

    in_house(story)


# --------------------------------------------------------------------------------------- on a real store, killed


async def test_a_server_that_dies_with_a_restart_due_leaves_it_to_the_next(
    fleet: Embedded, host: SimulatedHost
) -> None:
    answer = await fleet.server.instances.create(
        fleet.caller, NewInstance(name="web", image=IMAGE.name, restart=ALWAYS)
    )
    assert isinstance(answer.disposition, Admitted)
    vm = answer.instance.id
    await fleet.ended(answer.disposition.request)
    host.guest_panics(vm)
    await fleet.until_event(vm, "instance.restart_due")
    await fleet.crash()
    await fleet.start()
    await fleet.until(vm, vm_state=VmState.ACTIVE, task_state="none")
    await fleet.crash()
    await fleet.start()
    page = await fleet.server.store.requests(vm, 100)
    mine = [request for request in page.items if request.requested_by == "interlock"]
    assert [(request.operation, request.status) for request in mine] == [(O.START, Status.SUCCEEDED)]


async def test_the_policy_can_be_changed(fleet: Embedded) -> None:
    vm = await fleet.create("web")
    changed = await fleet.server.instances.relabel(fleet.caller, vm, Labels(restart=ALWAYS))
    assert changed.restart == ALWAYS
    kept = await fleet.server.store.instance(vm)
    assert kept is not None
    assert kept.restart == ALWAYS


# ------------------------------------------------------------------------------------------------- served at most


def test_a_stop_whose_worker_reports_progress_for_ever_fails_after_an_hour_and_the_queue_goes_on() -> None:
    """The guest ignores its power button, and the server waits for it for a day; each look at it is progress."""

    async def story(house: House) -> None:
        await house.put(VmState.STOPPED)
        await house.ask(O.START)
        await asyncio.sleep(10)
        house.host.ignore_power_button("vm")
        stop = await house.ask(O.STOP)
        await asyncio.sleep(10)
        start, pause = await house.ask(O.START), await house.ask(O.PAUSE)
        assert isinstance(stop, Admitted)
        assert isinstance(start, Admitted)
        assert isinstance(pause, Admitted)
        await asyncio.sleep(3_580)
        assert house.store.requests[stop.request.id].status is Status.IN_FLIGHT
        await asyncio.sleep(30)
        ended = [house.store.requests[one.request.id] for one in (stop, start, pause)]
        assert [(one.status, one.reason) for one in ended] == [
            (Status.FAILED, "served_too_long"), (Status.CANCELLED, "already_active"), (Status.SUCCEEDED, None),
        ]  # fmt: skip
        assert house.vm().vm_state is VmState.PAUSED

    in_house(story, driver=DriverConfig(drain_ms=1, guest_shutdown_timeout_ms=DAY_MS))


def test_a_pause_that_cannot_be_interrupted_is_fenced_at_its_limit_and_what_it_did_is_found_out() -> None:
    async def story(house: House) -> None:
        await house.put(VmState.STOPPED)
        await house.ask(O.START)
        await asyncio.sleep(10)
        house.host.faults.script("vm", Method.PAUSE, Slow(20 * 60_000))
        pause = await house.ask(O.PAUSE)
        assert isinstance(pause, Admitted)
        await asyncio.sleep(620)
        ended = house.store.requests[pause.request.id]
        assert (ended.status, ended.reason) == (Status.FAILED, "served_too_long")
        stop = await house.ask(O.STOP, hard=True)
        assert isinstance(stop, Admitted)
        await asyncio.sleep(1_000)
        assert house.store.requests[stop.request.id].status is Status.SUCCEEDED
        assert house.vm().vm_state is VmState.STOPPED

    in_house(story)
