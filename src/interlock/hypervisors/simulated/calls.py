"""How a call of the port passes: its delay, the fault that it meets, a guest that gives no answer.

The rules of this file:

* A call without delay and without fault costs a few microseconds and does not wait: everything slow is in methods
  of its own, behind one test.
* After a command that a frozen guest left unanswered, every later command to that guest is NotResponding at once
  until the guest answers again, so that nothing piles up behind it. Pulling the plug and removing always work, and a
  reset becomes a power cycle.
* Something long takes its delay in steps, with a report and a look at the permit after each.

What a guest does is not here: see `host`. What goes wrong, and when: see `faults`. Which calls there are: see
`adapter` and what it is put together from.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Final

from interlock.core.errors import Fenced, HypervisorError, NotResponding, NotThere, Refused, Unavailable
from interlock.hypervisors.simulated.console import SimulatedStream
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
from interlock.ports import HypervisorEvent, Permit, Report

_STEPS: Final = 5
"""In how many steps something long is done."""


class Calls:
    """What every call of the port is made with.

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
        self._streams: dict[str, set[SimulatedStream]] = {}

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
            if command.disk_id in guest.disks or command.interface_id in guest.interfaces:
                await self._no_answer(instance_id)
            return
        self.host.execute(guest, command)
        await self._afterwards(instance_id, fault)

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

    async def _take_long(
        self,
        permit: Permit,
        method: Method,
        fault: Fault | None,
        report: Report,
        total: int,
        still: Callable[[], None] | None = None,
    ) -> None:
        """Let something long take its time; `still` raises what it ends with when something comes between.

        Where it takes none and meets nothing, this does not wait.
        """
        delay_ms = self._delays_ms.get(method, 0) + (fault.delay_ms if isinstance(fault, Slow) else 0)
        report(0, total)
        for step in range(1, _STEPS + 1):
            if delay_ms > 0:
                await self._sleep(delay_ms / _STEPS / 1000)
                self._must_be_open()
                permit.check()
            if still is not None:
                still()
            if isinstance(fault, Refuses) and step * 2 > _STEPS:
                raise Refused(fault.message)
            report(total * step // _STEPS, total)

    async def _meet(self, guest: Guest, fault: Fault | None) -> None:
        """Let a guest meet the fault before something long begins, and see that what holds it answers."""
        if isinstance(fault, GuestVanishes):
            self.host.vanish(guest.instance_id)
        if isinstance(fault, Hangs):
            self._freeze(guest, fault)
        if guest.frozen and not await self._answers(guest):
            self._unanswered.add(guest.instance_id)
            raise NotResponding(f"What holds instance {guest.instance_id} gives no answer.")

    def _must_run(self, guest: Guest) -> None:
        """Raise `NotThere` unless it is still this guest that runs."""
        if self.host.guests.get(guest.instance_id) is not guest or guest.seen not in RUNS:
            raise NotThere(f"No guest of instance {guest.instance_id} runs on this host.")

    @contextlib.contextmanager
    def _standing_still(self, permit: Permit, guest: Guest) -> Iterator[None]:
        """Halt a guest that runs for the length of the block. What a server's end leaves halted remembers that."""
        permit.check()
        self.host.stand_still(guest)
        try:
            yield
        finally:
            if self._listener is not None and guest.standing_still:
                with contextlib.suppress(Fenced):
                    permit.check()
                    self.host.run_on(guest)

    async def _afterwards(self, instance_id: str, fault: Fault | None) -> None:
        """What a fault does once the effect has taken place."""
        if isinstance(fault, GuestPanics):
            self.host.guest_panics(instance_id)
        if isinstance(fault, AnswerLost):
            await self._no_answer(instance_id)

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

    def crash(self) -> None:
        """End as the killed process of a server does: from now on this object sees nothing and changes nothing."""
        if self._listener is not None:
            self._listener = None
            self.host.unwatch(self)
        for task in self._tasks:
            task.cancel()
        for stream in [stream for streams in self._streams.values() for stream in streams]:
            stream.end()

    def replaced(self) -> None:
        self.crash()

    def stirred(self, guest: Guest) -> None:
        if not guest.frozen:
            self._unanswered.discard(guest.instance_id)
        for waiting in self._waiting.get(guest.instance_id, ()):
            if not waiting.done():
                waiting.set_result(None)
        for stream in tuple(self._streams.get(guest.instance_id, ())):
            stream.look(guest)
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
