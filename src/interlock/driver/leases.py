"""Which of the other hosts live. A host is given up only when its guests cannot run any more.

Each holds its guests on a lease that its agent renews. The agent counts a lease from when it asked for it, and its
guests are ended when it runs out; here it is counted from when it was granted, which is later, and a margin is waited
for beyond its end. Both count on clocks that cannot be set.
"""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import structlog

from interlock.core.errors import Invalid, NotFound, StoreError
from interlock.driver.hosts import Hosts
from interlock.ports import Host, HostState, Limits, Store

_LOG = structlog.get_logger(__name__)


class Leases:
    """Keeps the state of every other host.

    Args:
        store: keeps the hosts.
        hosts: tells which of them are connected.
        lease_ms: how long a lease is, in milliseconds; 0: hosts hold their guests without.
        margin_ms: how long after the end of a lease its host counts as fenced, in milliseconds.
        silence_ms: how long a host may be silent before it is lost, where there are no leases, in milliseconds.
    """

    def __init__(self, store: Store, hosts: Hosts, *, lease_ms: int, margin_ms: int, silence_ms: int) -> None:
        self._store = store
        self._hosts = hosts
        self._lease_ms = lease_ms
        self._patience_s = (lease_ms + margin_ms if lease_ms else silence_ms + margin_ms) / 1000
        self._known: dict[str, Host] = {}
        self._granted: dict[str, float] = {}
        """When each host's last lease began, on the event loop's clock."""
        self._seen_at_ms: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        hosts.reachable = self.reachable

    async def open(self) -> None:
        """Take it that each host got a lease at the last moment before this server started."""
        now = asyncio.get_running_loop().time()
        for host in await self._store.hosts():
            self._known[host.name] = host
            self._granted[host.name] = now
            # What was decided until now took it for one whose guests may run.
            self._hosts.tell(host)
        self._task = asyncio.create_task(self._run(), name="leases of hosts")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def hosts(self) -> tuple[Host, ...]:
        """The other hosts, by name."""
        return tuple(self._known[name] for name in sorted(self._known))

    def host(self, name: str) -> Host:
        """Raises `NotFound`."""
        try:
            return self._known[name]
        except KeyError:
            raise NotFound(f"There is no host {name[:80]}.", remedy="List them with `interlock host list`.") from None

    def reachable(self, name: str) -> bool:
        """False where a host's guests have ended for certain."""
        host = self._known.get(name)
        return host is None or host.state is not HostState.FENCED

    def limits(self, name: str) -> Limits:
        """What may be promised of that host, as its agent last said."""
        host = self._known.get(name)
        return Limits() if host is None else host.limits

    def disk_free_mib(self, name: str) -> int | None:
        """What its file system has free for real; None where its agent does not say."""
        return self._hosts.disk_free_mib(name)

    async def heard(self, host: Host) -> None:
        """Take note of a host whose agent is connected; durable when this returns."""
        before = self._known.get(host.name)
        self.renewed(host.name)
        if before is not None:
            host = msgspec.structs.replace(host, joined_at_ms=before.joined_at_ms)
        await self._keep(host)

    def renewed(self, name: str) -> None:
        """A host has its lease anew, from this moment."""
        self._granted[name] = asyncio.get_running_loop().time()
        self._seen_at_ms[name] = self._store.now_ms()
        self._news.set()

    async def fence(self, name: str, by: str) -> Host:
        """Take an admin's word that the guests of a host have ended.

        Raises:
            NotFound: there is no such host.
            Invalid: its agent is connected, so they may run.
        """
        host = self.host(name)
        if self._hosts.linked(name):
            raise Invalid(
                f"The agent of the host {name} is connected: its guests run.",
                remedy="Stop the agent first, or migrate its instances away.",
            )
        if host.state is not HostState.FENCED:
            host = await self._keep(msgspec.structs.replace(host, state=HostState.FENCED, fenced_by=by))
        return host

    async def forget(self, name: str) -> None:
        """Forget a host that is given up. Raises `NotFound`, `Invalid`."""
        if self.host(name).state is not HostState.FENCED:
            raise Invalid(f"The host {name} is not fenced.", remedy="Only a host that is given up can be forgotten.")
        await self._store.delete_host(name)
        self._known.pop(name, None)
        self._granted.pop(name, None)

    def last_seen_at_ms(self, name: str) -> int:
        """When the agent last gave a sign of life, on the store's clock."""
        return self._seen_at_ms.get(name, self.host(name).last_seen_at_ms)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._news.clear()
            now, due = loop.time(), None
            for name, host in tuple(self._known.items()):
                if host.state is not HostState.UP or (not self._lease_ms and self._hosts.linked(name)):
                    continue
                ends = self._granted[name] + self._patience_s
                if ends <= now:
                    await self._give_up(host)
                else:
                    due = ends if due is None else min(due, ends)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._news.wait()

    async def _give_up(self, host: Host) -> None:
        fenced = bool(self._lease_ms)
        state = HostState.FENCED if fenced else HostState.LOST
        _LOG.warning("a host is lost", host=host.name, fenced=fenced)
        try:
            await self._keep(msgspec.structs.replace(host, state=state, fenced_by="lease" if fenced else None))
        except StoreError as error:
            _LOG.error("cannot keep that a host is lost", host=host.name, why=error.message)
            self._granted[host.name] = asyncio.get_running_loop().time()

    async def _keep(self, host: Host) -> Host:
        await self._store.put_host(host)
        self._known[host.name] = host
        self._news.set()
        self._hosts.tell(host)
        return host
