"""Authentication by bearer tokens, and authorization by role and project.

A token's secret is shown once, when it is created; only its SHA-256 is stored. Secrets are 256 random bits, so an
unsalted hash is enough.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any, Self

import msgspec

from interlock.core.errors import Forbidden, Invalid, NameTaken, not_found
from interlock.core.parameters import check_name
from interlock.core.restarts import SERVER_REQUESTER
from interlock.core.roles import Role
from interlock.ports import Store, Token

GROUPS_MAX = 32
"""The limit of groups of one token."""


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """An authenticated caller: its name, role, project and groups."""

    token_id: str
    name: str
    role: Role
    project: str
    groups: tuple[str, ...] = ()
    host: str | None = None
    """The host of an agent's token; None for other roles, and for an agent that has not connected yet."""

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
    """A connection opened with a token, for the time of its block; closed when the token is deleted."""

    def __init__(self, uses: dict[str, set[Use]], token_id: str) -> None:
        self._uses = uses
        self._token_id = token_id
        self.revoked = False
        self.waiting: set[asyncio.Task[Any]] = set()
        """Tasks that wait for data from the client; cancelled when the token is deleted."""

    def __enter__(self) -> Self:
        self._uses.setdefault(self._token_id, set()).add(self)
        return self

    def __exit__(self, *_: object) -> None:
        remaining = self._uses[self._token_id]
        remaining.discard(self)
        if not remaining:
            del self._uses[self._token_id]

    def revoke(self) -> None:
        """End the connection."""
        self.revoked = True
        for task in self.waiting:
            task.cancel()


class Authenticator:
    """The server's tokens, cached in memory so that a request needs no database query."""

    def __init__(self, store: Store, new_id: Callable[[], str], new_secret: Callable[[], str]) -> None:
        self._store = store
        self._new_id = new_id
        self._new_secret = new_secret
        self._known: dict[str, Caller] = {}
        self._uses: dict[str, set[Use]] = {}
        """Open connections by token id."""
        # Names reserved while their token is written, so that concurrent creations cannot share a name.
        self._reserved_names: set[str] = set()

    async def open(self) -> None:
        for token in await self._store.tokens.all():
            self._known[token.secret_sha256] = _caller(token)

    @property
    def empty(self) -> bool:
        return not self._known

    def authenticate(self, secret: str) -> Caller | None:
        """Return the caller that owns a secret, or None."""
        return self._known.get(_hash(secret))

    async def make_admin(self, name: str, secret: str) -> None:
        """Create an admin token with a secret that is already in the token file.

        In this order a crash leaves at worst a file with an unknown secret, which the next start replaces.
        """
        await self._keep(name, Role.ADMIN, "default", secret)

    def using(self, caller: Caller) -> Use:
        """Register a caller's connection for the time of a block, so that deleting its token closes it."""
        return Use(self._uses, caller.token_id)

    async def bind(self, caller: Caller, host: str) -> None:
        """Bind an agent's token to a host. Durable when this returns.

        Raises:
            Forbidden: it is bound to another host.
        """
        known = next((one for one in self._known.values() if one.token_id == caller.token_id), None)
        if known is None or known.host not in {None, host}:
            raise Forbidden(f"Permission denied: this token is not valid for the host {host}.")
        if known.host is None:
            for token in await self._store.tokens.all():
                if token.id == caller.token_id and token.host is None:
                    bound = msgspec.structs.replace(token, host=host)
                    self._known[token.secret_sha256] = _caller(bound)
                    await self._store.tokens.replace(bound)

    async def rename_host(self, before: str, name: str) -> None:
        """Rebind the tokens of a renamed host. Durable when this returns."""
        for token in await self._store.tokens.all():
            if token.host == before:
                bound = msgspec.structs.replace(token, host=name)
                self._known[token.secret_sha256] = _caller(bound)
                await self._store.tokens.replace(bound)

    async def make(
        self,
        caller: Caller,
        name: str,
        role: Role,
        project: str,
        host: str | None = None,
        groups: tuple[str, ...] = (),
    ) -> tuple[Token, str]:
        """Create a token; return it and its secret, which is not stored.

        Policies may name the groups (`groups`); nothing else depends on them.

        An agent's token is for one host: a token valid for any host would give access to the images and secrets of
        every project.

        Raises:
            Forbidden: the caller is not an admin.
            Invalid: the name, project, host or a group is invalid, there are too many groups, or the role requires a
                host, or allows none.
            NameTaken: a token with that name exists or is being created.
        """
        caller.require(Role.ADMIN, "create tokens")
        check_name(name, "name")
        check_name(project, "project")
        _check_host(name, role, host)
        _check_groups(groups)
        if name == SERVER_REQUESTER:
            raise Invalid(f"Invalid name {SERVER_REQUESTER!r}: reserved for the server.", remedy="Choose another name.")
        if name in self._reserved_names or any(known.name == name for known in self._known.values()):
            taken = f"A token named {name} already exists."
            raise NameTaken(taken, remedy="Choose another name, or delete that one.")
        secret = self._new_secret()
        self._reserved_names.add(name)
        try:
            return await self._keep(name, role, project, secret, host, tuple(dict.fromkeys(groups))), secret
        finally:
            self._reserved_names.discard(name)

    async def _keep(
        self,
        name: str,
        role: Role,
        project: str,
        secret: str,
        host: str | None = None,
        groups: tuple[str, ...] = (),
    ) -> Token:
        token = Token(
            id=self._new_id(),
            name=name,
            role=role,
            project=project,
            secret_sha256=_hash(secret),
            created_at_ms=self._store.now_ms(),
            host=host,
            groups=groups,
        )
        await self._store.tokens.put(token)
        self._known[token.secret_sha256] = _caller(token)
        return token

    async def list(self, caller: Caller) -> tuple[Token, ...]:
        caller.require(Role.ADMIN, "list tokens")
        return await self._store.tokens.all()

    async def delete(self, caller: Caller, reference: str) -> None:
        """Delete a token by id or name, and close its connections.

        Raises `NotFound`, `Forbidden`, or `Invalid` for the caller's own.
        """
        caller.require(Role.ADMIN, "delete tokens")
        for token in await self._store.tokens.all():
            if reference in {token.id, token.name}:
                if token.id == caller.token_id:
                    raise Invalid(
                        "A token cannot delete itself: it may be the last admin token.",
                        remedy="Delete it with another admin token.",
                    )
                await self._store.tokens.delete(token.id)
                self._known.pop(token.secret_sha256, None)
                for use in tuple(self._uses.get(token.id, ())):
                    use.revoke()
                return
        raise not_found("Token", reference)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _caller(token: Token) -> Caller:
    return Caller(
        token_id=token.id,
        name=token.name,
        role=token.role,
        project=token.project,
        groups=token.groups,
        host=token.host,
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
