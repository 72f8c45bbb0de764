"""The hosts beside the server's own: seen, fenced, forgotten, and their agents let in."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Protocol

import msgspec

from interlock.core.errors import Forbidden, Invalid, NotFound, NotResponding
from interlock.core.records import SharedFolder
from interlock.ports import (
    Host,
    HostState,
    Hypervisor,
    InstanceFilter,
    Link,
    RemoteHost,
    Role,
    SharedRoots,
    Store,
    every_instance,
)
from interlock.service.callers import Caller
from interlock.service.capacity import Capacity, Occupancy
from interlock.service.wishes import check_name

ANY: Final = "any"
"""What stands for whichever host has room."""


class HostBook(Protocol):
    """Knows which hosts live. The driver's leases do."""

    def hosts(self) -> tuple[Host, ...]: ...
    def host(self, name: str) -> Host: ...
    def reachable(self, name: str) -> bool: ...
    def last_seen_at_ms(self, name: str) -> int: ...
    async def heard(self, host: Host) -> None: ...
    async def fence(self, name: str, by: str) -> Host: ...
    async def forget(self, name: str) -> None: ...


class HostLinks(Protocol):
    """Has the adapters of hosts. The driver's registry does."""

    @property
    def own(self) -> str: ...
    def of(self, name: str) -> Hypervisor: ...
    def remote(self, name: str) -> RemoteHost: ...
    def linked(self, name: str) -> bool: ...


class SeenHost(msgspec.Struct, frozen=True, kw_only=True):
    """A host as it is told of."""

    host: Host
    linked: bool
    """Whether its agent is connected now."""
    last_seen_at_ms: int
    instances: int
    """How many instances are recorded as being there."""
    room: Occupancy


class HostVerbs:
    """What can be asked of the hosts beside the server's own.

    Args:
        store: counts the instances.
        book: knows which hosts live.
        links: has their adapters.
        capacity: knows what is promised of them.
        join: is awaited before an agent is spoken to, with the host's name.
        catch_up: is awaited when an agent can be asked; may raise `NotResponding`.
        shared: the folder in which hosts keep root disks together.
    """

    def __init__(
        self,
        store: Store,
        book: HostBook,
        links: HostLinks,
        capacity: Capacity,
        join: Callable[[str], Awaitable[None]],
        catch_up: Callable[[str], Awaitable[None]],
        shared: SharedRoots,
    ) -> None:
        self._store = store
        self._book = book
        self._links = links
        self._capacity = capacity
        self._join = join
        self._catch_up = catch_up
        self._shared = shared

    @property
    def own(self) -> str:
        """The name of the host on which the server runs."""
        return self._links.own

    async def list(self, caller: Caller) -> tuple[SeenHost, ...]:
        """Every other host, by name."""
        caller.require(Role.READER, "list hosts")
        return tuple([await self._seen(host) for host in self._book.hosts()])

    async def show(self, caller: Caller, name: str) -> SeenHost:
        """One of them. Raises `NotFound`."""
        caller.require(Role.READER, "look at hosts")
        return await self._seen(self._book.host(name))

    async def fence(self, caller: Caller, name: str) -> SeenHost:
        """Take the caller's word that the guests of a host have ended, so that they may be taken up elsewhere.

        Raises:
            Forbidden, NotFound, Invalid: the last where its agent is connected.
        """
        caller.require(Role.ADMIN, "fence hosts")
        return await self._seen(await self._book.fence(name, caller.name))

    async def forget(self, caller: Caller, name: str) -> None:
        """Forget a host that is fenced and has no instances any more. Raises `Forbidden`, `NotFound`, `Invalid`."""
        caller.require(Role.ADMIN, "forget hosts")
        seen = await self._seen(self._book.host(name))
        if seen.instances:
            raise Invalid(
                f"Instances are recorded on the host {name}: {seen.instances}.", remedy="Evacuate or delete them first."
            )
        await self._book.forget(name)

    async def _seen(self, host: Host) -> SeenHost:
        return SeenHost(
            host=host,
            linked=self._links.linked(host.name),
            last_seen_at_ms=self._book.last_seen_at_ms(host.name),
            instances=await self._count(host.name),
            room=await self._capacity.occupancy(host.name),
        )

    async def _count(self, name: str) -> int:
        """How many instances are recorded as being on that host."""
        count = 0
        async for _ in every_instance(self._store, InstanceFilter(host=name)):
            count += 1
        return count

    def named(self, wanted: str | None) -> tuple[str, ...]:
        """The hosts that are meant: the one of that name, the server's own where none is named, or for `any` all that
        can be asked, the server's own first.

        Raises:
            NotFound: there is no such host.
            Invalid: it cannot be asked now.
        """
        if wanted == ANY:
            there = (one.name for one in self._book.hosts() if one.state is HostState.UP)
            return (self.own, *(name for name in there if self._links.linked(name)))
        name = self.own if wanted is None else wanted
        self.require_there(name)
        return (name,)

    def shares(self, name: str, path: Path) -> bool:
        """Whether that host has a folder that hosts share, as far as it has said; the server's own has each."""
        if name == self.own:
            return True
        announced = self._book.host(name).shared
        return announced is not None and path.is_relative_to(announced)

    async def shared_folder(self, names: tuple[str, ...]) -> SharedFolder | None:
        """The folder in which hosts keep root disks together, for something new on one of those that are named.

        None where none of them has it. Raises as `SharedRoots.folder`.
        """
        path = self._shared.path
        there = path is not None and any(self.shares(name, path) for name in names)
        return await self._shared.folder() if there else None

    def hypervisor(self, name: str) -> Hypervisor:
        """What holds the guests of that host."""
        return self._links.of(name)

    def reachable(self, name: str) -> bool:
        """False where the guests of that host have ended for certain, so that they may be taken up elsewhere."""
        return self._book.reachable(name)

    def require_there(self, name: str) -> None:
        """Raise `NotFound` where there is no such host, `Invalid` where it cannot be asked now."""
        if name == self.own:
            return
        host = self._book.host(name)
        if host.state is not HostState.UP or not self._links.linked(name):
            raise Invalid(f"The host {name} is not connected.", remedy=f"See that `interlock agent` runs on {name}.")

    async def link(self, caller: Caller, name: str, link: Link) -> None:
        """Speak with the agent of a host until its connection ends.

        Raises:
            Forbidden: the caller is neither an agent nor an admin.
            Invalid: a host cannot be called that.
        """
        if caller.role not in {Role.AGENT, Role.ADMIN}:
            raise Forbidden(
                f"A token with the role {caller.role.value} may not speak for a host.",
                remedy="Use a token with the role agent.",
            )
        check_name(name, "name")
        if name in {self._links.own, ANY}:
            raise Invalid(f"{name!r} is not the name of another host.", remedy="Give the agent another with --name.")
        await self._join(name)

        async def heard(host: Host) -> None:
            await self._book.heard(host)
            with contextlib.suppress(NotResponding, NotFound):
                await self._catch_up(name)

        await self._links.remote(name).serve(link, heard)
