"""The dispatcher: registry of all state drivers, which it wakes on events and reconciles with the hosts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any, Final

import structlog

from interlock.core import host_changes, lifecycle
from interlock.core.errors import Fenced, HypervisorError, StoreClosed, StoreError
from interlock.core.operations import Lane, Operation
from interlock.core.records import ENDS, Change, Event, GuestEvent, Instance
from interlock.core.references import MIGRATIONS
from interlock.core.states import EXECUTING_STATES, HALTS, GuestTrouble, PowerState, VmState
from interlock.driver.operation_context import DriverDependencies, FencePermit
from interlock.driver.reconciliation import compared, release_strays
from interlock.driver.scheduled_actions import ScheduledActions
from interlock.driver.state_driver import ENDED, StateDriver
from interlock.policies.active_policy import PolicyInForce
from interlock.ports import Host, HostEvent, HypervisorEvent, InstanceFilter, every_instance
from interlock.ports.migration import MigrationPort

_LOG = structlog.get_logger(__name__)
_AT_ONCE: Final = 64
"""How many guests are inspected concurrently."""
_INSPECTION_S_MAX: Final = 30.0
"""The timeout for inspecting one guest at start, in seconds."""
_WAKING = frozenset(
    {
        *("request.admitted", "request.held", "request.approved", "request.interrupting", "request.cancelled"),
        *("instance.fenced", "instance.relabelled", "instance.host_fenced", "instance.host_back"),
    }
)

_ENDED = frozenset(f"request.{end.value}" for end in ENDS)
_HOST_EVENTS: Final = frozenset({"lost", "fenced", "back"})
"""The events of a host that are events of its instances too."""
_RESTING = frozenset({VmState.STOPPED, VmState.RESIZED})
"""The states in which the QEMU process of a guest that powered itself off may be left over."""
_LEAVES = MIGRATIONS | {Operation.DELETE, Operation.FORCE_DELETE}
"""The operations that remove an instance from a host."""
_MIGRATIONS = frozenset(operation.value for operation in MIGRATIONS)
_FENCING = frozenset({"instance.fenced", "instance.adopted"})
"""Events after which an older worker must not act."""


class Dispatcher:
    """The state drivers of the instances of one store."""

    def __init__(
        self,
        dependencies: DriverDependencies,
        policy: PolicyInForce,
        upkeep: ScheduledActions,
    ) -> None:
        self._dependencies = dependencies
        self._hosts = dependencies.hosts
        self._store = dependencies.store
        self._policy = policy
        self._upkeep = upkeep
        self._drivers: dict[str, StateDriver] = {}
        self._early: dict[str, list[tuple[str, HypervisorEvent]]] = {}
        """Events of guests whose instances are not served yet, with their host."""
        self._unseen: set[str] | None = None
        """The instances whose guests on this host are still to be inspected, before they are served; None until they
        are known."""
        self._taken_over: dict[str, Instance] = {}
        """The instances with requests in flight of an earlier process, until they are served again."""
        self._adopting: asyncio.Task[None] | None = None
        self._migrating: set[tuple[str, str]] = set()
        """Hosts and instances whose clean-up is deferred until a migration has ended."""
        self._background: set[asyncio.Task[None]] = set()
        self._host_events: dict[str, HostEvent | None] = {}
        """The last event of each other host that its instances were notified of."""
        self._open = False
        self._unlisten: list[Callable[[], None]] = []

    async def open(self) -> None:
        """Adopt requests in flight, and start inspecting the guests of this host; `adopted` waits for the end of that.

        An instance is served as soon as its guest has been inspected.
        """
        for other in await self._store.hosts.all():
            if not other.own:
                await self._subscribe(other.name)
                self._host_events[other.name] = other.history[-1] if other.history else None
        unsettled = await self._store.unsettled()
        self._taken_over = {one.id: one for one in await asyncio.gather(*map(self._adopt, unsettled))}
        self._open = True
        self._unlisten = [self._store.listen(self._on_events), self._store.on_admission(self.wake)]
        self._hosts.listen(self._on_host)
        self._adopting = asyncio.create_task(self._inspect_guests(), name="inspect the guests of this host")
        for host in self._host_events:
            # An earlier server may have ended before it had done so.
            self._in_background(self._reevaluate(host), f"re-evaluate queues on {host}")

    async def adopted(self) -> None:
        """Return when every guest of this host has been inspected, or its inspection has timed out.

        Raises:
            Unavailable: guests cannot run on this host.
            StoreError: the store cannot be read.
        """
        if self._adopting is not None:
            await asyncio.shield(self._adopting)

    @property
    def unseen(self) -> int | None:
        """The number of guests of this host still to be inspected; None while unknown."""
        return None if self._unseen is None else len(self._unseen)

    def serves(self, instance_id: str) -> bool:
        """Whether the instance is served: its guest was inspected."""
        return self._open and self._unseen is not None and instance_id not in self._unseen

    async def close(self) -> None:
        """Stop serving. Requests in flight that do not finish soon are adopted by the next server."""
        await self._upkeep.close()
        self._open = False
        for unlisten in self._unlisten:
            unlisten()
        if self._adopting is not None:
            self._adopting.cancel()
            await asyncio.wait({self._adopting})
        background = set(self._background)
        for task in background:
            task.cancel()
        if background:
            await asyncio.wait(background)
        await asyncio.gather(*(driver.close() for driver in tuple(self._drivers.values())))
        self._drivers.clear()
        await self._hosts.close()

    async def _subscribe(self, host: str) -> None:
        """Subscribe to the guest events of another host."""
        await self._hosts.remote(host).open(partial(self._on_guest_event, host))

    async def join(self, host: str, *, again: bool = False) -> None:
        """Add another host, whose agent has connected for the first time, or that was renamed (`again`)."""
        if again or host not in self._hosts:
            await self._subscribe(host)

    async def catch_up(self, host: str) -> None:
        """Reconcile the records with a host whose agent has reconnected and delivered its events.

        Raises:
            NotResponding: it has disconnected again.
        """
        await self._reconcile(host)
        for instance in await self._store.unsettled(host):
            self.wake(instance.id)

    def host_renamed(self, instance: Instance) -> None:
        """Restart the workers of an instance whose host was renamed."""
        if self.serves(instance.id):
            self._driver(instance.id).begin_again(instance)
        elif instance.id in self._taken_over:
            self._taken_over[instance.id] = instance

    # ---------------------------------------------------------------------------------------------------- waking

    def wake(self, instance_id: str) -> None:
        """Wake the state driver of an instance."""
        if self.serves(instance_id):
            self._driver(instance_id).wake()

    def _on_events(self, events: Sequence[Event]) -> None:
        """Wake the state drivers that the events concern. The store's listener."""
        # The driver that took a request together with its admission was woken by the hint.
        taken = {event.request_id for event in events if event.kind == "request.taken"}
        for event in events:
            if event.kind in _FENCING:
                self._hosts.superseded(event.instance_id, int(event.data["fence"]))
            if event.kind in _WAKING and (event.request_id not in taken or event.kind != "request.admitted"):
                self.wake(event.instance_id)
            if event.kind in _ENDED:
                self._tidy_again(event.instance_id)
            if event.kind == "request.superseded" and event.data["operation"] in _MIGRATIONS:
                self._in_background(self._tidy_target(event.request_id or ""), "clean up a migration target")

    def _in_background(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _on_host(self, host: Host) -> None:
        """Record in its instances that a host was lost, fenced or is back, and re-evaluate their queues."""
        if not self._open:
            return  # the next process reads the host records
        latest = host.history[-1] if host.history else None
        known = self._host_events.get(host.name)
        self._host_events[host.name] = latest
        name = f"re-evaluate queues on {host.name}"
        if latest is not None and latest != known and latest.kind in _HOST_EVENTS:
            self._in_background(self._note_host(host, f"host_{latest.kind}"), name)
        else:
            self._in_background(self._reevaluate(host.name), name)

    async def _note_host(self, host: Host, what: str) -> None:
        def decide(instance: Instance, now_ms: int) -> Change[tuple[str, ...]]:
            if instance.host != host.name or instance.vm_state is VmState.DELETED:
                return Change(instance=instance, answer=())
            policy, reachable = self._policy.for_waiting(instance), self._hosts.reachable(host.name)
            by = host.fenced_by
            return host_changes.note_host(instance, what, policy, now_ms, host_reachable=reachable, by=by)

        async def note(instance_id: str) -> None:
            await self._store.change(instance_id, decide)

        try:
            await _each([one.id async for one in every_instance(self._store, InstanceFilter(host=host.name))], note)
        except StoreError as error:
            _LOG.error("queue re-evaluation failed", host=host.name, why=error.message)

    async def _reevaluate(self, host: str) -> None:
        """Re-evaluate the queues of a host's instances."""

        def decide(instance: Instance, now_ms: int) -> Change[tuple[str, ...]]:
            policy, reachable = self._policy.for_waiting(instance), self._hosts.reachable(instance.host)
            return lifecycle.rejudge(instance, policy, now_ms, host_reachable=reachable)

        try:
            for instance in await self._store.unsettled(host):
                await self._store.change(instance.id, decide)
                if instance.held:
                    self.wake(instance.id)
        except StoreError as error:
            _LOG.error("queue re-evaluation failed", host=host, why=error.message)

    def _tidy_again(self, instance_id: str) -> None:
        for place in [place for place in self._migrating if place[1] == instance_id]:
            self._migrating.discard(place)
            self._in_background(self._tidy(*place), f"clean up {place[0]}")

    async def _tidy_target(self, request_id: str) -> None:
        """Remove the instance from the target of a superseded migration."""
        request = await self._store.request(request_id)
        target = None if request is None else request.parameters.get("host")
        if request is not None and isinstance(target, str) and self._hosts.linked(target):
            await self._tidy(target, request.instance_id)

    def _on_guest_event(self, host: str, event: HypervisorEvent) -> None:
        """Dispatch a guest event to its state driver. The hypervisors' listener."""
        if self.serves(event.instance_id):
            self._driver(event.instance_id).on_guest_event(host, event.kind)
        else:
            self._early.setdefault(event.instance_id, []).append((host, event))

    def _driver(self, instance_id: str) -> StateDriver:
        driver = self._drivers.get(instance_id)
        if driver is None:
            driver = StateDriver(instance_id, self._dependencies, self._policy, self._forget)
            self._drivers[instance_id] = driver
        return driver

    def _forget(self, instance_id: str) -> None:
        self._drivers.pop(instance_id, None)

    # ------------------------------------------------------------------------------------------------ at the start

    async def _adopt(self, instance: Instance) -> Instance:
        def decide(current: Instance, now_ms: int) -> Change[Instance]:
            change = lifecycle.adopt(current, now_ms)
            return Change(
                instance=change.instance, requests=change.requests, events=change.events, answer=change.instance
            )

        return await self._store.change(instance.id, decide)

    async def _inspect_guests(self) -> None:
        """Adopt this host's guests, and serve each instance as soon as its guest has been inspected."""
        own = self._hosts.own
        hypervisor = self._hosts.of(own)
        await hypervisor.open(partial(self._on_guest_event, own))
        known, running = await hypervisor.known(), await self._should_run(own)
        self._unseen = {*known, *running}
        await self._upkeep.open()
        for instance in await self._store.unsettled():
            if instance.id not in self._unseen:
                self._release(instance.id)
        for instance_id in [early for early in self._early if early not in self._unseen]:
            self._release(instance_id)
        await _each(sorted(self._unseen), lambda instance_id: self._inspect(instance_id, known, running))
        await release_strays(self._dependencies)

    async def _inspect(self, instance_id: str, known: frozenset[str], running: frozenset[str]) -> None:
        """Reconcile one guest with its record, then serve its instance."""
        own = self._hosts.own
        try:
            async with asyncio.timeout(_INSPECTION_S_MAX):
                if instance_id in known:
                    await self._tidy(own, instance_id)
                # A request in flight inspects the guest itself.
                if instance_id in running and instance_id not in self._early and not self._is_resumed(instance_id):
                    instance = await self._store.instance(instance_id)
                    if instance is not None:
                        await self._look(instance)
        except TimeoutError:
            _LOG.warning("guest inspection timed out", instance=instance_id)
        except (StoreClosed, asyncio.CancelledError):
            raise
        except Exception:  # noqa: BLE001 - one guest must not keep the others from being served
            _LOG.exception("guest inspection failed", instance=instance_id)
        self._release(instance_id)

    def _is_resumed(self, instance_id: str) -> bool:
        taken_over = self._taken_over.get(instance_id)
        return taken_over is not None and taken_over.served(Lane.STATE) is not None

    def _release(self, instance_id: str) -> None:
        """Start serving an instance: guest events first, then requests in flight, then queued ones."""
        if self._unseen is not None:
            self._unseen.discard(instance_id)
        early = self._early.pop(instance_id, [])
        # A request in flight inspects the guest itself; earlier events are obsolete.
        if not self._is_resumed(instance_id):
            for host, event in early:
                self._driver(instance_id).on_guest_event(host, event.kind)
        taken_over = self._taken_over.pop(instance_id, None)
        if taken_over is not None:
            self._driver(instance_id).resume(taken_over)
        else:
            self.wake(instance_id)

    async def _should_run(self, host: str) -> frozenset[str]:
        """Return the instances that should have a running guest on a host, by their records."""
        found = set()
        for state in EXECUTING_STATES:
            async for instance in every_instance(self._store, InstanceFilter(host=host, vm_state=state)):
                if instance.executing:
                    found.add(instance.id)
        return frozenset(found)

    async def _reconcile(self, host: str) -> None:
        """Record missed ends of guests, and remove instances that are deleted or on another host."""
        await _each(sorted(await self._hosts.of(host).known()), partial(self._tidy, host))
        await _each(sorted(await self._should_run(host)), self._look_unless_busy)

    async def _look_unless_busy(self, instance_id: str) -> None:
        driver = self._drivers.get(instance_id)
        if driver is not None and driver.has_guest_events:
            return  # pending events say more than an inspection
        instance = await self._store.instance(instance_id)
        if instance is not None and instance.executing and not instance.outstanding:
            await self._look(instance)

    async def _look(self, instance: Instance) -> None:
        seen = await self._hosts.of(instance.host).inspect(instance.id)
        if not seen.responsive:
            return
        found = ENDED.get(seen.power_state)
        if found is None and instance.guest_trouble is GuestTrouble.NOT_RESPONDING:
            found = GuestEvent.RESPONDING
        if found is None and instance.guest_trouble in HALTS and seen.power_state is PowerState.RUNNING:
            found = GuestEvent.WENT_ON
        if found is None and compared(instance, seen).any:
            found = GuestEvent.CHANGED
        if found is not None:
            self._on_guest_event(
                instance.host, HypervisorEvent(instance_id=instance.id, kind=found, during_watch=False)
            )

    async def _tidy(self, host: str, instance_id: str) -> None:
        """Clean up a host: remove an instance that is deleted or on another host.

        The QEMU process of a guest that powered itself off is ended. An instance in migration is left to its worker. A
        guest left paused by a migration that was aborted while its host was unreachable is resumed.

        Instances that the store does not know stay: they may be newer than a restored database.
        """
        self._migrating.add((host, instance_id))  # before reading: its migration may end meanwhile
        instance = await self._store.instance(instance_id)
        serving = None if instance is None else instance.served(Lane.STATE)
        leaves = serving is not None and serving.operation in _LEAVES
        if not leaves:
            self._migrating.discard((host, instance_id))
        if instance is None:
            _LOG.warning("unknown instance found on host", host=host, instance=instance_id)
            return
        permit = FencePermit(self._store, instance_id, instance.fence)
        hypervisor = self._hosts.of(host)
        elsewhere = self._hosts.of(instance.host) is not hypervisor
        try:
            if instance.vm_state is VmState.DELETED or (elsewhere and not leaves):
                await hypervisor.undefine(permit, instance_id)
            elif instance.vm_state in _RESTING and not instance.executing and not instance.outstanding:
                seen = await hypervisor.inspect(instance_id)
                if seen.power_state is PowerState.SHUTDOWN:
                    await hypervisor.power_off(permit, instance_id)
            elif instance.executing and serving is None and isinstance(hypervisor, MigrationPort):
                await hypervisor.resume_source(permit, instance_id)
        except (HypervisorError, Fenced, OSError) as error:
            _LOG.warning("host clean-up failed", host=host, instance=instance_id, why=str(error))


async def _each(names: Iterable[str], work: Callable[[str], Awaitable[None]]) -> None:
    """Call `work` for every name, with bounded concurrency."""
    left = iter(names)

    async def go_through() -> None:
        for name in left:
            await work(name)

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(_AT_ONCE):
                tasks.create_task(go_through())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures
