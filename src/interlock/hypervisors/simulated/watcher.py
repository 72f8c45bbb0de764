"""Watches a simulated host: delivers its events, and wakes who waits for a guest.

One watcher at a time watches a host; another one replaces it, as a new server does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from interlock.core.errors import HypervisorError, Unavailable
from interlock.core.records import GuestEvent
from interlock.core.states import PowerState
from interlock.hypervisors.simulated.console import SimulatedStream
from interlock.hypervisors.simulated.guest import Command, SimulatedGuest
from interlock.hypervisors.simulated.host import SimulatedHost
from interlock.ports import HypervisorEvent


class GuestWatcher:
    """The connection of a hypervisor object with its host, from `open` to `close`. Satisfies `host.Watcher`."""

    def __init__(
        self,
        host: SimulatedHost,
        sleep: Callable[[float], Awaitable[object]],
        *,
        power_off_ms: int,
        liveness_timeout_ms: int,
    ) -> None:
        self.host = host
        self.unresponsive: set[str] = set()
        """Frozen guests for which a command has timed out: later ones time out at once."""
        self._sleep = sleep
        self._power_off_ms = power_off_ms
        self._liveness_timeout_ms = liveness_timeout_ms
        self._reported: set[str] = set()
        """Guests that were reported as not responding."""
        self._listener: Callable[[HypervisorEvent], None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self._answers: dict[int, asyncio.Future[HypervisorError | None]] = {}
        self._streams: dict[str, set[SimulatedStream]] = {}

    # --------------------------------------------------------------------------------------------- open and close

    def open(self, listener: Callable[[HypervisorEvent], None]) -> None:
        """Load the host, and report what its guests did unobserved. Raises `Unavailable`."""
        self.host.load()
        for guest in self.host.guests.values():
            # How long ago the button was pressed is unknown; long enough.
            self.host.answer_button(guest.instance_id)
        self._listener = listener
        self.host.watch(self)
        for guest in list(self.host.guests.values()):
            self._report_pending(guest, during_watch=False)
            if guest.frozen:
                self.froze(guest)
            if guest.frozen and guest.thaw_after_ms is not None:
                self.call_later(guest.thaw_after_ms, self.host.thaw, guest.instance_id)

    def close(self) -> None:
        """End as the process of a killed server does: nothing is reported or changed from now on."""
        if self._listener is not None:
            self._listener = None
            self.host.unwatch(self)
        for task in self._tasks:
            task.cancel()
        for stream in [stream for streams in self._streams.values() for stream in streams]:
            stream.end()

    @property
    def is_open(self) -> bool:
        return self._listener is not None

    def require_open(self) -> None:
        """Raise `Unavailable` unless it is open."""
        if self._listener is None:
            raise Unavailable(
                "The simulated hypervisor is not open.", remedy="Call open() first; it cannot be opened again."
            )

    # --------------------------------------------------------------------------------------------------- waiting

    async def wait_for_change(self, instance_id: str, limit: asyncio.Future[Any] | None = None) -> None:
        """Wait until a guest changes, or `limit` is done."""
        changed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(instance_id, set())
        waiting.add(changed)
        try:
            await asyncio.wait({changed} if limit is None else {changed, limit}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.discard(changed)
            if not waiting and self._waiting.get(instance_id) is waiting:
                del self._waiting[instance_id]

    async def send(self, guest: SimulatedGuest, command: Command, timeout_s: float) -> bool:
        """Send a command to a frozen guest; return whether it was executed in time. Raises its error."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[id(command)] = answer
        self.host.send(guest, command)
        timeout: asyncio.Future[Any] = asyncio.ensure_future(self._sleep(timeout_s))
        try:
            await asyncio.wait({answer, timeout}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            timeout.cancel()
            del self._answers[id(command)]
            if not answer.done():
                self.unresponsive.add(guest.instance_id)
        if not answer.done():
            return False
        error: HypervisorError | None = answer.result()
        if error is not None:
            raise error
        return True

    def call_later(self, delay_ms: int, act: Callable[[str], object], instance_id: str) -> None:
        """Call `act` after a delay, unless this is closed by then."""

        async def wait_and_act() -> None:
            await self._sleep(delay_ms / 1000)
            act(instance_id)

        task = asyncio.get_running_loop().create_task(wait_and_act())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def add_stream(self, instance_id: str, stream: SimulatedStream) -> None:
        """Notify a stream of changes of the guest."""
        self._streams.setdefault(instance_id, set()).add(stream)

    def remove_stream(self, instance_id: str, stream: SimulatedStream) -> None:
        streams = self._streams.get(instance_id, set())
        streams.discard(stream)
        if not streams:
            self._streams.pop(instance_id, None)

    # ------------------------------------------------------------------------------------------- events of the host

    def replaced(self) -> None:
        self.close()

    def froze(self, guest: SimulatedGuest) -> None:
        self.call_later(self._liveness_timeout_ms, self._report_unresponsive, guest.instance_id)

    def _report_unresponsive(self, instance_id: str) -> None:
        guest = self.host.guests.get(instance_id)
        if guest is not None and guest.frozen and instance_id not in self._reported:
            self._reported.add(instance_id)
            self._report(instance_id, GuestEvent.NOT_RESPONDING)

    def _report(self, instance_id: str, kind: GuestEvent) -> None:
        if self._listener is not None:
            self._listener(HypervisorEvent(instance_id=instance_id, kind=kind))

    def _report_soon(self, instance_id: str, kind: GuestEvent) -> None:
        # Not at once: the host is in the middle of the change.
        asyncio.get_running_loop().call_soon(self._report, instance_id, kind)

    def changed(self, guest: SimulatedGuest) -> None:
        if not guest.frozen:
            self.unresponsive.discard(guest.instance_id)
            if guest.instance_id in self._reported:
                self._reported.discard(guest.instance_id)
                if guest.power is not PowerState.NONE:
                    self._report_soon(guest.instance_id, GuestEvent.RESPONDING)
        for waiting in self._waiting.get(guest.instance_id, ()):
            if not waiting.done():
                waiting.set_result(None)
        for stream in tuple(self._streams.get(guest.instance_id, ())):
            stream.update(guest)
        if guest.pending_events:
            asyncio.get_running_loop().call_soon(self._report_pending, guest)

    def button_pressed(self, guest: SimulatedGuest) -> None:
        if self._power_off_ms > 0:
            self.call_later(self._power_off_ms, self.host.answer_button, guest.instance_id)
        else:
            asyncio.get_running_loop().call_soon(self._answer_button, guest.instance_id)

    def _answer_button(self, instance_id: str) -> None:
        if self._listener is not None:
            self.host.answer_button(instance_id)

    def released(self, guest: SimulatedGuest) -> None:
        self._report_soon(guest.instance_id, GuestEvent.CHANGED)

    def executed(self, instance_id: str, command: Command, error: HypervisorError | None) -> None:
        answer = self._answers.get(id(command))
        if answer is not None and not answer.done():
            answer.set_result(error)
        elif answer is None and error is None:
            # The caller has timed out.
            self._report_soon(instance_id, GuestEvent.CHANGED)

    def _report_pending(self, guest: SimulatedGuest, *, during_watch: bool = True) -> None:
        listener = self._listener
        if listener is None or not guest.pending_events:
            return
        pending, guest.pending_events = guest.pending_events, []
        try:
            for kind in pending:
                listener(HypervisorEvent(instance_id=guest.instance_id, kind=kind, during_watch=during_watch))
        finally:
            self.host.keep(guest)
