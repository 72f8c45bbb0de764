"""Wire types of the audit log."""

from __future__ import annotations

from typing import Any

from interlock.api.schemas.wire import Timestamp, Wire
from interlock.ports.audit import Outcome


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
