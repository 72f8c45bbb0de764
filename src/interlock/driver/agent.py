"""The state drivers of all instances, put together: woken by what happens, and brought into step with their hosts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

import structlog

from interlock.core import lifecycle
from interlock.core.errors import Fenced, HypervisorError, StoreError
from interlock.core.operations import TRAVELS, Lane
from interlock.core.records import ENDS, Change, Event, Instance
from interlock.core.states import PowerState, VmState
from interlock.driver.state_driver import ENDED, StateDriver
from interlock.driver.upkeep import Upkeep
from interlock.driver.work import FencePermit, Means
from interlock.policies.in_force import PolicyInForce
from interlock.ports import Host, HypervisorEvent, InstanceFilter, every_instance
from interlock.ports.travelling import Travelling

_LOG = structlog.get_logger(__name__)
_WAKING = frozenset(
    {
        *("request.admitted", "request.held", "request.interrupting", "request.cancelled"),
        *("instance.fenced", "instance.relabelled"),
    }
)

_ENDED = frozenset(f"request.{end.value}" for end in ENDS)
_RESTING = frozenset({VmState.STOPPED, VmState.RESIZED})
"""Where the empty machine of a guest that powered itself off may be left."""
_FENCING = frozenset({"instance.fenced", "instance.adopted"})
"""Events after which an older worker may not act any more."""


class Agent:
    """Serves the instances of one store, on its hosts."""

    def __init__(
        self,
        means: Means,
        policy: PolicyInForce,
        upkeep: Upkeep,
    ) -> None:
        self._means = means
        self._hosts = means.hosts
        self._store = means.store
        self._policy = policy
        self._upkeep = upkeep
        self._drivers: dict[str, StateDriver] = {}
        self._early: list[tuple[str, HypervisorEvent]] = []
        self._travelling: set[tuple[str, str]] = set()
        """Hosts, and instances that were on their way when those were tidied up; they are again when that has ended."""
        self._tidying: set[asyncio.Task[None]] = set()
        self._serving = False
        self._unlisten: Callable[[], None] | None = None

    async def open(self) -> None:
        """Inspect before serving: what was in flight is adopted, and what happened meanwhile is noted.

        Raises:
            Unavailable: guests cannot be held here.
        """
        own = self._hosts.own
        await self._hosts.of(own).open(partial(self._hear, own))
        for other in await self._store.hosts():
            await self._welcome(other.name)
        adopted = [await self._adopt(instance) for instance in await self._store.unsettled()]
        told = {event.instance_id for _, event in self._early}
        await self._reconcile(own, told)
        self._serving = True
        self._unlisten = self._store.listen(self._heed)
        self._hosts.listen(self._heed_host)
        # What is performed again starts from what it finds; what the guest did before that is no news after it.
        resumed = {instance.id for instance in adopted if instance.served(Lane.STATE) is not None}
        for host, event in self._early:
            if event.instance_id not in resumed:
                self._driver(event.instance_id).tell(host, event.kind)
        self._early.clear()
        for instance in adopted:
            self._driver(instance.id).resume(instance)
        await self._upkeep.open()

    async def close(self) -> None:
        """Stop serving. What is in flight and does not finish soon is adopted by the next agent."""
        await self._upkeep.close()
        self._serving = False
        if self._unlisten is not None:
            self._unlisten()
        for task in self._tidying:
            task.cancel()
        await asyncio.gather(*(driver.close() for driver in tuple(self._drivers.values())))
        self._drivers.clear()
        await self._hosts.close()

    async def _welcome(self, host: str) -> None:
        """Hear what the guests of another host do, from now on."""
        await self._hosts.remote(host).open(partial(self._hear, host))

    async def join(self, host: str) -> None:
        """Have to do with another host, whose agent speaks to this server for the first time."""
        if host not in self._hosts:
            await self._welcome(host)

    async def catch_up(self, host: str) -> None:
        """Bring the records and a host into step whose agent has come back; it has told what it kept.

        Raises:
            NotResponding: it has gone again.
        """
        await self._reconcile(host, set())
        for instance in await self._store.unsettled(host):
            self.wake(instance.id)

    # ---------------------------------------------------------------------------------------------------- waking

    def wake(self, instance_id: str) -> None:
        """Have an instance looked at for which there may be something to do that no event tells."""
        if self._serving:
            self._driver(instance_id).wake()

    def _heed(self, events: Sequence[Event]) -> None:
        """Wake the drivers of the instances for which there may be something to do. The store's listener."""
        for event in events:
            if event.kind in _FENCING:
                self._hosts.superseded(event.instance_id, int(event.data["fence"]))
            if event.kind in _WAKING:
                self._driver(event.instance_id).wake()
            if event.kind in _ENDED:
                self._tidy_again(event.instance_id)

    def _heed_host(self, host: Host) -> None:
        """Have what is held for the instances of a host judged again, of which something has changed."""
        task = asyncio.create_task(self._judge_held(host.name), name=f"judge what is held on {host.name}")
        self._tidying.add(task)
        task.add_done_callback(self._tidying.discard)

    async def _judge_held(self, host: str) -> None:
        try:
            for instance in await self._store.unsettled(host):
                if instance.held:
                    await self._store.change(instance.id, lifecycle.stir)
                    self.wake(instance.id)
        except StoreError as error:
            _LOG.error("what is held was not judged again", host=host, why=error.message)

    def _tidy_again(self, instance_id: str) -> None:
        for place in [place for place in self._travelling if place[1] == instance_id]:
            self._travelling.discard(place)
            task = asyncio.create_task(self._tidy(*place), name=f"tidy {place[0]}")
            self._tidying.add(task)
            task.add_done_callback(self._tidying.discard)

    def _hear(self, host: str, event: HypervisorEvent) -> None:
        """Hand on what a guest did. The hypervisors' listener."""
        if self._serving:
            self._driver(event.instance_id).tell(host, event.kind)
        else:
            self._early.append((host, event))

    def _driver(self, instance_id: str) -> StateDriver:
        driver = self._drivers.get(instance_id)
        if driver is None:
            driver = StateDriver(instance_id, self._means, self._policy, self._forget)
            self._drivers[instance_id] = driver
        return driver

    def _forget(self, instance_id: str) -> None:
        self._drivers.pop(instance_id, None)

    # ------------------------------------------------------------------------------------------------ at the start

    async def _adopt(self, instance: Instance) -> Instance:
        def decide(current: Instance, now_ms: int) -> Change[Instance]:
            change = lifecycle.adopt(current, now_ms)
            return Change(
                instance=change.instance, requests=change.requests, events=change.events, answer=change.instance
            )

        return await self._store.change(instance.id, decide)

    async def _reconcile(self, host: str, told: set[str]) -> None:
        """Note the ends that nobody told, and remove what is left of instances that are deleted or elsewhere."""
        known = await self._hosts.of(host).known()
        for instance_id in known:
            await self._tidy(host, instance_id)
        async for instance in every_instance(self._store, InstanceFilter(host=host)):
            if instance.id not in told and not instance.outstanding and instance.executing:
                await self._look(instance)

    async def _look(self, instance: Instance) -> None:
        seen = await self._hosts.of(instance.host).inspect(instance.id)
        ended = ENDED.get(seen.power_state)
        if seen.responsive and ended is not None:
            self._hear(instance.host, HypervisorEvent(instance_id=instance.id, kind=ended, during_watch=False))

    async def _tidy(self, host: str, instance_id: str) -> None:
        """Remove what is left of an instance that is deleted or went to another host.

        The empty machine of one that powered itself off is ended. What is on its way is left to who sends it. A guest
        that was sent, and whose migration was broken off while its host could not be told, goes on here.

        What the store has never heard of is left alone: it may be younger than a database that was put back.
        """
        self._travelling.add((host, instance_id))  # before looking: its journey may end meanwhile
        instance = await self._store.instance(instance_id)
        serving = None if instance is None else instance.served(Lane.STATE)
        travels = serving is not None and serving.operation in TRAVELS
        if not travels:
            self._travelling.discard((host, instance_id))
        if instance is None:
            _LOG.warning("the host holds an instance that the store does not know", instance=instance_id)
            return
        permit = FencePermit(self._store, instance_id, instance.fence)
        hypervisor = self._hosts.of(host)
        elsewhere = self._hosts.of(instance.host) is not hypervisor
        try:
            if instance.vm_state is VmState.DELETED or (elsewhere and not travels):
                await hypervisor.undefine(permit, instance_id)
            elif instance.vm_state in _RESTING and not instance.executing and not instance.outstanding:
                seen = await hypervisor.inspect(instance_id)
                if seen.power_state is PowerState.SHUTDOWN:
                    await hypervisor.power_off(permit, instance_id)
            elif instance.executing and serving is None and isinstance(hypervisor, Travelling):
                await hypervisor.keep_guest(permit, instance_id)
        except (HypervisorError, Fenced) as error:
            _LOG.warning("cannot tidy up", instance=instance_id, why=error.message)
