"""The agent of one host: runs the state drivers, and puts record and host in step when it starts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from interlock.config import DriverConfig
from interlock.core import lifecycle
from interlock.core.errors import Fenced, HypervisorError
from interlock.core.operations import Lane
from interlock.core.records import Change, Event, Instance
from interlock.core.states import EXECUTING_STATES, PowerState, VmState
from interlock.driver.state_driver import ENDED, StateDriver
from interlock.driver.upkeep import Upkeep
from interlock.driver.work import FencePermit
from interlock.policies.in_force import PolicyInForce
from interlock.ports import Hypervisor, HypervisorEvent, ImageFiles, InstanceFilter, Store

_LOG = structlog.get_logger(__name__)
_PAGE = 500
_WAKING = frozenset(
    {
        *("request.admitted", "request.held", "request.interrupting", "request.cancelled"),
        *("instance.fenced", "instance.relabelled"),
    }
)


class Agent:
    """Serves the instances of one host, from the one store, on the one hypervisor."""

    def __init__(
        self,
        host: str,
        store: Store,
        hypervisor: Hypervisor,
        images: ImageFiles,
        policy: PolicyInForce,
        config: DriverConfig,
        upkeep: Upkeep,
    ) -> None:
        self._host = host
        self._store = store
        self._hypervisor = hypervisor
        self._images = images
        self._policy = policy
        self._config = config
        self._upkeep = upkeep
        self._drivers: dict[str, StateDriver] = {}
        self._early: list[HypervisorEvent] = []
        self._serving = False
        self._unlisten: Callable[[], None] | None = None

    async def open(self) -> None:
        """Inspect before serving: what was in flight is adopted, and what happened meanwhile is noted.

        Raises:
            Unavailable: guests cannot be held here.
        """
        await self._hypervisor.open(self._hear)
        adopted = [await self._adopt(instance) for instance in await self._store.unsettled(self._host)]
        told = {event.instance_id for event in self._early}
        await self._reconcile(told)
        self._serving = True
        self._unlisten = self._store.listen(self._heed)
        # What is performed again starts from what it finds; what the guest did before that is no news after it.
        resumed = {instance.id for instance in adopted if instance.served(Lane.STATE) is not None}
        for event in self._early:
            if event.instance_id not in resumed:
                self._driver(event.instance_id).tell(event.kind)
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
        await asyncio.gather(*(driver.close() for driver in tuple(self._drivers.values())))
        self._drivers.clear()
        await self._hypervisor.close()

    # ---------------------------------------------------------------------------------------------------- waking

    def wake(self, instance_id: str) -> None:
        """Have an instance looked at for which there may be something to do that no event tells."""
        if self._serving:
            self._driver(instance_id).wake()

    def _heed(self, events: Sequence[Event]) -> None:
        """Wake the drivers of the instances for which there may be something to do. The store's listener."""
        for event in events:
            if event.kind in _WAKING:
                self._driver(event.instance_id).wake()

    def _hear(self, event: HypervisorEvent) -> None:
        """Hand on what a guest did. The hypervisor's listener."""
        if self._serving:
            self._driver(event.instance_id).tell(event.kind)
        else:
            self._early.append(event)

    def _driver(self, instance_id: str) -> StateDriver:
        driver = self._drivers.get(instance_id)
        if driver is None:
            driver = StateDriver(
                instance_id, self._store, self._hypervisor, self._images, self._policy, self._config, self._forget
            )
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

    async def _reconcile(self, told: set[str]) -> None:
        """Note the ends that nobody told, and remove what is left of deleted instances."""
        known = await self._hypervisor.known()
        for instance_id in known:
            await self._tidy(instance_id)
        cursor: str | None = None
        while True:
            page = await self._store.instances(InstanceFilter(host=self._host), _PAGE, cursor)
            for instance in page.items:
                if instance.id not in told and not instance.outstanding and instance.vm_state in EXECUTING_STATES:
                    await self._look(instance)
            if page.next_cursor is None:
                return
            cursor = page.next_cursor

    async def _look(self, instance: Instance) -> None:
        seen = await self._hypervisor.inspect(instance.id)
        ended = ENDED.get(seen.power_state)
        if seen.responsive and ended is not None:
            self._early.append(HypervisorEvent(instance_id=instance.id, kind=ended, during_watch=False))

    async def _tidy(self, instance_id: str) -> None:
        """Remove what is left of a deleted instance, and end the empty machine of one that powered itself off.

        What the store has never heard of is left alone: it may be younger than a database that was put back.
        """
        instance = await self._store.instance(instance_id)
        if instance is None:
            _LOG.warning("the host holds an instance that the store does not know", instance=instance_id)
            return
        permit = FencePermit(self._store, instance_id, instance.fence)
        try:
            if instance.vm_state is VmState.DELETED:
                await self._hypervisor.undefine(permit, instance_id)
            elif instance.vm_state is VmState.STOPPED and not instance.outstanding:
                seen = await self._hypervisor.inspect(instance_id)
                if seen.power_state is PowerState.SHUTDOWN:
                    await self._hypervisor.power_off(permit, instance_id)
        except (HypervisorError, Fenced) as error:
            _LOG.warning("cannot tidy up", instance=instance_id, why=error.message)
