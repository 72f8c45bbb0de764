"""The worker of one request: performs it, and reports its outcome exactly once.

Whatever a handler does, `finish` is called exactly once, or the worker was fenced and its report is recorded as such.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import structlog

from interlock.core import lifecycle
from interlock.core.errors import Fenced, InterlockError, NotResponding, OperationRejected, StoreClosed, StoreError
from interlock.core.operations import Lane
from interlock.core.records import Change, GuestEvent, Instance, Outcome, Request, StaleFence
from interlock.core.states import PowerState
from interlock.driver.operation_context import Done, OperationContext
from interlock.driver.operations import HANDLERS
from interlock.policies.active_policy import PolicyInForce
from interlock.ports import Observation
from interlock.ports.system_errors import system_failure

AnswerT = TypeVar("AnswerT")

_LOG = structlog.get_logger(__name__)
_BACKOFF_MAX = 16
_HERE = "the server's host"


class Worker:
    """The task that performs one request."""

    def __init__(self, work: OperationContext, policy: PolicyInForce, ended: Callable[[], None]) -> None:
        self.work = work
        self.request_id = work.request.id
        self.fence = work.request.fence
        self.lane = work.request.lane
        self.absorbed: list[GuestEvent] = []
        """Expected guest events; they are handled after all if the operation does not succeed."""
        self._policy = policy
        self._handler = HANDLERS[work.request.operation]
        self._outcome: Outcome | None = None
        self._interrupting = False
        self._superseded = False
        self._abandoned = False
        self._reporting = False
        self._begun = False
        self._undone_in_vain = False
        name = f"{work.request.operation.value} {work.id}"
        self._task = asyncio.get_running_loop().create_task(self._run(), name=name)
        self._task.add_done_callback(lambda _: ended())

    @property
    def done(self) -> bool:
        return self._task.done()

    @property
    def succeeded(self) -> bool:
        return self._outcome is Outcome.SUCCEEDED

    @property
    def used_up(self) -> bool:
        """Whether its expected events are obsolete: it succeeded, or restored the guest since."""
        return self.work.brought_back or (self._outcome is Outcome.SUCCEEDED and bool(self.absorbed))

    @property
    def left_half_way(self) -> bool:
        """Whether it was interrupted and the rollback failed."""
        return self._undone_in_vain

    @property
    def left_over(self) -> list[GuestEvent]:
        """The expected events that are still to be handled."""
        return [] if self._outcome is Outcome.SUCCEEDED or self.work.brought_back else self.absorbed

    def expects(self, event: GuestEvent) -> bool:
        """Absorb a guest event if it is part of the operation; return whether it is."""
        self.work.wakeup.set()
        if event not in self._handler.expected_events or self._reporting:
            return False
        self.absorbed.append(event)
        return True

    def interrupt(self) -> None:
        """Interrupt it and roll back, unless it is already reporting its outcome."""
        if not self._interrupting and not self._reporting:
            self._interrupting = True
            self._stop()

    def supersede(self) -> None:
        """Stop it, because it was fenced."""
        if not self._superseded and not self._reporting:
            self._superseded = True
            self._stop()

    def _stop(self) -> None:
        # A task that is cancelled before its first step never runs at all, and its request would have no end.
        if self._begun:
            self._task.cancel()

    async def abandon(self) -> None:
        """Stop it without a report; its request stays in flight, for the next server."""
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
            # The store records the attempt of a fenced worker.
            await self._finish(Outcome.INTERRUPTED, error.message)
        except Exception as error:  # noqa: BLE001 - the outermost frame of a worker
            failed = system_failure(error, _HERE) if isinstance(error, OSError) else None
            if failed is not None:
                _LOG.warning("operation failed", instance=self.work.id, request=self.request_id, why=failed.message)
                await self._finish(self._failed, _say(failed), await self._power_state())
                return
            # A bug must not leave the VM stuck: the request fails.
            _LOG.exception("operation handler failed", instance=self.work.id, request=self.request_id)
            await self._finish(self._failed, f"Internal error: {type(error).__name__}: {error}")

    async def _begin(self) -> None:
        if self._interrupting or self._superseded:
            raise asyncio.CancelledError

    async def _serve(self) -> None:
        attempts, waits = 0, _Patience(self.work.config.unknown_timeout_ms)
        while True:
            attempts += 1
            try:
                done = await self._perform()
            except NotResponding as error:
                if (failure := await self._known_failure(error, attempts)) is not None:
                    await self._finish(self._failed, failure)
                    return
                await self._finish(Outcome.UNKNOWN, _say(error))
                if not await self._until_answering(waits):
                    limit_s = self.work.config.unknown_timeout_ms / 1000
                    await self._finish(self._failed, _given_up(error, f"It did not respond for {limit_s:g} s"))
                    return
            except Fenced:
                raise
            except InterlockError as error:
                await self._finish(self._failed, _say(error), await self._power_state())
                return
            else:
                await self._finish(Outcome.SUCCEEDED, done.message, done.power_state, arrived=done.arrived)
                return

    @property
    def _failed(self) -> Outcome:
        return Outcome.UNTOUCHED if self.work.untouched else Outcome.FAILED

    async def _inspect(self) -> Observation:
        """Inspect the instance on the host that is being called."""
        return await self.work.hosts.of(self.work.called_host).inspect(self.work.id)

    async def _perform(self) -> Done:
        """Perform the operation once. Raises `OperationRejected` if it makes no progress for too long."""
        silence_s = self.work.config.silence_timeout_ms / 1000
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(silence_s) as limit:

                def put_off() -> None:
                    if not limit.expired():
                        limit.reschedule(loop.time() + silence_s)

                self.work.on_progress = put_off
                return await self._handler.perform(self.work)
        except TimeoutError:
            if not limit.expired():
                raise
            raise OperationRejected(
                f"The operation timed out: no progress for {silence_s:g} s.", remedy=_LATE
            ) from None
        finally:
            self.work.on_progress = _nothing

    async def _known_failure(self, error: NotResponding, attempts: int) -> str | None:
        """Return why it fails for certain after an attempt that timed out; None if the outcome is still unknown."""
        if attempts > 1 and (await self._inspect()).responsive:
            # QEMU responds and still does not perform this: a certain failure.
            return _say(error)
        if attempts >= self.work.config.unknown_attempts_max and self._may_be_given_up():
            return _given_up(error, f"It was tried {attempts} times")
        return None

    def _may_be_given_up(self) -> bool:
        """Whether it may fail with an unknown outcome: not in a migration, where only its success runs the guest."""
        return self.work.instance.left_host is None and self.work.hosts.linked(self.work.called_host)

    async def _power_state(self) -> PowerState | None:
        """Return the guest's power state after a failure; None if unknown."""
        with contextlib.suppress(InterlockError, OSError):
            seen = await self.work.hypervisor.inspect(self.work.id)
            if self.lane is Lane.STATE and seen.responsive:
                return seen.power_state
        return None

    async def _until_answering(self, waits: _Patience) -> bool:
        """Wait until QEMU responds again (law 10), or its host is fenced and the operation does not need it.

        Return False on timeout.
        """
        retry_s = self.work.config.inspect_retry_ms / 1000
        pause_s = retry_s
        while True:
            self.work.wakeup.clear()
            fenced = not self.work.hosts.reachable(self.work.called_host)
            if fenced and self._handler.without_host:
                return True
            with waits.counted(counts=self._may_be_given_up()):
                if (await self._inspect()).responsive:
                    return True
            if waits.left_s <= 0:
                return False
            try:
                with waits.counted(counts=self._may_be_given_up()):
                    # Not `wait_for`, which swallows a cancellation that comes together with the event.
                    async with asyncio.timeout(min(pause_s, waits.left_s)):
                        await self.work.wakeup.wait()
            except TimeoutError:
                pause_s = min(pause_s * 2, retry_s * _BACKOFF_MAX)

    async def _report_interruption(self) -> None:
        try:
            if self._interrupting and self._handler.undo is not None:
                await self._handler.undo(self.work)
        except (InterlockError, OSError) as failed:
            error = system_failure(failed, _HERE) or failed if isinstance(failed, OSError) else failed
            self._undone_in_vain = True
            await self._finish(Outcome.FAILED, f"It was interrupted, and the rollback failed: {_say(error)}")
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
        if self._reporting:
            self.work.permit.end()

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
                host_reachable=self.work.hosts.reachable(instance.host),
            )

        if isinstance(await self._kept(decide), Request):
            self._outcome = outcome

    async def _kept(self, decide: Callable[[Instance, int], Change[AnswerT]]) -> AnswerT:
        """Write to the store, and retry until it succeeds: a lost outcome would leave the VM in its task state."""
        while True:
            try:
                return await self.work.store.change(self.work.id, decide)
            except StoreClosed:
                # The server is shutting down; the next one resumes the request.
                raise asyncio.CancelledError from None
            except StoreError as error:
                _LOG.error("failed to persist request outcome", request=self.request_id, why=error.message)
                await asyncio.sleep(self.work.config.inspect_retry_ms / 1000)


class _Patience:
    """The remaining time of a timeout that can be paused.

    It is counted in whole nanoseconds: a rest too small to change the clock would never pass.
    """

    def __init__(self, limit_ms: int) -> None:
        self._left_ns = limit_ms * 1_000_000

    @property
    def left_s(self) -> float:
        return self._left_ns / 1e9

    @contextlib.contextmanager
    def counted(self, *, counts: bool) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            yield
        finally:
            if counts:
                self._left_ns -= round((loop.time() - began) * 1e9)


_LATE: Final = "Check the VM; if it takes effect later, its record is updated."


def _given_up(error: NotResponding, after: str) -> str:
    return f"{error.message} {after}; the outcome is unknown. {_LATE}"


def _nothing() -> None:
    """Do nothing."""


def _say(error: InterlockError | OSError) -> str:
    if isinstance(error, OSError):
        return str(error)
    return f"{error.message} {error.remedy}" if error.remedy else error.message
