"""Host leases: a host whose agent stops renewing its lease is fenced once its guests have certainly ended.

The agent measures a lease from its renewal request, and ends its guests when the lease expires; the server measures it
from the grant, which is later, and adds a margin. Both use monotonic clocks.

Renewals are granted in the thread that has the agents' connections, so that no load on this event loop keeps an agent
from its lease. Before a host is fenced, its lease is ended there; a renewal that came before that keeps it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import structlog

from interlock.core.errors import Invalid, StoreError, not_found
from interlock.driver.host_registry import HostRegistry
from interlock.ports import Drain, Host, HostCondition, HostEvent, HostState, Limits, Store
from interlock.ports.hosts import HISTORY_MAX, STALL_S

_LOG = structlog.get_logger(__name__)
_LOST_SHARE: Final = 2 / 3
"""The share of a lease without a renewal after which the host is lost: two renewals were missed."""


class Leases:
    """The state of every other host.

    Args:
        store: has the host records.
        hosts: knows which of them are connected.
        lease_ms: the length of a lease, in milliseconds; 0: no leases.
        margin_ms: the time between the expiry of a lease and the fencing of its host, in milliseconds.
        silence_ms: without leases, the time after which an unresponsive host is lost, in milliseconds.
        fenced: called with the name of each host that is fenced because its lease has expired.
    """

    def __init__(
        self,
        store: Store,
        hosts: HostRegistry,
        *,
        lease_ms: int,
        margin_ms: int,
        silence_ms: int,
        fenced: Callable[[str], Awaitable[None]],
    ) -> None:
        self._fenced = fenced
        self._store = store
        self._hosts = hosts
        self._lease_ms = lease_ms
        self._lost_after_s = lease_ms * _LOST_SHARE / 1000
        self._lost: set[str] = set()
        """The hosts that do not respond while their leases still run."""
        self._fence_after_s = (lease_ms + margin_ms if lease_ms else silence_ms + margin_ms) / 1000
        self._known: dict[str, Host] = {}
        self._own: Host | None = None
        self._granted: dict[str, float] = {}
        """When each host's last lease began, on the event loop's clock."""
        self._seen_at_ms: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None
        self._wakeup = asyncio.Event()

    async def open(self) -> None:
        """Assume that each host renewed its lease just before this server started."""
        now = asyncio.get_running_loop().time()
        stored = await self._store.hosts.all()
        renamed = {host.replaces for host in stored}
        for host in stored:
            if host.own:
                # A record of another name is from before the server's host was renamed.
                self._own = host if host.name == self._hosts.own else self._own
                continue
            self._known[host.name] = host
            self._granted[host.name] = now
            if host.name not in renamed:
                self._hosts.set_former_names(host.name, host.former_names)
            # Earlier decisions assumed that its guests may run.
            self._hosts.notify(host)
        self._task = asyncio.create_task(self._run(), name="leases of hosts")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def hosts(self) -> tuple[Host, ...]:
        """Return the other hosts, sorted by name."""
        return tuple(self._known[name] for name in sorted(self._known))

    def host(self, name: str) -> Host:
        """Return the host's record. Raises `NotFound`."""
        try:
            return self._known[name]
        except KeyError:
            raise not_found("Host", name) from None

    def reachable(self, name: str) -> bool:
        """Return False if the host is fenced: its guests have ended for certain."""
        host = self._known.get(self._hosts.current_name(name))
        return host is None or host.state is not HostState.FENCED

    def condition(self, name: str) -> HostCondition:
        """Return the present condition of a host; the server's own is always up."""
        host = self._known.get(self._hosts.current_name(name))
        if host is None or (host.state is HostState.UP and host.name not in self._lost):
            return HostCondition(name=name, state=HostState.UP)
        since_ms = host.history[-1].at_ms if host.history else host.last_seen_at_ms
        if host.state is HostState.FENCED:
            return HostCondition(name=name, state=HostState.FENCED, since_ms=since_ms)
        return HostCondition(name=name, state=HostState.LOST, since_ms=since_ms, fenced_at_ms=self.fenced_at_ms(name))

    def fenced_at_ms(self, name: str) -> int | None:
        """Return when an unresponsive host is fenced at the latest, on the store's clock; None if it is connected, or
        only an admin can fence it.
        """
        host = self._known.get(self._hosts.current_name(name))
        away = host is not None and host.state is not HostState.FENCED and not self._hosts.linked(host.name)
        left_ms = self.ends_in_ms(host.name) if host is not None and away else None
        return None if left_ms is None else self._store.now_ms() + left_ms

    def limits(self, name: str) -> Limits:
        """Return the host's capacity, as last reported by its agent."""
        host = self._known.get(self._hosts.current_name(name))
        return Limits() if host is None else host.limits

    def disk_free_mib(self, name: str) -> int | None:
        """Return the free space of its file system in MiB; None if unknown."""
        return self._hosts.disk_free_mib(name)

    async def on_connected(self, host: Host) -> None:
        """Record that a host's agent is connected; durable when this returns."""
        before = self._known.get(host.name)
        if before is None or not before.is_same(host):
            # Another host took the name after this one was admitted.
            self._hosts.disconnect(host.name)
            return
        self.renewed(host.name)
        kept = {name: getattr(before, name) for name in ("joined_at_ms", "drain", "replaces", "history")}
        host = msgspec.structs.replace(host, **kept)
        was_lost = host.name in self._lost
        self._lost.discard(host.name)
        await self.keep(self._noted(host, "back") if was_lost else host)

    def current_name(self, name: str) -> str:
        """Return the present name of a host, given its present or former one."""
        return self._hosts.current_name(name)

    def find(self, name: str) -> Host | None:
        """Return the host's record, or None."""
        return self._known.get(name)

    def ends_in_ms(self, name: str) -> int | None:
        """Return the time until the host is fenced if it does not respond; None if only an admin can fence it."""
        if not self._lease_ms or name not in self._granted:
            return None
        left_s = self._renewed_s(name) + self._fence_after_s - asyncio.get_running_loop().time()
        return max(0, round(left_s * 1000))

    async def rename(self, host: Host, name: str) -> Host:
        """Rename a host. Its instances are still to be moved to the new record, see `Host.replaces`."""
        before, runs_as = host.name, host.former or host.name
        renamed = msgspec.structs.replace(
            host,
            name=name,
            former=None if runs_as == name else runs_as,
            other_former=tuple(sorted((host.former_names | {before}) - {name, runs_as})),
            replaces=before,
        )
        await self._store.hosts.put(renamed)
        self._granted[name] = self._granted.pop(before)
        self._seen_at_ms[name] = self.last_seen_at_ms(before)
        self._known.pop(before, None)
        self._hosts.rename(before, name)
        self._hosts.set_former_names(name, renamed.former_names)
        self._known[name] = renamed
        return renamed

    async def drop(self, name: str) -> None:
        """Delete a host's record, whatever its state."""
        await self._store.hosts.delete(name)
        self._known.pop(name, None)
        self._granted.pop(name, None)
        self._lost.discard(name)
        self._hosts.set_former_names(name, frozenset())

    def renewed(self, name: str) -> None:
        """Start a new lease of a host now."""
        self._granted[name] = asyncio.get_running_loop().time()
        self._seen_at_ms[name] = self._store.now_ms()

    def _renewed_s(self, name: str) -> float:
        """Return when the present lease of a host began, on the monotonic clock."""
        return max(self._granted[name], self._hosts.renewed_s(name))

    def drain(self, name: str) -> Drain | None:
        """Return the host's drain, or None; also for the server's own host. Raises `NotFound`."""
        host = self._own if name == self._hosts.own else self.host(name)
        return None if host is None else host.drain

    async def set_drain(self, name: str, drain: Drain | None) -> None:
        """Start or end the drain of a host; durable when this returns. Raises `NotFound`."""
        if name == self._hosts.own:
            self._own = msgspec.structs.replace(self._own_host, drain=drain)
            await self._store.hosts.put(self._own)
            self._hosts.notify(self._own)
        else:
            await self.keep(msgspec.structs.replace(self.host(name), drain=drain))

    @property
    def _own_host(self) -> Host:
        now_ms = self._store.now_ms()
        return self._own or Host(name=self._hosts.own, own=True, joined_at_ms=now_ms, last_seen_at_ms=now_ms)

    async def note_own(self, kind: str, detail: str) -> None:
        """Record an event of the server's own host; durable when this returns."""
        self._own = self._noted(self._own_host, kind, detail)
        await self._store.hosts.put(self._own)

    def history(self, name: str) -> tuple[HostEvent, ...]:
        """Return a host's events, latest last; also for the server's own host. Raises `NotFound`."""
        host = self._own if name == self._hosts.own else self.host(name)
        return () if host is None else host.history

    def to_leave(self) -> tuple[Host, ...]:
        """Return the hosts that instances are to leave: the drained and the fenced ones."""
        own = () if self._own is None or self._own.drain is None else (self._own,)
        return own + tuple(one for one in self.hosts() if one.drain is not None or one.state is HostState.FENCED)

    async def fence(self, name: str, by: str) -> Host:
        """Fence a host, after an admin has confirmed that its guests have ended.

        Raises:
            NotFound: the host does not exist.
            Invalid: its agent is connected.
        """
        if await self._hosts.answers(name):
            raise Invalid(
                f"The agent of host {name} is connected, so its VMs may run.",
                remedy="Stop the agent first, or migrate its VMs away.",
            )
        host = self.host(name)
        if host.state is not HostState.FENCED:
            self._hosts.end_lease(name)
            try:
                host = await self.keep(msgspec.structs.replace(host, state=HostState.FENCED, fenced_by=by))
            except StoreError:
                self._hosts.resume_lease(name)
                raise
            self._hosts.disconnect(name)
        return host

    async def forget(self, name: str) -> None:
        """Delete a fenced host. Raises `NotFound`, `Invalid`."""
        if self.host(name).state is not HostState.FENCED:
            raise Invalid(f"Host {name} is not fenced.", remedy="Only a fenced host can be forgotten.")
        await self.drop(name)

    def last_seen_at_ms(self, name: str) -> int:
        """Return when the agent last responded, on the store's clock."""
        return self._seen_at_ms.get(name, self.host(name).last_seen_at_ms)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        stalled = False
        while True:
            self._wakeup.clear()
            now_s = loop.time()
            # What agents have sent while the server was busy is received before they are judged.
            due_s = now_s + STALL_S if stalled else await self._judge(now_s)
            try:
                async with asyncio.timeout_at(due_s):
                    await self._wakeup.wait()
                stalled = False
            except TimeoutError:
                stalled = not stalled and due_s is not None and loop.time() - due_s > STALL_S

    async def _judge(self, now_s: float) -> float | None:
        """Give up the hosts whose leases have ended. Return when to judge again (monotonic clock), or None."""
        due_s = None
        for name, host in tuple(self._known.items()):
            if host.state is not HostState.UP:
                continue
            linked = self._hosts.linked(name)
            renewed_s = self._renewed_s(name)
            ends_s, lost_s = renewed_s + self._fence_after_s, renewed_s + self._lost_after_s
            if not self._lease_ms and linked:
                # The end of the connection is not an event.
                ends_s = max(ends_s, now_s + self._fence_after_s)
            if ends_s <= now_s:
                if self._hosts.end_lease(name, renewed_s):
                    await self._give_up(host)
                    continue
                ends_s = lost_s = now_s + self._lost_after_s
            if self._lease_ms and name not in self._lost:
                if lost_s > now_s:
                    ends_s = lost_s
                elif not linked:
                    await self._note_lost(host)
            due_s = ends_s if due_s is None else min(due_s, ends_s)
        return due_s

    async def _note_lost(self, host: Host) -> None:
        """Record that a host does not respond, whose lease still runs."""
        _LOG.warning("host lost", host=host.name, fenced_in_s=(self.ends_in_ms(host.name) or 0) / 1000)
        self._lost.add(host.name)
        try:
            await self.keep(self._noted(host, "lost"))
        except StoreError as error:
            _LOG.error("failed to persist host state", host=host.name, why=error.message)

    def _noted(self, host: Host, kind: str, detail: str | None = None) -> Host:
        event = HostEvent(kind=kind, at_ms=self._store.now_ms(), by=host.fenced_by, detail=detail)
        return msgspec.structs.replace(host, history=(*host.history, event)[-HISTORY_MAX:])

    def _with_history(self, host: Host) -> Host:
        """Return the new record with its history, including the event of this change."""
        before = self._known.get(host.name)
        if before is not None and not host.history:
            host = msgspec.structs.replace(host, history=before.history)
        if not host.history:
            return self._noted(host, "joined")
        if before is not None and host.state is not before.state:
            return self._noted(host, "back" if host.state is HostState.UP else host.state.value)
        return host

    async def _give_up(self, host: Host) -> None:
        fenced = bool(self._lease_ms)
        state = HostState.FENCED if fenced else HostState.LOST
        _LOG.warning("host fenced" if fenced else "host lost", host=host.name)
        try:
            await self.keep(msgspec.structs.replace(host, state=state, fenced_by="lease" if fenced else None))
        except StoreError as error:
            _LOG.error("failed to persist host state", host=host.name, why=error.message)
            self._hosts.resume_lease(host.name)
            # Retry after the same time.
            self._granted[host.name] = asyncio.get_running_loop().time()
            self._wakeup.set()
        else:
            if fenced:
                await self._fenced(host.name)
            # One that was only unresponsive must be admitted again before it gets a lease.
            self._hosts.disconnect(host.name)

    async def admit(self, host: Host) -> Host:
        """Store the record of a host whose agent is admitted again; durable when this returns.

        A fenced host is up from now on: its agent gets a lease next, and what is fenced may not have one.
        """
        if host.state is HostState.FENCED:
            self.renewed(host.name)
            host = msgspec.structs.replace(host, state=HostState.UP, fenced_by=None)
        return await self.keep(host)

    async def keep(self, host: Host) -> Host:
        """Store a host's record; durable when this returns."""
        host = self._with_history(host)
        await self._store.hosts.put(host)
        if host.state is not HostState.UP:
            self._lost.discard(host.name)
        self._known[host.name] = host
        self._hosts.set_former_names(host.name, host.former_names)
        self._granted.setdefault(host.name, asyncio.get_running_loop().time())
        self._wakeup.set()
        self._hosts.notify(host)
        return host
