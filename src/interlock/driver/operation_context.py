"""The context of one request in flight: instance, permit, ports, and progress reports."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec

from interlock.config import DriverConfig
from interlock.core import lifecycle
from interlock.core.errors import Fenced, InterlockError, NotFound
from interlock.core.operations import Lane, Operation
from interlock.core.records import (
    Change,
    Image,
    Instance,
    InstanceUpdate,
    Request,
    Spec,
    StaleFence,
    Status,
    TransferProgress,
)
from interlock.core.states import PowerState
from interlock.driver.host_registry import HostRegistry
from interlock.driver.progress import ProgressReporter
from interlock.ports import DumpFiles, Hypervisor, ImageFiles, Passwords, Store, TransferReport, Volume


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a successful operation."""

    power_state: PowerState | None = None
    message: str | None = None
    """A note for people."""
    arrived: bool = False
    """Whether the instance is now on another host of this server, with its vm_state unchanged."""


class DriverDependencies(msgspec.Struct, frozen=True, kw_only=True):
    """The dependencies of all state drivers."""

    store: Store
    hosts: HostRegistry
    images: ImageFiles
    dumps: DumpFiles
    passwords: Passwords
    config: DriverConfig


class FencePermit:
    """The right of one worker to act (law 4): valid while the instance's fence is unchanged, until `end`."""

    def __init__(self, store: Store, instance_id: str, fence: int) -> None:
        self._store = store
        self._instance_id = instance_id
        self.fence = fence
        self._ended = False

    def end(self) -> None:
        """Invalidate it, because the request has ended."""
        self._ended = True

    def check(self) -> None:
        """Return if the worker may still act, else raise `Fenced`."""
        if self._ended:
            raise Fenced(f"A worker of the instance {self._instance_id} continued after its request had ended.")
        current = self._store.fence(self._instance_id)
        if current != self.fence:
            raise Fenced(
                f"A worker of the instance {self._instance_id} was fenced: its fence is {self.fence}, "
                f"the instance's is {current}."
            )


class OperationContext:
    """One request in flight, with its instance and its dependencies."""

    def __init__(
        self,
        dependencies: DriverDependencies,
        instance: Instance,
        request: Request,
    ) -> None:
        self.store = dependencies.store
        self.hosts = dependencies.hosts
        self.images = dependencies.images
        self.dumps = dependencies.dumps
        self.passwords = dependencies.passwords
        self.config = dependencies.config
        self.instance = instance
        self.request = request
        self.taken_up = request.status is Status.UNKNOWN
        """Whether an earlier worker began it, so that it may be partly or completely done."""
        self.permit = FencePermit(dependencies.store, instance.id, request.fence)
        self.brought_back = False
        """Whether guest events from before are obsolete, because the guest was restarted or is on another host now."""
        self.untouched = False
        """Whether nothing was changed yet, so that the vm_state stays if it fails now."""
        self.awaited_host: str | None = None
        """The host that is being called, if that is not the instance's own."""
        self.on_progress: Callable[[], None] = _nothing
        """Called after each recorded sign of life."""
        self.wakeup = asyncio.Event()
        """Set by the state driver after each event of the instance."""

    @property
    def id(self) -> str:
        return self.instance.id

    @property
    def hypervisor(self) -> Hypervisor:
        """The hypervisor of the instance's host."""
        return self.hosts.of(self.instance.host)

    @property
    def called_host(self) -> str:
        """The host that is being called."""
        return self.awaited_host or self.instance.host

    @property
    def spec(self) -> Spec:
        """The instance's spec. A launched instance has a root disk, even if its record is older than `root_made`."""
        spec = self.instance.spec
        assert spec is not None
        if spec.root_made is None and self.instance.launched:
            return msgspec.structs.replace(spec, root_made=True)
        return spec

    async def phase(self, name: str, detail: str | None = None) -> None:
        """Record the start of a phase, durable when this returns, for a later worker. Raises `Fenced`."""
        await self._report(phase=name, detail=detail)

    async def describe(self, detail: str) -> None:
        """Record a status text, which is a sign of life. Raises `Fenced`."""
        await self._report(detail=detail)

    async def alive(self) -> None:
        """Record a sign of life. Raises `Fenced`."""
        await self._report()

    async def keep(self, kept: InstanceUpdate, phase: str | None = None) -> None:
        """Record an update of the instance, and the phase that it begins, atomically. Raises `Fenced`."""
        await self._report(kept=kept, phase=phase)

    @contextlib.asynccontextmanager
    async def moving(self) -> AsyncIterator[TransferReport]:
        """Yield a progress callback, whose reports are recorded in intervals as the request's progress.

        Only a report with something new is a sign of life. Raises `Fenced`.
        """
        reporter = ProgressReporter(
            self._report_moved, self.config.progress_interval_ms, self.config.progress_interval_max_ms
        )
        try:
            yield reporter
        except BaseException:
            with contextlib.suppress(InterlockError):
                await reporter.close()
            raise
        await reporter.close()

    async def _report_moved(self, moved: TransferProgress) -> None:
        await self._report(moved=moved)

    async def _report(
        self,
        phase: str | None = None,
        detail: str | None = None,
        moved: TransferProgress | None = None,
        kept: InstanceUpdate | None = None,
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
        self.on_progress()

    async def keep_changed(self, change: Callable[[Spec], Spec]) -> None:
        """Apply `change` to the present spec, including concurrent component changes. Raises `Fenced`."""
        request = self.request

        def decide(instance: Instance, now_ms: int) -> Change[tuple[Request | StaleFence, Instance]]:
            assert instance.spec is not None
            kept = InstanceUpdate(spec=change(instance.spec))
            done = lifecycle.progress(instance, request.id, request.fence, now_ms, kept=kept)
            return Change(
                instance=done.instance, requests=done.requests, events=done.events, answer=(done.answer, done.instance)
            )

        answer, instance = await self.store.change(self.id, decide)
        if isinstance(answer, StaleFence):
            raise Fenced(f"The request {request.id} was superseded.")
        self.request, self.instance = answer, instance

    async def image(self, image_id: str) -> Image:
        """Return an image of the request. Raises `NotFound` if it was deleted while the request was queued."""
        for image in await self.store.images.all():
            if image.id == image_id:
                return image
        raise NotFound(
            f"The image {image_id} was deleted while the request was queued.",
            remedy="List images with `interlock image list`.",
        )

    async def look(self) -> Instance:
        """Read the instance from the store."""
        instance = await self.store.instance(self.id)
        assert instance is not None
        return instance

    async def refresh(self) -> None:
        """Reload the instance, with concurrent component changes."""
        self.instance = await self.look()

    async def keep_spec(self, spec: Spec, looked_at: Instance, *, guest_has_it: bool) -> bool:
        """Record the spec, and return whether that was possible.

        It is not if no guest had the device at the inspection after `looked_at`, and a start that may have read the old
        spec has been in flight since: the caller has to inspect the guest again. Raises `Fenced`.
        """
        request = self.request

        def decide(instance: Instance, now_ms: int) -> Change[Request | StaleFence | None]:
            if not guest_has_it and (
                _place(instance) != _place(looked_at) or starting(looked_at) or starting(instance)
            ):
                return Change(instance=instance, answer=None)
            return lifecycle.progress(instance, request.id, request.fence, now_ms, kept=InstanceUpdate(spec=spec))

        answer = await self.store.change(self.id, decide)
        if isinstance(answer, StaleFence):
            raise Fenced(f"The request {request.id} was superseded.")
        if answer is None:
            return False
        self.instance = lifecycle.apply_update(self.instance, InstanceUpdate(spec=spec), request.lane)
        return True

    async def release_strays(self) -> None:
        """Complete pending detachments, and release claimed volumes that are not attached.

        Call it while no QEMU process runs. Claims of a concurrent component change are left to that.
        """
        instance = await self.look()
        if instance.detaching and instance.served(Lane.COMPONENT) is None:
            self.permit.check()
            self.instance = await self.store.change(self.id, lifecycle.complete_detachments)
        claimed = [one for one in await self.store.volumes.all(self.instance.project) if one.attached_to == self.id]
        if not claimed:
            return
        instance = await self.look()
        if instance.served(Lane.COMPONENT) is None and instance.spec is not None:
            await self._release(claimed, frozenset(disk.id for disk in instance.spec.disks))

    async def release_volumes(self, kept: frozenset[str]) -> None:
        """Release every volume that the instance has claimed, but those."""
        claimed = [one for one in await self.store.volumes.all(self.instance.project) if one.attached_to == self.id]
        await self._release(claimed, kept)

    async def _release(self, claimed: list[Volume], kept: frozenset[str]) -> None:
        for volume in claimed:
            if volume.id not in kept:
                self.permit.check()
                await self.store.volumes.release(volume.id, self.id)

    async def while_alive(self, wait: Callable[[], Awaitable[None]], timeout_ms: int) -> bool:
        """Wait with a timeout, and inspect the guest at intervals; return False if it timed out.

        Each inspection that finds the guest responsive is a sign of life; an unresponsive guest can be taken over.
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
        """Wait until no start is in flight, and return the instance."""
        while True:
            self.wakeup.clear()
            instance = await self.store.instance(self.id)
            assert instance is not None
            if not starting(instance):
                return instance
            await self.wakeup.wait()


def _nothing() -> None:
    """Do nothing."""


_STARTS = frozenset({Operation.START, Operation.CREATE, Operation.REBOOT, Operation.MIGRATE})


def _place(instance: Instance) -> tuple[object, ...]:
    """Return values that change whenever a guest was started, ended or migrated."""
    return instance.vm_state, instance.state_since_ms, instance.host


def starting(instance: Instance) -> bool:
    """Whether a state change that starts the guest is in flight."""
    serving = instance.served(Lane.STATE)
    return serving is not None and serving.operation in _STARTS
