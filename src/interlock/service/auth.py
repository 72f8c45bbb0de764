"""Authentication by bearer tokens, and authorization by role and project.

A token's secret is shown once, when it is created or rotated; only its SHA-256 is stored. Secrets are 256 random bits,
so an unsalted hash is enough. Expiry is measured on the store's clock, so that no jump of the wall clock hastens it;
the time in which the machine is off does not count.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any, Final, Self

import msgspec
import structlog

from interlock.core.durations import short_time
from interlock.core.errors import Forbidden, Invalid, NameTaken, StoreError, not_found
from interlock.core.parameters import check_name
from interlock.core.restarts import SERVER_REQUESTER
from interlock.core.roles import Role
from interlock.ports import Store, Token

GROUPS_MAX = 32
"""The limit of groups of one token."""
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
                remedy=f"Use a token with the role {role.value}.",
            )


class Use:
    """A connection opened with a token, for the time of its block; closed when its secret is no longer valid."""

    def __init__(self, uses: dict[str, set[Use]], caller: Caller) -> None:
        self._uses = uses
        self.caller = caller
        self.revoked = False
        self.waiting: set[asyncio.Task[Any]] = set()
        """Tasks that wait for data from the client; cancelled when the secret is no longer valid."""

    def __enter__(self) -> Self:
        self._uses.setdefault(self.caller.token_id, set()).add(self)
        return self

    def __exit__(self, *_: object) -> None:
        remaining = self._uses[self.caller.token_id]
        remaining.discard(self)
        if not remaining:
            del self._uses[self.caller.token_id]

    def revoke(self) -> None:
        """End the connection."""
        self.revoked = True
        for task in self.waiting:
            task.cancel()


class Authenticator:
    """The server's tokens, cached in memory so that a request needs no database query.

    Args:
        store: keeps the tokens.
        new_id: makes ids.
        new_secret: makes secrets.
        lifetime_max_ms: the longest time from the creation of a secret to its expiry, and the default; 0: no limit.
        last_use_interval_ms: how often the times of last use are written at most.
    """

    def __init__(
        self,
        store: Store,
        new_id: Callable[[], str],
        new_secret: Callable[[], str],
        *,
        lifetime_max_ms: int = 0,
        last_use_interval_ms: int = 60_000,
    ) -> None:
        self._store = store
        self._new_id = new_id
        self._new_secret = new_secret
        self._lifetime_max_ms = lifetime_max_ms
        self._last_use_interval_ms = last_use_interval_ms
        self._tokens: dict[str, Token] = {}
        """By id, in the order of their creation."""
        self._known: dict[str, Caller] = {}
        """By the hash of each secret, also of expired ones."""
        self._uses: dict[str, set[Use]] = {}
        """Open connections by token id."""
        # Names reserved while their token is written, so that concurrent creations cannot share a name.
        self._reserved_names: set[str] = set()
        self._changing = asyncio.Lock()
        self._last_uses: dict[str, int] = {}
        """Times of last use that are not written yet, by token id."""
        self._writing_uses: asyncio.Task[None] | None = None
        self._expiry: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        for token in await self._store.tokens.all():
            self._remember(token)

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
        return not self._tokens

    # ------------------------------------------------------------------------------------------------ authentication

    def authenticate(self, secret: str) -> Caller | None:
        """Return the caller that owns a secret, or None if it is unknown or no longer valid."""
        caller = self._known.get(_hash(secret))
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
        caller = self._known.get(_hash(secret))
        if caller is None:
            return None
        token = self._tokens[caller.token_id]
        if caller.secret_sha256 != token.secret_sha256:
            return f"The access token {token.name} was rotated; this secret has expired.", "Use its new secret."
        return f"The access token {token.name} has expired.", f"Rotate it: `interlock token rotate {token.name}`."

    def using(self, caller: Caller) -> Use:
        """Register a caller's connection for the time of a block; it is closed when its secret stops being valid."""
        return Use(self._uses, caller)

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
            if token_id in self._tokens:
                self._tokens[token_id] = msgspec.structs.replace(self._tokens[token_id], last_used_at_ms=at_ms)
        try:
            await self._store.tokens.note_uses(uses)
        except StoreError as error:
            _LOG.warning("failed to write when tokens were last used", why=error.message)

    def _remember(self, token: Token) -> None:
        """Cache a token as it is now, and close the connections whose secret is no longer valid."""
        for known, caller in tuple(self._known.items()):
            if caller.token_id == token.id:
                del self._known[known]
        self._tokens[token.id] = token
        if token.former_sha256 is not None:
            former = _caller(token, token.former_sha256, token.former_until_ms)
            self._known[token.former_sha256] = former
        self._known[token.secret_sha256] = _caller(token, token.secret_sha256, token.expires_at_ms)
        self._close_invalid(token.id)
        self._watch_expiry()

    def _forget(self, token: Token) -> None:
        self._tokens.pop(token.id, None)
        for secret in {token.secret_sha256, token.former_sha256}:
            self._known.pop(secret or "", None)
        self._close_invalid(token.id)

    def _close_invalid(self, token_id: str) -> None:
        for use in tuple(self._uses.get(token_id, ())):
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
        for token_id in tuple(self._uses):
            self._close_invalid(token_id)
        self._watch_expiry()

    # ------------------------------------------------------------------------------------------------------- agents

    async def bind(self, caller: Caller, host: str) -> None:
        """Bind an agent's token to a host. Durable when this returns.

        Raises:
            Forbidden: it is bound to another host.
        """
        async with self._changing:
            token = self._tokens.get(caller.token_id)
            if token is None or token.host not in {None, host}:
                raise Forbidden(f"Permission denied: this token is not valid for the host {host}.")
            if token.host is None:
                await self._replace(token, host=host)

    async def rename_host(self, before: str, name: str) -> None:
        """Rebind the tokens of a renamed host. Durable when this returns."""
        async with self._changing:
            for token in tuple(self._tokens.values()):
                if token.host == before:
                    await self._replace(token, host=name)

    async def _replace(self, token: Token, **fields: Any) -> Token:
        changed = msgspec.structs.replace(token, **fields)
        await self._store.tokens.replace(changed)
        self._remember(changed)
        return changed

    # ----------------------------------------------------------------------------------------------- administration

    async def make_admin(self, name: str, secret: str) -> None:
        """Create an admin token, without expiry, with a secret that is already in the token file.

        In this order a crash leaves at worst a file with an unknown secret, which the next start replaces.
        """
        await self._keep(self._token(name, Role.ADMIN, "default", secret))

    async def make(
        self,
        caller: Caller,
        name: str,
        role: Role,
        project: str,
        host: str | None = None,
        groups: tuple[str, ...] = (),
        *,
        expires_in_ms: int | None = None,
    ) -> tuple[Token, str]:
        """Create a token; return it and its secret, which is not stored.

        Policies may name the groups (`groups`); nothing else depends on them.

        An agent's token is for one host: a token valid for any host would give access to the images and secrets of
        every project.

        It expires after `expires_in_ms`; if that is None, after the configured maximum, or never.

        Raises:
            Forbidden: the caller is not an admin.
            Invalid: the name, project, host or a group is invalid, there are too many groups, the role requires a
                host or allows none, or the token would be valid for longer than the configured maximum.
            NameTaken: a token with that name exists or is being created.
        """
        caller.require(Role.ADMIN, "create tokens")
        check_name(name, "name")
        check_name(project, "project")
        _check_host(name, role, host)
        _check_groups(groups)
        lifetime_ms = self._lifetime_ms(expires_in_ms)
        if name == SERVER_REQUESTER:
            raise Invalid(f"Invalid name {SERVER_REQUESTER!r}: reserved for the server.", remedy="Choose another name.")
        if name in self._reserved_names or any(known.name == name for known in self._tokens.values()):
            taken = f"A token named {name} already exists."
            raise NameTaken(taken, remedy="Choose another name, or delete that one.")
        secret = self._new_secret()
        token = self._token(name, role, project, secret)
        token = msgspec.structs.replace(
            token,
            host=host,
            groups=tuple(dict.fromkeys(groups)),
            created_by=caller.name,
            expires_at_ms=None if lifetime_ms is None else token.created_at_ms + lifetime_ms,
        )
        self._reserved_names.add(name)
        try:
            await self._keep(token)
        finally:
            self._reserved_names.discard(name)
        _LOG.info("token created", token=name, role=role.value, project=project, by=caller.name)
        return token, secret

    def _token(self, name: str, role: Role, project: str, secret: str) -> Token:
        now_ms = self._store.now_ms()
        return Token(
            id=self._new_id(),
            name=name,
            role=role,
            project=project,
            secret_sha256=_hash(secret),
            created_at_ms=now_ms,
        )

    async def _keep(self, token: Token) -> None:
        await self._store.tokens.put(token)
        self._remember(token)

    def _lifetime_ms(self, wanted_ms: int | None) -> int | None:
        """Return how long a new secret is valid. Raises `Invalid` if that is longer than the configured maximum."""
        most_ms = self._lifetime_max_ms or None
        if wanted_ms is not None and most_ms is not None and wanted_ms > most_ms:
            raise Invalid(
                f"expires_in: {short_time(wanted_ms)} is longer than this server allows ({short_time(most_ms)}).",
                remedy=f"Use at most {short_time(most_ms)}, or raise tokens.lifetime_max_ms in the configuration.",
            )
        return most_ms if wanted_ms is None else wanted_ms

    async def list(self, caller: Caller) -> tuple[Token, ...]:
        """Return the tokens, with the times of last use as they are now. Raises `Forbidden`."""
        caller.require(Role.ADMIN, "list tokens")
        return tuple(
            msgspec.structs.replace(token, last_used_at_ms=self._last_uses.get(token.id, token.last_used_at_ms))
            for token in self._tokens.values()
        )

    async def rotate(
        self, caller: Caller, reference: str, *, overlap_ms: int = 0, expires_in_ms: int | None = None
    ) -> tuple[Token, str]:
        """Give a token a new secret; return both. Connections opened with the former one close at its end.

        The former secret stays valid for `overlap_ms`, at most until it would have expired; one that is still valid
        from the rotation before ends now. The new one expires after `expires_in_ms`; if that is None, after as long as
        the former one was valid for.

        Raises:
            NotFound, Forbidden: as `delete`.
            Invalid: it is the caller's own and there is no overlap, so that the response could not be sent, or it
                would be valid for longer than the configured maximum.
        """
        caller.require(Role.ADMIN, "rotate tokens")
        async with self._changing:
            token = self._find(reference)
            if token.id == caller.token_id and not overlap_ms:
                raise Invalid(
                    "overlap: required to rotate the token that is in use; without it, the response would not arrive.",
                    remedy="Use --overlap 1m.",
                )
            now_ms = self._store.now_ms()
            if expires_in_ms is None and token.expires_at_ms is not None:
                before_ms = token.expires_at_ms - (token.rotated_at_ms or token.created_at_ms)
                expires_in_ms = min(before_ms, self._lifetime_max_ms or before_ms)
            lifetime_ms = self._lifetime_ms(expires_in_ms)
            former_until_ms = now_ms + overlap_ms
            if token.expires_at_ms is not None:
                former_until_ms = min(former_until_ms, token.expires_at_ms)
            secret = self._new_secret()
            rotated = await self._replace(
                token,
                secret_sha256=_hash(secret),
                rotated_at_ms=now_ms,
                expires_at_ms=None if lifetime_ms is None else now_ms + lifetime_ms,
                former_sha256=token.secret_sha256,
                former_until_ms=former_until_ms,
            )
        _LOG.info("token rotated", token=token.name, project=token.project, overlap_ms=overlap_ms, by=caller.name)
        return rotated, secret

    async def delete(self, caller: Caller, reference: str) -> None:
        """Delete a token by id or name, and close its connections.

        Raises `NotFound`, `Forbidden`, or `Invalid` for the caller's own.
        """
        caller.require(Role.ADMIN, "delete tokens")
        async with self._changing:
            token = self._find(reference)
            if token.id == caller.token_id:
                raise Invalid(
                    "A token cannot delete itself: it may be the last admin token.",
                    remedy="Delete it with another admin token.",
                )
            await self._store.tokens.delete(token.id)
            self._forget(token)
        _LOG.info("token deleted", token=token.name, project=token.project, by=caller.name)

    def _find(self, reference: str) -> Token:
        """Return a token by id or name. Raises `NotFound`."""
        found = self._tokens.get(reference) or next(
            (token for token in self._tokens.values() if token.name == reference), None
        )
        if found is None:
            raise not_found("Token", reference)
        return found


def _hash(secret: str) -> str:
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


def _check_groups(groups: tuple[str, ...]) -> None:
    if len(groups) > GROUPS_MAX:
        raise Invalid(f"groups: {len(groups)}; a token has at most {GROUPS_MAX}.", remedy="Name fewer groups.")
    for group in groups:
        check_name(group, "groups")


def _check_host(name: str, role: Role, host: str | None) -> None:
    if role is Role.AGENT and host is None:
        raise Invalid(
            "host: required for a token with the role agent.",
            remedy=f"Name it: `interlock token create {name} --role agent --host HOST`.",
        )
    if role is not Role.AGENT and host is not None:
        raise Invalid(
            f"host: not allowed for a token with the role {role.value}.",
            remedy="Leave the host out, or create a token with the role agent.",
        )
    if host is not None:
        check_name(host, "host")
