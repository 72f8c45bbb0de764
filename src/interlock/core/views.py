"""Views: what the rules of a policy see of an instance, a submission and the requests in the way.

Every view of the core is built here, so that a value that rules are to see is added in one place: `build_view` for a
submission now, and `Foreseen` for a request in the state that earlier ones lead to.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, Protocol

import msgspec

from interlock.core.operations import BIT, Lane, Operation
from interlock.core.records import Instance, Request, Submission
from interlock.core.references import MIGRATIONS
from interlock.core.roles import Role
from interlock.core.state_stack import Memory, resolve_target, rests
from interlock.core.states import EXECUTING_STATES, NO_TASK, PowerState, VmState


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
    role: Role = Role.MEMBER
    requested_by: str = ""
    """The caller's name; empty: one that no rule names."""
    project: str = ""
    """The caller's project."""
    groups: tuple[str, ...] = ()
    """The caller's groups."""
    windows: tuple[str, ...] = ()
    """The time windows that are open."""
    locked: bool = False
    locked_above: bool = False
    """Whether it was locked with a role that the caller's does not include."""
    blocked: bool = False
    tags: tuple[str, ...] = ()
    host_reachable: bool = True
    power_state: PowerState = PowerState.RUNNING
    hard: bool = False
    silent_ms: int = 0
    """Time since the last progress of the request in flight."""
    running_ms: int = 0
    """Time since the request in flight was taken."""
    launched: bool = True
    held: int = 0
    """The operations held, as a bit mask."""


_SINCE_RECORDED: Final = ("project", "groups", "windows")
"""Fields that came later, and are recorded where they are not as in a plain submission."""


def recorded(view: View) -> dict[str, Any]:
    """Return what the event of a decision has of its view."""
    fields = msgspec.structs.asdict(view)
    for name in _SINCE_RECORDED:
        if not fields[name]:
            del fields[name]
    return fields


class RequestLike(Protocol):
    """What a request, a submission and a view have in common: the operation and its requester."""

    @property
    def operation(self) -> Operation: ...
    @property
    def hard(self) -> bool: ...
    @property
    def role(self) -> Role: ...
    @property
    def requested_by(self) -> str: ...
    @property
    def project(self) -> str: ...
    @property
    def groups(self) -> tuple[str, ...]: ...
    @property
    def windows(self) -> tuple[str, ...]: ...


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
        project=submission.project,
        groups=submission.groups,
        windows=submission.windows,
        locked=instance.locked_by is not None,
        locked_above=instance.locked_by is not None and not submission.role.includes(instance.lock_role),
        blocked=submission.operation in instance.blocked_operations,
        tags=instance.tags,
        host_reachable=submission.host_reachable,
        power_state=instance.power_state,
        hard=submission.hard,
        silent_ms=max(0, now_ms - silent_since),
        running_ms=max(0, now_ms - running_since),
        launched=instance.launched,
        held=kinds(instance.held) if instance.held else 0,
    )


class Foreseen(NamedTuple):
    """The state of an instance after earlier requests have succeeded, as far as rules see it."""

    vm_state: VmState
    memory: Memory
    launched: bool
    host_reachable: bool = True
    """False while its host is fenced."""
    tags: tuple[str, ...] = ()
    power_state: PowerState = PowerState.RUNNING

    def after(self, operation: Operation) -> Foreseen:
        """Return the state after that state change has succeeded too; a migration leads to a reachable host."""
        vm_state, memory = resolve_target(operation, self.vm_state, self.memory)
        launched = self.launched or vm_state in EXECUTING_STATES
        reachable = self.host_reachable or operation in MIGRATIONS
        return Foreseen(vm_state, memory, launched, reachable, self.tags, _power_in(vm_state, memory))

    def view(self, request: RequestLike) -> View:
        """Return the view of a request in this state, with nothing outstanding.

        A lock or a blocked operation does not count: it restricts new requests only.
        """
        return View(
            operation=request.operation,
            vm_state=self.vm_state,
            role=request.role,
            requested_by=request.requested_by,
            project=request.project,
            groups=request.groups,
            windows=request.windows,
            tags=self.tags,
            host_reachable=self.host_reachable,
            power_state=self.power_state,
            hard=request.hard,
            launched=self.launched,
        )


def at_present(instance: Instance, *, host_reachable: bool = True) -> Foreseen:
    """Return the present state of an instance."""
    return Foreseen(
        instance.vm_state,
        instance.state_stack,
        instance.launched,
        host_reachable,
        instance.tags,
        instance.power_state,
    )


def _power_in(vm_state: VmState, memory: Memory) -> PowerState:
    """Return what a hypervisor reports after a state change has succeeded and led to the vm_state."""
    if vm_state is VmState.PAUSED:
        return PowerState.PAUSED
    executing = vm_state in EXECUTING_STATES and not rests(vm_state, memory)
    return PowerState.RUNNING if executing else PowerState.NONE
