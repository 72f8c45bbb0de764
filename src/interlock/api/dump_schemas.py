"""What `/v1/instances/{reference}/dumps` answers, as it goes over the wire."""

from __future__ import annotations

from interlock.api.inventory_schemas import Wire
from interlock.api.schemas import Timestamp


class MemoryDump(Wire, frozen=True, kw_only=True):
    """A dump of a guest's memory, as a compressed kdump."""

    id: str
    """That of the request that made it."""
    size_bytes: int
    made_at: Timestamp


class DumpList(Wire, frozen=True, kw_only=True):
    """An instance's dumps, oldest first."""

    items: tuple[MemoryDump, ...]
