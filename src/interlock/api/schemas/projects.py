"""Wire types of projects and their quotas."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from interlock.api.schemas.responses import Timestamp, Wire
from interlock.core.parameters import Name

Limit = Annotated[int, Meta(ge=0, le=2**53)] | None | UnsetType


class Quota(Wire, frozen=True, kw_only=True):
    """The most that a project may use; null: no limit."""

    instances: int | None = None
    """VMs, unless deleted or migrated out."""
    vcpus: int | None = None
    """Of VMs that are not shelved and offloaded; so are the next two."""
    memory_mib: int | None = None
    disk_mib: int | None = None
    """Root disks and volumes."""
    volumes: int | None = None
    images: int | None = None
    """Snapshots and backups, with those that are being made."""
    outstanding_requests: int | None = None
    held_requests: int | None = None


class QuotaChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits to change; null removes one, and what is not named stays."""

    instances: Limit = UNSET
    vcpus: Limit = UNSET
    memory_mib: Limit = UNSET
    disk_mib: Limit = UNSET
    volumes: Limit = UNSET
    images: Limit = UNSET
    outstanding_requests: Limit = UNSET
    held_requests: Limit = UNSET


class Use(Wire, frozen=True, kw_only=True):
    """What a project uses, with what its outstanding and held requests need."""

    instances: int
    vcpus: int
    memory_mib: int
    disk_mib: int
    volumes: int
    images: int
    outstanding_requests: int
    held_requests: int


class Project(Wire, frozen=True, kw_only=True):
    """A project, what it may use and what it uses."""

    name: str
    created_at: Timestamp | None
    """Null: unknown."""
    created_by: str | None
    """Who created it; null: the server, or unknown."""
    quota: Quota
    used: Use


class ProjectList(Wire, frozen=True, kw_only=True):
    """All projects to an admin, and to others their own."""

    items: tuple[Project, ...]


class NewProject(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A project to create."""

    name: Name
    quota: QuotaChange = QuotaChange()
    """By default without limits."""
    with_history: bool = False
    """Confirms that its members may see the records of VMs of an earlier project of that name."""
