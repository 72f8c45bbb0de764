"""What is said of hosts over HTTP."""

from __future__ import annotations

import msgspec

from interlock.api.host_schemas import HostAmounts
from interlock.ports import HostState


class OtherHost(msgspec.Struct, frozen=True, kw_only=True):
    """A host beside the server's own."""

    name: str
    state: HostState
    linked: bool
    """Whether its agent is connected now."""
    last_seen_at: str
    fenced_by: str | None
    """`lease`, or the admin who said that its guests have ended."""
    address: str | None
    """Where other hosts send guests to."""
    shared: str | None
    """The folder that it has in common with other hosts."""
    instances: int
    total: HostAmounts
    """What may be promised there in all, as its agent last said."""
    promised: HostAmounts
    """What is promised to instances there, and to those on their way to it."""
    free: HostAmounts
    """What may still be promised."""
    disk_free_mib: int | None
    """What the file system of its data folder has free for real; null while it is away."""


class OtherHostList(msgspec.Struct, frozen=True, kw_only=True):
    own: str
    """The name of the host on which the server runs; it is not among the items."""
    items: tuple[OtherHost, ...]


class Fencing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An admin's word that the guests of a host have ended."""

    guests_have_ended: bool
    """Must be true. If it is not, two copies of one guest may run, and damage its disks."""
