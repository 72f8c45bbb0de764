"""Wire types of projects and their quotas, and of the audit log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from interlock.api.schemas.wire import Timestamp, Wire
from interlock.core import quotas
from interlock.core.parameters import Name
from interlock.core.quotas import RESOURCES
from interlock.ports.audit import Outcome

Limit = Annotated[int, Meta(ge=0, le=2**53)] | None | UnsetType


def _amounts(name: str, base: type, kind: Any, *default: Any, **options: Any) -> Any:
    """Return a type with a field of that kind for each resource."""
    fields = [
        (what, Annotated[kind, Meta(description=resource.meaning)] if resource.meaning else kind, *default)
        for what, resource in RESOURCES.items()
    ]
    return msgspec.defstruct(name, fields, bases=(base,), module=__name__, frozen=True, kw_only=True, **options)


if TYPE_CHECKING:

    class Quota(quotas.Quota, Wire, frozen=True):
        """As below."""

    QuotaChange = quotas.Quota
    Use = Quota
else:
    Quota = _amounts("Quota", Wire, int | None, None)
    Quota.__doc__ = "The most that a project may use; null: no limit."
    QuotaChange = _amounts("QuotaChange", msgspec.Struct, Limit, UNSET, forbid_unknown_fields=True)
    QuotaChange.__doc__ = "Limits to change; null removes one, and what is not named stays."
    Use = _amounts("Use", Wire, int)
    Use.__doc__ = "What a project uses, with what its outstanding and held requests need."


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


class AuditEntry(Wire, frozen=True, kw_only=True):
    """One action of a caller, or of the server itself."""

    sequence: int
    at: Timestamp
    action: str
    """What was done, such as `token.create`."""
    outcome: Outcome
    who: str
    """The name of the caller's token; empty if it is unknown, `interlock` for the server itself."""
    role: str
    project: str
    address: str
    """The network address of the client."""
    target: str
    """The name or id of what it was done to."""
    details: dict[str, Any]


class AuditEntries(Wire, frozen=True, kw_only=True):
    """Entries of the audit log: newest first, or with `after` oldest first."""

    items: tuple[AuditEntry, ...]
    next_cursor: str | None
    """`cursor` of the next, older page; None at the end, and with `after`."""
    next_after: int
    """`after` of the next request that follows the log."""
