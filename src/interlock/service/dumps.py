"""The verbs on memory dumps: which there are, where, and their removal.

What a guest knows is in them, so readers get none.
"""

from __future__ import annotations

from interlock.core.errors import NotFound
from interlock.ports import Dump, DumpFiles, Role
from interlock.service.callers import Caller
from interlock.service.instances import Instances


class Dumps:
    """Finds dumps for callers, for whom only their own project's instances exist."""

    def __init__(self, instances: Instances, files: DumpFiles) -> None:
        self._instances = instances
        self._files = files

    async def of(self, caller: Caller, reference: str) -> tuple[Dump, ...]:
        """The instance's dumps, oldest first. Raises `NotFound`."""
        instance = await self._instances.describe(caller, reference)
        return await self._files.dumps(instance.id)

    async def find(self, caller: Caller, reference: str, dump_id: str) -> Dump:
        """One dump, to be read. Raises `NotFound`, `Forbidden`."""
        caller.require(Role.MEMBER, "read what a guest had in its memory")
        return await self._find(caller, reference, dump_id)

    async def delete(self, caller: Caller, reference: str, dump_id: str) -> None:
        """Remove one dump. Raises `NotFound`, `Forbidden`."""
        caller.require(Role.MEMBER, "delete memory dumps")
        await self._files.discard(await self._find(caller, reference, dump_id))

    async def _find(self, caller: Caller, reference: str, dump_id: str) -> Dump:
        for dump in await self.of(caller, reference):
            if dump.id == dump_id:
                return dump
        raise NotFound(
            f"{reference[:80]} has no dump {dump_id[:80]}.", remedy="List them with `interlock vm dumps NAME`."
        )
