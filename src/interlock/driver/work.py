"""What one worker has in its hands while it serves one request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec

from interlock.config import DriverConfig
from interlock.core import lifecycle
from interlock.core.errors import Fenced, InterlockError, NotFound
from interlock.core.operations import Lane, Operation
from interlock.core.records import Change, Image, Instance, Kept, Moved, Request, Spec, StaleFence, Status
from interlock.core.states import PowerState
from interlock.driver.hosts import Hosts
from interlock.driver.meter import Meter
from interlock.ports import DumpFiles, Hypervisor, ImageFiles, Passwords, Report, Store, Volume


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """What a performance that succeeded leaves behind."""

    power_state: PowerState | None = None
    message: str | None = None
    """What is worth telling people about how it went."""
    arrived: bool = False
    """Whether the instance has come to another host of this server, and is there what it was."""


class Means(msgspec.Struct, frozen=True, kw_only=True):
    """What every driver of a server works with."""

    store: Store
    hosts: Hosts
    images: ImageFiles
    dumps: DumpFiles
    passwords: Passwords
    config: DriverConfig


class FencePermit:
    """The right of one worker to act: it lasts while the instance's fence is the one it was given (law 4)."""

    def __init__(self, store: Store, instance_id: str, fence: int) -> None:
        self._store = store
        self._instance_id = instance_id
        self.fence = fence

    def check(self) -> None:
        """Return if the worker may still act, else raise `Fenced`."""
        current = self._store.fence(self._instance_id)
        if current != self.fence:
            raise Fenced(
                f"A worker of the instance {self._instance_id} was fenced: it holds {self.fence}, "
                f"and the instance is at {current}."
            )


