"""Who is asking: bearer tokens and what they stand for.

A token's secret is shown once, when it is made; only its SHA-256 is kept. The secrets are 256 random bits, so that a
plain hash is enough: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import msgspec

from interlock.core.errors import Forbidden, Invalid, NameTaken, NotFound
from interlock.core.restarting import UPKEEP
from interlock.ports import Role, Store, Token
from interlock.service.wishes import check_name

_RANK = {Role.AGENT: -1, Role.READER: 0, Role.MEMBER: 1, Role.ADMIN: 2}


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """One authenticated caller: what it is called, what it may do, and whose instances exist for it."""

    token_id: str
    name: str
    role: Role
    project: str

    def require(self, role: Role, what: str) -> None:
        """Raise `Forbidden` unless the caller's role includes `role`; `what` completes "may not ..."."""
        if _RANK[self.role] < _RANK[role]:
            raise Forbidden(
                f"A token with the role {self.role.value} may not {what}.",
                remedy=f"Use a token with the role {role.value}.",
            )


class Callers:
    """The tokens of a server, held in memory so that a request costs no look-up in the store."""

    def __init__(self, store: Store, new_id: Callable[[], str], new_secret: Callable[[], str]) -> None:
        self._store = store
        self._new_id = new_id
        self._new_secret = new_secret
        self._known: dict[str, Caller] = {}
        # Keeping one is a wait; of two who make one of the same name at once, one loses.
        self._being_made: set[str] = set()

    async def open(self) -> None:
        for token in await self._store.tokens():
            self._known[token.secret_sha256] = _caller(token)

    @property
    def empty(self) -> bool:
        return not self._known

    def authenticate(self, secret: str) -> Caller | None:
        """The caller that a secret stands for, or None."""
        return self._known.get(_hash(secret))

    async def make_admin(self, name: str, secret: str) -> None:
        """Make an admin's token, asked for by nobody, of a secret that was put in its place already.

        In this order a crash leaves at worst a file with a secret that stands for nothing, and the next start makes
        another.
        """
        await self._keep(name, Role.ADMIN, "default", secret)

    async def make(self, caller: Caller, name: str, role: Role, project: str) -> tuple[Token, str]:
        """Make a token; the answer's second part is its secret, which is kept nowhere.

        Raises:
            Forbidden: the caller is not an admin.
            Invalid: the name or project is no name.
            NameTaken: there is a token of that name, or one is being made.
        """
        caller.require(Role.ADMIN, "make tokens")
        check_name(name, "name")
        check_name(project, "project")
        if name == UPKEEP:
            raise Invalid(f"{UPKEEP} is the name under which the server asks by itself.", remedy="Choose another name.")
        if name in self._being_made or any(known.name == name for known in self._known.values()):
            taken = f"There is a token named {name} already."
            raise NameTaken(taken, remedy="Choose another name, or delete that one.")
        secret = self._new_secret()
        self._being_made.add(name)
        try:
            return await self._keep(name, role, project, secret), secret
        finally:
            self._being_made.discard(name)

    async def _keep(self, name: str, role: Role, project: str, secret: str) -> Token:
        token = Token(
            id=self._new_id(),
            name=name,
            role=role,
            project=project,
            secret_sha256=_hash(secret),
            created_at_ms=self._store.now_ms(),
        )
        await self._store.put_token(token)
        self._known[token.secret_sha256] = _caller(token)
        return token

    async def list(self, caller: Caller) -> tuple[Token, ...]:
        caller.require(Role.ADMIN, "list tokens")
        return await self._store.tokens()

    async def delete(self, caller: Caller, reference: str) -> None:
        """Delete a token by id or name. Raises `NotFound`, `Forbidden`, or `Invalid` for the caller's own."""
        caller.require(Role.ADMIN, "delete tokens")
        for token in await self._store.tokens():
            if reference in {token.id, token.name}:
                if token.id == caller.token_id:
                    raise Invalid(
                        "A token cannot delete itself: nobody might be left who can make another.",
                        remedy="Delete it with another admin token.",
                    )
                await self._store.delete_token(token.id)
                self._known.pop(token.secret_sha256, None)
                return
        raise NotFound(f"There is no token {reference}.")


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _caller(token: Token) -> Caller:
    return Caller(token_id=token.id, name=token.name, role=token.role, project=token.project)
