"""Who waits for the events of one QEMU process: subscriptions by kind, and devices that are being unplugged."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from interlock.core.errors import GuestNotFound
from interlock.hypervisors.qemu.qmp.qmp_events import QemuEvent


class EventSubscription:
    """The events of one kind since the subscription."""

    def __init__(self, instance_id: str) -> None:
        self._instance_id = instance_id
        self._events: asyncio.Queue[QemuEvent | None] = asyncio.Queue()

    def put(self, event: QemuEvent | None) -> None:
        """Add an event; None: the process has ended."""
        self._events.put_nowait(event)

    async def next(self) -> QemuEvent:
        """Return the next event. Raises `GuestNotFound` when the process has ended."""
        event = await self._events.get()
        if event is None:
            self.put(None)
            raise GuestNotFound(f"The QEMU process of instance {self._instance_id} has ended.")
        return event

    async def next_within(self, timeout_ms: int) -> QemuEvent | None:
        """As `next`; return None on timeout."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_ms / 1000):
                return await self.next()
        return None


class EventSubscriptions:
    """All subscriptions to one process."""

    def __init__(self, instance_id: str) -> None:
        self._instance_id = instance_id
        self._by_kind: dict[str, set[EventSubscription]] = {}
        self._ended = False

    def __bool__(self) -> bool:
        return any(self._by_kind.values())

    @contextlib.contextmanager
    def subscribe(self, kind: str) -> Iterator[EventSubscription]:
        """Subscribe to the events of one kind for the length of the block."""
        subscription = EventSubscription(self._instance_id)
        self._by_kind.setdefault(kind, set()).add(subscription)
        if self._ended:
            subscription.put(None)
        try:
            yield subscription
        finally:
            self._by_kind[kind].discard(subscription)

    def publish(self, event: QemuEvent) -> None:
        for subscription in self._by_kind.get(event.event, ()):
            subscription.put(event)

    def end(self) -> None:
        """Note that the process has ended."""
        self._ended = True
        for subscriptions in self._by_kind.values():
            for subscription in subscriptions:
                subscription.put(None)


class UnplugWaiters:
    """Who waits until the guest has released a device."""

    def __init__(self) -> None:
        self._futures: dict[str, set[asyncio.Future[bool]]] = {}

    def expect(self, device: str) -> asyncio.Future[bool]:
        """Return a future: true when the guest has released the device, false if it refused or ended."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._futures.setdefault(device, set()).add(future)
        future.add_done_callback(lambda done: self._discard(device, done))
        return future

    def _discard(self, device: str, future: asyncio.Future[bool]) -> None:
        futures = self._futures.get(device, set())
        futures.discard(future)
        if not futures:
            self._futures.pop(device, None)

    def resolve(self, device: str, *, released: bool) -> bool:
        """Complete the futures of a device; return whether there were any."""
        futures = tuple(self._futures.get(device, ()))
        for future in futures:
            if not future.done():
                future.set_result(released)
        return bool(futures)

    def resolve_all(self) -> None:
        """Complete all futures: the guest has ended."""
        for device in tuple(self._futures):
            self.resolve(device, released=False)
