"""The hosts beside the server's own: what is kept of one, and how its agent's adapter is spoken to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from enum import StrEnum
from typing import Protocol

import msgspec

from interlock.ports.hypervisor import Hypervisor


class HostState(StrEnum):
    """What the server takes a host for."""

    UP = "up"
    """Its agent speaks to the server, or did so until so short a while ago that its guests may still run."""
    LOST = "lost"
    """Its agent is silent, and nothing tells whether its guests run."""
    FENCED = "fenced"
    """Its guests have ended: its lease ran out, or an admin said so. They may be taken up elsewhere."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What may be promised of a host in all; None: without limit."""

    memory_mib: int | None = None
    vcpus: int | None = None
    disk_mib: int | None = None
    disk_reserved_mib: int = 0
    """What must stay free of its file system for real when a disk is promised."""
    devices_max: int | None = None
    """How many disks and further interfaces one guest can have together, with a place for a root disk."""


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """A host whose agent has spoken to this server."""

    name: str
    state: HostState = HostState.UP
    joined_at_ms: int
    last_seen_at_ms: int
    lease_until_ms: int | None = None
    """When the last lease that was granted ends; None for one that holds its guests without a lease."""
    fenced_by: str | None = None
    """Who said that its guests have ended: `lease`, or an admin's name."""
    address: str | None = None
    """Where other hosts send guests to, as HOST:PORT; None if it takes none."""
    shared: str | None = None
    """The folder that it has in common with other hosts, under the same name; None if it has none."""
    limits: Limits = Limits()
    """What its agent last said may be promised there."""


class Link(Protocol):
    """A connection between server and agent that carries whole messages, in order."""

    async def send(self, frame: bytes) -> None:
        """Send one message. Raises `ConnectionError` when the connection has ended."""
        ...

    async def receive(self) -> bytes:
        """The next message. Raises `ConnectionError` when the connection has ended."""
        ...

    async def close(self) -> None:
        """End the connection."""
        ...


class RemoteHost(Hypervisor, Protocol):
    """The hypervisor of a host whose agent comes and goes. While it is away every call is `NotResponding`."""

    @property
    def linked(self) -> bool:
        """Whether its agent is connected."""
        ...

    @property
    def disk_free_mib(self) -> int | None:
        """What the file system of its folder had free for real at its last sign of life; None while it is away."""
        ...

    async def serve(self, link: Link, heard: Callable[[Host], Awaitable[None]]) -> None:
        """Speak with the agent until the connection ends. An earlier connection of the same host is ended first.

        `heard` is called when the agent has told what its guests did while it was away, and can be asked.
        """
        ...

    def superseded(self, instance_id: str, fence: int) -> None:
        """Have the host know that nobody with a smaller fence may act on the instance any more."""
        ...

    def copy_name(self, path: str) -> str:
        """What the host calls its copy of a file that the server has under `path`."""
        ...

    async def image_copies(self) -> dict[str, int]:
        """How long ago each copy of an image's file was last used, in milliseconds, by its name.

        Without those that a guest there boots, or that a disk of one is a layer over. Raises `NotResponding` and
        `Refused`.
        """
        ...

    async def drop_image_copies(self, names: Collection[str]) -> tuple[str, ...]:
        """Remove those copies, and tell which are gone: none that a guest needs by now, or that was asked for since
        `image_copies`. Raises `NotResponding`, `Refused`.
        """
        ...
