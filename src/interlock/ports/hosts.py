"""Host records, and the port of a remote host with its agent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import msgspec

from interlock.core.networks import NetworkKind
from interlock.ports.hypervisor import Hypervisor


class HostState(StrEnum):
    """The state of a host."""

    UP = "up"
    """Its agent is connected, or was so recently that its lease still runs."""
    LOST = "lost"
    """Its agent does not respond, and its guests may still run."""
    FENCED = "fenced"
    """Its guests have ended: its lease expired, or an admin confirmed it. They may be evacuated."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The total capacity of a host for allocation; None: unlimited."""

    memory_mib: int | None = None
    vcpus: int | None = None
    disk_mib: int | None = None
    disk_reserved_mib: int = 0
    """The free space that its file system must keep when a disk is allocated."""
    devices_max: int | None = None
    """The device slots of one guest, for disks (including the root disk) and further interfaces."""


class HostIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """The identity of a host: its data folder and where that is, independent of its name."""

    id: str
    """Stored in the data folder, created with it. A copy of the folder has the same id."""
    machine: str = ""
    """Machine id of the installed system."""
    boot: str = ""
    """Boot id of the machine."""
    folder: str = ""
    """Device and inode of the data folder; together with `boot` it distinguishes a folder from its copies."""
    run: str = ""
    """Unique id of the agent process."""

    def same_folder(self, other: HostIdentity) -> bool:
        """Whether both are the same folder on the same boot. Its lock allows one agent at a time."""
        return (self.id, self.boot, self.folder) == (other.id, other.boot, other.folder)

    def is_rebooted(self, before: HostIdentity) -> bool:
        """Whether the machine has rebooted since, so that its earlier guests have ended."""
        return self.machine == before.machine and self.boot != before.boot


class Drain(msgspec.Struct, frozen=True, kw_only=True):
    """The drain of a host: no new instances are scheduled there, and its instances are migrated away."""

    by: str
    """Who requested it."""
    since_ms: int
    cold: bool = False
    """Whether instances that cannot be live-migrated are migrated cold."""


HISTORY_MAX: Final = 100
"""The number of events kept for each host."""


class HostEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a host."""

    kind: str
    """`joined`, `lost` (its agent does not respond), `fenced`, or `back`; for the server's own host `clock_jumped`,
    `disk_full` and `disk_has_space`."""
    at_ms: int
    by: str | None = None
    """For `fenced`: `lease`, or an admin's name."""
    detail: str | None = None
    """A sentence for people, for events of the server's own host."""


class HostCondition(msgspec.Struct, frozen=True, kw_only=True):
    """The present condition of a host."""

    name: str
    state: HostState
    """`lost` already while its lease still runs, if its agent has not responded for most of it."""
    since_ms: int = 0
    """Since when it is lost or fenced, on the store's clock."""
    fenced_at_ms: int | None = None
    """For a lost host: when it is fenced at the latest, unless it is back before; None if only an admin can fence it.
    """


