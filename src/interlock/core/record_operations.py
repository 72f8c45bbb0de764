"""The operations that change only the record of an instance: what each of them does.

They are done when they are admitted; `admission` looks them up here by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from interlock.core import restarts
from interlock.core.errors import Invalid
from interlock.core.operations import Lane, Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Instance, Request, Submission
from interlock.core.request_queue import Draft, judge_again, replace
from interlock.core.roles import Role
from interlock.core.states import VmState


class Displaced(NamedTuple):
    """The ids of other requests that the operation ended."""

    supersedes: tuple[str, ...] = ()
    cancels: tuple[str, ...] = ()


def _is_never_so(_instance: Instance, _submission: Submission) -> str | None:
    return None


class RecordOperation(NamedTuple):
    """What one operation does to the record."""

    perform: Callable[[Draft, Request, CompiledPolicy], Displaced]
    """Applies a request to the draft; the policy is for operations after which the queue is judged again."""
    holds_already: Callable[[Instance, Submission], str | None] = _is_never_so
    """Returns why a submission would change nothing, for people; None if it would."""


_NONE: Final = Displaced()


def _lock(draft: Draft, request: Request, _policy: CompiledPolicy) -> Displaced:
    draft.instance = replace(draft.instance, locked_by=request.requested_by, lock_role=request.role)
    return _NONE


def _is_locked(instance: Instance, submission: Submission) -> str | None:
    """Return who holds a lock that the caller's would not strengthen: one of an admin replaces that of a member."""
    if instance.locked_by is None or not instance.lock_role.includes(submission.role):
        return None
    return f"The VM is locked already, by {instance.locked_by}."


def _unlock(draft: Draft, _request: Request, _policy: CompiledPolicy) -> Displaced:
    draft.instance = replace(draft.instance, locked_by=None, lock_role=Role.MEMBER)
    return _NONE


def _set_metadata(draft: Draft, request: Request, _policy: CompiledPolicy) -> Displaced:
    draft.instance = replace(draft.instance, metadata=_merged(draft.instance.metadata, request.parameters))
    return _NONE


def _merged(metadata: dict[str, str], parameters: dict[str, Any]) -> dict[str, str]:
    removed = frozenset(parameters.get("remove", ()))
    return {key: value for key, value in {**metadata, **parameters.get("set", {})}.items() if key not in removed}


def _has_metadata(instance: Instance, submission: Submission) -> str | None:
    parameters = submission.parameters
    same = bool(parameters) and _merged(instance.metadata, parameters) == instance.metadata
    return "The metadata is like that already." if same else None


def _rename(draft: Draft, request: Request, _policy: CompiledPolicy) -> Displaced:
    """Give the instance its new name; the store refuses one that is taken."""
    before = draft.instance.name
    name = request.parameters.get("name", before)
    draft.instance = replace(draft.instance, name=name)
    draft.emit("instance.renamed", request.id, name=name, before=before, by=request.requested_by)
    return _NONE


def _has_name(instance: Instance, submission: Submission) -> str | None:
    same = submission.parameters.get("name") == instance.name
    return f"The VM is called {instance.name} already." if same else None


def _abort_migration(draft: Draft, request: Request, _policy: CompiledPolicy) -> Displaced:
    migration = _live_migration(draft)
    if migration is not None:
        draft.put(replace(migration, interrupt_at_ms=draft.now_ms))
        draft.emit("request.interrupting", migration.id, by=request.requested_by)
    return _NONE


def _force_complete_migration(draft: Draft, _request: Request, _policy: CompiledPolicy) -> Displaced:
    migration = _live_migration(draft)
    if migration is not None:
        draft.put(replace(migration, parameters={**migration.parameters, "force_complete": True}))
    return _NONE


def _live_migration(draft: Draft) -> Request | None:
    """Return the live migration in flight, or None."""
    serving = draft.instance.served(Lane.STATE)
    return serving if serving is not None and serving.operation is Operation.LIVE_MIGRATE else None


def reset_target(parameters: dict[str, Any]) -> VmState:
    """Return the vm_state that a `reset_state` sets.

    Raises:
        Invalid: there is no such vm_state, or it is `deleted`, where only a deletion leads.
    """
    wanted = parameters.get("vm_state", VmState.ERROR)
    if wanted not in _RESETTABLE:
        known = ", ".join(sorted(_RESETTABLE))
        raise Invalid(f"Invalid vm_state {wanted!r} for reset_state: expected one of {known}.")
    return VmState(wanted)


_RESETTABLE: Final = tuple(state for state in VmState if state is not VmState.DELETED)


def _reset_state(draft: Draft, request: Request, policy: CompiledPolicy) -> Displaced:
    """Set the vm_state, fence the workers, and judge the queue again."""
    before = draft.instance
    supersedes = draft.fence_off(request.id, f"The state was reset by {request.requested_by}.")
    target = reset_target(request.parameters)
    message = str(request.parameters.get("reason", "reset")) if target is VmState.ERROR else None
    there = draft.instance.come_to(target, before.state_stack)
    draft.instance = replace(restarts.without_scheduled_restart(there), error=message)
    draft.alive()
    draft.emit("instance.state", request.id, vm_state=target.value, before=before.vm_state.value)
    return Displaced(supersedes, judge_again(draft, policy))


RECORD_OPERATIONS: Final[dict[Operation, RecordOperation]] = {
    Operation.LOCK: RecordOperation(_lock, _is_locked),
    Operation.UNLOCK: RecordOperation(_unlock),
    Operation.SET_METADATA: RecordOperation(_set_metadata, _has_metadata),
    Operation.RENAME: RecordOperation(_rename, _has_name),
    Operation.LIVE_MIGRATE_ABORT: RecordOperation(_abort_migration),
    Operation.LIVE_MIGRATE_FORCE_COMPLETE: RecordOperation(_force_complete_migration),
    Operation.RESET_STATE: RecordOperation(_reset_state),
}
"""Every operation of `Lane.RECORD`."""

MAY_CHANGE_NOTHING: Final = frozenset(
    operation for operation, entry in RECORD_OPERATIONS.items() if entry.holds_already is not _is_never_so
)
"""Those that are redundant where what they set holds already."""


def changes_nothing(instance: Instance, submission: Submission) -> frozenset[Operation]:
    """Return the operations that would change nothing of the record, if they were submitted with these parameters."""
    return frozenset(
        operation
        for operation in MAY_CHANGE_NOTHING
        if RECORD_OPERATIONS[operation].holds_already(instance, submission) is not None
    )
