"""Projects: the records of the owners of instances, volumes, images and tokens."""

from __future__ import annotations

import msgspec

from interlock.core.quotas import Quota


class Project(msgspec.Struct, frozen=True, kw_only=True):
    """A project, and what it may use."""

    name: str
    created_at_ms: int | None = None
    """None: unknown, since it existed before projects were recorded."""
    created_by: str | None = None
    """The name of who created it; None: the server, or unknown."""
    quota: Quota = Quota()
