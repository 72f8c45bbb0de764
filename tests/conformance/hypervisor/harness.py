"""What a check of a hypervisor works with: the host under test, a permit, a listener, and the first steps.

No promise is written here: see `lifecycle`, `faults` and the other modules.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, Protocol

from interlock.core.errors import Fenced, NotResponding
from interlock.core.records import Disk, GuestEvent, Spec
from interlock.core.states import PowerState
from interlock.ports import Hypervisor, HypervisorEvent


class HypervisorUnderTest(Protocol):
    """An adapter, and hands on the guests that it holds. One object is one host, new and empty."""

    patience_s: float
    """How long anything that is promised may take, in seconds."""
    notice_s: float
    """How long the adapter may take to say that a guest does not answer, in seconds."""

    def make(self) -> Hypervisor:
        """A new adapter, not open yet, for the same host."""
        ...

    async def abandon(self, hypervisor: Hypervisor) -> None:
        """Take the adapter from its host as nearly as possible like the end of its process by `kill -9`."""
        ...

    def spec(self) -> Spec:
        """Something that boots and heeds its power button."""
        ...

    def disk(self, disk_id: str) -> Disk:
        """A disk that can be attached: the same one for the same id."""
        ...

    async def mark_root(self, spec: Spec, instance_id: str, mark: int) -> None:
        """Write a number, 1 to 255, on the instance's root disk, which nobody uses."""
        ...

    async def root_mark(self, spec: Spec, instance_id: str) -> int | None:
        """The number that was last written on the root disk; 0 if none was, None where there is no such disk."""
        ...

    async def until_up(self, instance_id: str) -> None:
        """Return when the guest can heed its power button."""
        ...

    async def incarnation(self, instance_id: str) -> object:
        """Something that is another one for each guest that is started, such as the id of its process."""
        ...

    async def remains(self, instance_id: str) -> list[str]:
        """What the host still has of the instance, for people; empty if nothing."""
        ...

    async def guest_power_off(self, instance_id: str) -> None:
        """Let the guest power itself off."""
        ...

    async def guest_reset(self, instance_id: str) -> None:
        """Let the guest reboot itself."""
        ...

    async def guest_panic(self, instance_id: str) -> None:
        """Let the guest panic."""
        ...

    async def guest_ignores(self, instance_id: str) -> None:
        """Let the guest ignore its power button from now on."""
        ...

    async def kill(self, instance_id: str) -> None:
        """End what holds the guest."""
        ...

    async def freeze(self, instance_id: str) -> None:
        """Let what holds the guest do nothing any more, without ending it."""
        ...

    async def thaw(self, instance_id: str) -> None:
        """Let what holds the guest go on."""
        ...


class GivenPermit:
    """A permit that lasts until it is revoked."""

    fence = 0

    def __init__(self) -> None:
        self._revoked = False

    def revoke(self) -> None:
        self._revoked = True

    def check(self) -> None:
        if self._revoked:
            raise Fenced("The permit of this check was revoked.")


_OF_THE_MACHINE: Final = frozenset({GuestEvent.NOT_RESPONDING, GuestEvent.RESPONDING, GuestEvent.CHANGED})


class Told:
    """A listener that remembers what it was told, and lets a check wait for more."""

    def __init__(self) -> None:
        self.events: list[HypervisorEvent] = []
        self._more = asyncio.Event()

    def __call__(self, event: HypervisorEvent) -> None:
        self.events.append(event)
        self._more.set()

    def kinds(self) -> list[GuestEvent]:
        """What guests did; not whether what holds them answered meanwhile."""
        return [event.kind for event in self.events if event.kind not in _OF_THE_MACHINE]

    async def until(self, kind: GuestEvent, patience_s: float, times: int = 1) -> None:
        """Return when such an event was told so many times; an AssertionError says what was told instead."""
        try:
            async with asyncio.timeout(patience_s):
                while [event.kind for event in self.events].count(kind) < times:
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            told = [event.kind.value for event in self.events]
            raise AssertionError(f"{kind} was not told {times} times, but {told}") from None


class Bench:
    """One host with an open adapter, and the few steps that most checks begin with."""

    def __init__(self, under_test: HypervisorUnderTest) -> None:
        self.host = under_test
        self.permit = GivenPermit()
        self.told = Told()
        self.hypervisor = under_test.make()
        self.spec = under_test.spec()
        self._open = False

    async def open(self) -> list[HypervisorEvent]:
        """Go on with a new adapter, and answer what it told before it was open."""
        self.told = Told()
        self.hypervisor = self.host.make()
        await self.hypervisor.open(self.told)
        self._open = True
        return list(self.told.events)

    async def abandon(self) -> None:
        """Let the adapter end as its killed process would."""
        self._open = False
        await self.host.abandon(self.hypervisor)

    async def close(self) -> None:
        self._open = False
        await self.hypervisor.close()

    async def clear(self) -> None:
        """Remove everything from the host, whatever a check left there, and close the adapter."""
        if not self._open:
            await self.open()
        for instance_id in await self.hypervisor.known():
            await self.hypervisor.undefine(GivenPermit(), instance_id)
        await self.close()

    async def start(self, instance_id: str = "one", spec: Spec | None = None) -> None:
        """Define and start an instance, and wait until its guest is up."""
        await self.hypervisor.define(self.permit, instance_id, spec or self.spec)
        await self.hypervisor.power_on(self.permit, instance_id, spec or self.spec)
        await self.host.until_up(instance_id)

    async def power(self, instance_id: str = "one") -> PowerState:
        return (await self.hypervisor.inspect(instance_id)).power_state

    async def in_time(self, promised: Awaitable[object]) -> None:
        """Wait for something promised, as long as patience lasts."""
        async with asyncio.timeout(self.host.patience_s):
            await promised

    async def expect(self, kind: GuestEvent, times: int = 1) -> None:
        await self.told.until(kind, self.host.patience_s, times)

    async def leave_unanswered(self, instance_id: str = "one") -> None:
        """Freeze the guest and send it a pause, which it does not answer."""
        await self.host.freeze(instance_id)
        async with raises(NotResponding):
            await self.in_time(self.hypervisor.pause(self.permit, instance_id))


Check = Callable[[Bench], Awaitable[None]]

CHECKS: Final[list[Check]] = []
"""Every check, once the modules that hold them are imported; the package does that."""


def check(promise: Check) -> Check:
    """Add a promise to `CHECKS`."""
    CHECKS.append(promise)
    return promise


async def run(promise: Check, under_test: HypervisorUnderTest) -> None:
    """Run one check on a new host, and remove afterwards what it left there."""
    bench = Bench(under_test)
    await bench.open()
    try:
        await promise(bench)
    finally:
        await bench.clear()


@asynccontextmanager
async def raises(*errors: type[Exception]) -> AsyncIterator[None]:
    """Expect that one of these is raised, without a test framework."""
    try:
        yield
    except errors:
        return
    raise AssertionError(f"none of {[error.__name__ for error in errors]} was raised")
