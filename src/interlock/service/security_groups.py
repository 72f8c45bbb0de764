"""Security groups of projects: create, list, change and delete."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from interlock.core.errors import InUse, Invalid, NameTaken, not_found
from interlock.core.networks import IngressRule, SecurityGroup, ingress_of
from interlock.core.parameters import check_name
from interlock.core.resource_claims import group_place
from interlock.core.roles import Role
from interlock.ports import Store, Tally
from interlock.service.auth import Caller
from interlock.service.quotas import Quotas

GROUPS_MAX: Final = 100
"""How many security groups a project may have."""


class SecurityGroups:
    """The security groups of all projects, in memory, so that a decision sees at once that one is being deleted."""

    def __init__(self, store: Store, quotas: Quotas, new_id: Callable[[], str]) -> None:
        self._store = store
        self._quotas = quotas
        self._new_id = new_id
        self._groups: dict[str, dict[str, SecurityGroup]] = {}
        """By project and name."""
        self._changing = asyncio.Lock()
        self._listener: Callable[[], None] | None = None

    async def open(self) -> None:
        """Load the groups. The store must be open."""
        for group in await self._store.security_groups.all():
            self._remember(group)

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` when the rules of a group have changed."""
        self._listener = listener

    def _remember(self, group: SecurityGroup) -> None:
        self._groups.setdefault(group.project, {})[group.name] = group
        self._quotas.security_groups[group.project] = len(self._groups[group.project])

    def _forget(self, group: SecurityGroup) -> None:
        del self._groups[group.project][group.name]
        self._quotas.security_groups[group.project] = len(self._groups[group.project])

    def rules(self, project: str) -> dict[str, tuple[IngressRule, ...]]:
        """Return the rules of a project's groups, by name."""
        return {name: one.ingress for name, one in self._groups.get(project, {}).items()}

    def check(self, project: str, names: Iterable[str]) -> None:
        """Raise `NotFound` unless the project has these groups."""
        for name in names:
            if name not in self._groups.get(project, {}):
                raise not_found("Security group", name)

    def projects_with_users(self) -> tuple[str, ...]:
        """Return the projects with a group that an instance has."""
        found = (group for groups in self._groups.values() for group in groups.values())
        return tuple(dict.fromkeys(one.project for one in found if self.users(one)))

    def users(self, group: SecurityGroup) -> int:
        """Return how many instances have the group, or will have."""
        return self._store.tally(Tally.SECURITY_GROUPS, group_place(group.project, group.name))

    def list(self, caller: Caller) -> tuple[SecurityGroup, ...]:
        """Return the groups of the caller's project; for an admin, all."""
        projects = self._groups if caller.role is Role.ADMIN else (caller.project,)
        return tuple(one for project in projects for one in self._groups.get(project, {}).values())

    def find(self, caller: Caller, reference: str) -> SecurityGroup:
        """Return a group by id, or one of the caller's project by name. Raises `NotFound`."""
        for one in self.list(caller):
            if one.id == reference or (one.name == reference and one.project == caller.project):
                return one
        raise not_found("Security group", reference)

    async def create(self, caller: Caller, name: str, allow: str) -> SecurityGroup:
        """Create a group with rules such as `tcp 22 from 10.0.0.0/8`.

        Raises:
            Forbidden, NameTaken, StoreFull.
            Invalid: names the field and what was expected; also if the project has as many as it may have.
        """
        caller.require(Role.MEMBER, "create security groups")
        check_name(name, "name")
        ingress = ingress_of(allow)
        async with self._changing:
            self._quotas.require_open(caller.project)
            present = self._groups.get(caller.project, {})
            if name in present:
                raise NameTaken(f"A security group named {name} already exists.", remedy="Choose another name.")
            if len(present) >= GROUPS_MAX:
                raise Invalid(
                    f"The project {caller.project} has {len(present)} security groups, the most that it may have.",
                    remedy="Delete one first.",
                )
            group = SecurityGroup(
                id=self._new_id(),
                name=name,
                project=caller.project,
                ingress=ingress,
                created_at_ms=self._store.now_ms(),
                created_by=caller.name,
            )
            self._quotas.security_groups[caller.project] += 1
            try:
                await self._store.security_groups.put(group)
            except BaseException:
                self._quotas.security_groups[caller.project] -= 1
                raise
            self._remember(group)
        return group

    async def set(self, caller: Caller, reference: str, allow: str) -> SecurityGroup:
        """Replace the rules of a group; the instances that have it follow. Raises as `create`, and `NotFound`."""
        caller.require(Role.MEMBER, "change security groups")
        ingress = ingress_of(allow)
        async with self._changing:
            changed = msgspec.structs.replace(self.find(caller, reference), ingress=ingress)
            await self._store.security_groups.replace(changed)
            self._remember(changed)
        if self._listener is not None:
            self._listener()
        return changed

    async def delete(self, caller: Caller, reference: str) -> None:
        """Delete a group that no instance has. Raises `NotFound`, `Forbidden`, `InUse`."""
        caller.require(Role.MEMBER, "delete security groups")
        async with self._changing:
            group = self.find(caller, reference)
            users = self.users(group)
            if users:
                raise InUse(
                    f"The security group {group.name} is in use by {users} VM{'' if users == 1 else 's'}.",
                    remedy="Delete them, or change their interfaces with `interlock vm set-interface --group` first.",
                )
            self._forget(group)
            try:
                await self._store.security_groups.delete(group.id)
            except BaseException:
                self._remember(group)
                raise
