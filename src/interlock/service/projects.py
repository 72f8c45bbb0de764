"""Administration of projects: create, list, limit and delete."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec

from interlock.core.errors import InUse, Invalid, NameTaken, not_found
from interlock.core.parameters import check_name
from interlock.core.quotas import Quota
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.ports import InstanceFilter, Project, Store
from interlock.service.auth import Authenticator, Caller
from interlock.service.quotas import Quotas

DEFAULT = "default"
"""The project of the first admin token."""


class Projects:
    """The projects and their quotas.

    Args:
        store: keeps the projects.
        quotas: applies the limits, and knows what is used.
        callers: knows the tokens of a project.
    """

    def __init__(self, store: Store, quotas: Quotas, callers: Authenticator) -> None:
        self._store = store
        self._quotas = quotas
        self._callers = callers
        self._projects: dict[str, Project] = {}
        # Held while a project or a token is created or deleted, so that no token is created in a project that ends.
        self._changing = asyncio.Lock()

    async def open(self) -> None:
        """Load the projects. The store must be open."""
        for project in await self._store.projects.all():
            self._remember(project)

    def _remember(self, project: Project) -> None:
        self._projects[project.name] = project
        self._quotas.set_limits(project.name, project.quota)

    def exists(self, name: str) -> bool:
        return name in self._projects

    def used(self, project: Project) -> dict[str, int]:
        """Return what a project uses of each resource."""
        return self._quotas.used(project.name)

    def list(self, caller: Caller) -> tuple[Project, ...]:
        """Return all projects to an admin, and to others their own."""
        visible = (self._projects[name] for name in sorted(self._projects))
        return tuple(one for one in visible if caller.role is Role.ADMIN or one.name == caller.project)

    def find(self, caller: Caller, name: str) -> Project:
        """Return a project: any to an admin, and to others their own. Raises `NotFound`."""
        project = self._projects.get(name)
        if project is None or (caller.role is not Role.ADMIN and name != caller.project):
            raise not_found("Project", name)
        return project

    async def create(self, caller: Caller, name: str, quota: Quota, *, with_history: bool = False) -> Project:
        """Create a project.

        Raises:
            Forbidden: the caller is not an admin.
            Invalid: the name is invalid.
            NameTaken: it exists.
            InUse: records of VMs of an earlier project of that name are kept, which the new one would see, and
                `with_history` does not confirm that.
        """
        caller.require(Role.ADMIN, "create projects")
        async with self._changing:
            if name in self._projects:
                raise NameTaken(f"A project named {name} already exists.", remedy="Choose another name.")
            return await self._create(caller, name, quota, with_history=with_history)

    async def _create(self, caller: Caller, name: str, quota: Quota, *, with_history: bool = False) -> Project:
        check_name(name, "name")
        past = await self._store.instances(InstanceFilter(project=name, vm_state=VmState.DELETED), 1)
        if past.items and not with_history:
            raise InUse(
                f"Records of VMs of an earlier project named {name} are still kept; a new one of that name would show "
                "them to its members.",
                remedy=f"Choose another name, or confirm it: `interlock project create {name} --with-history`.",
            )
        project = Project(name=name, created_at_ms=self._store.now_ms(), created_by=caller.name, quota=quota)
        await self._store.projects.put(project)
        self._quotas.closed.discard(name)
        self._remember(project)
        return project

    @contextlib.asynccontextmanager
    async def entered(self, caller: Caller, name: str) -> AsyncIterator[None]:
        """Keep a project from being deleted while a token is created in it.

        One that does not exist is created, without a quota. Raises as `create`.
        """
        async with self._changing:
            if name not in self._projects:
                caller.require(Role.ADMIN, "create projects")
                await self._create(caller, name, Quota())
            yield

    async def limit(self, caller: Caller, name: str, changes: Mapping[str, int | None]) -> Project:
        """Change limits of a project; what it uses already stays. Return the project.

        Raises:
            Forbidden: the caller is not an admin.
            NotFound: it does not exist.
        """
        caller.require(Role.ADMIN, "change quotas")
        async with self._changing:
            project = self.find(caller, name)
            changed = msgspec.structs.replace(project, quota=msgspec.structs.replace(project.quota, **changes))
            await self._store.projects.replace(changed)
            self._remember(changed)
            return changed

    async def delete(self, caller: Caller, name: str) -> None:
        """Delete an empty project. Records of its deleted VMs are kept.

        Raises:
            Forbidden: the caller is not an admin.
            NotFound: it does not exist.
            Invalid: it is the project of the server's own tokens.
            InUse: something is in it.
        """
        caller.require(Role.ADMIN, "delete projects")
        async with self._changing:
            project = self.find(caller, name)
            if name == DEFAULT:
                raise Invalid(f"The project {DEFAULT} cannot be deleted: the server creates its own tokens there.")
            self._quotas.closed.add(name)
            try:
                await self._require_empty(name)
                await self._store.projects.delete(name)
            except BaseException:
                self._quotas.closed.discard(name)
                raise
            del self._projects[project.name]
            self._quotas.set_limits(name, Quota())

    async def _require_empty(self, name: str) -> None:
        await self._store.settled()
        used: dict[str, Any] = self._quotas.used(name)
        tokens = sum(token.project == name for token in self._callers.tokens.values())
        instances = len((await self._store.instances(InstanceFilter(project=name), 1_000)).items)
        kinds = {"VM": instances, "volume": used["volumes"], "image": used["images"]}
        kinds |= {"network": used["networks"], "token": tokens}
        kinds["security group"] = self._quotas.security_groups[name]
        found = [f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in kinds.items() if count]
        if found:
            raise InUse(
                f"The project {name} is not empty: it has {', '.join(found)}.",
                remedy="Delete them first; a deleted token cannot create more.",
            )
