"""Administration of access tokens: create, list, rotate and delete."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from interlock.core.durations import short_time
from interlock.core.errors import Forbidden, Invalid, NameTaken, not_found
from interlock.core.parameters import check_name
from interlock.core.restarts import SERVER_REQUESTER
from interlock.core.roles import Role
from interlock.ports import Store, Token
from interlock.service.auth import ASK_ADMIN, Authenticator, Caller, hash_of
from interlock.service.projects import DEFAULT, Projects

GROUPS_MAX: Final = 32
"""The limit of groups of one token."""


def new_secret() -> str:
    """Return a token secret: 256 random bits, with a prefix for secret scanners."""
    return f"ilk_{secrets.token_urlsafe(32)}"


async def make_admin(callers: Authenticator, store: Store, token_id: str, name: str, secret: str) -> None:
    """Create an admin token, without expiry, with a secret that is already in the token file.

    In this order a crash leaves at worst a file with an unknown secret, which the next start replaces.
    """
    await callers.add(
        Token(
            id=token_id,
            name=name,
            role=Role.ADMIN,
            project=DEFAULT,
            secret_sha256=hash_of(secret),
            created_at_ms=store.now_ms(),
        )
    )


class Tokens:
    """The tokens that a caller administers: all for an admin, those of its project for a project_admin.

    Args:
        callers: the tokens as they are now.
        store: keeps the tokens.
        new_id: makes ids.
        projects: knows which projects exist.
        lifetime_max_ms: the longest time from the creation of a secret to its expiry, and the default; 0: no limit.
    """

    def __init__(
        self,
        callers: Authenticator,
        store: Store,
        new_id: Callable[[], str],
        projects: Projects,
        lifetime_max_ms: int = 0,
    ) -> None:
        self._callers = callers
        self._projects = projects
        self._store = store
        self._new_id = new_id
        self._lifetime_max_ms = lifetime_max_ms
        # Projects and names reserved while their token is written, so that concurrent creations cannot share a name.
        self._reserved_names: set[tuple[str, str]] = set()

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
        server_admin: bool = False,
    ) -> tuple[Token, str]:
        """Create a token; return it and its secret, which is not stored.

        Policies may name the groups (`groups`); nothing else depends on them. `server_admin` confirms that an admin
        in another project is to administer the server.

        An agent's token is for one host: a token valid for any host would give access to the images and secrets of
        every project.

        A project that does not exist is created, without a quota. The token expires after `expires_in_ms`; if that is
        None, after the configured maximum, or never.

        Raises:
            Forbidden: the caller does not administer the project, or may not grant the role or a group.
            Invalid: the name, project, host or a group is invalid, there are too many groups, the role requires a
                host or allows none, the token would be valid for longer than the configured maximum, or
                `server_admin` is missing.
            NameTaken: the project has a token with that name, or it is being created.
        """
        check_name(name, "name")
        check_name(project, "project")
        caller.require_may_administer(project, "create tokens")
        _check_grant(caller, role, groups, "create a token")
        _check_scope(caller, role, project, server_admin=server_admin)
        _check_host(name, role, host)
        _check_groups(groups)
        lifetime_ms = self._lifetime_ms(expires_in_ms)
        self._check_free(project, name)
        secret = new_secret()
        now_ms = self._store.now_ms()
        token = Token(
            id=self._new_id(),
            name=name,
            role=role,
            project=project,
            secret_sha256=hash_of(secret),
            created_at_ms=now_ms,
            created_by=caller.name,
            groups=tuple(dict.fromkeys(groups)),
            host=host,
            expires_at_ms=None if lifetime_ms is None else now_ms + lifetime_ms,
        )
        self._reserved_names.add((project, name))
        try:
            async with self._projects.entered(caller, project):
                await self._callers.add(token)
        finally:
            self._reserved_names.discard((project, name))
        return token, secret

    def _check_free(self, project: str, name: str) -> None:
        """Raise `Invalid` for the server's own name, `NameTaken` if the project has a token of that name."""
        if name == SERVER_REQUESTER:
            raise Invalid(f"Invalid name {SERVER_REQUESTER!r}: reserved for the server.", remedy="Choose another name.")
        known = {(one.project, one.name) for one in self._callers.tokens.values()} | self._reserved_names
        if (project, name) in known:
            taken = f"A token named {name} already exists in the project {project}."
            raise NameTaken(taken, remedy="Choose another name, or delete that one.")

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
        """Return the tokens that the caller administers, with the times of last use as they are now.

        Raises `Forbidden`.
        """
        caller.require_may_administer(caller.project, "list tokens")
        return tuple(
            msgspec.structs.replace(token, last_used_at_ms=self._callers.last_used_at_ms(token))
            for token in self._visible(caller)
        )

    def _visible(self, caller: Caller) -> Iterator[Token]:
        for token in self._callers.tokens.values():
            if caller.role is Role.ADMIN or token.project == caller.project:
                yield token

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
        caller.require_may_administer(caller.project, "rotate tokens")
        async with self._callers.changing:
            token = self._find(caller, reference)
            _check_grant(caller, token.role, token.groups, f"rotate the token {token.name}")
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
            secret = new_secret()
            rotated = await self._callers.replace(
                token,
                secret_sha256=hash_of(secret),
                rotated_at_ms=now_ms,
                expires_at_ms=None if lifetime_ms is None else now_ms + lifetime_ms,
                former_sha256=token.secret_sha256,
                former_until_ms=former_until_ms,
            )
        return rotated, secret

    async def delete(self, caller: Caller, reference: str) -> None:
        """Delete a token by id or name, and close its connections.

        Raises:
            NotFound: it does not exist, or is one of another project that the caller does not administer.
            Forbidden: the caller does not administer tokens, or none with that role.
            Invalid: it is the caller's own, or several projects have a token of that name.
        """
        caller.require_may_administer(caller.project, "delete tokens")
        async with self._callers.changing:
            token = self._find(caller, reference)
            _check_grant(caller, token.role, (), f"delete the token {token.name}")
            if token.id == caller.token_id:
                raise Invalid(
                    "A token cannot delete itself: it may be the last admin token.",
                    remedy="Delete it with another admin token.",
                )
            await self._store.tokens.delete(token.id)
            self._callers.forget(token)

    def _find(self, caller: Caller, reference: str) -> Token:
        """Return a token by id or name. Raises `NotFound`, or `Invalid` for a name in several projects."""
        visible = tuple(self._visible(caller))
        found = [one for one in visible if one.id == reference] or [one for one in visible if one.name == reference]
        if not found:
            raise not_found("Token", reference)
        if len(found) > 1:
            projects = ", ".join(sorted(token.project for token in found))
            raise Invalid(
                f"Several tokens are named {reference}, in the projects {projects}.",
                remedy="Use the id: `interlock token list` shows it.",
            )
        return found[0]


def _check_grant(caller: Caller, role: Role, groups: tuple[str, ...], what: str) -> None:
    """Raise `Forbidden` if a caller that is not an admin would get or take more than it has itself."""
    if caller.role is Role.ADMIN:
        return
    if role is Role.AGENT or not caller.role.includes(role):
        raise Forbidden(
            f"Permission denied: a token with the role {caller.role.value} may not {what} with the role {role.value}.",
            remedy=ASK_ADMIN,
        )
    foreign = sorted(set(groups) - set(caller.groups))
    if foreign:
        raise Forbidden(
            f"Permission denied: you may not {what} in the groups {', '.join(foreign)[:200]}, which your own does not "
            "have.",
            remedy=ASK_ADMIN,
        )


def _check_scope(caller: Caller, role: Role, project: str, *, server_admin: bool) -> None:
    """Raise `Invalid` if an admin is created for another project without saying that it administers the server."""
    if role is Role.ADMIN and project != caller.project and not server_admin:
        raise Invalid(
            f"role: a token with the role admin administers the whole server, not only the project {project}.",
            remedy="Use the role project_admin for an admin of the project, or confirm it with --server-admin "
            "(`server_admin` over HTTP).",
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
