"""`/v1/audit`: who did what to the server, from where, with what outcome."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request

from interlock.api.http import request_parsing
from interlock.api.http.disconnects import cancel_on_disconnect
from interlock.api.http.route import CURSOR, LIMIT, WAIT, ApiParts, Parameter, Routes
from interlock.api.schemas.projects import AuditEntries, AuditEntry
from interlock.api.schemas.serializers import wire
from interlock.core.errors import Invalid
from interlock.ports.audit import AuditFilter, Outcome
from interlock.service.auth import Caller

routes = Routes("audit")

_SEQUENCE_MAX: Final = 2**53


@routes.add(
    "GET /v1/audit",
    "List the audit log, newest first, or follow it",
    {200: AuditEntries},
    parameters=(
        LIMIT,
        CURSOR,
        Parameter("after", "Entries after this sequence, oldest first.", {"type": "integer", "minimum": 0}),
        WAIT,
        Parameter("action", "Only this action, such as `token.create`, or those that it begins, such as `token`."),
        Parameter("who", "Only what this caller did: the name of a token."),
        Parameter("outcome", "Only this outcome.", {"type": "string", "enum": [one.value for one in Outcome]}),
    ),
)
async def audit(parts: ApiParts, caller: Caller, request: Request) -> AuditEntries:
    """Return a page; with `after` and `wait` the request is held open until there is an entry."""
    query = request.query_params
    limit = request_parsing.integer(query, "limit", 100, 1, 500)
    where = AuditFilter(
        action=query.get("action") or None, who=query.get("who") or None, outcome=_outcome(query.get("outcome"))
    )
    if "after" in query:
        after = request_parsing.integer(query, "after", 0, 0, _SEQUENCE_MAX)
        wait_ms = request_parsing.wait_ms(query)
        following = parts.audit.following(caller, limit, after, where, wait_ms)
        found = await cancel_on_disconnect(request, following)
        cursor = None
    else:
        before = request_parsing.integer(query, "cursor", _SEQUENCE_MAX, 1, _SEQUENCE_MAX)
        after = 0
        found = await parts.audit.newest(caller, limit + 1, before, where)
        cursor = str(found[limit - 1].sequence) if len(found) > limit else None
        found = found[:limit]
    next_after = max((one.sequence for one in found), default=after)
    return AuditEntries(items=tuple(wire(AuditEntry, one) for one in found), next_cursor=cursor, next_after=next_after)


def _outcome(text: str | None) -> Outcome | None:
    if text is None:
        return None
    try:
        return Outcome(text)
    except ValueError:
        known = ", ".join(one.value for one in Outcome)
        raise Invalid(f"Invalid outcome {text[:80]!r}.", remedy=f"One of: {known}.") from None
