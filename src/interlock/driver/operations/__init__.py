"""How each operation is performed. One file a family; each step converges from whatever it finds.

A performance is called with a `Work`, may be cancelled at any await, and is called again after a crash at any point.
It returns `Done`, or raises an `InterlockError` that says why it failed; `NotResponding`
stands for an outcome that cannot be known yet.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from interlock.core.operations import Operation
from interlock.core.records import GuestEvent
from interlock.driver.operations import (
    access,
    copies,
    interfaces,
    memory,
    migrating,
    power,
    presence,
    rebuilding,
    relocating,
    rescue,
    resizing,
    shelving,
    swapping,
    volumes,
)
from interlock.driver.work import Done, Work


class Performance(msgspec.Struct, frozen=True, kw_only=True):
    """How one operation is performed."""

    perform: Callable[[Work], Awaitable[Done]]
    undo: Callable[[Work], Awaitable[None]] | None = None
    """Puts back what a performance that was interrupted half-way had begun; None where there is nothing to undo."""
    absorbs: frozenset[GuestEvent] = frozenset()
    """What a guest does while it is performed that is part of it and no news."""


_ENDS = frozenset({GuestEvent.STOPPED, GuestEvent.CRASHED, GuestEvent.VANISHED})

PERFORMANCES: dict[Operation, Performance] = {
    Operation.CREATE: Performance(perform=presence.create, undo=power.pull_plug),
    Operation.START: Performance(perform=power.start, undo=power.pull_plug),
    Operation.STOP: Performance(perform=power.stop, absorbs=_ENDS),
    Operation.REBOOT: Performance(perform=power.reboot, absorbs=_ENDS | {GuestEvent.RESET}),
    Operation.PAUSE: Performance(perform=power.pause),
    Operation.UNPAUSE: Performance(perform=power.unpause),
    Operation.SUSPEND: Performance(perform=memory.suspend, undo=memory.undo_suspend),
    Operation.RESUME: Performance(perform=memory.resume),
    Operation.RESCUE: Performance(perform=rescue.rescue, absorbs=_ENDS | {GuestEvent.RESET}),
    Operation.UNRESCUE: Performance(perform=rescue.unrescue, absorbs=_ENDS | {GuestEvent.RESET}),
    Operation.CRASH_DUMP: Performance(perform=memory.crash_dump),
    Operation.SET_PASSWORD: Performance(perform=access.set_password),
    Operation.SOFT_DELETE: Performance(perform=presence.soft_delete, absorbs=_ENDS | {GuestEvent.RESET}),
    Operation.RESTORE: Performance(perform=presence.restore),
    Operation.DELETE: Performance(perform=presence.delete, absorbs=_ENDS | {GuestEvent.RESET}),
    Operation.FORCE_DELETE: Performance(perform=presence.delete, absorbs=_ENDS | {GuestEvent.RESET}),
    Operation.ATTACH_VOLUME: Performance(perform=volumes.attach),
    Operation.DETACH_VOLUME: Performance(perform=volumes.detach),
    Operation.SWAP_VOLUME: Performance(perform=swapping.swap),
    Operation.ATTACH_INTERFACE: Performance(perform=interfaces.attach),
    Operation.DETACH_INTERFACE: Performance(perform=interfaces.detach),
    Operation.REBUILD: Performance(perform=rebuilding.rebuild, absorbs=_ENDS | {GuestEvent.RESET}),
    Operation.RESIZE: Performance(perform=resizing.resize, absorbs=_ENDS | {GuestEvent.RESET}),
    Operation.CONFIRM_RESIZE: Performance(perform=resizing.confirm),
    Operation.REVERT_RESIZE: Performance(perform=resizing.revert, absorbs=_ENDS | {GuestEvent.RESET}),
    Operation.SHELVE: Performance(perform=shelving.shelve, undo=shelving.undo_shelve, absorbs=_ENDS),
    Operation.SHELVE_OFFLOAD: Performance(perform=shelving.offload),
    Operation.UNSHELVE: Performance(perform=shelving.unshelve, undo=shelving.undo_unshelve),
    Operation.MIGRATE: Performance(perform=relocating.migrate, undo=relocating.undo_migrate, absorbs=_ENDS),
    Operation.LIVE_MIGRATE: Performance(
        perform=migrating.live_migrate, undo=migrating.undo_live_migrate, absorbs=_ENDS
    ),
    Operation.EVACUATE: Performance(perform=migrating.evacuate, absorbs=_ENDS),
    Operation.SNAPSHOT: Performance(perform=copies.snapshot, undo=copies.undo),
    Operation.BACKUP: Performance(perform=copies.backup, undo=copies.undo),
}
"""What this driver performs, apart from the operations that change only the record."""

PERFORMS: frozenset[Operation] = frozenset(PERFORMANCES) | {
    Operation.LOCK,
    Operation.UNLOCK,
    Operation.SET_METADATA,
    Operation.RESET_STATE,
    Operation.LIVE_MIGRATE_ABORT,
    Operation.LIVE_MIGRATE_FORCE_COMPLETE,
}
