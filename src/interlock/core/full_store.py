"""Which changes a store still writes when its disk is full, from a reserve that it keeps.

Two kinds: operations that free space or end guests, and the bookkeeping of requests in flight.
"""

from __future__ import annotations

from typing import Any, Final

from interlock.core.operations import Operation
from interlock.core.records import Change, Event, Instance

SERVED_WHEN_FULL: Final = frozenset(
    {
        Operation.STOP,
        Operation.DELETE,
        Operation.SOFT_DELETE,
        Operation.FORCE_DELETE,
        Operation.CONFIRM_RESIZE,
        Operation.SHELVE_OFFLOAD,
        Operation.LIVE_MIGRATE_ABORT,
        Operation.UNLOCK,
    }
)
"""The operations admitted and performed while the store is full."""

_BOOKKEEPING: Final = frozenset(
    {"instance.adopted", "instance.fenced", "instance.state", "instance.restart_due", "instance.gave_up"}
)
_ANSWERS: Final = frozenset({"request.denied", "request.redundant"})


def kept_when_full(before: Instance | None, change: Change[Any]) -> bool:
    """Whether a change is written while the store is full. `before` is the instance before it; None: it is new."""
    if before is None or not (change.requests or change.events):
        return False
    known = {request.id for request in (*before.outstanding, *before.held)}
    new = (request for request in change.requests if request.id not in known)
    return all(request.operation in SERVED_WHEN_FULL for request in new) and all(map(_is_needed, change.events))


def _is_needed(event: Event) -> bool:
    if event.kind in _ANSWERS:
        return event.data.get("operation") in SERVED_WHEN_FULL
    if event.kind == "instance.relabelled":
        # Protected instances cannot be deleted until they are unprotected.
        return event.data.keys() <= {"by", "blocked_operations"}
    return event.kind in _BOOKKEEPING or event.kind.startswith(("request.", "guest."))
