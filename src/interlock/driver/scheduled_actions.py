"""Scheduler of automatic actions: sleeps until the next one is due, and submits it to the gate.

`core.scheduled_actions` decides what is due, and again inside the store's transaction that admits it, so that nothing
is submitted twice. The store is scanned once at the start; afterwards its events suffice.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import structlog

from interlock.config import UpkeepConfig
from interlock.core import admission, restarts, scheduled_actions
from interlock.core.errors import NotFound, StoreClosed, StoreError
from interlock.core.records import Admitted, Change, Denied, Disposition, Event, Instance, Submission
from interlock.core.roles import Role
from interlock.core.scheduled_actions import Due, ScheduledAction, UpkeepTimes
from interlock.policies.active_policy import PolicyInForce
from interlock.ports import InstanceFilter, Store, every_instance

_LOG = structlog.get_logger(__name__)
_RETRY_MS_MAX: Final = 3_600_000
_SLEEP_S_MAX: Final = 3_600
"""The store's clock may jump forward during a sleep, without an event."""
_ENDS: Final = frozenset({"request.succeeded", "request.failed", "request.cancelled", "request.superseded"})
_NEWS: Final = frozenset({"instance.relabelled", "instance.restart_due"})
_FORGIVING: Final = frozenset({"instance.relabelled", "instance.state", "instance.host_back", "instance.evacuated"})
"""After these, a denied action may be admitted."""


class _Tried(msgspec.Struct, frozen=True):
    """An action that was submitted, and is still due."""

    due: Due
    times: int
    again_at_ms: int


