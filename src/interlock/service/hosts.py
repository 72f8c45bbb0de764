"""Hosts: list, fence, drain, rename, replace and delete them, and authorize the connections of their agents."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from pathlib import Path
from typing import Final, Protocol

import msgspec

from interlock.core.errors import Forbidden, InterlockError, Invalid, NotFound, NotResponding, OperationRejected
from interlock.core.networks import NetworkKind
from interlock.core.parameters import check_name
from interlock.core.records import Instance, SharedFolder, Spec
from interlock.core.roles import Role
from interlock.core.states import GuestTrouble, PowerState, VmState
from interlock.ports import (
    Drain,
    Host,
    HostCondition,
    HostEvent,
    HostState,
    Hypervisor,
    Link,
    RemoteHost,
    SharedRoots,
    Store,
    Tally,
)
from interlock.ports.hosts import NetworkAbility
from interlock.ports.migration import MigrationPort
from interlock.service.auth import Caller
from interlock.service.capacity import Capacity, Occupancy

ON_NO_HOST: Final = frozenset({VmState.DELETED, VmState.MIGRATED_OUT, VmState.SHELVED_OFFLOADED})
"""The states in which no host holds anything of the instance."""
ANY: Final = "any"
"""In place of a host's name: let the scheduler choose."""


AGENT_WAIT_S: Final = 1.0
"""For how long a guest agent's answer is waited for before a decision is made without it."""


class LeaseView(Protocol):
    """The state of hosts and their leases. Implemented by the driver's leases."""

    def hosts(self) -> tuple[Host, ...]: ...
    def host(self, name: str) -> Host: ...
    def find(self, name: str) -> Host | None: ...
    def reachable(self, name: str) -> bool: ...
    def condition(self, name: str) -> HostCondition: ...
    def fenced_at_ms(self, name: str) -> int | None: ...
    def ends_in_ms(self, name: str) -> int | None: ...
    def last_seen_at_ms(self, name: str) -> int: ...
    def drain(self, name: str) -> Drain | None: ...
    async def set_drain(self, name: str, drain: Drain | None) -> None: ...
    def history(self, name: str) -> tuple[HostEvent, ...]: ...
    def to_leave(self) -> tuple[Host, ...]: ...
    def current_name(self, name: str) -> str: ...
    async def on_connected(self, host: Host) -> None: ...
    async def fence(self, name: str, by: str) -> Host: ...
    async def forget(self, name: str) -> None: ...


class HostGate(Protocol):
    """Decides which agent may use which host name. Implemented by the driver's host admission."""

    async def admit(self, host: Host) -> None: ...
    async def replace(self, name: str, by: str) -> Host: ...
    async def rename(self, name: str, new: str) -> Host: ...


class HostConnections(Protocol):
    """The connections to hosts. Implemented by the driver's host registry."""

    @property
    def own(self) -> str: ...
    def of(self, name: str) -> Hypervisor: ...
    def remote(self, name: str) -> RemoteHost: ...
    def linked(self, name: str) -> bool: ...
    def certificate_names(self, source: str, target: str) -> tuple[str, str] | None: ...
    def listen(self, listener: Callable[[Host], None]) -> None: ...


class DrainView(msgspec.Struct, frozen=True, kw_only=True):
    """The progress of a drain."""

    drain: Drain
    left: int
    """Number of instances still on the host."""


class HostView(msgspec.Struct, frozen=True, kw_only=True):
    """A host with its status."""

    host: Host
    linked: bool
    """Whether its agent is connected now."""
    certified: bool
    """Whether its agent got a certificate when it connected, for encrypted migrations."""
    last_seen_at_ms: int
    instances: int
    """Number of instances recorded on it."""
    room: Occupancy
    condition: HostCondition
    lease_left_ms: int | None
    """Time until its lease expires and it is fenced; None if it has no lease or is fenced."""
    fenced_at_ms: int | None
    """When a host with a disconnected agent is fenced at the latest; None if only an admin can fence it."""
    drain: DrainView | None = None
    """Its drain; None if it is not drained."""


