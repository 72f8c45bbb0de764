"""What a check of a store works with: the store under test, a clock, and decisions to keep. No promise is here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

from msgspec.structs import replace

from in_process.virtual_time import OneClock
from interlock.core.operations import Operation
from interlock.core.records import Admitted, Change, Event, Image, Instance, Request, Spec, Status
from interlock.core.states import VmState
from interlock.ports import Clock, IdempotencyKey, Store

START_MS: Final = 1_700_000_000_000
IMAGE: Final = Image(id="image", name="image", kind="kernel", path="/image", size_bytes=1, sha256="0" * 64)


class GivenClock(OneClock):
    """A clock that shows what it is set to, also an earlier time."""

    def __init__(self, shows_ms: int = START_MS) -> None:
        self.shows_ms = shows_ms

    def now_ms(self) -> int:
        return self.shows_ms


class StoreUnderTest(Protocol):
    """An adapter with data of its own, empty at first. One object is one set of data."""

    def make(self, clock: Clock) -> Store:
        """A new store on the data, not open yet. At most one of them is open at a time."""
        ...

    def make_after_power_cut(self, clock: Clock) -> Store:
        """A new store, not open yet, on what would be found if the power failed at this moment.

        The open store is not disturbed by it. Called on the event loop, and returns without waiting for the store.
        """
        ...


class Bench:
    """An open store, and the few steps that most checks begin with."""

    def __init__(self, under_test: StoreUnderTest) -> None:
        self.under_test = under_test
        self.clock = GivenClock()
        self.store = under_test.make(self.clock)

    async def reopen(self, clock: GivenClock | None = None) -> None:
        """Close the store and go on with another one on the same data."""
        await self.store.close()
        self.clock = clock or self.clock
        self.store = self.under_test.make(self.clock)
        await self.store.open()

    @asynccontextmanager
    async def power_cut(self) -> AsyncIterator[Store]:
        """Another store, open for this block, on what is durable now."""
        store = self.under_test.make_after_power_cut(GivenClock())
        await store.open()
        try:
            yield store
        finally:
            await store.close()

    async def create(self, instance_id: str, **fields: Any) -> Instance:
        """Keep an active instance; its id is its name unless the fields say otherwise."""
        return await self.store.create(creating(instance_id, **fields))

    async def grow(self, instance_id: str) -> int:
        """Raise the generation by one; what it is then."""
        return await self.store.change(instance_id, growing)

    async def admit(self, instance_id: str, request_id: str, key: IdempotencyKey | None = None) -> Admitted:
        return await self.store.change(instance_id, admitting(request_id), key)

    async def kept(self, instance_id: str) -> Instance:
        """The instance, which must be there."""
        instance = await self.store.instance(instance_id)
        assert instance is not None, f"there is no {instance_id}"
        return instance


def creating(instance_id: str, **fields: Any) -> Callable[[int], Change[Instance]]:
    """A decision that keeps a new instance and tells of it."""

    def decide(now_ms: int) -> Change[Instance]:
        given = {"name": instance_id, "project": "one", "host": "h1", "vm_state": VmState.ACTIVE} | fields
        instance = Instance(id=instance_id, created_at_ms=now_ms, updated_at_ms=now_ms, spec=Spec(image=IMAGE), **given)
        return Change(instance=instance, events=(telling(instance, "instance.created", now_ms),), answer=instance)

    return decide


def growing(instance: Instance, now_ms: int) -> Change[int]:
    """A decision that raises the generation and tells of it."""
    after = replace(instance, generation=instance.generation + 1, updated_at_ms=now_ms)
    return Change(instance=after, events=(telling(after, "instance.grown", now_ms),), answer=after.generation)


def putting(**fields: Any) -> Callable[[Instance, int], Change[None]]:
    """A decision that sets fields of the instance and tells nothing."""

    def decide(instance: Instance, now_ms: int) -> Change[None]:
        return Change(instance=replace(instance, updated_at_ms=now_ms, **fields), answer=None)

    return decide


def admitting(request_id: str, operation: Operation = Operation.REBOOT) -> Callable[[Instance, int], Change[Admitted]]:
    """A decision that queues a request, as the gate would."""

    def decide(instance: Instance, now_ms: int) -> Change[Admitted]:
        request = Request(
            id=request_id,
            instance_id=instance.id,
            operation=operation,
            parameters={"for": request_id},
            requested_by="somebody",
            rule="a-rule",
            admitted_at_ms=now_ms,
        )
        after = replace(
            instance,
            generation=instance.generation + 1,
            updated_at_ms=now_ms,
            outstanding=(*instance.outstanding, request),
        )
        return Change(
            instance=after,
            requests=(request,),
            events=(telling(after, "request.admitted", now_ms, request_id),),
            answer=Admitted(request=request, rule="a-rule"),
        )

    return decide


def serving(request_id: str) -> Callable[[Instance, int], Change[None]]:
    """A decision that admits a reboot and takes it at once, so that the task_state is `rebooting`."""

    def decide(instance: Instance, now_ms: int) -> Change[None]:
        admitted = admitting(request_id)(instance, now_ms)
        taken = replace(admitted.requests[0], status=Status.IN_FLIGHT, phase="rebooting", taken_at_ms=now_ms)
        after = replace(admitted.instance, outstanding=(*instance.outstanding, taken))
        return Change(instance=after, requests=(taken,), answer=None)

    return decide


def ending(request_id: str) -> Callable[[Instance, int], Change[Request]]:
    """A decision that ends a request that is outstanding."""

    def decide(instance: Instance, now_ms: int) -> Change[Request]:
        (before,) = (request for request in instance.outstanding if request.id == request_id)
        ended = replace(before, status=Status.SUCCEEDED, ended_at_ms=now_ms)
        rest = tuple(request for request in instance.outstanding if request.id != request_id)
        after = replace(instance, generation=instance.generation + 1, updated_at_ms=now_ms, outstanding=rest)
        return Change(
            instance=after,
            requests=(ended,),
            events=(telling(after, "request.ended", now_ms, request_id),),
            answer=ended,
        )

    return decide


def telling(instance: Instance, kind: str, now_ms: int, request_id: str | None = None) -> Event:
    return Event(
        kind=kind,
        instance_id=instance.id,
        at_ms=now_ms,
        generation=instance.generation,
        request_id=request_id,
        data={"name": instance.name, "nested": {"list": [1, None, "ü"]}},
    )


Check = Callable[[Bench], Awaitable[None]]

CHECKS: Final[list[Check]] = []
"""Every check, once the modules that hold them are imported; the package does that."""


def check(promise: Check) -> Check:
    """Add a promise to `CHECKS`."""
    CHECKS.append(promise)
    return promise


async def run(promise: Check, under_test: StoreUnderTest) -> None:
    """Run one check on a store that is opened before and closed afterwards."""
    bench = Bench(under_test)
    await bench.store.open()
    try:
        await promise(bench)
    finally:
        await bench.store.close()


@asynccontextmanager
async def raises(*errors: type[Exception]) -> AsyncIterator[None]:
    """Expect that one of these is raised, without a test framework."""
    try:
        yield
    except errors:
        return
    raise AssertionError(f"none of {[error.__name__ for error in errors]} was raised")
