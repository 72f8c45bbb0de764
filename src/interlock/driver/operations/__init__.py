"""The operation handlers, by operation. Each step is idempotent.

A handler is called with an `OperationContext`, may be cancelled at any await, and is called again after a crash. It
returns `Done`, or raises an `InterlockError` with the reason; `NotResponding` means that the outcome is unknown.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from interlock.core.operations import Operation
from interlock.core.record_operations import RECORD_OPERATIONS
from interlock.core.records import GuestEvent
from interlock.driver.operation_context import Done, OperationContext
from interlock.driver.operations import (
    cold_migration,
    evacuation,
    interfaces,
    lifecycle,
    live_migration,
    memory,
    password,
    power,
    rescue,
    snapshots,
    swap_volume,
    volumes,
)
from interlock.driver.operations import rebuild as rebuilding
from interlock.driver.operations import resize as resizing
from interlock.driver.operations import shelve as shelving


class OperationHandler(msgspec.Struct, frozen=True, kw_only=True):
    """The handler of one operation."""

    perform: Callable[[OperationContext], Awaitable[Done]]
    undo: Callable[[OperationContext], Awaitable[None]] | None = None
    """Rolls back an interrupted `perform`; None if there is nothing to roll back."""
    expected_events: frozenset[GuestEvent] = frozenset()
    """The guest events that are part of the operation."""
    without_host: bool = False
    """Whether it can be performed although its host is fenced."""


_ENDS = frozenset({GuestEvent.STOPPED, GuestEvent.CRASHED, GuestEvent.VANISHED, GuestEvent.LEASE_ENDED})

HANDLERS: dict[Operation, OperationHandler] = {
    Operation.CREATE: OperationHandler(perform=lifecycle.create, undo=power.pull_plug),
    Operation.START: OperationHandler(perform=power.start, undo=power.pull_plug),
    Operation.STOP: OperationHandler(perform=power.stop, expected_events=_ENDS),
    Operation.REBOOT: OperationHandler(perform=power.reboot, expected_events=_ENDS | {GuestEvent.RESET}),
    Operation.PAUSE: OperationHandler(perform=power.pause),
    Operation.UNPAUSE: OperationHandler(perform=power.unpause),
    Operation.SUSPEND: OperationHandler(perform=memory.suspend, undo=memory.undo_suspend),
    Operation.RESUME: OperationHandler(perform=memory.resume),
    Operation.RESCUE: OperationHandler(perform=rescue.rescue, expected_events=_ENDS | {GuestEvent.RESET}),
    Operation.UNRESCUE: OperationHandler(perform=rescue.unrescue, expected_events=_ENDS | {GuestEvent.RESET}),
    Operation.CRASH_DUMP: OperationHandler(perform=memory.crash_dump),
    Operation.SET_PASSWORD: OperationHandler(perform=password.set_password),
    Operation.SOFT_DELETE: OperationHandler(perform=lifecycle.soft_delete, expected_events=_ENDS | {GuestEvent.RESET}),
    Operation.RESTORE: OperationHandler(perform=lifecycle.restore),
    Operation.DELETE: OperationHandler(
        perform=lifecycle.delete, expected_events=_ENDS | {GuestEvent.RESET}, without_host=True
    ),
    Operation.FORCE_DELETE: OperationHandler(
        perform=lifecycle.delete, expected_events=_ENDS | {GuestEvent.RESET}, without_host=True
    ),
    Operation.ATTACH_VOLUME: OperationHandler(perform=volumes.attach),
    Operation.DETACH_VOLUME: OperationHandler(perform=volumes.detach),
    Operation.SWAP_VOLUME: OperationHandler(perform=swap_volume.swap),
    Operation.ATTACH_INTERFACE: OperationHandler(perform=interfaces.attach),
    Operation.DETACH_INTERFACE: OperationHandler(perform=interfaces.detach),
    Operation.MOVE_INTERFACE: OperationHandler(perform=interfaces.move),
    Operation.SET_INTERFACE: OperationHandler(perform=interfaces.set_limits),
    Operation.ADD_FORWARD: OperationHandler(perform=interfaces.add_forward),
    Operation.REMOVE_FORWARD: OperationHandler(perform=interfaces.remove_forward),
    Operation.REBUILD: OperationHandler(perform=rebuilding.rebuild, expected_events=_ENDS | {GuestEvent.RESET}),
    Operation.RESIZE: OperationHandler(perform=resizing.resize, expected_events=_ENDS | {GuestEvent.RESET}),
    Operation.CONFIRM_RESIZE: OperationHandler(perform=resizing.confirm),
    Operation.REVERT_RESIZE: OperationHandler(perform=resizing.revert, expected_events=_ENDS | {GuestEvent.RESET}),
    Operation.SHELVE: OperationHandler(perform=shelving.shelve, undo=shelving.undo_shelve, expected_events=_ENDS),
    Operation.SHELVE_OFFLOAD: OperationHandler(perform=shelving.offload),
    Operation.UNSHELVE: OperationHandler(perform=shelving.unshelve, undo=shelving.undo_unshelve),
    Operation.MIGRATE: OperationHandler(
        perform=cold_migration.migrate, undo=cold_migration.undo_migrate, expected_events=_ENDS
    ),
    Operation.LIVE_MIGRATE: OperationHandler(
        perform=live_migration.live_migrate, undo=live_migration.undo_live_migrate, expected_events=_ENDS
    ),
    Operation.EVACUATE: OperationHandler(perform=evacuation.evacuate, expected_events=_ENDS, without_host=True),
    Operation.SNAPSHOT: OperationHandler(perform=snapshots.snapshot, undo=snapshots.undo),
    Operation.BACKUP: OperationHandler(perform=snapshots.backup, undo=snapshots.undo),
}
"""The handlers of all operations but those that change only the record."""

PERFORMS: frozenset[Operation] = frozenset(HANDLERS) | frozenset(RECORD_OPERATIONS)
