"""The audit log's port: who did what to the server, from where, with what outcome."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Protocol

import msgspec


class Outcome(StrEnum):
    """How an audited action ended."""

    SUCCEEDED = "succeeded"
    REFUSED = "refused"
    """The caller may not do it, or asked for what is impossible."""
    FAILED = "failed"
    """The server could not do it."""


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One action of a caller, or of the server itself."""

    sequence: int = 0
    """Its number; 0 before it is stored."""
    at_ms: int
    """When it ended, on the store's clock."""
    action: str
    """What was done, such as `token.create`."""
    outcome: Outcome
    who: str = ""
    """The name of the caller's token; empty if it is unknown."""
    role: str = ""
    project: str = ""
    address: str = ""
    """The network address of the client; empty for the server itself."""
    target: str = ""
    """The name or id of what it was done to."""
    details: dict[str, Any] = {}


class AuditFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Filter of a list of entries; None matches any."""

    action: str | None = None
    """An action, or its first part: `token` matches `token.create`."""
    who: str | None = None
    outcome: Outcome | None = None


class AuditRecords(Protocol):
    """The audit log. Entries are only ever added, and removed when they are older than they are kept for."""

    async def add(self, entry: AuditEntry) -> None:
        """Store an entry under the next sequence."""
        ...

    async def after(self, sequence: int, limit: int, where: AuditFilter) -> tuple[AuditEntry, ...]:
        """Return entries with a greater sequence, oldest first."""
        ...

    async def before(self, sequence: int | None, limit: int, where: AuditFilter) -> tuple[AuditEntry, ...]:
        """Return entries with a smaller sequence, newest first; None begins with the newest."""
        ...

    async def forget(self, before_ms: int) -> int:
        """Remove entries older than that; return how many."""
        ...
