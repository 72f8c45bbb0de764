"""The port, on a simulated host: who waits, for how long, and with which right to act.

The rules of this file:

* A call without delay and without fault costs a few microseconds and does not wait: everything slow is in methods
  of its own, behind one test.
* After a command that a frozen guest left unanswered, every later command to that guest is NotResponding at once
  until the guest answers again, so that nothing piles up behind it. Pulling the plug and removing always work, and a
  reset becomes a power cycle.
* What a guest does is not here: see `host`. What goes wrong, and when: see `faults`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from interlock.core.errors import HypervisorError, NotResponding, NotThere, Refused, Unavailable
from interlock.core.records import Disk, Spec
from interlock.core.states import PowerState
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
from interlock.hypervisors.simulated.guest import RUNS, Command, Guest
from interlock.hypervisors.simulated.host import SimulatedHost
from interlock.hypervisors.unmade import Unmade
from interlock.ports import HypervisorEvent, Observation, Permit


class SimulatedHypervisor(Unmade):
    """Drives a `SimulatedHost`, which may outlive it.

    Args:
        host: the guests; a new host in memory where none is given.
        delays_ms: how long each call takes before its effect, in milliseconds; a call not named takes no time.
        power_off_ms: how long a guest takes to heed its power button, in milliseconds.
        answer_timeout_s: how long an answer is waited for, in seconds.
        sleep: waits for seconds; give a clock's own to work in virtual time.
    """

    def __init__(
        self,
        host: SimulatedHost | None = None,
        *,
        delays_ms: Mapping[Method, int] | None = None,
        power_off_ms: int = 0,
        answer_timeout_s: float = 5.0,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self.host = host or SimulatedHost()
        self._delays_ms = dict(delays_ms or {})
        self._power_off_ms = power_off_ms
        self._answer_timeout_s = answer_timeout_s
        self._sleep = sleep
        self._listener: Callable[[HypervisorEvent], None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self._asked: dict[int, asyncio.Future[HypervisorError | None]] = {}
        self._unanswered: set[str] = set()

    # --------------------------------------------------------------------------------------------- taking charge

    async def open(self, listener: Callable[[HypervisorEvent], None]) -> None:
        self.host.load()
        for guest in self.host.guests.values():
            # Nobody watched how long ago the button was pressed; long enough.
            self.host.answer_button(guest.instance_id)
        self._listener = listener
        self.host.watch(self)
        for guest in list(self.host.guests.values()):
            self._tell(guest, during_watch=False)
            if guest.frozen and guest.thaw_after_ms is not None:
                self._later(guest.thaw_after_ms, self.host.thaw, guest.instance_id)

    async def close(self) -> None:
        self.crash()

    def crash(self) -> None:
        """End as the killed process of a server does: from now on this object sees nothing and changes nothing."""
        if self._listener is not None:
            self._listener = None
            self.host.unwatch(self)
        for task in self._tasks:
            task.cancel()

    async def known(self) -> frozenset[str]:
        self._must_be_open()
        return frozenset(self.host.guests)

    def console_path(self, instance_id: str) -> Path | None:  # noqa: ARG002 - no simulated guest has one
        return None

    # --------------------------------------------------------------------------------------------------- looking

    async def inspect(self, instance_id: str) -> Observation:
        self._must_be_open()
        guest = self.host.guests.get(instance_id)
        fault, quiet = self._meets(instance_id, Method.INSPECT)
        responsive = True
        if guest is not None and (guest.frozen or not quiet):
            await self._pass(Method.INSPECT, fault)
            if isinstance(fault, Hangs):
                self._freeze(guest, fault)
            responsive = not guest.frozen or await self._answers(guest)
            guest = self.host.guests.get(instance_id)
        if guest is None:
            return Observation(defined=False, power_state=PowerState.NONE)
        seen = guest.seen
        disks = tuple(guest.disks) if seen in RUNS else ()
        return Observation(defined=True, power_state=seen, disks=disks, responsive=responsive)

    async def _answers(self, guest: Guest) -> bool:
        """Wait for a frozen guest to thaw or end, as long as an answer is waited for."""
        if guest.instance_id in self._unanswered:
            return False
        timeout = asyncio.ensure_future(self._sleep(self._answer_timeout_s))
        try:
            while guest.frozen and not timeout.done():
                await self._stir(guest.instance_id, timeout)
        finally:
            timeout.cancel()
        return not guest.frozen

    async def wait_powered_off(self, instance_id: str) -> None:
        self._must_be_open()
        while (guest := self.host.guests.get(instance_id)) is not None:
            if guest.seen not in RUNS:
                return
            await self._stir(instance_id)

    async def _stir(self, instance_id: str, limit: asyncio.Future[Any] | None = None) -> None:
        """Wait until something changes of the instance, or the time-out has passed."""
        stirred: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(instance_id, set())
        waiting.add(stirred)
        try:
            await asyncio.wait({stirred} if limit is None else {stirred, limit}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.discard(stirred)
            if not waiting and self._waiting.get(instance_id) is waiting:
                del self._waiting[instance_id]

    # ------------------------------------------------------------------------------------- what the host can do

    async def define(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        self._must_be_open()
        fault, quiet = self._meets(instance_id, Method.DEFINE)
        if not quiet:
            await self._pass(Method.DEFINE, fault)
        if isinstance(fault, Refuses):
            raise Refused(fault.message)
        if instance_id not in self.host.guests:
            permit.check()
            self.host.define(instance_id, spec)
        if isinstance(fault, AnswerLost):
            await self._no_answer(instance_id)

    async def undefine(self, permit: Permit, instance_id: str) -> None:
        await self._end(permit, instance_id, Method.UNDEFINE)

    async def power_off(self, permit: Permit, instance_id: str) -> None:
        await self._end(permit, instance_id, Method.POWER_OFF)

    async def _end(self, permit: Permit, instance_id: str, method: Method) -> None:
        self._must_be_open()
        fault, quiet = self._meets(instance_id, method)
        if not quiet:
            await self._pass(method, fault)
        guest = self.host.guests.get(instance_id)
        if guest is None:
            return
        if method is Method.UNDEFINE:
            permit.check()
            self.host.undefine(guest)
        elif guest.power is not PowerState.NONE:
            permit.check()
            self.host.pull_plug(guest)
        self._unanswered.discard(instance_id)

    async def power_on(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        guest = self._guest(instance_id)
        if guest.power in RUNS and not (guest.starting and guest.spec != spec):
            await self._command(permit, instance_id, Command(method=Method.UNPAUSE))
            return
        fault, quiet = self._meets(instance_id, Method.POWER_ON)
        if quiet:
            permit.check()
            self.host.start(guest, spec)
            return
        permit.check()
        if isinstance(fault, Refuses):
            raise Refused(fault.message)
        # As a real one is: there, with its processors still halted, and let go when everything is in place.
        self.host.start(guest, spec, PowerState.PAUSED)
        await self._pass(Method.POWER_ON, fault)
        await self._carry_out(permit, Command(method=Method.UNPAUSE), instance_id, fault)
        if isinstance(fault, GuestVanishes):
            self.host.vanish(instance_id)

    # ----------------------------------------------------------------------------------- what a guest is told to

    async def press_power_button(self, permit: Permit, instance_id: str) -> None:
        await self._command(permit, instance_id, Command(method=Method.PRESS_POWER_BUTTON))

    async def reset(self, permit: Permit, instance_id: str) -> None:
        await self._command(permit, instance_id, Command(method=Method.RESET))

    async def pause(self, permit: Permit, instance_id: str) -> None:
        await self._command(permit, instance_id, Command(method=Method.PAUSE))

    async def unpause(self, permit: Permit, instance_id: str) -> None:
        await self._command(permit, instance_id, Command(method=Method.UNPAUSE))

    async def attach_disk(self, permit: Permit, instance_id: str, disk: Disk) -> None:
        await self._command(permit, instance_id, Command(method=Method.ATTACH_DISK, disk=disk))

    async def detach_disk(self, permit: Permit, instance_id: str, disk_id: str) -> None:
        await self._command(permit, instance_id, Command(method=Method.DETACH_DISK, disk_id=disk_id))

    async def _command(self, permit: Permit, instance_id: str, command: Command) -> None:
        guest = self._guest(instance_id)
        fault, quiet = self._meets(instance_id, command.method)
        if quiet and not guest.frozen:
            permit.check()
            self.host.execute(guest, command)
            return
        await self._pass(command.method, fault)
        if isinstance(fault, GuestVanishes):
            self.host.vanish(instance_id)
        await self._carry_out(permit, command, instance_id, fault)

    async def _carry_out(self, permit: Permit, command: Command, instance_id: str, fault: Fault | None) -> None:
        guest = self._guest(instance_id)
        if isinstance(fault, Refuses):
            raise Refused(fault.message)
        if isinstance(fault, Hangs):
            self._freeze(guest, fault)
        if guest.frozen:
            await self._ask_frozen(permit, guest, command)
            return
        permit.check()
        if isinstance(fault, GuestIgnores):
            if command.method is Method.DETACH_DISK and command.disk_id in guest.disks:
                await self._no_answer(instance_id)
            return
        self.host.execute(guest, command)
        if isinstance(fault, GuestPanics):
            self.host.guest_panics(instance_id)
        if isinstance(fault, AnswerLost):
            await self._no_answer(instance_id)

    async def _ask_frozen(self, permit: Permit, guest: Guest, command: Command) -> None:
        instance_id = guest.instance_id
        if instance_id not in self._unanswered and await self._asks_in_time(permit, guest, command):
            return
        if command.method is not Method.RESET:
            raise NotResponding(f"What holds instance {instance_id} has not answered {command.method}.")
        guest = self._guest(instance_id)
        permit.check()
        self.host.power_cycle(guest)
        self._unanswered.discard(instance_id)

    async def _asks_in_time(self, permit: Permit, guest: Guest, command: Command) -> bool:
        """Send a command to a frozen guest. Whether it was carried out before the time-out; raises what it answers."""
        permit.check()
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked[id(command)] = answer
        self.host.send(guest, command)
        timeout: asyncio.Future[Any] = asyncio.ensure_future(self._sleep(self._answer_timeout_s))
        try:
            await asyncio.wait({answer, timeout}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            timeout.cancel()
            del self._asked[id(command)]
            if not answer.done():
                self._unanswered.add(guest.instance_id)
        if not answer.done():
            return False
        error: HypervisorError | None = answer.result()
        if error is not None:
            raise error
        return True

    # -------------------------------------------------------------------------------------------- delay and fault

    def _meets(self, instance_id: str, method: Method) -> tuple[Fault | None, bool]:
        """The fault that a call meets, and whether it takes neither time nor harm."""
        plan = self.host.faults
        fault = None if plan.quiet else plan.next(instance_id, method)
        return fault, fault is None and not self._delays_ms

    async def _pass(self, method: Method, fault: Fault | None) -> None:
        delay_ms = self._delays_ms.get(method, 0) + (fault.delay_ms if isinstance(fault, Slow) else 0)
        if delay_ms > 0:
            await self._sleep(delay_ms / 1000)
            self._must_be_open()

    async def _no_answer(self, instance_id: str) -> None:
        await self._sleep(self._answer_timeout_s)
        raise NotResponding(f"The hypervisor has not answered what was asked of it for instance {instance_id}.")

    def _freeze(self, guest: Guest, fault: Hangs) -> None:
        if self.host.freeze(guest.instance_id, fault.thaw_after_ms) and fault.thaw_after_ms is not None:
            self._later(fault.thaw_after_ms, self.host.thaw, guest.instance_id)

    def _later(self, delay_ms: int, act: Callable[[str], bool], instance_id: str) -> None:
        """Let something happen by itself, unless nobody watches any more by then."""

        async def wait_and_act() -> None:
            await self._sleep(delay_ms / 1000)
            act(instance_id)

        task = asyncio.get_running_loop().create_task(wait_and_act())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _must_be_open(self) -> None:
        if self._listener is None:
            raise Unavailable(
                "The simulated hypervisor is not open.", remedy="Call open() first; a closed one is over."
            )

    def _guest(self, instance_id: str) -> Guest:
        self._must_be_open()
        guest = self.host.guests.get(instance_id)
        if guest is None:
            raise NotThere(f"The simulated host holds no instance {instance_id}.")
        return guest

    # ---------------------------------------------------------------------------------- what the host tells: Watcher

    def replaced(self) -> None:
        self.crash()

    def stirred(self, guest: Guest) -> None:
        if not guest.frozen:
            self._unanswered.discard(guest.instance_id)
        for waiting in self._waiting.get(guest.instance_id, ()):
            if not waiting.done():
                waiting.set_result(None)
        if guest.untold:
            # Not at once: whoever made it happen is in the middle of something.
            asyncio.get_running_loop().call_soon(self._tell, guest)

    def button_pressed(self, guest: Guest) -> None:
        if self._power_off_ms > 0:
            self._later(self._power_off_ms, self.host.answer_button, guest.instance_id)
        else:
            asyncio.get_running_loop().call_soon(self._answer_button, guest.instance_id)

    def answered(self, command: Command, error: HypervisorError | None) -> None:
        answer = self._asked.get(id(command))
        if answer is not None and not answer.done():
            answer.set_result(error)

    def _answer_button(self, instance_id: str) -> None:
        if self._listener is not None:
            self.host.answer_button(instance_id)

    def _tell(self, guest: Guest, *, during_watch: bool = True) -> None:
        listener = self._listener
        if listener is None or not guest.untold:
            return
        untold, guest.untold = guest.untold, []
        try:
            for kind in untold:
                listener(HypervisorEvent(instance_id=guest.instance_id, kind=kind, during_watch=during_watch))
        finally:
            self.host.keep(guest)