class Work:
    """One request being served: what is asked, on what, and the ways to say how it goes."""

    def __init__(
        self,
        means: Means,
        instance: Instance,
        request: Request,
    ) -> None:
        self.store = means.store
        self.hosts = means.hosts
        self.images = means.images
        self.dumps = means.dumps
        self.passwords = means.passwords
        self.config = means.config
        self.instance = instance
        self.request = request
        self.taken_up = request.status is Status.UNKNOWN
        """Whether an earlier worker began it, so that what it leads to may hold already."""
        self.permit = FencePermit(means.store, instance.id, request.fence)
        self.brought_back = False
        """Whether what the guest did meanwhile is no news any more, since it was brought back or is elsewhere now."""
        self.news = asyncio.Event()
        """Set by the state driver whenever something happened to the instance."""

    @property
    def id(self) -> str:
        return self.instance.id

    @property
    def hypervisor(self) -> Hypervisor:
        """That of the host where the instance is."""
        return self.hosts.of(self.instance.host)

    @property
    def spec(self) -> Spec:
        """The instance's spec; every instance that has a driver has one."""
        assert self.instance.spec is not None
        return self.instance.spec

    async def phase(self, name: str, detail: str | None = None) -> None:
        """Journal the phase that begins. It is durable when this returns, so a later worker can tell how far it came.

        Raises:
            Fenced: the request was superseded.
        """
        await self._report(phase=name, detail=detail)

    async def tell(self, detail: str) -> None:
        """Say what is being done, for people. Counts as a sign of life. Raises `Fenced`."""
        await self._report(detail=detail)

    async def alive(self) -> None:
        """Say that the operation lives. Raises `Fenced`."""
        await self._report()

    async def keep(self, kept: Kept, phase: str | None = None) -> None:
        """Keep what the instance is known by from now on, and the phase that begins with it, if one does.

        Both are durable when this returns, or neither. Raises `Fenced`.
        """
        await self._report(kept=kept, phase=phase)

    @contextlib.asynccontextmanager
    async def moving(self) -> AsyncIterator[Report]:
        """A report for something that moves bytes; what it says is kept as the request's progress now and then.

        Only a report that says something new is a sign of life. Raises `Fenced` where the request was superseded.
        """
        meter = Meter(self._report_moved, self.config.progress_interval_ms)
        try:
            yield meter
        except BaseException:
            with contextlib.suppress(InterlockError):
                await meter.close()
            raise
        await meter.close()

    async def _report_moved(self, moved: Moved) -> None:
        await self._report(moved=moved)

    async def _report(
        self,
        phase: str | None = None,
        detail: str | None = None,
        moved: Moved | None = None,
        kept: Kept | None = None,
    ) -> None:
        request = self.request

        def decide(instance: Instance, now_ms: int) -> Change[tuple[Instance, Request | StaleFence]]:
            change = lifecycle.progress(
                instance, request.id, request.fence, now_ms, phase=phase, detail=detail, moved=moved, kept=kept
            )
            return Change(
                instance=change.instance,
                requests=change.requests,
                events=change.events,
                answer=(change.instance, change.answer),
            )

        instance, answer = await self.store.change(self.id, decide)
        if isinstance(answer, StaleFence):
            raise Fenced(f"The request {request.id} was superseded.")
        self.instance, self.request = instance, answer

    async def keep_changed(self, change: Callable[[Spec], Spec]) -> None:
        """Keep the spec as `change` makes it of the present one, to which a component change may have added meanwhile.

        Raises:
            Fenced: the request was superseded.
        """
        request = self.request

        def decide(instance: Instance, now_ms: int) -> Change[tuple[Request | StaleFence, Instance]]:
            assert instance.spec is not None
            kept = Kept(spec=change(instance.spec))
            done = lifecycle.progress(instance, request.id, request.fence, now_ms, kept=kept)
            return Change(
                instance=done.instance, requests=done.requests, events=done.events, answer=(done.answer, done.instance)
            )

        answer, instance = await self.store.change(self.id, decide)
        if isinstance(answer, StaleFence):
            raise Fenced(f"The request {request.id} was superseded.")
        self.request, self.instance = answer, instance

    async def image(self, image_id: str) -> Image:
        """An image that a request names. Raises `NotFound` where it was deleted before its turn came."""
        for image in await self.store.images():
            if image.id == image_id:
                return image
        raise NotFound("The image was deleted before its turn came.", remedy="List the images that there are.")

    async def look(self) -> Instance:
        """The instance as it is recorded now."""
        instance = await self.store.instance(self.id)
        assert instance is not None
        return instance

    async def refresh(self) -> None:
        """Take note of what a component change has kept meanwhile."""
        self.instance = await self.look()

    async def keep_spec(self, spec: Spec, looked_at: Instance, *, guest_has_it: bool) -> bool:
        """Keep what the instance is from now on, and say whether that could be.

        It cannot if no guest had it when that was looked at, which was after the instance was `looked_at`, and by now a
        start is in flight or was, which may have read the spec before: the caller has to look again. Raises `Fenced`.
        """
        request = self.request

        def decide(instance: Instance, now_ms: int) -> Change[Request | StaleFence | None]:
            if not guest_has_it and (
                _place(instance) != _place(looked_at) or starting(looked_at) or starting(instance)
            ):
                return Change(instance=instance, answer=None)
            return lifecycle.progress(instance, request.id, request.fence, now_ms, kept=Kept(spec=spec))

        answer = await self.store.change(self.id, decide)
        if isinstance(answer, StaleFence):
            raise Fenced(f"The request {request.id} was superseded.")
        if answer is None:
            return False
        self.instance = lifecycle.known_by(self.instance, Kept(spec=spec), request.lane)
        return True

    async def release_strays(self) -> None:
        """Let go of volumes that a component change claimed which was superseded half-way.

        To be called while no machine runs. One that is being served beside this knows what it claims itself.
        """
        claimed = [one for one in await self.store.volumes(self.instance.project) if one.attached_to == self.id]
        if not claimed:
            return
        instance = await self.look()
        if instance.served(Lane.COMPONENT) is None and instance.spec is not None:
            await self._release(claimed, frozenset(disk.id for disk in instance.spec.disks))

    async def release_volumes(self, kept: frozenset[str]) -> None:
        """Let go of every volume that the instance has claimed, but those."""
        claimed = [one for one in await self.store.volumes(self.instance.project) if one.attached_to == self.id]
        await self._release(claimed, kept)

    async def _release(self, claimed: list[Volume], kept: frozenset[str]) -> None:
        for volume in claimed:
            if volume.id not in kept:
                self.permit.check()
                await self.store.release_volume(volume.id, self.id)

    async def while_alive(self, wait: Callable[[], Awaitable[None]], timeout_ms: int) -> bool:
        """Wait for something that takes its time, looking now and then whether the guest is still there.

        Each look that finds it responsive is a sign of life; one that does not is none, so that a frozen guest can be
        taken over. Answers whether what was waited for came within `timeout_ms`.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_ms / 1000
        task = asyncio.ensure_future(wait())
        try:
            while True:
                left = deadline - loop.time()
                await asyncio.wait((task,), timeout=max(0.0, min(left, self.config.heartbeat_ms / 1000)))
                if task.done():
                    task.result()
                    return True
                if loop.time() >= deadline:
                    return False
                if (await self.hypervisor.inspect(self.id)).responsive:
                    await self.alive()
        finally:
            task.cancel()

    async def until_start_has_ended(self) -> Instance:
        """The instance as soon as no start of it is in flight."""
        while True:
            self.news.clear()
            instance = await self.store.instance(self.id)
            assert instance is not None
            if not starting(instance):
                return instance
            await self.news.wait()


_STARTS = frozenset({Operation.START, Operation.CREATE, Operation.REBOOT, Operation.MIGRATE})


def _place(instance: Instance) -> tuple[object, ...]:
    """What is another one once a guest was started or ended between two looks, or went elsewhere."""
    return instance.vm_state, instance.state_since_ms, instance.host


def starting(instance: Instance) -> bool:
    """Whether something is in flight that starts the guest beside a component change."""
    serving = instance.served(Lane.STATE)
    return serving is not None and serving.operation in _STARTS