class NetworkAbility(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a host can connect guests to networks of a kind."""

    kind: NetworkKind
    available: bool
    detail: str = ""
    """What is missing, or how it is done; for people."""


class Protection(msgspec.Struct, frozen=True, kw_only=True):
    """What confines the guests of a host."""

    name: str
    """What it is, such as `mount_namespace`."""
    on: bool
    detail: str
    """How it is done, or why it is off, for people."""


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a host."""

    name: str
    identity: HostIdentity | None = None
    """The identity to which the name is bound; None until an agent with an identity has connected."""
    former: str | None = None
    """The former name under which its agent runs; None if it runs under the present one."""
    other_former: tuple[str, ...] = ()
    """Further former names, under which its agent may connect the next time; none from then on."""
    replaces: str | None = None
    """The former name whose instances are still to be moved to this record; None when that is done."""
    own: bool = False
    """Whether it is the server's own, which has no agent: only its drain and history are stored."""
    drain: Drain | None = None
    state: HostState = HostState.UP
    joined_at_ms: int
    last_seen_at_ms: int
    lease_until_ms: int | None = None
    """When its last lease expires; None without leases."""
    fenced_by: str | None = None
    """What fenced it: `lease`, or an admin's name."""
    address: str | None = None
    """Its address for incoming migrations, as HOST:PORT; None if it accepts none."""
    shared: str | None = None
    """The folder that it shares with other hosts, at the same path; None if it has none."""
    limits: Limits = Limits()
    """Its capacity, as last reported by its agent."""
    protections: tuple[Protection, ...] = ()
    """What confines its guests, as last reported by its agent; empty if unknown."""
    networks: tuple[NetworkAbility, ...] = ()
    """The kinds of network that it has for its guests, as last reported by its agent; empty if unknown."""
    history: tuple[HostEvent, ...] = ()
    """Its events, latest last."""

    @property
    def former_names(self) -> frozenset[str]:
        """The former names that its agent may use."""
        return frozenset(self.other_former if self.former is None else (self.former, *self.other_former))

    def is_same(self, other: Host) -> bool:
        """Whether both records can be of one host: unless their identities differ."""
        return self.identity is None or other.identity is None or self.identity.id == other.identity.id


STALL_S: Final = 1.0
"""A timer that fires later than this shows that the server was busy, and not the agents, in seconds."""
LINK_ALPN: Final = "interlock-agent"
"""The protocol that an agent offers in its TLS handshake (ALPN), by which the server distinguishes its connection from
those of other clients before it is decrypted."""


_CERTIFIED: Final = "interlock:host:"


def host_uri(name: str) -> str:
    """Return the URI that names a host in its certificate; no client takes it for the name of an HTTPS server."""
    return f"{_CERTIFIED}{name}"


def certified_host(certificate: Mapping[str, Any] | None) -> str | None:
    """Return the host that a verified certificate names, as `ssl` decodes it; None if there is none that names one."""
    names: Iterable[tuple[str, str]] = (certificate or {}).get("subjectAltName", ())
    uris = (value.removeprefix(_CERTIFIED) for kind, value in names if kind == "URI" and value.startswith(_CERTIFIED))
    return next(uris, None)


class IssuedCertificate(msgspec.Struct, frozen=True, kw_only=True):
    """A host's certificate for migrations, from the server's CA."""

    certificate: str
    """PEM."""
    ca: str
    """The CA that the certificates of other hosts must be from, as PEM."""
    renew_s: int
    """After how many seconds to request the next one."""


class Link(Protocol):
    """A connection between server and agent that carries whole messages, in order."""

    async def send(self, frame: bytes) -> None:
        """Send one message. Raises `ConnectionError` if the connection is closed."""
        ...

    async def receive(self) -> bytes:
        """Receive the next message. Raises `ConnectionError` if the connection is closed."""
        ...

    async def close(self, reason: str = "") -> None:
        """Close the connection; the other side receives a reason other than the usual end of a session."""
        ...


@runtime_checkable
class ThreadedLink(Link, Protocol):
    """A link whose messages arrive in a thread of their own, whatever the event loop that receives them does."""

    def reply_at_once(self, reply: Callable[[bytes], bytes | None]) -> None:
        """Call `reply` in that thread with each message that arrives, and send what it returns, if anything.

        Each message is also received as usual.
        """
        ...


class RemoteHost(Hypervisor, Protocol):
    """The hypervisor of a host with an agent. While that is disconnected every call raises `NotResponding`."""

    @property
    def linked(self) -> bool:
        """Whether its agent is connected."""
        ...

    @property
    def disk_free_mib(self) -> int | None:
        """The free space of its data folder's file system, as last reported; None while it is disconnected."""
        ...

    @property
    def renewed_s(self) -> float:
        """When the last renewal of its agent was granted, in seconds of the monotonic clock; 0: never.

        Renewals may be granted in another thread, so that this is up to date however long the event loop was blocked.
        """
        ...

    def end_lease(self, unless_after_s: float | None = None) -> bool:
        """Grant its agent no more renewals in this session, unless one was granted after that time.

        Return whether none is granted any more, also because there is no session.
        """
        ...

    def resume_lease(self) -> None:
        """Grant renewals again, after `end_lease`."""
        ...

    @property
    def certificate_name(self) -> str | None:
        """The name in the certificate of the host, which its agent got when it connected; None if it has none."""
        ...

    async def serve(
        self, link: Link, admit: Callable[[Host], Awaitable[None]], on_connected: Callable[[Host], Awaitable[None]]
    ) -> None:
        """Serve the agent's session until the connection ends.

        `admit` is called before anything is granted to the agent, for one agent at a time; its errors are sent to the
        agent, and raised. An earlier connection of the same host is closed after that. `on_connected` is called when
        the agent has delivered the events of its guests from before, and accepts calls.
        """
        ...

    async def answers(self) -> bool:
        """Whether an agent is connected and responds now."""
        ...

    def disconnect(self) -> None:
        """Close the connection, if there is one. The agent may reconnect."""
        ...

    def superseded(self, instance_id: str, fence: int) -> None:
        """Notify the host that calls with a smaller fence must be rejected for the instance."""
        ...

    def rename(self, name: str, former: frozenset[str]) -> None:
        """Rename the host; its agent may still use the former names."""
        ...

    def outgoing_file(self, transfer: str) -> Path:
        """Return the file that the server sends to the host in that transfer.

        Raises:
            NotFound: the transfer has ended, or is one of another host.
        """
        ...

    async def receive_range(self, transfer: str, offset: int, chunks: AsyncIterator[bytes]) -> None:
        """Write consecutive chunks to the file that the server fetches from the host in that transfer.

        Raises:
            NotFound: as `outgoing_file`.
            OSError: it cannot be written.
        """
        ...

    def copy_name(self, path: str) -> str:
        """Return the host's name for its copy of the server's file at `path`."""
        ...

    async def image_copies(self) -> dict[str, int]:
        """Return the time since the last use of each unused copy of an image file, in milliseconds, by name.

        Copies that a guest there boots, or that are backing files, are omitted. Raises `NotResponding` and
        `OperationRejected`.
        """
        ...

    async def drop_image_copies(self, names: Collection[str]) -> tuple[str, ...]:
        """Remove those copies and return the removed ones; any that were used since `image_copies` stay.

        Raises `NotResponding`, `OperationRejected`.
        """
        ...
