"""Authentication of HTTP requests and WebSockets by the secret of a token."""

from __future__ import annotations

from starlette.requests import HTTPConnection

from interlock.api.http.listener import client_of
from interlock.api.http.problems import HttpProblem, too_many
from interlock.api.http.route import ApiParts
from interlock.service.auth import Caller


def bearer(header: str) -> str:
    """Return the secret of an `Authorization` header; empty if it has none."""
    scheme, _, secret = header.partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else ""


def authenticated(
    parts: ApiParts,
    connection: HTTPConnection,
    secret: str,
    *,
    detail: str = "Access token missing or invalid.",
    remedy: str,
) -> Caller:
    """Return the caller that owns a secret.

    Raises `HttpProblem` if there is none: 401 with `detail` and `remedy`, or with the reason if the secret is known and
    no longer valid; 429 if the client's address has made too many such requests. A valid secret is accepted whatever
    others at its address do: secrets have 256 bits, and cannot be guessed.
    """
    caller = parts.callers.authenticate(secret) if secret else None
    if caller is not None:
        return caller
    address = "" if connection.client is None else client_of(connection.client.host)
    retry_after_s = parts.load.auth_failures.take(address)
    if retry_after_s:
        raise too_many("Too many requests from this address without a valid token.", "Check the token.", retry_after_s)
    detail, remedy = parts.callers.refusal(secret) or (detail, remedy)
    raise HttpProblem("unauthorized", detail, remedy=remedy, WWW_Authenticate='Bearer realm="interlock"')
