"""How a call of the port runs on a simulated host: its delay, the fault that it meets, a guest that does not respond.

* A call without delay and fault costs a few microseconds and does not wait: everything slow is in methods of its own,
  behind one test.
* After a command to a frozen guest has timed out, every later one is `NotResponding` at once until the guest responds
  again, so that nothing piles up. Hard power-off and removal always work, and a reset becomes a power cycle.
* A long operation takes its delay in steps, with a report and a check of the permit after each.

What a guest does is in `host`; what goes wrong, and when, in `faults`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Final

from interlock.core.errors import Fenced, GuestNotFound, NotResponding, OperationRejected
from interlock.hypervisors.simulated.faults import (
    AnswerLost,
    Fault,
    GuestIgnores,
    GuestPanics,
    GuestVanishes,
    Hangs,
    Method,
    Refuses,
    Slow,
)
from interlock.hypervisors.simulated.guest import RUNS, Command, SimulatedGuest
from interlock.hypervisors.simulated.watcher import GuestWatcher
from interlock.ports import Permit, Report

_STEPS: Final = 5
"""The number of steps of a long operation."""


class CallRunner:
    """What all calls of the port have in common."""

    def __init__(
        self,
        watcher: GuestWatcher,
        sleep: Callable[[float], Awaitable[object]],
        *,
        delays_ms: Mapping[Method, int],
        answer_timeout_s: float,
    ) -> None:
        self.host = watcher.host
        self.watcher = watcher
        self._sleep = sleep
        self._delays_ms = dict(delays_ms)
        self._answer_timeout_s = answer_timeout_s

    def guest(self, instance_id: str) -> SimulatedGuest:
        """Return the guest. Raises `GuestNotFound`, `Unavailable`."""
        self.watcher.require_open()
        guest = self.host.guests.get(instance_id)
        if guest is None:
            raise GuestNotFound(f"The simulated host has no VM {instance_id}.")
        return guest

    def require_running(self, guest: SimulatedGuest) -> None:
        """Raise `GuestNotFound` unless it is still this guest that runs."""
        if self.host.guests.get(guest.instance_id) is not guest or guest.seen not in RUNS:
            raise GuestNotFound(f"VM {guest.instance_id} does not run on this host.")

    async def responds(self, guest: SimulatedGuest) -> bool:
        """Wait for a frozen guest to thaw or end, until the timeout."""
        if guest.instance_id in self.watcher.unresponsive:
            return False
        timeout = asyncio.ensure_future(self._sleep(self._answer_timeout_s))
        try:
            while guest.frozen and not timeout.done():
                await self.watcher.wait_for_change(guest.instance_id, timeout)
        finally:
            timeout.cancel()
        return not guest.frozen

    # --------------------------------------------------------------------------------------------------- commands

    async def command(self, permit: Permit, instance_id: str, command: Command) -> None:
        """Have the guest execute a command, with delay and fault."""
        guest = self.guest(instance_id)
        fault, quiet = self.next_fault(instance_id, command.method)
        if quiet and not guest.frozen:
            permit.check()
            self.host.execute(guest, command)
            return
        await self.delay(command.method, fault)
        if isinstance(fault, GuestVanishes):
            self.host.vanish(instance_id)
        await self.execute(permit, command, instance_id, fault)

    async def execute(self, permit: Permit, command: Command, instance_id: str, fault: Fault | None) -> None:
        """Have the guest execute a command after its delay."""
        guest = self.guest(instance_id)
        if isinstance(fault, Refuses):
            raise OperationRejected(fault.message)
        if isinstance(fault, Hangs):
            self.freeze(guest, fault)
        if guest.frozen:
            await self._send_to_frozen(permit, guest, command)
            return
        permit.check()
        if isinstance(fault, GuestIgnores):
            device = command.disk_id or command.interface_id
            if device is not None and (device in guest.disks or device in guest.interfaces):
                self.host.request_release(guest, device)
                await self.time_out(instance_id)
            return
        self.host.execute(guest, command)
        await self.apply_after(instance_id, fault)

    async def _send_to_frozen(self, permit: Permit, guest: SimulatedGuest, command: Command) -> None:
        instance_id = guest.instance_id
        if instance_id not in self.watcher.unresponsive:
            permit.check()
            if await self.watcher.send(guest, command, self._answer_timeout_s):
                return
        if command.method is not Method.RESET:
            raise NotResponding(f"VM {instance_id} did not respond to {command.method}.")
        guest = self.guest(instance_id)
        permit.check()
        self.host.power_cycle(guest)
        self.watcher.unresponsive.discard(instance_id)

    # -------------------------------------------------------------------------------------------- delay and fault

    def next_fault(self, instance_id: str, method: Method) -> tuple[Fault | None, bool]:
        """Return the fault that a call meets, and whether it meets neither fault nor delay."""
        plan = self.host.faults
        fault = None if plan.quiet else plan.next(instance_id, method)
        return fault, fault is None and not self._delays_ms

    def _delay_s(self, method: Method, fault: Fault | None) -> float:
        return (self._delays_ms.get(method, 0) + (fault.delay_ms if isinstance(fault, Slow) else 0)) / 1000

    async def delay(self, method: Method, fault: Fault | None) -> None:
        """Wait for the delay of a call."""
        delay_s = self._delay_s(method, fault)
        if delay_s > 0:
            await self._sleep(delay_s)
            self.watcher.require_open()

    async def run_long(
        self,
        permit: Permit,
        method: Method,
        fault: Fault | None,
        report: Report,
        total: int,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Wait for the delay of a long operation in steps. `check` raises what ends it meanwhile.

        Without delay and fault this does not wait.
        """
        delay_s = self._delay_s(method, fault)
        report(0, total)
        for step in range(1, _STEPS + 1):
            if delay_s > 0:
                await self._sleep(delay_s / _STEPS)
                self.watcher.require_open()
                permit.check()
            if check is not None:
                check()
            if isinstance(fault, Refuses) and step * 2 > _STEPS:
                raise OperationRejected(fault.message)
            report(total * step // _STEPS, total)

    async def apply_before(self, guest: SimulatedGuest, fault: Fault | None) -> None:
        """Apply a fault before a long operation. Raises `NotResponding` if the guest does not respond."""
        if isinstance(fault, GuestVanishes):
            self.host.vanish(guest.instance_id)
        if isinstance(fault, Hangs):
            self.freeze(guest, fault)
        if guest.frozen and not await self.responds(guest):
            self.watcher.unresponsive.add(guest.instance_id)
            raise NotResponding(f"VM {guest.instance_id} does not respond.")

    async def apply_after(self, instance_id: str, fault: Fault | None) -> None:
        """Apply a fault after the effect of a call."""
        if isinstance(fault, GuestPanics):
            self.host.guest_panics(instance_id)
        if isinstance(fault, AnswerLost):
            await self.time_out(instance_id)

    async def time_out(self, instance_id: str) -> None:
        """Raise `NotResponding` after the timeout."""
        await self._sleep(self._answer_timeout_s)
        raise NotResponding(f"The simulated hypervisor did not respond for VM {instance_id}.")

    def freeze(self, guest: SimulatedGuest, fault: Hangs) -> None:
        """Freeze the guest, for the time of the fault."""
        if self.host.freeze(guest.instance_id, fault.thaw_after_ms) and fault.thaw_after_ms is not None:
            self.watcher.call_later(fault.thaw_after_ms, self.host.thaw, guest.instance_id)

    @contextlib.contextmanager
    def paused(self, permit: Permit, guest: SimulatedGuest) -> Iterator[None]:
        """Pause a guest that runs for the length of the block. One that a killed server left paused is marked so."""
        permit.check()
        self.host.pause_for_memory(guest)
        try:
            yield
        finally:
            if self.watcher.is_open and guest.paused_for_memory:
                with contextlib.suppress(Fenced):
                    permit.check()
                    self.host.resume_from_memory(guest)
