"""Nothing of an agent, or of the upkeep, goes on once it is closed: its store is closed next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from in_process.memory_store import MemoryStore
from in_process.virtual_time import LoopClock, run_in_virtual_time
from interlock.config import DriverConfig, UpkeepConfig
from interlock.core import admission
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Admitted, Change, Event, Image, Instance, Spec, Submission
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.driver.dispatcher import Dispatcher
from interlock.driver.host_registry import HostRegistry
from interlock.driver.operation_context import DriverDependencies
from interlock.driver.operations import PERFORMS
from interlock.driver.scheduled_actions import ScheduledActions
from interlock.hypervisors.simulated import SimulatedHost, SimulatedHypervisor
from interlock.images.image_folder import ImageFolder
from interlock.images.volume_folder import DumpFolder
from interlock.policies.active_policy import PolicyInForce
from interlock.policies.language.bundle import Source
from interlock.ports import Host, RemoteHost, Store
from interlock.service.passwords import PendingPasswords

NOTHING = Image(id="i", name="i", kind="kernel", path="/nowhere", size_bytes=0, sha256="0" * 64)
FAR = Host(name="far", joined_at_ms=0, last_seen_at_ms=0)


class Site:
    """An agent on one simulated host."""

    def __init__(self) -> None:
        self.store = MemoryStore(LoopClock(asyncio.get_running_loop()))
        self.policy = PolicyInForce(CompiledPolicy(Source.read("standard").policy, PERFORMS))
        self.hypervisor = SimulatedHypervisor(SimulatedHost())
        store = cast("Store", self.store)
        self.hosts = HostRegistry("here", self.hypervisor, _no_other, lambda _: True)
        self.upkeep = ScheduledActions(store, self.policy, UpkeepConfig(), lambda: "upkeep", self.hosts.reachable)
        means = DriverDependencies(
            store=store,
            hosts=self.hosts,
            images=ImageFolder(Path("/nowhere")),
            dumps=DumpFolder(Path("/nowhere")),
            passwords=PendingPasswords(),
            config=DriverConfig(drain_ms=1),
        )
        self.agent = Dispatcher(means, self.policy, self.upkeep)

    async def put(self, **more: Any) -> None:
        instance = Instance(
            id="vm",
            name="web",
            project="p",
            host="here",
            vm_state=VmState.SOFT_DELETED,
            state_since_ms=self.store.now_ms(),
            spec=Spec(image=NOTHING),
            **more,
        )
        event = Event(
            kind="instance.state",
            instance_id="vm",
            at_ms=self.store.now_ms(),
            generation=0,
            data={"vm_state": "soft_deleted"},
        )
        await self.store.create(lambda _: Change(instance=instance, events=(event,), answer=None))


def _no_other(name: str) -> RemoteHost:
    raise AssertionError(f"asked for the host {name}")


class Slow:
    """Calls that take long, and whose end takes a moment also for who is cancelled, as with a thread."""

    def __init__(self) -> None:
        self.under_way = 0

    async def __call__(self, *_: Any, **__: Any) -> Any:
        self.under_way += 1
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.shield(asyncio.sleep(1))
            self.under_way -= 1


async def _is_alone() -> bool:
    return asyncio.all_tasks() == {asyncio.current_task()}


async def _looking_after_a_vm(site: Site) -> None:
    """The upkeep looks at a VM."""
    await site.put()


async def _judging_what_is_held(site: Site) -> None:
    """A host has changed."""
    site.hosts.notify(FAR)


@pytest.mark.parametrize(
    ("slow", "begin"),
    [("instance", _looking_after_a_vm), ("unsettled", _judging_what_is_held)],
)
def test_what_is_under_way_has_ended(slow: str, begin: Callable[[Site], Awaitable[None]]) -> None:
    async def main() -> None:
        site, call = Site(), Slow()
        await site.agent.open()
        await site.agent.adopted()
        setattr(site.store, slow, call)
        await begin(site)
        await asyncio.sleep(0.5)
        assert call.under_way == 1
        begun = asyncio.get_running_loop().time()
        await site.agent.close()
        assert asyncio.get_running_loop().time() < begun + 5
        assert call.under_way == 0
        assert await _is_alone()

    run_in_virtual_time(main())


def test_what_is_found_at_the_start_is_not_looked_for_any_more() -> None:
    async def main() -> None:
        site, call = Site(), Slow()
        site.hypervisor.open = call  # type: ignore[method-assign]
        await site.agent.open()
        await asyncio.sleep(0.5)
        assert call.under_way == 1
        await site.agent.close()
        assert call.under_way == 0
        assert await _is_alone()

    run_in_virtual_time(main())


def test_nothing_that_happens_afterwards_is_heard() -> None:
    async def main() -> None:
        site = Site()
        await site.agent.open()
        await site.agent.adopted()
        await site.put()
        await site.agent.close()
        assert site.store._listeners == []
        submission = Submission(
            request_id="ann", operation=Operation.RESTORE, parameters={}, requested_by="ann", role=Role.ADMIN
        )
        answer = await site.store.change(
            "vm", lambda instance, now_ms: admission.admit(instance, submission, site.policy.compiled, now_ms)
        )
        assert isinstance(answer, Admitted)
        site.agent.wake("vm")
        site.hosts.notify(FAR)
        assert await _is_alone()
        await asyncio.sleep(100)
        assert not site.agent.serves("vm")
        assert site.store.requests["ann"].ended_at_ms is None
        assert await _is_alone()

    run_in_virtual_time(main())


def test_an_agent_that_was_never_opened_can_be_closed() -> None:
    async def main() -> None:
        await Site().agent.close()

    run_in_virtual_time(main())
