"""One worker: performs one request and reports how it came out, once.

This is the single exit of every request that is served: whatever a performance does, `finish` is called exactly once
for it, or the worker was fenced and what it wanted to say is recorded as that.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

import structlog

from interlock.core import lifecycle
from interlock.core.errors import Fenced, InterlockError, NotResponding, StoreClosed, StoreError
from interlock.core.operations import Lane
from interlock.core.records import Change, GuestEvent, Instance, Outcome, Request, StaleFence
from interlock.core.states import PowerState
from interlock.driver.operations import PERFORMANCES
from interlock.driver.work import Work
from interlock.policies.in_force import PolicyInForce

AnswerT = TypeVar("AnswerT")

_LOG = structlog.get_logger(__name__)
_BACKOFF_MAX = 16


class Worker:
    """Serves one request in a task of its own."""

    def __init__(self, work: Work, policy: PolicyInForce, ended: Callable[[], None]) -> None:
        self.work = work
        self.request_id = work.request.id
        self.fence = work.request.fence
        self.lane = work.request.lane
        self.absorbed: list[GuestEvent] = []
        """What the guest did meanwhile that belongs to the operation; it is news after all if that does not succeed."""
        self._policy = policy
        self._performance = PERFORMANCES[work.request.operation]
        self._outcome: Outcome | None = None
        self._interrupting = False
        self._superseded = False
        self._abandoned = False
        self._reporting = False
        self._begun = False
        self._undone_in_vain = False
        self._task = asyncio.create_task(self._run(), name=f"{work.request.operation.value} {work.id}")
        self._task.add_done_callback(lambda _: ended())

    @property
    def done(self) -> bool:
        return self._task.done()

    @property
    def used_up(self) -> bool:
        """Whether what it absorbed was part of its success, or it has brought the guest back since."""
        return self.work.brought_back or (self._outcome is Outcome.SUCCEEDED and bool(self.absorbed))

    @property
    def left_half_way(self) -> bool:
        """Whether it was stopped half-way and could not undo what it had begun."""
        return self._undone_in_vain

    @property
    def left_over(self) -> list[GuestEvent]:
        """What it absorbed and did not use up."""
        return [] if self._outcome is Outcome.SUCCEEDED or self.work.brought_back else self.absorbed

    def absorbs(self, event: GuestEvent) -> bool:
        """Take note of what the guest did if it is part of the operation; answers whether it is."""
        self.work.news.set()
        if event not in self._performance.absorbs or self._reporting:
            return False
        self.absorbed.append(event)
        return True

    def interrupt(self) -> None:
        """Ask it to stop half-way, undo, and say so. One that is about to report its end goes on with that."""
        if not self._interrupting and not self._reporting:
            self._interrupting = True
            self._stop()

    def supersede(self) -> None:
        """Stop it: its request was taken from it, and it can do nothing more."""
        if not self._superseded and not self._reporting:
            self._superseded = True
            self._stop()

    def _stop(self) -> None:
        # A task that is cancelled before its first step never runs at all, and its request would have no end.
        if self._begun:
            self._task.cancel()

    async def abandon(self) -> None:
        """Stop it without a word; its request stays in flight, for the next server to look into."""
        self._abandoned = True
        self._task.cancel()
        await asyncio.wait((self._task,))

    async def wait(self, timeout_s: float) -> None:
        await asyncio.wait((self._task,), timeout=timeout_s)

    async def _run(self) -> None:
        self._begun = True
        try:
            await self._begin()
            await self._serve()
        except asyncio.CancelledError:
            if not self._abandoned:
                await asyncio.shield(self._report_interruption())
        except Fenced as error:
            _LOG.info("worker fenced", instance=self.work.id, request=self.request_id, why=error.message)
            # The store records that a fenced worker wanted to report.
            await self._finish(Outcome.INTERRUPTED, error.message)
        except Exception as error:  # noqa: BLE001 - the outermost frame of a worker
            # A bug must not leave the VM stuck: the request fails, and says so.
            _LOG.exception("a performance broke", instance=self.work.id, request=self.request_id)
            await self._finish(Outcome.FAILED, f"Internal error: {type(error).__name__}: {error}")

    async def _begin(self) -> None:
        if self._interrupting or self._superseded:
            raise asyncio.CancelledError

    async def _serve(self) -> None:
        looked = False
        while True:
            try:
                done = await self._performance.perform(self.work)
            except NotResponding as error:
                if looked and (await self.work.hypervisor.inspect(self.work.id)).responsive:
                    # It was looked at, answers, and still does not do this: that is known now, and is a failure.
                    await self._finish(Outcome.FAILED, _say(error))
                    return
                await self._finish(Outcome.UNKNOWN, _say(error))
                await self._until_answering()
                looked = True
            except Fenced:
                raise
            except InterlockError as error:
                await self._finish(Outcome.FAILED, _say(error), await self._power_state())
                return
            else:
                await self._finish(Outcome.SUCCEEDED, done.message, done.power_state, arrived=done.arrived)
                return

    async def _power_state(self) -> PowerState | None:
        """What is found of the guest after a failure, which may have come before its end or after; None: not known."""
        with contextlib.suppress(InterlockError):
            seen = await self.work.hypervisor.inspect(self.work.id)
            if self.lane is Lane.STATE and seen.responsive:
                return seen.power_state
        return None

    async def _until_answering(self) -> None:
        """Look until the machine answers again (law 10)."""
        retry_s = self.work.config.inspect_retry_ms / 1000
        pause_s = retry_s
        while True:
            self.work.news.clear()
            if (await self.work.hypervisor.inspect(self.work.id)).responsive:
                return
            try:
                # Not `wait_for`, which swallows a cancellation that comes together with the news of it.
                async with asyncio.timeout(pause_s):
                    await self.work.news.wait()
            except TimeoutError:
                pause_s = min(pause_s * 2, retry_s * _BACKOFF_MAX)

    async def _report_interruption(self) -> None:
        try:
            if self._interrupting and self._performance.undo is not None:
                await self._performance.undo(self.work)
        except InterlockError as error:
            self._undone_in_vain = True
            await self._finish(Outcome.FAILED, f"It was stopped half-way and could not be undone: {_say(error)}")
            return
        await self._finish(Outcome.INTERRUPTED, None)

    async def _finish(
        self,
        outcome: Outcome,
        message: str | None,
        power_state: PowerState | None = None,
        *,
        arrived: bool = False,
    ) -> None:
        self._reporting = outcome is not Outcome.UNKNOWN

        def decide(instance: Instance, now_ms: int) -> Change[Request | StaleFence]:
            return lifecycle.finish(
                instance,
                self.request_id,
                self.fence,
                outcome,
                self._policy.for_waiting(instance),
                now_ms,
                message=message,
                power_state=power_state,
                arrived=arrived,
            )

        if isinstance(await self._kept(decide), Request):
            self._outcome = outcome

    async def _kept(self, decide: Callable[[Instance, int], Change[AnswerT]]) -> AnswerT:
        """Have the store keep it, however long that takes: an end that is not kept leaves the VM in its task."""
        while True:
            try:
                return await self.work.store.change(self.work.id, decide)
            except StoreClosed:
                # The server is gone from under it; the next one takes the request up.
                raise asyncio.CancelledError from None
            except StoreError as error:
                _LOG.error("cannot keep the end of a request", request=self.request_id, why=error.message)
                await asyncio.sleep(self.work.config.inspect_retry_ms / 1000)


def _say(error: InterlockError) -> str:
    return f"{error.message} {error.remedy}" if error.remedy else error.message
