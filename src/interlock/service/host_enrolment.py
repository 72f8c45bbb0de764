"""Which agent may connect for a host, beyond its token: one with the host's certificate, or with a one-time secret."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable

import msgspec

from interlock.config import HostsConfig
from interlock.core.errors import Forbidden, Invalid
from interlock.core.parameters import check_name
from interlock.core.roles import Role
from interlock.service.auth import Caller


class Enrolment(msgspec.Struct, frozen=True, kw_only=True):
    """The one-time secret for the first connection of a host's agent, without a certificate."""

    host: str
    secret: str
    expires_at_ms: int
    """On the store's clock."""


class HostEnrolment:
    """Checks the certificates of agents, and issues enrolment secrets, which are lost when the server ends.

    Args:
        config: whether agents need a certificate, and for how long a secret is valid.
        current_name: returns the present name of a host, given that or a former one.
        now_ms: the store's clock.
    """

    def __init__(self, config: HostsConfig, current_name: Callable[[str], str], now_ms: Callable[[], int]) -> None:
        self._required = config.require_client_certificates
        self._valid_ms = config.enrolment_ms
        self._current_name = current_name
        self._now_ms = now_ms
        self._issued: dict[str, tuple[str, int]] = {}
        """Hash of the secret, and when it expires, by host."""

    def create(self, caller: Caller, name: str) -> Enrolment:
        """Return a secret for the host of that name, in place of an earlier one that was not used.

        Raises:
            Forbidden: the caller is not an admin.
            Invalid: the name is invalid, or a former name.
        """
        caller.require(Role.ADMIN, "enrol hosts")
        check_name(name, "name")
        present = self._current_name(name)
        if present != name:
            raise Invalid(f"{name} is a former name of the host {present}.", remedy=f"Enrol {present}.")
        secret, expires_at_ms = f"ile_{secrets.token_urlsafe(32)}", self._now_ms() + self._valid_ms
        self._issued[name] = _hash(secret), expires_at_ms
        return Enrolment(host=name, secret=secret, expires_at_ms=expires_at_ms)

    def require(self, name: str, certified: str | None, secret: str | None = None) -> None:
        """Return if an agent may connect for the host: its certificate names it, or the secret is its own, and unused.

        Raises:
            Forbidden: certificates are required, and it has neither.
        """
        if not self._required:
            return
        if certified is not None and self._current_name(certified) == self._current_name(name):
            return
        if secret is not None and self._redeem(self._current_name(name), secret):
            return
        if secret is not None:
            problem = f"this enrolment secret is not valid for the host {name}, was used, or has expired"
        elif certified is not None:
            problem = f"the certificate is of the host {certified}, not of {name}"
        else:
            problem = f"the agent of {name} has sent no certificate, and this server requires one"
        raise Forbidden(
            f"Permission denied: {problem}.",
            remedy=f"Create a secret with `interlock host enroll {name[:80]}`, and start the agent with it: "
            "--enrolment-file FILE.",
        )

    def _redeem(self, name: str, secret: str) -> bool:
        known, expires_at_ms = self._issued.get(name, ("", 0))
        if not secrets.compare_digest(_hash(secret), known) or self._now_ms() > expires_at_ms:
            return False
        del self._issued[name]
        return True


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
