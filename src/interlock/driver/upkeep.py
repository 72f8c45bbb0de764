"""Asks for what is due without anybody asking: sleeps until the next moment, and goes through the gate.

What is due, and when, is `core.upkeep`'s. Whether it still is gets decided once more inside the change of the store
that admits it, so that nothing is asked for twice, whatever happens in between. Nothing is asked again and again: the
store is looked through once at the start, and its events tell the rest.
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
from interlock.core import admission, restarting, upkeep
from interlock.core.errors import NotFound, StoreClosed, StoreError
from interlock.core.records import Admitted, Change, Denied, Disposition, Event, Instance, Submission
from interlock.core.upkeep import Due, Wish
from interlock.policies.in_force import PolicyInForce
from interlock.ports import Role, Store, every_instance

_LOG = structlog.get_logger(__name__)
_RETRY_MS_MAX: Final = 3_600_000
_SLEEP_S_MAX: Final = 3_600
"""The store's clock may be put forward while we sleep, and nobody tells."""
_ENDS: Final = frozenset({"request.succeeded", "request.failed", "request.cancelled", "request.superseded"})
_NEWS: Final = frozenset({"instance.relabelled", "instance.restart_due"})
_FORGIVING: Final = frozenset({"instance.relabelled", "instance.state"})
"""After these, what was refused may be admitted."""


class _Tried(msgspec.Struct, frozen=True):
    """Something due that was asked for, and is due still."""

    due: Due
    times: int
    again_at_ms: int