class ScheduledActions:
    """The scheduled actions of all instances."""

    def __init__(
        self,
        store: Store,
        policy: PolicyInForce,
        config: UpkeepConfig,
        new_id: Callable[[], str],
        reachable: Callable[[str], bool],
    ) -> None:
        """`reachable` returns False for the name of a fenced host."""
        self._store = store
        self._policy = policy
        self._retry_ms = config.retry_ms
        self._times = config.times
        self._new_id = new_id
        self._reachable = reachable
        self._changed: dict[str, None] = {}
        """The instances to check, in the order of their events."""
        self._moments: dict[str, int] = {}
        """The time of each instance's next action."""
        self._order: list[tuple[int, str]] = []
        """A heap of those times; entries that differ from `_moments` are obsolete."""
        self._tried: dict[str, _Tried] = {}
        self._busy: set[str] = set()
        """Instances that may have an action once their outstanding requests have ended."""
        self._wakeup = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._unlisten: Callable[[], None] | None = None

    async def open(self) -> None:
        """Scan the store, and start."""
        self._unlisten = self._store.listen(self._on_events)
        async for instance in every_instance(self._store, InstanceFilter(upkeep=True)):
            self._changed[instance.id] = None
        self._task = asyncio.create_task(self._run(), name="upkeep")

    async def close(self) -> None:
        if self._unlisten is not None:
            self._unlisten()
            self._unlisten = None
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    def _on_events(self, events: Sequence[Event]) -> None:
        """Note the instances whose actions may have changed. The store's listener."""
        for event in events:
            if self._concerns(event):
                if event.kind in _FORGIVING:
                    self._tried.pop(event.instance_id, None)
                self._changed[event.instance_id] = None
                self._wakeup.set()

    def _concerns(self, event: Event) -> bool:
        if event.kind == "instance.state" and event.data["vm_state"] in scheduled_actions.STATES:
            return True
        instance_id = event.instance_id
        if instance_id in self._moments or instance_id in self._tried or instance_id in self._busy:
            return event.kind in _NEWS | _ENDS | _FORGIVING or event.kind == "request.redundant"
        return event.kind in _NEWS

    # ---------------------------------------------------------------------------------------------------- its task

    async def _run(self) -> None:
        while True:
            self._wakeup.clear()
            try:
                await self._look()
                await self._ask()
            except StoreClosed:
                return
            except StoreError as error:
                _LOG.error("scheduled actions failed to access the store", why=error.message)
                await asyncio.sleep(self._retry_ms / 1000)
                continue
            except Exception:  # noqa: BLE001 - the outermost frame of the task
                # A bug with one instance must not stop the actions of the others.
                _LOG.exception("scheduled actions failed")
                await asyncio.sleep(self._retry_ms / 1000)
                continue
            await self._rest()

    async def _look(self) -> None:
        """Plan the actions of changed instances."""
        while self._changed:
            instance_id = next(iter(self._changed))
            del self._changed[instance_id]
            instance = await self._store.instance(instance_id)
            if instance is None:
                self._moments.pop(instance_id, None)
            else:
                self._plan(instance)

    def _plan(self, instance: Instance) -> None:
        self._busy.discard(instance.id)
        due = scheduled_actions.due(instance, self._trusted_times())
        tried = self._tried.get(instance.id)
        if due is None:
            self._moments.pop(instance.id, None)
            if instance.outstanding and instance.vm_state in scheduled_actions.STATES:
                self._busy.add(instance.id)
            else:
                self._tried.pop(instance.id, None)
            return
        at_ms = due.at_ms
        if tried is not None and tried.due == due:
            at_ms = max(at_ms, tried.again_at_ms)
        self._moments[instance.id] = at_ms
        heapq.heappush(self._order, (at_ms, instance.id))

    async def _rest(self) -> None:
        """Sleep until an event, or until an action is due."""
        while self._order and self._moments.get(self._order[0][1]) != self._order[0][0]:
            heapq.heappop(self._order)
        seconds = None
        if self._order:
            seconds = min(_SLEEP_S_MAX, max(0, self._order[0][0] - self._store.now_ms()) / 1000)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wakeup.wait()

    async def _ask(self) -> None:
        """Submit everything that is due now."""
        while self._order and self._order[0][0] <= self._store.now_ms():
            at_ms, instance_id = heapq.heappop(self._order)
            if self._moments.get(instance_id) == at_ms:
                del self._moments[instance_id]
                await self._ask_for(instance_id)

    async def _ask_for(self, instance_id: str) -> None:
        try:
            submitted = await self._submit(instance_id)
        except NotFound:
            return
        except StoreError:
            self._changed[instance_id] = None
            raise
        if submitted is None:
            # It has changed since it was planned.
            self._changed[instance_id] = None
            self._wakeup.set()
            return
        due, answer, now_ms = submitted
        self._put_off(instance_id, due, answer, now_ms)
        if isinstance(answer, Admitted):
            operation = answer.request.operation.value
            _LOG.info(
                "scheduled action submitted", instance=instance_id, operation=operation, request=answer.request.id
            )
        else:
            if isinstance(answer, Denied):
                _LOG.warning("scheduled action denied", instance=instance_id, rule=answer.rule, why=answer.because)
            self._changed[instance_id] = None
            self._wakeup.set()

    def _trusted_times(self) -> UpkeepTimes:
        return msgspec.structs.replace(self._times, not_before_ms=self._store.time.cautious_until_ms)

    def _put_off(self, instance_id: str, due: Due, answer: Disposition, now_ms: int) -> None:
        """Delay the next attempt, with exponential backoff."""
        tried = self._tried.get(instance_id)
        times = tried.times + 1 if tried is not None and tried.due == due else 1
        wait_ms = min(_RETRY_MS_MAX, self._retry_ms << min(times - 1, 20))
        again_at_ms = now_ms + wait_ms
        if isinstance(answer, Denied) and answer.allowed_at_ms is not None:
            again_at_ms = max(now_ms + 1, answer.allowed_at_ms)
        self._tried[instance_id] = _Tried(due, times, again_at_ms)

    async def _submit(self, instance_id: str) -> tuple[Due, Disposition, int] | None:
        """Submit what is due; return None if nothing is. Denials are not recorded, since they would repeat."""
        request_id = self._new_id()

        def decide(instance: Instance, now_ms: int) -> Change[tuple[Due, Disposition, int] | None]:
            due = scheduled_actions.due(instance, self._trusted_times())
            if due is None or due.at_ms > now_ms:
                return Change(instance=instance, answer=None)
            change = self._first_admitted(instance, due, request_id, now_ms)
            if not isinstance(change.answer, Admitted):
                return Change(instance=instance, answer=(due, change.answer, now_ms))
            return Change(
                instance=restarts.noted(instance, change.instance),
                requests=change.requests,
                events=change.events,
                answer=(due, change.answer, now_ms),
            )

        return await self._store.change(instance_id, decide)

    def _first_admitted(self, instance: Instance, due: Due, request_id: str, now_ms: int) -> Change[Disposition]:
        """Return the gate's result for the first alternative that it admits, else for the first."""
        policy, reachable = self._policy.for_instance(instance), self._reachable(instance.host)
        changes = (
            admission.admit(instance, _submission(action, request_id, reachable), policy, now_ms)
            for action in due.alternatives
            if action.from_ms <= now_ms
        )
        first = next(changes)
        if isinstance(first.answer, Admitted):
            return first
        return next((change for change in changes if isinstance(change.answer, Admitted)), first)


def _submission(action: ScheduledAction, request_id: str, host_reachable: bool) -> Submission:
    return Submission(
        request_id=request_id,
        operation=action.operation,
        parameters=action.parameters,
        requested_by=restarts.SERVER_REQUESTER,
        role=Role.ADMIN,
        host_reachable=host_reachable,
    )
