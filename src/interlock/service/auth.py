"""Authentication by bearer tokens, and authorization by role and project.

A token's secret is shown once, when it is created or rotated; only its SHA-256 is stored. Secrets are 256 random bits,
so an unsalted hash is enough. Expiry is measured on the store's clock, so that no jump of the wall clock hastens it;
the time in which the machine is off does not count.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any, Final, Self

import msgspec
import structlog

from interlock.core.errors import Forbidden, StoreError
from interlock.core.roles import Role
from interlock.ports import Store, Token

ASK_ADMIN: Final = "Use a token with the role admin, which administers the whole server."
_TIMER_MAX_S: Final = 86_400.0
"""The longest time after which expiries are looked at again, in seconds."""

_LOG = structlog.get_logger(__name__)


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """An authenticated caller: its name, role, project and groups."""

    token_id: str
    name: str
    role: Role
    project: str
    groups: tuple[str, ...] = ()
    host: str | None = None
    """The host of an agent's token; None for other roles, and for an agent that has not connected yet."""
    secret_sha256: str = ""
    """Which secret of the token was used; empty for a caller that did not use one."""
    expires_at_ms: int | None = None
    """When that secret stops being valid, on the store's clock; None: never."""

    @property
    def identity(self) -> dict[str, Any]:
        """The fields of a submission that say who asks."""
        return {
            "requested_by": self.name,
            "role": self.role,
            "project": self.project,
            "groups": self.groups,
        }

    def require(self, role: Role, what: str) -> None:
        """Raise `Forbidden` unless the caller's role includes `role`; `what` completes "may not ..."."""
        if not self.role.includes(role):
            raise Forbidden(
                f"Permission denied: a token with the role {self.role.value} may not {what}.",
                remedy=ASK_ADMIN if role is Role.ADMIN else f"Use a token with the role {role.value}.",
            )

    def require_may_administer(self, project: str, what: str) -> None:
        """Raise `Forbidden` unless the caller administers the server, or this project; `what` as in `require`."""
        if self.role is Role.PROJECT_ADMIN and project != self.project:
            raise Forbidden(
                f"Permission denied: a token with the role project_admin may {what} only in its own project, "
                f"{self.project}.",
                remedy=ASK_ADMIN,
            )
        if self.role not in {Role.PROJECT_ADMIN, Role.ADMIN}:
            raise Forbidden(
                f"Permission denied: a token with the role {self.role.value} may not {what}.",
                remedy="Use a token with the role project_admin of that project, or admin.",
            )


class Use:
    """A connection opened with a token, for the time of its block; closed when its secret is no longer valid."""

    __slots__ = ("_uses", "caller", "revoked", "waiting")

    def __init__(self, uses: set[Use], caller: Caller) -> None:
        self._uses = uses
        self.caller = caller
        self.revoked = False
        self.waiting: set[asyncio.Task[Any]] = set()
        """Tasks that wait for data from the client; cancelled when the secret is no longer valid."""

    def __enter__(self) -> Self:
        self._uses.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._uses.discard(self)

    def revoke(self) -> None:
        """End the connection."""
        self.revoked = True
        for task in self.waiting:
            task.cancel()