class Upkeep:
    """The housekeeping of all instances, on whichever host."""

    def __init__(self, store: Store, policy: PolicyInForce, config: UpkeepConfig, new_id: Callable[[], str]) -> None:
        self._store = store
        self._policy = policy
        self._retry_ms = config.retry_ms
        self._times = config.times
        self._new_id = new_id
        self._changed: dict[str, None] = {}
        """The instances to look at, in the order told of."""
        self._moments: dict[str, int] = {}
        """When the next thing of each instance is to be asked for."""
        self._order: list[tuple[int, str]] = []
        """A heap of those moments; what is not in `_moments` any more is passed over."""
        self._tried: dict[str, _Tried] = {}
        self._busy: set[str] = set()
        """Those for which something may be due as soon as what is outstanding has ended."""
        self._bell = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._unlisten: Callable[[], None] | None = None

    async def open(self) -> None:
        """Look through the store once, and go on from there."""
        self._unlisten = self._store.listen(self._hear)
        async for instance in every_instance(self._store):
            if instance.vm_state in upkeep.STATES:
                self._changed[instance.id] = None
        self._task = asyncio.create_task(self._run(), name="upkeep")

    async def close(self) -> None:
        if self._unlisten is not None:
            self._unlisten()
            self._unlisten = None
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    def _hear(self, events: Sequence[Event]) -> None:
        """Note whom the events concern for whom something is due, or may be now. The store's listener."""
        for event in events:
            if self._concerns(event):
                if event.kind in _FORGIVING:
                    self._tried.pop(event.instance_id, None)
                self._changed[event.instance_id] = None
                self._bell.set()

    def _concerns(self, event: Event) -> bool:
        if event.kind == "instance.state" and event.data["vm_state"] in upkeep.STATES:
            return True
        instance_id = event.instance_id
        if instance_id in self._moments or instance_id in self._tried or instance_id in self._busy:
            return event.kind in _NEWS | _ENDS | _FORGIVING or event.kind == "request.redundant"
        return event.kind in _NEWS

    # ---------------------------------------------------------------------------------------------------- its task

    async def _run(self) -> None:
        while True:
            self._bell.clear()
            try:
                await self._look()
                await self._ask()
            except StoreClosed:
                return
            except StoreError as error:
                _LOG.error("the upkeep cannot reach its store", why=error.message)
                await asyncio.sleep(self._retry_ms / 1000)
                continue
            except Exception:  # noqa: BLE001 - the outermost frame of the upkeep
                # A bug about one instance must not end what is done for the others.
                _LOG.exception("the upkeep broke")
                await asyncio.sleep(self._retry_ms / 1000)
                continue
            await self._rest()

    async def _look(self) -> None:
        """See what is due for those that changed."""
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
        due = upkeep.due(instance, self._times)
        tried = self._tried.get(instance.id)
        if due is None:
            self._moments.pop(instance.id, None)
            if instance.outstanding and instance.vm_state in upkeep.STATES:
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
        """Sleep until something changes, or is due."""
        while self._order and self._moments.get(self._order[0][1]) != self._order[0][0]:
            heapq.heappop(self._order)
        seconds = None
        if self._order:
            seconds = min(_SLEEP_S_MAX, max(0, self._order[0][0] - self._store.now_ms()) / 1000)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._bell.wait()

    async def _ask(self) -> None:
        """Ask for everything that is due now."""
        while self._order and self._order[0][0] <= self._store.now_ms():
            at_ms, instance_id = heapq.heappop(self._order)
            if self._moments.get(instance_id) == at_ms:
                del self._moments[instance_id]
                await self._ask_for(instance_id)

    async def _ask_for(self, instance_id: str) -> None:
        try:
            asked = await self._submit(instance_id)
        except NotFound:
            return
        except StoreError:
            self._changed[instance_id] = None
            raise
        if asked is None:
            # It has changed since it was looked at.
            self._changed[instance_id] = None
            self._bell.set()
            return
        due, answer, now_ms = asked
        self._put_off(instance_id, due, answer, now_ms)
        if isinstance(answer, Admitted):
            operation = answer.request.operation.value
            _LOG.info("asked for what was due", instance=instance_id, operation=operation, request=answer.request.id)
        else:
            if isinstance(answer, Denied):
                _LOG.warning("what is due is refused", instance=instance_id, rule=answer.rule, why=answer.because)
            self._changed[instance_id] = None
            self._bell.set()

    def _put_off(self, instance_id: str, due: Due, answer: Disposition, now_ms: int) -> None:
        """Note that it was tried: if it is due still, that is no reason to try at once."""
        tried = self._tried.get(instance_id)
        times = tried.times + 1 if tried is not None and tried.due == due else 1
        wait_ms = min(_RETRY_MS_MAX, self._retry_ms << min(times - 1, 20))
        again_at_ms = now_ms + wait_ms
        if isinstance(answer, Denied) and answer.allowed_at_ms is not None:
            again_at_ms = max(now_ms + 1, answer.allowed_at_ms)
        self._tried[instance_id] = _Tried(due, times, again_at_ms)

    async def _submit(self, instance_id: str) -> tuple[Due, Disposition, int] | None:
        """Ask for what is due; None if nothing is any more. A refusal is not kept: it would be, again and again."""
        request_id = self._new_id()

        def decide(instance: Instance, now_ms: int) -> Change[tuple[Due, Disposition, int] | None]:
            due = upkeep.due(instance, self._times)
            if due is None or due.at_ms > now_ms:
                return Change(instance=instance, answer=None)
            change = self._first_admitted(instance, due, request_id, now_ms)
            if not isinstance(change.answer, Admitted):
                return Change(instance=instance, answer=(due, change.answer, now_ms))
            return Change(
                instance=restarting.noted(instance, change.instance),
                requests=change.requests,
                events=change.events,
                answer=(due, change.answer, now_ms),
            )

        return await self._store.change(instance_id, decide)

    def _first_admitted(self, instance: Instance, due: Due, request_id: str, now_ms: int) -> Change[Disposition]:
        """What the gate says to the first wish that it admits; to the first of all if it admits none."""
        changes = (
            admission.admit(instance, _submission(wish, request_id), self._policy.compiled, now_ms)
            for wish in due.wishes
            if wish.from_ms <= now_ms
        )
        first = next(changes)
        if isinstance(first.answer, Admitted):
            return first
        return next((change for change in changes if isinstance(change.answer, Admitted)), first)


def _submission(wish: Wish, request_id: str) -> Submission:
    return Submission(
        request_id=request_id,
        operation=wish.operation,
        parameters=wish.parameters,
        requested_by=restarting.UPKEEP,
        role=Role.ADMIN.value,
    )
