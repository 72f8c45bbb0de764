"""Memory dumps: list, read, delete. They contain the guest's memory, so readers may only list them."""

from __future__ import annotations

from interlock.core.errors import NotFound
from interlock.core.roles import Role
from interlock.ports import Dump, DumpFiles
from interlock.service.auth import Caller
from interlock.service.instances import Instances


class Dumps:
    """Finds and deletes the dumps of instances in the caller's project."""

    def __init__(self, instances: Instances, files: DumpFiles) -> None:
        self._instances = instances
        self._files = files

    async def of(self, caller: Caller, reference: str) -> tuple[Dump, ...]:
        """Return the instance's dumps, oldest first. Raises `NotFound`."""
        instance = await self._instances.describe(caller, reference)
        return await self._files.dumps(instance.id)

    async def find(self, caller: Caller, reference: str, dump_id: str) -> Dump:
        """Return a dump, for reading. Raises `NotFound`, `Forbidden`."""
        caller.require(Role.MEMBER, "read memory dumps")
        return await self._find(caller, reference, dump_id)

    async def delete(self, caller: Caller, reference: str, dump_id: str) -> None:
        """Delete a dump. Raises `NotFound`, `Forbidden`."""
        caller.require(Role.MEMBER, "delete memory dumps")
        await self._files.discard(await self._find(caller, reference, dump_id))

    async def _find(self, caller: Caller, reference: str, dump_id: str) -> Dump:
        for dump in await self.of(caller, reference):
            if dump.id == dump_id:
                return dump
        raise NotFound(
            f"Dump of {reference[:80]} not found: {dump_id[:80]}.", remedy="List them with `interlock vm dumps NAME`."
        )
