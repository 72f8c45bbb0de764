"""Authentication of HTTP requests and WebSockets by the secret of a token."""

from __future__ import annotations

from interlock.api.http.problems import HttpProblem
from interlock.service.auth import Authenticator, Caller


def bearer(header: str) -> str:
    """Return the secret of an `Authorization` header; empty if it has none."""
    scheme, _, secret = header.partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else ""


def authenticated(
    callers: Authenticator, secret: str, *, detail: str = "Access token missing or invalid.", remedy: str
) -> Caller:
    """Return the caller that owns a secret.

    Raises `HttpProblem` (401) if there is none: with `detail` and `remedy`, or with the reason if the secret is known
    and no longer valid.
    """
    caller = callers.authenticate(secret) if secret else None
    if caller is None:
        detail, remedy = callers.refusal(secret) or (detail, remedy)
        raise HttpProblem("unauthorized", detail, remedy=remedy, WWW_Authenticate='Bearer realm="interlock"')
    return caller
