"""The state driver: the one task that owns an instance while there is something to do for it.

It is woken, looks at what the store holds, and does what follows: what the guest did comes first, then what is due,
then the next request. It ends when nothing is outstanding, so that a fleet at rest costs nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

import structlog

from interlock.core import lifecycle
from interlock.core.errors import Fenced, HypervisorError, NotFound, StoreError
from interlock.core.operations import CATALOGUE, Lane
from interlock.core.records import Change, GuestEvent, Instance, Request
from interlock.core.states import PowerState
from interlock.driver.work import FencePermit, Means, Work
from interlock.driver.worker import Worker
from interlock.policies.in_force import PolicyInForce

_LOG = structlog.get_logger(__name__)
_Step = tuple[Instance, Request | None, bool]

ENDED: Final = {
    PowerState.NONE: GuestEvent.VANISHED,
    PowerState.SHUTDOWN: GuestEvent.STOPPED,
    PowerState.CRASHED: GuestEvent.CRASHED,
}
"""What has happened to a guest that should run, by what is found of it."""


class StateDriver:
    """Serves one instance."""

    def __init__(
        self,
        instance_id: str,
        means: Means,
        policy: PolicyInForce,
        gone: Callable[[str], None],
    ) -> None:
        self._id = instance_id
        self._means = means
        self._store = means.store
        self._hosts = means.hosts
        self._policy = policy
        self._config = means.config
        self._gone = gone
        self._bell = asyncio.Event()
        self._workers: dict[Lane, Worker] = {}
        self._leaving: set[Worker] = set()
        """Workers that lost their request, and have not ended yet."""
        self._guest_events: deque[tuple[str | None, GuestEvent]] = deque()
        """What the guest did, and on which host; None for the one where it is."""
        self._look_again = False
        """Whether a guest did something while it was being worked on that may be more than part of that work."""
        self._task: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------------------------------------ from outside

    def wake(self) -> None:
        """Have it look at its instance."""
        self._bell.set()
        for worker in self._workers.values():
            worker.work.news.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"driver {self._id}")

    def tell(self, host: str, event: GuestEvent) -> None:
        """Have it deal with what the guest did on that host, before anything else."""
        worker = self._workers.get(Lane.STATE)
        if worker is None or not worker.absorbs(event):
            self._guest_events.append((host, event))
        self.wake()

    def resume(self, instance: Instance) -> None:
        """Take up what an earlier process was serving; `instance` has just been adopted."""
        for lane in (Lane.STATE, Lane.COMPONENT):
            request = instance.served(lane)
            if request is not None:
                self._serve(instance, request)
        self.wake()

    async def close(self) -> None:
        """Let what is in flight finish for a moment, then leave it to the next process."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        for worker in (*self._workers.values(), *self._leaving):
            await worker.wait(self._config.drain_ms / 1000)
            await worker.abandon()

    # ---------------------------------------------------------------------------------------------------- its task

    async def _run(self) -> None:
        while True:
            self._bell.clear()
            try:
                instance = await self._step()
            except NotFound:
                break
            except StoreError as error:
                _LOG.error("a state driver cannot reach its store", instance=self._id, why=error.message)
                await asyncio.sleep(self._config.inspect_retry_ms / 1000)
                continue
            except Exception:  # noqa: BLE001 - the outermost frame of a driver
                # A bug must not leave the instance without its driver.
                _LOG.exception("a state driver broke", instance=self._id)
                await asyncio.sleep(self._config.inspect_retry_ms / 1000)
                continue
            if self._is_idle(instance):
                break
            await self._rest(instance)
        self._task = None
        self._gone(self._id)

    def _is_idle(self, instance: Instance) -> bool:
        """Whether nothing is being done, and nothing will be due by itself."""
        busy = self._workers or self._leaving or self._guest_events or self._bell.is_set()
        return not busy and lifecycle.next_deadline_ms(instance) is None

    async def _rest(self, instance: Instance) -> None:
        """Wait until something happens, or something is due."""
        deadline_ms = lifecycle.next_deadline_ms(instance)
        if deadline_ms is None:
            await self._bell.wait()
            return
        try:
            async with asyncio.timeout(max(0, deadline_ms - self._store.now_ms()) / 1000):
                await self._bell.wait()
        except TimeoutError:
            self._bell.set()

    async def _step(self) -> Instance:
        """Do everything that can be done now; the instance as it then is."""
        self._reap()
        if self._look_again and Lane.STATE not in self._workers:
            self._look_again = False
            await self._look()
        while self._guest_events and Lane.STATE not in self._workers:
            await self._observe(*self._guest_events[0])
            self._guest_events.popleft()
        while True:
            instance, taken, more = await self._store.change(self._id, self._next)
            self._heed(instance)
            if taken is not None:
                self._serve(instance, taken)
            elif not more:
                return instance

    def _next(self, instance: Instance, now_ms: int) -> Change[_Step]:
        """One decision: what is due, else take what can be served. After what was due there may be more to do."""
        deadlines = (request.interrupt_deadline_ms for request in instance.outstanding)
        overdue = any(deadline is not None and deadline <= now_ms for deadline in deadlines)
        # What waits may have the promise of an earlier policy; what is held has none yet.
        policy = self._policy.for_waiting(instance) if overdue else self._policy.compiled
        reachable = self._means.hosts.reachable(instance.host)
        expired = lifecycle.expire(instance, policy, now_ms, host_reachable=reachable)
        if expired.instance is not instance:
            return _with_instance(expired, None, more=True)
        lane = Lane.COMPONENT if instance.served(Lane.STATE) else None
        change = lifecycle.take(instance, lane, now_ms)
        return _with_instance(change, change.answer)

    def _serve(self, instance: Instance, request: Request) -> None:
        before = self._workers.get(request.lane)
        if before is not None:
            self._leaving.add(before)
        work = Work(self._means, instance, request)
        self._workers[request.lane] = Worker(work, self._policy, self.wake)

    def _reap(self) -> None:
        """Forget the workers that are done; what they absorbed and did not use up is news after all."""
        self._leaving = {worker for worker in self._leaving if not worker.done}
        for lane, worker in tuple(self._workers.items()):
            if worker.done:
                del self._workers[lane]
                self._guest_events.extendleft((None, event) for event in reversed(worker.left_over))
                self._look_again = self._look_again or worker.used_up or worker.left_half_way

    async def _look(self) -> None:
        """See whether a guest that should run does.

        A reboot absorbs that its guest powers off, and cannot tell whether that was before the reset or after it.
        """
        instance = await self._store.instance(self._id)
        if instance is None or not instance.executing:
            return
        seen = await self._hosts.of(instance.host).inspect(self._id)
        ended = ENDED.get(seen.power_state)
        if seen.responsive and ended is not None and all(ended is not event for _, event in self._guest_events):
            self._guest_events.append((instance.host, ended))

    def _heed(self, instance: Instance) -> None:
        """Stop the workers that lost their request, and ask those to stop that are wanted to."""
        for lane, worker in self._workers.items():
            request = instance.served(lane)
            if request is None or request.id != worker.request_id or request.fence != worker.fence:
                if not worker.done:
                    worker.supersede()
            elif request.interrupt_at_ms is not None and CATALOGUE[request.operation].interruptible:
                worker.interrupt()

    async def _observe(self, host: str | None, event: GuestEvent) -> None:
        """Keep what the guest did, and tidy up after one that has powered itself off.

        What is told of a host that it has left is no news of it.
        """

        def decide(instance: Instance, now_ms: int) -> Change[Instance | None]:
            if host is not None and self._hosts.of(host) is not self._hosts.of(instance.host):
                return Change(instance=instance, answer=None)
            change = lifecycle.observe(instance, event, self._policy.for_waiting(instance), now_ms)
            return Change(instance=change.instance, requests=change.requests, events=change.events, answer=instance)

        observed = await self._store.change(self._id, decide)
        if event is GuestEvent.STOPPED and observed is not None:
            permit = FencePermit(self._store, self._id, observed.fence)
            try:
                await self._hosts.of(observed.host).power_off(permit, self._id)
            except (HypervisorError, Fenced) as error:
                _LOG.warning("cannot tidy up after a guest", instance=self._id, why=error.message)


def _with_instance(change: Change[object], taken: Request | None, *, more: bool = False) -> Change[_Step]:
    return Change(
        instance=change.instance,
        requests=change.requests,
        events=change.events,
        answer=(change.instance, taken, more),
    )
