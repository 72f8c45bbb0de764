"""Problem details (RFC 9457): the table from exception classes to HTTP status and problem type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import msgspec
from starlette.responses import Response

from interlock.api.schemas import responses as schemas
from interlock.core import errors

MEDIA_TYPE: Final = "application/problem+json"
_ENCODE: Final = msgspec.json.Encoder().encode


class ProblemType(msgspec.Struct, frozen=True):
    status: int
    name: str
    """The last part of the type URI, `urn:interlock:problem:<name>`. Stable."""
    title: str


class HttpProblem(errors.Invalid):
    """An invalid HTTP request: invalid JSON, unsupported media type, too large, unauthorized."""

    def __init__(self, name: str, message: str, *, remedy: str | None = None, **headers: str) -> None:
        super().__init__(message, remedy=remedy)
        self.kind = HTTP_PROBLEM_TYPES[name]
        self.headers = {key.replace("_", "-"): value for key, value in headers.items()}


def too_many(message: str, remedy: str, retry_after_s: float = 1) -> HttpProblem:
    """Return the problem for a client that asks or holds more than it may. Nothing was done."""
    return HttpProblem("rate-limited", message, remedy=remedy, Retry_After=str(max(1, math.ceil(retry_after_s))))


def overloaded(message: str, remedy: str = "Retry later.") -> HttpProblem:
    """Return the problem for a server that has no capacity left. Nothing was done."""
    return HttpProblem("overloaded", message, remedy=remedy, Retry_After="1")


PROBLEM_TYPES: Final[dict[type[errors.InterlockError], ProblemType]] = {
    errors.NotFound: ProblemType(404, "not-found", "Not found"),
    errors.NameTaken: ProblemType(409, "name-taken", "Name already exists"),
    errors.InsufficientCapacity: ProblemType(409, "no-room", "Not enough capacity on the host"),
    errors.QuotaExceeded: ProblemType(409, "quota", "Quota of the project exceeded"),
    errors.InUse: ProblemType(409, "in-use", "Resource in use"),
    errors.KeyReused: ProblemType(422, "key-reused", "Idempotency key already used for another request"),
    errors.GenerationMismatch: ProblemType(412, "generation-mismatch", "Instance has changed"),
    errors.PolicyMismatch: ProblemType(412, "policy-mismatch", "Another policy is in force"),
    errors.PolicyError: ProblemType(422, "policy", "Invalid policy"),
    errors.Forbidden: ProblemType(403, "forbidden", "Permission denied"),
    errors.Invalid: ProblemType(422, "invalid", "Invalid request"),
    errors.StoreFull: ProblemType(507, "store-full", "No space left on the server's disk"),
    errors.StoreError: ProblemType(503, "store", "Database unavailable"),
    errors.NoSpace: ProblemType(507, "no-space", "No space left on a disk"),
    errors.SystemFailed: ProblemType(503, "system", "System call failed"),
    errors.HypervisorError: ProblemType(503, "hypervisor", "Hypervisor unavailable"),
}
"""Problem types of service exceptions. An exception has the type of its nearest ancestor in this table."""

HTTP_PROBLEM_TYPES: Final[dict[str, ProblemType]] = {
    kind.name: kind
    for kind in (
        ProblemType(400, "not-json", "Invalid JSON"),
        ProblemType(400, "duplicate-key", "Duplicate key"),
        ProblemType(400, "not-a-form", "Invalid form"),
        ProblemType(400, "bad-header", "Invalid header"),
        ProblemType(400, "malformed", "Malformed request"),
        ProblemType(401, "unauthorized", "Unauthorized"),
        ProblemType(404, "no-such-path", "Path not found"),
        ProblemType(405, "method-not-allowed", "Method not allowed"),
        ProblemType(408, "request-timeout", "Request timed out"),
        ProblemType(409, "too-late", "Too late to cancel"),
        ProblemType(413, "too-large", "Body too large"),
        ProblemType(414, "url-too-long", "URL too long"),
        ProblemType(415, "media-type", "Unsupported media type"),
        ProblemType(422, "policy-refused", "Policy rejected"),
        ProblemType(429, "rate-limited", "Too many requests"),
        ProblemType(431, "headers-too-large", "Headers too large"),
        ProblemType(500, "internal", "Internal server error"),
        ProblemType(503, "overloaded", "Server overloaded"),
    )
}


LIMITS: Final = frozenset({"rate-limited", "overloaded", "too-large"})
"""The problems of requests that are beyond a limit, apart from those that the protocol refuses."""


def problem_type_of(error: errors.InterlockError) -> ProblemType:
    if isinstance(error, HttpProblem):
        return error.kind
    for ancestor in type(error).__mro__:
        if ancestor in PROBLEM_TYPES:
            return PROBLEM_TYPES[ancestor]
    return HTTP_PROBLEM_TYPES["internal"]


def from_error(error: errors.InterlockError, path: str) -> Response:
    """Return the error response for an exception."""
    headers = error.headers if isinstance(error, HttpProblem) else {}
    kind = problem_type_of(error)
    amounts: dict[str, dict[str, int]] = {}
    match error:
        case errors.InsufficientCapacity():
            amounts = {"needed": error.needed, "free": error.free}
        case errors.QuotaExceeded():
            amounts = {"needed": error.needed, "used": error.used, "limit": error.limit, "free": error.free}
        case _:
            pass
    return response(kind, error.message, path, remedy=error.remedy, headers=headers, amounts=amounts)


def response(
    kind: ProblemType,
    detail: str,
    path: str,
    *,
    remedy: str | None = None,
    occurrence: str | None = None,
    headers: dict[str, str] | None = None,
    amounts: Mapping[str, dict[str, int]] = MappingProxyType({}),
) -> Response:
    problem = schemas.Problem(
        type=f"urn:interlock:problem:{kind.name}",
        title=kind.title,
        status=kind.status,
        detail=detail,
        instance=path,
        remedy=remedy,
        occurrence=occurrence,
        **amounts,
    )
    return Response(_ENCODE(problem), kind.status, headers, MEDIA_TYPE)
