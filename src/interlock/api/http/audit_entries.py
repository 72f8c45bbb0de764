"""What the audit log records of HTTP requests and WebSockets: by whom, from where, with what outcome."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from starlette.requests import HTTPConnection, Request

from interlock.core.errors import InterlockError
from interlock.ports.audit import Outcome
from interlock.service.audit import AuditLog
from interlock.service.auth import Caller

_NOTE: Final = "interlock.audit"
_SERVER_ERRORS: Final = 500
_ERRORS: Final = 400


class _Note(NamedTuple):
    action: str
    target: str
    details: Mapping[str, Any]


def note(request: Request, *, action: str = "", target: str = "", details: Mapping[str, Any] | None = None) -> None:
    """Say more about a request than its route does; with `action`, have a request recorded whose route is not."""
    request.scope[_NOTE] = _Note(action, target, details or {})


def is_audited(scope: Mapping[str, Any], action: str) -> bool:
    """Whether a request is recorded: its route's `action` is, or it has a note."""
    return bool(action) or _NOTE in scope


async def record(log: AuditLog, caller: Caller, request: HTTPConnection, action: str, status: int) -> None:
    """Record a request that is audited, with its response's status. Its path names the target, or its note does."""
    said: _Note = request.scope.get(_NOTE) or _Note("", "", {})
    outcome = (
        Outcome.FAILED if status >= _SERVER_ERRORS else Outcome.REFUSED if status >= _ERRORS else Outcome.SUCCEEDED
    )
    target = said.target or next(iter(request.path_params.values()), "")
    reads = request.scope.get("method") in {"GET", "HEAD"}
    await (log.record_read if reads else log.record)(
        said.action or action,
        outcome,
        who=caller,
        address=address_of(request),
        target=str(target),
        **({"status": status} if outcome is not Outcome.SUCCEEDED else {}),
        **said.details,
    )


async def record_failure(log: AuditLog, connection: HTTPConnection, error: InterlockError) -> None:
    """Record that a client could not be authenticated."""
    await log.record_failure(address_of(connection), connection.url.path, error.message)


def address_of(connection: HTTPConnection) -> str:
    return "" if connection.client is None else connection.client.host
