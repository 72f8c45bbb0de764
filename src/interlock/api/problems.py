"""Errors as problem details (RFC 9457): one table from the error tree to status and type, and nothing else."""

from __future__ import annotations

from typing import Final

import msgspec
from starlette.responses import Response

from interlock.api import schemas
from interlock.core import errors

MEDIA_TYPE: Final = "application/problem+json"
_ENCODE: Final = msgspec.json.Encoder().encode


class Kind(msgspec.Struct, frozen=True):
    """One kind of problem."""

    status: int
    name: str
    """The last part of its type, `urn:interlock:problem:<name>`. Stable."""
    title: str


class Bad(errors.Invalid):
    """The request is wrong as HTTP has it: not JSON, the wrong media type, too large, not authenticated."""

    def __init__(self, name: str, message: str, *, remedy: str | None = None, **headers: str) -> None:
        super().__init__(message, remedy=remedy)
        self.kind = HTTP_KINDS[name]
        self.headers = {key.replace("_", "-"): value for key, value in headers.items()}


KINDS: Final[dict[type[errors.InterlockError], Kind]] = {
    errors.NotFound: Kind(404, "not-found", "There is no such thing"),
    errors.NameTaken: Kind(409, "name-taken", "The name is in use"),
    errors.NoRoom: Kind(409, "no-room", "It does not fit on the host"),
    errors.InUse: Kind(409, "in-use", "Something else uses it"),
    errors.KeyReused: Kind(422, "key-reused", "The idempotency key was used for another request"),
    errors.GenerationMismatch: Kind(412, "generation-mismatch", "The instance has changed"),
    errors.PolicyMismatch: Kind(412, "policy-mismatch", "Another policy is in force"),
    errors.PolicyError: Kind(422, "policy", "The policy cannot be used"),
    errors.Forbidden: Kind(403, "forbidden", "The role does not allow this"),
    errors.Invalid: Kind(422, "invalid", "The request makes no sense"),
    errors.StoreFull: Kind(507, "store-full", "The server's disk is full"),
    errors.StoreError: Kind(503, "store", "The server's store cannot be used"),
    errors.HypervisorError: Kind(503, "hypervisor", "The hypervisor cannot be used"),
}
"""The kinds of problem that the service raises. An error is of the first kind in its own line of descent."""

HTTP_KINDS: Final[dict[str, Kind]] = {
    kind.name: kind
    for kind in (
        Kind(400, "not-json", "The body is not JSON"),
        Kind(400, "not-a-form", "The body is not a form"),
        Kind(400, "bad-header", "A header makes no sense"),
        Kind(401, "unauthorized", "No valid token"),
        Kind(404, "no-such-path", "There is no such path"),
        Kind(405, "method-not-allowed", "The path does not know this method"),
        Kind(409, "too-late", "It is too late to cancel"),
        Kind(413, "too-large", "The body is too large"),
        Kind(415, "media-type", "The body is of the wrong type"),
        Kind(422, "policy-refused", "The policy is refused"),
        Kind(500, "internal", "Something is wrong with the server"),
    )
}


def kind_of(error: errors.InterlockError) -> Kind:
    if isinstance(error, Bad):
        return error.kind
    for ancestor in type(error).__mro__:
        if ancestor in KINDS:
            return KINDS[ancestor]
    return HTTP_KINDS["internal"]


def of_error(error: errors.InterlockError, path: str) -> Response:
    """The response that says what is wrong."""
    headers = error.headers if isinstance(error, Bad) else {}
    needed, free = (error.needed, error.free) if isinstance(error, errors.NoRoom) else (None, None)
    kind = kind_of(error)
    return response(kind, error.message, path, remedy=error.remedy, headers=headers, needed=needed, free=free)


def response(
    kind: Kind,
    detail: str,
    path: str,
    *,
    remedy: str | None = None,
    occurrence: str | None = None,
    headers: dict[str, str] | None = None,
    needed: dict[str, int] | None = None,
    free: dict[str, int] | None = None,
) -> Response:
    problem = schemas.Problem(
        type=f"urn:interlock:problem:{kind.name}",
        title=kind.title,
        status=kind.status,
        detail=detail,
        instance=path,
        remedy=remedy,
        occurrence=occurrence,
        needed=needed,
        free=free,
    )
    return Response(_ENCODE(problem), kind.status, headers, MEDIA_TYPE)