class Authenticator:
    """The server's tokens, cached in memory so that a request needs no database query.

    Args:
        store: keeps the tokens.
        last_use_interval_ms: how often the times of last use are written at most.
    """

    def __init__(self, store: Store, last_use_interval_ms: int = 60_000) -> None:
        self._store = store
        self._last_use_interval_ms = last_use_interval_ms
        self.tokens: dict[str, Token] = {}
        """By id, in the order of their creation."""
        self.changing = asyncio.Lock()
        """Held by whoever changes a token that exists."""
        self._known: dict[str, Caller] = {}
        """By the hash of each secret, also of expired ones."""
        self._uses: set[Use] = set()
        """Open connections."""
        self._last_uses: dict[str, int] = {}
        """Times of last use that are not written yet, by token id."""
        self._writing_uses: asyncio.Task[None] | None = None
        self._expiry: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        for token in await self._store.tokens.all():
            self.remember(token)

    async def close(self) -> None:
        """Write the times of last use. The store must be open."""
        if self._expiry is not None:
            self._expiry.cancel()
        if self._writing_uses is not None:
            self._writing_uses.cancel()
            await asyncio.gather(self._writing_uses, return_exceptions=True)
        await self._write_uses()

    @property
    def empty(self) -> bool:
        return not self.tokens

    # ------------------------------------------------------------------------------------------------ authentication

    def authenticate(self, secret: str) -> Caller | None:
        """Return the caller that owns a secret, or None if it is unknown or no longer valid."""
        caller = self._known.get(hash_of(secret))
        if caller is None:
            return None
        now_ms = self._store.now_ms()
        if _expired(caller, now_ms):
            return None
        self._last_uses[caller.token_id] = now_ms
        if self._writing_uses is None:
            self._writing_uses = asyncio.create_task(self._keep_writing_uses(), name="write the last uses of tokens")
        return caller

    def refusal(self, secret: str) -> tuple[str, str] | None:
        """Return why a known secret is not valid, and what to do; None for an unknown one."""
        caller = self._known.get(hash_of(secret))
        if caller is None:
            return None
        token = self.tokens[caller.token_id]
        if caller.secret_sha256 != token.secret_sha256:
            return (
                f"The access token {token.name} was rotated; this secret has expired.",
                "Use the secret that the rotation printed, or another token.",
            )
        return (
            f"The access token {token.name} has expired.",
            f"An admin rotates it: `interlock token rotate {token.name}`. Or use another token.",
        )

    def using(self, caller: Caller) -> Use:
        """Register a caller's connection for the time of a block; it is closed when its secret stops being valid."""
        return Use(self._uses, caller)

    def last_used_at_ms(self, token: Token) -> int | None:
        """Return when a token was last used, also if that is not written yet."""
        return self._last_uses.get(token.id, token.last_used_at_ms)

    async def _keep_writing_uses(self) -> None:
        """Write the times of last use at once, and again after each interval with uses; end after one without."""
        try:
            while self._last_uses:
                await self._write_uses()
                await asyncio.sleep(self._last_use_interval_ms / 1000)
        finally:
            self._writing_uses = None

    async def _write_uses(self) -> None:
        uses, self._last_uses = self._last_uses, {}
        for token_id, at_ms in uses.items():
            if token_id in self.tokens:
                self.tokens[token_id] = msgspec.structs.replace(self.tokens[token_id], last_used_at_ms=at_ms)
        try:
            await self._store.tokens.note_uses(uses)
        except StoreError as error:
            _LOG.warning("failed to write when tokens were last used", why=error.message)

    def remember(self, token: Token) -> None:
        """Cache a token as it is now, and close the connections whose secret is no longer valid."""
        for known, caller in tuple(self._known.items()):
            if caller.token_id == token.id:
                del self._known[known]
        self.tokens[token.id] = token
        if token.former_sha256 is not None:
            former = _caller(token, token.former_sha256, token.former_until_ms)
            self._known[token.former_sha256] = former
        self._known[token.secret_sha256] = _caller(token, token.secret_sha256, token.expires_at_ms)
        self._close_invalid(token.id)
        self._watch_expiry()

    def forget(self, token: Token) -> None:
        """Remove a deleted token from the cache, and close its connections."""
        self.tokens.pop(token.id, None)
        for secret in {token.secret_sha256, token.former_sha256}:
            self._known.pop(secret or "", None)
        self._close_invalid(token.id)

    def _close_invalid(self, token_id: str) -> None:
        for use in [one for one in self._uses if one.caller.token_id == token_id]:
            valid = self._known.get(use.caller.secret_sha256)
            if valid is None or _expired(valid, self._store.now_ms()):
                use.revoke()

    def _watch_expiry(self) -> None:
        """Close connections at the next expiry of a secret."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        now_ms = self._store.now_ms()
        times = [one.expires_at_ms for one in self._known.values() if one.expires_at_ms and one.expires_at_ms > now_ms]
        if times:
            wait_s = min((min(times) - now_ms) / 1000, _TIMER_MAX_S)
            self._expiry = asyncio.get_running_loop().call_later(wait_s, self._on_expiry)

    def _on_expiry(self) -> None:
        for token_id in {use.caller.token_id for use in self._uses}:
            self._close_invalid(token_id)
        self._watch_expiry()

    # ------------------------------------------------------------------------------------------------------- agents

    async def bind(self, caller: Caller, host: str) -> None:
        """Bind an agent's token to a host. Durable when this returns.

        Raises:
            Forbidden: it is bound to another host.
        """
        async with self.changing:
            token = self.tokens.get(caller.token_id)
            if token is None or token.host not in {None, host}:
                raise Forbidden(f"Permission denied: this token is not valid for the host {host}.")
            if token.host is None:
                await self.replace(token, host=host)

    async def rename_host(self, before: str, name: str) -> None:
        """Rebind the tokens of a renamed host. Durable when this returns."""
        async with self.changing:
            for token in tuple(self.tokens.values()):
                if token.host == before:
                    await self.replace(token, host=name)

    async def add(self, token: Token) -> None:
        """Store a new token. Durable when this returns."""
        await self._store.tokens.put(token)
        self.remember(token)

    async def replace(self, token: Token, **fields: Any) -> Token:
        """Change a token, durably, while `changing` is held; return it."""
        changed = msgspec.structs.replace(token, **fields)
        await self._store.tokens.replace(changed)
        self.remember(changed)
        return changed


def hash_of(secret: str) -> str:
    """Return the hash by which a secret is stored."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _expired(caller: Caller, now_ms: int) -> bool:
    return caller.expires_at_ms is not None and now_ms >= caller.expires_at_ms


def _caller(token: Token, secret_sha256: str, expires_at_ms: int | None) -> Caller:
    return Caller(
        token_id=token.id,
        name=token.name,
        role=token.role,
        project=token.project,
        groups=token.groups,
        host=token.host,
        secret_sha256=secret_sha256,
        expires_at_ms=expires_at_ms,
    )
