"""Views: what the rules of a policy see of an instance, a submission and the requests in the way.

Every view of the core is built here, so that a value that rules are to see is added in one place.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from interlock.core.operations import BIT, Lane, Operation
from interlock.core.records import Instance, Request, Submission
from interlock.core.states import NO_TASK, VmState


class View(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The input of a decision: instance, caller and requests in the way.

    The defaults are those of a plain submission: by a member, to an unlocked instance on a reachable host, with nothing
    outstanding.
    """

    operation: Operation
    vm_state: VmState
    task_state: str = NO_TASK
    outstanding: int = 0
    """The operations queued or in flight, as a bit mask (`operations.BIT`)."""
    role: str = "member"
    requested_by: str = ""
    """The caller's name; empty: one that no rule names."""
    locked: bool = False
    blocked: bool = False
    tags: tuple[str, ...] = ()
    host_reachable: bool = True
    hard: bool = False
    silent_ms: int = 0
    """Time since the last progress of the request in flight."""
    running_ms: int = 0
    """Time since the request in flight was taken."""
    launched: bool = True
    held: int = 0
    """The operations held, as a bit mask."""


class RequestLike(Protocol):
    """What a request, a submission and a view have in common: the operation and its requester."""

    @property
    def operation(self) -> Operation: ...
    @property
    def hard(self) -> bool: ...
    @property
    def role(self) -> str: ...
    @property
    def requested_by(self) -> str: ...


def kinds(requests: tuple[Request, ...]) -> int:
    """Return the operations of the requests as a bit mask."""
    mask = 0
    for request in requests:
        mask |= BIT[request.operation]
    return mask


def build_view(instance: Instance, submission: Submission, now_ms: int) -> View:
    """Return the rules' input for a submission. Ages are never negative, so a clock that jumps back only delays."""
    serving = task_state = None
    outstanding = 0
    if instance.outstanding:
        serving = instance.served(Lane.STATE) or instance.served(Lane.COMPONENT)
        task_state, outstanding = instance.task_state, kinds(instance.outstanding)
    if serving is None:
        silent_since = running_since = instance.updated_at_ms
    else:
        running_since = serving.taken_at_ms or 0
        silent_since = serving.last_progress_at_ms or running_since
    return View(
        operation=submission.operation,
        vm_state=instance.vm_state,
        task_state=task_state or NO_TASK,
        outstanding=outstanding,
        role=submission.role,
        requested_by=submission.requested_by,
        locked=instance.locked_by is not None,
        blocked=submission.operation in instance.blocked_operations,
        tags=instance.tags,
        host_reachable=submission.host_reachable,
        hard=submission.hard,
        silent_ms=max(0, now_ms - silent_since),
        running_ms=max(0, now_ms - running_since),
        launched=instance.launched,
        held=kinds(instance.held) if instance.held else 0,
    )


def settled_view(
    request: RequestLike, vm_state: VmState, tags: tuple[str, ...], *, launched: bool, host_reachable: bool
) -> View:
    """Return the view of a request in a foreseen state, where nothing is outstanding.

    A lock or a blocked operation does not count: it restricts new requests only.
    """
    return View(
        operation=request.operation,
        vm_state=vm_state,
        role=request.role,
        requested_by=request.requested_by,
        tags=tags,
        host_reachable=host_reachable,
        hard=request.hard,
        launched=launched,
    )
