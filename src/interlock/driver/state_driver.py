"""The state driver: the one task that owns an instance while it has outstanding work.

On each wake-up it reads the store, and handles guest events first, then deadlines, then the next request. It ends when
nothing is outstanding, so that an idle fleet costs nothing.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import Final

import structlog

from interlock.core import lifecycle
from interlock.core.errors import Fenced, HypervisorError, NameTaken, NotFound, StoreError
from interlock.core.holds import refuse_name
from interlock.core.operations import CATALOGUE, Lane
from interlock.core.records import Change, GuestEvent, Instance, Request
from interlock.core.states import PowerState
from interlock.driver.operation_context import DriverDependencies, FencePermit, OperationContext
from interlock.driver.reconciliation import reconcile, release_detached
from interlock.driver.worker import Worker
from interlock.policies.active_policy import PolicyInForce
from interlock.ports import counts_around

_LOG = structlog.get_logger(__name__)
_Step = tuple[Instance, Request | None, bool]

ENDED: Final = {
    PowerState.NONE: GuestEvent.VANISHED,
    PowerState.SHUTDOWN: GuestEvent.STOPPED,
    PowerState.CRASHED: GuestEvent.CRASHED,
}
"""The event that a guest which should run has had, by its power state."""


_RECONCILE_BACKOFF: Final = 4
_RECONCILE_AFTER: Final = frozenset({GuestEvent.CHANGED, GuestEvent.RESPONDING, GuestEvent.RESET})


class StateDriver:
    """The state driver of one instance."""

    def __init__(
        self,
        instance_id: str,
        dependencies: DriverDependencies,
        policy: PolicyInForce,
        gone: Callable[[str], None],
    ) -> None:
        self._id = instance_id
        self._dependencies = dependencies
        self._store = dependencies.store
        self._hosts = dependencies.hosts
        self._policy = policy
        self._config = dependencies.config
        self._gone = gone
        self._wakeup = asyncio.Event()
        self._workers: dict[Lane, Worker] = {}
        self._leaving: set[Worker] = set()
        """Superseded workers that have not ended yet."""
        self._guest_events: deque[tuple[str | None, GuestEvent]] = deque()
        """Guest events and their host; None for the present one."""
        self._look_again = False
        """Whether to inspect the guest, because an event may have come after the operation that expected it."""
        self._reconcile = False
        """Whether to compare the guest with its record once no worker is active."""
        self._reconcile_at = -math.inf
        """Not before this time, on the event loop's clock."""
        self._task: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------------------------------------ from outside

    def wake(self) -> None:
        """Wake the task, or start it."""
        self._wakeup.set()
        for worker in self._workers.values():
            worker.work.wakeup.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name=f"driver {self._id}")

    @property
    def has_guest_events(self) -> bool:
        """Whether guest events are pending."""
        return bool(self._guest_events)

    def on_guest_event(self, host: str, event: GuestEvent) -> None:
        """Queue a guest event from that host, to be handled before anything else."""
        worker = self._workers.get(Lane.STATE)
        if worker is None or not worker.expects(event):
            self._guest_events.append((host, event))
        self.wake()

    def resume(self, instance: Instance) -> None:
        """Resume requests in flight of an earlier process; `instance` has just been adopted."""
        for lane in (Lane.STATE, Lane.COMPONENT):
            request = instance.served(lane)
            if request is not None:
                self._serve(instance, request)
        self.wake()

    def begin_again(self, instance: Instance) -> None:
        """Restart requests in flight with new workers; `instance` has just been adopted."""
        self._supersede_or_interrupt(instance)
        self.resume(instance)

    async def close(self) -> None:
        """Give requests in flight a short time to finish, then leave them to the next process."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        for worker in (*self._workers.values(), *self._leaving):
            await worker.wait(self._config.drain_ms / 1000)
            await worker.abandon()

    # ---------------------------------------------------------------------------------------------------- its task

    async def _run(self) -> None:
        while True:
            self._wakeup.clear()
            try:
                instance = await self._step()
            except NotFound:
                break
            except (StoreError, OSError) as error:
                # A system error, such as no space left, may be temporary.
                why = error.message if isinstance(error, StoreError) else str(error)
                _LOG.error("state driver failed to access the store", instance=self._id, why=why)
                await asyncio.sleep(self._config.inspect_retry_ms / 1000)
                continue
            except Exception:  # noqa: BLE001 - the outermost frame of a driver
                # A bug must not leave the instance without its driver.
                _LOG.exception("state driver failed", instance=self._id)
                await asyncio.sleep(self._config.inspect_retry_ms / 1000)
                continue
            deadline_ms = lifecycle.next_deadline_ms(instance)
            if deadline_ms is None and self._is_idle():
                break
            await self._rest(deadline_ms)
        self._task = None
        self._gone(self._id)

    def _is_idle(self) -> bool:
        """Whether there are no workers or events."""
        busy = self._workers or self._leaving or self._guest_events or self._reconcile or self._wakeup.is_set()
        return not busy

    async def _rest(self, deadline_ms: int | None) -> None:
        """Wait for a wake-up or a deadline."""
        loop = asyncio.get_running_loop()
        waits_s = [] if deadline_ms is None else [max(0, deadline_ms - self._store.now_ms()) / 1000]
        if self._reconcile and not self._workers and not self._leaving:
            waits_s.append(max(0.0, self._reconcile_at - loop.time()))
        timer = loop.call_later(min(waits_s), self._wakeup.set) if waits_s else None
        try:
            await self._wakeup.wait()
        finally:
            if timer is not None:
                timer.cancel()

    async def _step(self) -> Instance:
        """Do everything that can be done now; return the instance afterwards."""
        self._reap()
        if self._look_again and Lane.STATE not in self._workers:
            self._look_again = False
            await self._look()
        while self._guest_events and Lane.STATE not in self._workers:
            await self._observe(*self._guest_events[0])
            self._guest_events.popleft()
        if self._reconcile and not self._workers and not self._leaving:
            await self._compare()
        while True:
            try:
                instance, taken, more = await self._store.change(self._id, self._next)
            except NameTaken as error:
                if not await self._store.change(self._id, self._refusing_name(error.message)):
                    raise
                continue
            self._supersede_or_interrupt(instance)
            if taken is not None:
                self._serve(instance, taken)
                more = len(instance.outstanding) > 1
            if not more:
                return instance

    async def _compare(self) -> None:
        """Reconcile the guest with its record, and retry later if it did not respond."""
        loop = asyncio.get_running_loop()
        if loop.time() >= self._reconcile_at:
            self._reconcile = not await reconcile(self._dependencies, self._policy, self._id)
            wait_ms = self._config.inspect_retry_ms * _RECONCILE_BACKOFF if self._reconcile else 0
            self._reconcile_at = loop.time() + wait_ms / 1000

    def _refusing_name(self, because: str) -> Callable[[Instance, int], Change[bool]]:
        """Return a decision that cancels the held request that asked for a name which is taken now."""

        def decide(instance: Instance, now_ms: int) -> Change[bool]:
            reachable = self._dependencies.hosts.reachable(instance.host)
            policy = self._policy.compiled
            counts = counts_around(instance, policy, self._store)
            return refuse_name(instance, policy, now_ms, because, host_reachable=reachable, counts=counts)

        return decide

    def _next(self, instance: Instance, now_ms: int) -> Change[_Step]:
        """Apply a deadline, else take the next request. After a deadline, call this again."""
        # Queued requests may be evaluated by an earlier policy; held requests never are.
        policy = self._policy.for_instance(instance)
        reachable = self._dependencies.hosts.reachable(instance.host)
        counts = counts_around(instance, policy, self._store)
        expired = lifecycle.expire(instance, policy, now_ms, host_reachable=reachable, counts=counts)
        if expired.instance is not instance:
            return _with_instance(expired, None, more=True)
        lane = Lane.COMPONENT if instance.served(Lane.STATE) else None
        change = lifecycle.take(instance, lane, now_ms, host_reachable=reachable)
        return _with_instance(change, change.answer)

    def _serve(self, instance: Instance, request: Request) -> None:
        before = self._workers.get(request.lane)
        if before is not None:
            self._leaving.add(before)
        work = OperationContext(self._dependencies, instance, request)
        self._workers[request.lane] = Worker(work, self._policy, self.wake)

    def _reap(self) -> None:
        """Remove workers that are done; queue the events that they expected if they did not succeed."""
        left = {worker for worker in self._leaving if not worker.done}
        self._reconcile = self._reconcile or left != self._leaving
        self._leaving = left
        for lane, worker in tuple(self._workers.items()):
            if worker.done:
                del self._workers[lane]
                self._guest_events.extendleft((None, event) for event in reversed(worker.left_over))
                self._look_again = self._look_again or worker.used_up or worker.left_half_way
                # A failed operation may still have taken effect.
                self._reconcile = self._reconcile or not worker.succeeded

    async def _look(self) -> None:
        """Inspect whether a guest that should run does.

        A reboot expects its guest to power off, and cannot know whether that was before or after the reset.
        """
        instance = await self._store.instance(self._id)
        if instance is None or not instance.executing:
            return
        seen = await self._hosts.of(instance.host).inspect(self._id)
        ended = ENDED.get(seen.power_state)
        if seen.responsive and ended is not None and all(ended is not event for _, event in self._guest_events):
            self._guest_events.append((instance.host, ended))

    def _supersede_or_interrupt(self, instance: Instance) -> None:
        """Stop workers that were fenced, and interrupt those with an interrupt request."""
        for lane, worker in self._workers.items():
            request = instance.served(lane)
            if request is None or request.id != worker.request_id or request.fence != worker.fence:
                if not worker.done:
                    worker.supersede()
            elif request.interrupt_at_ms is not None and CATALOGUE[request.operation].interruptible:
                worker.interrupt()

    async def _observe(self, host: str | None, event: GuestEvent) -> None:
        """Record a guest event, and end the QEMU process of a guest that has powered itself off.

        Events from a host that the instance has left are ignored.
        """

        def decide(instance: Instance, now_ms: int) -> Change[Instance | None]:
            if host is not None and self._hosts.of(host) is not self._hosts.of(instance.host):
                return Change(instance=instance, answer=None)
            reachable = self._hosts.reachable(instance.host)
            policy = self._policy.for_waiting(instance)
            change = lifecycle.observe(instance, event, policy, now_ms, host_reachable=reachable)
            return Change(instance=change.instance, requests=change.requests, events=change.events, answer=instance)

        observed = await self._store.change(self._id, decide)
        if event in _RECONCILE_AFTER:
            self._reconcile = True
        if event is GuestEvent.STOPPED and observed is not None:
            permit = FencePermit(self._store, self._id, observed.fence)
            try:
                await self._hosts.of(observed.host).power_off(permit, self._id)
            except (HypervisorError, Fenced, OSError) as error:
                _LOG.warning("guest clean-up failed", instance=self._id, why=str(error))
                return
        if observed is not None and event in {GuestEvent.STOPPED, GuestEvent.VANISHED, GuestEvent.LEASE_ENDED}:
            await release_detached(self._dependencies, observed)


def _with_instance(change: Change[object], taken: Request | None, *, more: bool = False) -> Change[_Step]:
    return Change(
        instance=change.instance,
        requests=change.requests,
        events=change.events,
        answer=(change.instance, taken, more),
    )