class HostService:
    """Operations on the hosts other than the server's own.

    Args:
        store: counts the instances.
        leases: state of hosts and leases.
        connections: connections to hosts.
        capacity: allocated and free capacity of hosts.
        gate: decides which agent may use which name.
        bind: binds an agent's token to a host.
        rename_tokens: rebinds the tokens of a renamed host.
        join: awaited with the host's name before an agent is served.
        catch_up: awaited when an agent is connected; may raise `NotResponding`.
        shared: the shared folder for root disks.
        own_in_any: whether `any` includes the server's own host.
        own_networks: returns the kinds of network of the server's own host.
    """

    def __init__(
        self,
        store: Store,
        leases: LeaseView,
        connections: HostConnections,
        capacity: Capacity,
        gate: HostGate,
        bind: Callable[[Caller, str], Awaitable[None]],
        rename_tokens: Callable[[str, str], Awaitable[None]],
        join: Callable[[str], Awaitable[None]],
        catch_up: Callable[[str], Awaitable[None]],
        shared: SharedRoots,
        *,
        own_in_any: bool = True,
        own_networks: Callable[[], tuple[NetworkAbility, ...]] = tuple,
    ) -> None:
        self._store = store
        self.leases = leases
        self.connections = connections
        self._capacity = capacity
        self._gate = gate
        self._bind = bind
        self._rename_tokens = rename_tokens
        self._join = join
        self._catch_up = catch_up
        self._shared = shared
        self._own_in_any = own_in_any
        self._own_networks = own_networks

    @property
    def own(self) -> str:
        """The name of the host on which the server runs."""
        return self.connections.own

    async def list(self, caller: Caller) -> tuple[HostView, ...]:
        """Return the other hosts, by name."""
        caller.require(Role.READER, "list hosts")
        return await self.every()

    async def every(self) -> tuple[HostView, ...]:
        """Return the other hosts, by name, for the server's metrics."""
        return tuple([await self._seen(host) for host in self.leases.hosts()])

    async def show(self, caller: Caller, name: str) -> HostView:
        """Return a host. Raises `NotFound`."""
        caller.require(Role.READER, "see hosts")
        return await self._seen(self.leases.host(name))

    def history(self, caller: Caller, name: str) -> tuple[HostEvent, ...]:
        """Return the events of a host, also the server's own, oldest first. Raises `NotFound`."""
        caller.require(Role.READER, "see hosts")
        return self.leases.history(name)

    async def fence(self, caller: Caller, name: str) -> HostView:
        """Fence a host on the caller's assurance that its guests have ended, so that they can be evacuated.

        Raises:
            Forbidden, NotFound, or Invalid if its agent is connected.
        """
        caller.require(Role.ADMIN, "fence hosts")
        return await self._seen(await self.leases.fence(name, caller.name))

    async def replace(self, caller: Caller, name: str) -> HostView:
        """Fence a host as `fence` does, and free its name for an agent with another data folder.

        Returns the former host, which keeps its instances under another name.

        Raises:
            Forbidden, NotFound, or Invalid if its agent is connected.
        """
        caller.require(Role.ADMIN, "replace hosts")
        return await self._seen(await self._gate.replace(name, caller.name))

    async def rename(self, caller: Caller, name: str, new: str) -> HostView:
        """Rename a host: its record, its instances, its agent's connection and its tokens.

        Raises:
            Forbidden, NotFound, or Invalid if the new name is invalid or instances are migrating.
        """
        caller.require(Role.ADMIN, "rename hosts")
        check_name(new, "name")
        if name == self.own:
            raise Invalid(
                f"The host {name} is the server's own.", remedy="Set `host` in its configuration and restart it."
            )
        if new == ANY:
            raise Invalid(f"Invalid host name {new!r}: reserved.", remedy="Choose another name.")
        host = await self._gate.rename(name, new)
        await self._rename_tokens(name, new)
        return await self._seen(host)

    async def forget(self, caller: Caller, name: str) -> None:
        """Delete the record of a fenced host without instances. Raises `Forbidden`, `NotFound`, `Invalid`."""
        caller.require(Role.ADMIN, "forget hosts")
        seen = await self._seen(self.leases.host(name))
        if seen.instances:
            evacuate = "Evacuate" if seen.host.state is HostState.FENCED else "Migrate (evacuate, once it is fenced)"
            raise Invalid(
                f"VMs are recorded on the host {name}: {seen.instances}.", remedy=f"{evacuate} or delete them first."
            )
        await self.leases.forget(name)

    async def _seen(self, host: Host) -> HostView:
        return HostView(
            host=host,
            linked=self.connections.linked(host.name),
            certified=self.connections.remote(host.name).certificate_name is not None,
            last_seen_at_ms=self.leases.last_seen_at_ms(host.name),
            instances=self._store.tally(Tally.RECORDED, host.name),
            room=await self._capacity.occupancy(host.name),
            condition=self.leases.condition(host.name),
            lease_left_ms=None if host.state is HostState.FENCED else self.leases.ends_in_ms(host.name),
            fenced_at_ms=self.leases.fenced_at_ms(host.name),
            drain=self.drain_seen(host.name),
        )

    def drain_seen(self, name: str) -> DrainView | None:
        """Return the progress of a host's drain; None if it is not drained. Raises `NotFound`."""
        drain = self.leases.drain(name)
        return None if drain is None else DrainView(drain=drain, left=self._store.tally(Tally.GUESTS, name))

    def named(self, wanted: str | None) -> tuple[str, ...]:
        """Return the candidate hosts: the named one, the server's own by default, or for `any` all that are available.

        With `any` the server's own comes first, and drained or disconnected hosts are left out.

        Raises:
            NotFound: the host does not exist.
            Invalid: it is not connected or is drained; or no host is available.
        """
        if wanted == ANY:
            up = (one.name for one in self.leases.hosts() if one.state is HostState.UP and one.drain is None)
            own = (self.own,) if self._own_in_any and self.leases.drain(self.own) is None else ()
            found = (*own, *(name for name in up if self.connections.linked(name)))
            if not found:
                raise Invalid(
                    "No host is available: all are disconnected or drained.",
                    remedy="See `interlock host list`; start an agent, or `interlock host undrain` a host.",
                )
            return found
        name = self.own if wanted is None else wanted
        self.require_open(name)
        return (name,)

    def require_open(self, name: str) -> None:
        """Raise `NotFound` if the host does not exist, `Invalid` if it is not connected or is drained."""
        self.require_there(name)
        if self.leases.drain(name) is not None:
            raise Invalid(
                f"The host {name} is being drained and accepts no new VMs.",
                remedy=f"Name another host, or any; `interlock host undrain {name}` ends the drain.",
            )

    def known(self, name: str) -> Host | None:
        """Return the host of that name; None for the server's own. Raises `NotFound`."""
        return None if name == self.own else self.leases.host(name)

    def shares(self, name: str, path: Path) -> bool:
        """Whether that host reported the shared folder `path`; always true for the server's own."""
        if name == self.own:
            return True
        announced = self.leases.host(name).shared
        return announced is not None and path.is_relative_to(announced)

    async def shared_folder(self, names: tuple[str, ...]) -> SharedFolder | None:
        """Return the shared folder for the root disk of a new instance on one of the hosts; None if none has it.

        Raises as `SharedRoots.folder`.
        """
        path = self._shared.path
        mounted = path is not None and any(self.shares(name, path) for name in names)
        return await self._shared.folder() if mounted else None

    def lacks_network(self, name: str, spec: Spec | None) -> str:
        """Return why a host cannot connect a guest to its networks, as a sentence; empty if it can."""
        interfaces = () if spec is None else spec.all_interfaces
        return self.lacks_kinds(name, {one.network.kind for one in interfaces if one.network is not None})

    def lacks_kinds(self, name: str, kinds: Collection[NetworkKind]) -> str:
        """Return why a host cannot connect a guest to networks of those kinds, as a sentence; empty if it can."""
        if not kinds:
            return ""
        host = self.leases.find(self.leases.current_name(name))
        found = {one.kind: one for one in (self._own_networks() if host is None else host.networks)}
        for kind in sorted(kinds):
            ability = found.get(kind)
            if ability is None or not ability.available:
                why = f": {ability.detail}" if ability is not None and ability.detail else ""
                return f"The host {name} has no networks of the kind {kind.value}{why}."
        return ""

    def reaches(self, name: str, path: str) -> bool:
        """Whether a volume's file is in the shared folder that the host reported; always true for the server's own."""
        host = self.leases.find(self.leases.current_name(name))
        return host is None or (host.shared is not None and Path(path).is_relative_to(host.shared))

    async def agent_answers(self, instance: Instance) -> bool | None:
        """Whether a guest agent responds in the guest of an instance; None if unknown now."""
        hypervisor = self.connections.of(instance.host)
        if instance.power_state is not PowerState.RUNNING or instance.guest_trouble is GuestTrouble.NOT_RESPONDING:
            return None
        try:
            async with asyncio.timeout(AGENT_WAIT_S):
                if await hypervisor.agent_answers(instance.id):
                    return True
                seen = await hypervisor.inspect(instance.id)
        except (InterlockError, TimeoutError):
            return None
        return False if seen.responsive and seen.power_state is PowerState.RUNNING else None

    def sends_guests(self, name: str) -> bool:
        """Whether the host's hypervisor supports live migration."""
        return isinstance(self.connections.of(name), MigrationPort)

    def can_encrypt(self, source: str, target: str) -> bool:
        """Whether guests can be migrated between the hosts encrypted, or need not be; True while one is away."""
        if not (self.connections.linked(source) and self.connections.linked(target)):
            return True
        try:
            self.connections.certificate_names(source, target)
        except OperationRejected:
            return False
        return True

    def in_trouble(self) -> tuple[HostCondition, ...]:
        """Return the hosts that are lost or fenced."""
        conditions = (self.leases.condition(host.name) for host in self.leases.hosts())
        return tuple(one for one in conditions if one.state is not HostState.UP)

    def require_there(self, name: str) -> None:
        """Raise `NotFound` if the host does not exist, `Invalid` if it is not connected."""
        if name == self.own:
            return
        host = self.leases.host(name)
        if host.state is not HostState.UP or not self.connections.linked(name):
            raise Invalid(f"The host {name} is not connected.", remedy=f"Start `interlock agent` on {name}.")

    def require_may_link(self, caller: Caller, name: str) -> None:
        """Raise unless the caller may connect as the agent of that host.

        Raises:
            Forbidden: its token does not have the role agent, or is for another host.
            Invalid: the host name is invalid or reserved.
        """
        check_name(name, "name")
        if name in {self.connections.own, ANY}:
            raise Invalid(f"Invalid host name {name!r}: reserved.", remedy="Give the agent another with --name.")
        if caller.role is not Role.AGENT:
            raise Forbidden(
                f"Permission denied: a token with the role {caller.role.value} may not connect as an agent.",
                remedy=f"Create one for it: `interlock token create NAME --role agent --host {name}`.",
            )
        # After a rename of its host, an agent may still use the former name.
        if caller.host is not None and self.leases.current_name(caller.host) != self.leases.current_name(name):
            raise Forbidden(
                f"Permission denied: this token is for the host {caller.host}, not {name}.",
                remedy=f"Start the agent with --name {caller.host}, or create another token: "
                f"`interlock token create NAME --role agent --host {name}`.",
            )

    def require_present_name(self, caller: Caller, name: str) -> None:
        """Raise `Invalid` if a token is to be created for a former name of a host; `Forbidden` as creating it would."""
        caller.require(Role.ADMIN, "create tokens")
        present = self.leases.current_name(name)
        if present != name:
            raise Invalid(
                f"host: {name} is a former name of the host {present}.",
                remedy=f"Create the token for it: --host {present}.",
            )

    def outgoing_file(self, caller: Caller, name: str, transfer: str) -> Path:
        """Return the file that is sent to the host in that transfer, for its agent.

        Raises:
            Forbidden, Invalid: as `require_may_link`.
            NotFound: the transfer has ended, or is one of another host.
        """
        return self._agents_host(caller, name).outgoing_file(transfer)

    async def receive_range(
        self, caller: Caller, name: str, transfer: str, offset: int, chunks: AsyncIterator[bytes]
    ) -> None:
        """Write chunks to the file that is fetched from the host in that transfer. Raises as `outgoing_file`."""
        await self._agents_host(caller, name).receive_range(transfer, offset, chunks)

    def _agents_host(self, caller: Caller, name: str) -> RemoteHost:
        self.require_may_link(caller, name)
        return self.connections.remote(self.leases.host(self.leases.current_name(name)).name)

    async def link(self, caller: Caller, name: str, link: Link) -> None:
        """Serve the connection of a host's agent until it ends.

        Raises:
            Forbidden, Invalid: as `require_may_link`.
            HostTaken: another agent uses the name.
        """
        self.require_may_link(caller, name)
        name = self.leases.current_name(name)
        await self._join(name)

        async def admit(host: Host) -> None:
            await self._gate.admit(host)
            present = self.leases.current_name(name)
            if caller.host is not None and self.leases.current_name(caller.host) == present:
                # A former name, if the server was killed during the rename.
                await self._rename_tokens(caller.host, present)
            await self._bind(caller, present)

        async def on_connected(host: Host) -> None:
            await self.leases.on_connected(host)
            with contextlib.suppress(NotResponding, NotFound):
                await self._catch_up(name)

        await self.connections.remote(name).serve(link, admit, on_connected)
