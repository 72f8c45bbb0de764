"""Names of instances: unique within a project among those that are not deleted, also before they are committed."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from interlock.core.errors import name_taken
from interlock.core.records import Instance
from interlock.core.states import VmState
from interlock.stores.database import Database
from interlock.stores.write_batch import CachedInstance, WriteBatch


class InstanceNames:
    """The names in the database and in uncommitted batches.

    Args:
        database: has the committed names.
        cached: the cache of the store, by id.
    """

    def __init__(self, database: Database, cached: Mapping[str, CachedInstance]) -> None:
        self._database = database
        self._cached = cached
        self._pending: dict[tuple[str, str], CachedInstance] = {}
        """The instances that got a name in an uncommitted batch."""

    def check(self, instance: Instance) -> None:
        """Raise `NameTaken` if another instance has the name, committed or not."""
        if self._holder(instance.project, instance.name) not in {None, instance.id}:
            raise name_taken(instance.project, instance.name)

    def _holder(self, project: str, name: str) -> str | None:
        """Return the id of the instance that has the name after all decisions, or None."""
        pending = self._pending.get((project, name))
        if pending is not None and _has(pending, name):
            return pending.latest.id
        holder = self._database.read.id_named(project, name)
        cached = None if holder is None else self._cached.get(holder)
        return holder if cached is None or _has(cached, name) else None

    def freed_by(self, batch: WriteBatch, instance: Instance) -> bool:
        """Whether the batch frees the name that the instance takes. The two cannot be in one transaction: its rows are
        updated in no particular order.
        """
        holder = self._database.read.id_named(instance.project, instance.name)
        return holder in batch.instances and holder != instance.id and not _has(batch.instances[holder], instance.name)

    def add(self, batch: WriteBatch, kept: CachedInstance) -> None:
        """Record that an instance got its name in the batch."""
        name = (kept.latest.project, kept.latest.name)
        self._pending[name] = kept
        batch.names.append(name)

    def forget(self, batch: WriteBatch, later: Collection[tuple[str, str]]) -> None:
        """Forget the names of a batch that is committed or failed, except those that a later batch has again."""
        for name in batch.names:
            if name not in later:
                self._pending.pop(name, None)


def _has(cached: CachedInstance, name: str) -> bool:
    return cached.latest.vm_state is not VmState.DELETED and cached.latest.name == name
