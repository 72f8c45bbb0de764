"""Views: what the rules of a policy see of an instance, a submission and the requests in the way.

Every view of the core is built here, so that a value that rules are to see is added in one place: `build_view` for a
submission now, and `Foreseen` for a request in the state that earlier ones lead to.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from interlock.core.operations import BIT, Lane, Operation
from interlock.core.records import Instance, Request, Submission
from interlock.core.references import MIGRATIONS
from interlock.core.roles import Role
from interlock.core.state_stack import Memory, resolve_target, rests
from interlock.core.states import EXECUTING_STATES, NO_TASK, PowerState, VmState


class View(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
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
    approver: tuple[str, ...] = ()
    """The roles and groups of those who approved the request."""
    project_outstanding: int = 0
    """How many requests were outstanding in the instance's project at the submission."""
    host_outstanding: int = 0
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
    failures: int = 0
    """How often the operation has failed on the instance since it last succeeded."""
    age_ms: int = 0
    """Time since the instance was created."""
    in_state_ms: int = 0
    """Time since its vm_state last changed."""
    vcpus: int = 0
    """Of the size that the request asks for, as the next two; 0: it asks for none."""
    memory_mib: int = 0
    root_gib: int = 0
    target_host: str = ""
    """The host that the request names; empty: none, or any."""
    image: str = ""
    """The name of the image that the request names; empty: none."""


_LATER: Final = frozenset(
    {
        "project",
        "groups",
        "windows",
        "failures",
        "age_ms",
        "in_state_ms",
        "vcpus",
        "memory_mib",
        "root_gib",
        "target_host",
        "approver",
        "project_outstanding",
        "host_outstanding",
        "image",
    }
)
"""Fields that are recorded only where they are not as in a plain submission."""
_PLAIN: Final = {
    field.name: field.default.value if isinstance(field.default, Enum) else field.default
    for field in msgspec.structs.fields(View)
    if field.default is not msgspec.NODEFAULT and field.name not in _LATER
}


def recorded(view: View) -> dict[str, Any]:
    """Return what the event of a decision has of its view."""
    own: dict[str, Any] = msgspec.to_builtins(view)
    return _PLAIN | own


class _SeenParameters(NamedTuple):
    """The parameters of a request that rules see, named as in views."""

    vcpus: int = 0
    memory_mib: int = 0
    root_gib: int = 0
    target_host: str = ""


_NO_PARAMETERS: Final = _SeenParameters()
_ANY_HOST: Final = "any"
PARAMETERS: Final = {
    "vcpus": "vcpus",
    "memory_mib": "memory_mib",
    "root_gib": "root_gib",
    "target_host": "host",
    "image": "image",
}
"""The parameters that rules see, by field of the view."""


def _seen_parameters(parameters: dict[str, Any]) -> _SeenParameters:
    get = parameters.get
    host = get("host") or ""
    return _SeenParameters(
        get("vcpus") or 0, get("memory_mib") or 0, get("root_gib") or 0, "" if host == _ANY_HOST else str(host)
    )


class ByCaller(Protocol):
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
    @property
    def image(self) -> str: ...
    @property
    def approver(self) -> tuple[str, ...]: ...
    @property
    def project_outstanding(self) -> int: ...
    @property
    def host_outstanding(self) -> int: ...


class WithParameters(ByCaller, Protocol):
    """A request or a submission."""

    @property
    def parameters(self) -> dict[str, Any]: ...


RequestLike = WithParameters | View


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
    created_ms, state_since = instance.created_at_ms, instance.state_since_ms or instance.updated_at_ms
    vcpus, memory_mib, root_gib, target_host = (
        _seen_parameters(submission.parameters) if submission.parameters else _NO_PARAMETERS
    )
    # In the order of the fields: dozens of names would take longer to match than the rest of a decision takes.
    return View(
        submission.operation,
        instance.vm_state,
        task_state or NO_TASK,
        outstanding,
        submission.role,
        submission.requested_by,
        submission.project,
        submission.groups,
        submission.windows,
        submission.approver,
        submission.project_outstanding,
        submission.host_outstanding,
        instance.locked_by is not None,
        instance.locked_by is not None and not submission.role.includes(instance.lock_role),
        submission.operation in instance.blocked_operations,
        instance.tags,
        submission.host_reachable,
        instance.power_state,
        submission.hard,
        now_ms - silent_since if now_ms > silent_since else 0,
        now_ms - running_since if now_ms > running_since else 0,
        instance.launched,
        kinds(instance.held) if instance.held else 0,
        instance.failures.get(submission.operation, 0) if instance.failures else 0,
        now_ms - created_ms if now_ms > created_ms else 0,
        now_ms - state_since if now_ms > state_since else 0,
        vcpus,
        memory_mib,
        root_gib,
        target_host,
        submission.image,
    )


class Foreseen(NamedTuple):
    """The state of an instance after earlier requests have succeeded, as far as rules see it."""

    vm_state: VmState
    memory: Memory
    launched: bool
    host_reachable: bool = True
    """False while its host is fenced."""
    tags: tuple[str, ...] = ()
    instance: Instance | None = None
    """The instance as it is now; None: one of which nothing else is known."""
    done: tuple[Operation, ...] = ()
    """The state changes that have succeeded by then."""
    moved: bool = False
    """Whether they have changed its vm_state."""

    def after(self, operation: Operation) -> Foreseen:
        """Return the state after that state change has succeeded too; a migration leads to a reachable host."""
        before, memory, launched, reachable, tags, instance, done, moved = self
        vm_state, memory = resolve_target(operation, before, memory)
        return Foreseen(
            vm_state,
            memory,
            launched or vm_state in EXECUTING_STATES,
            reachable or operation in MIGRATIONS,
            tags,
            instance,
            (*done, operation),
            moved or vm_state is not before,
        )

    def view(self, request: RequestLike, submitted_at_ms: int = 0) -> View:
        """Return the view of a request in this state, with nothing outstanding.

        A lock or a blocked operation does not count: it restricts new requests only. Ages are those when it was
        submitted, so that a rule on an age does not take back what it has admitted (law 2).
        """
        seen: _SeenParameters | View = _NO_PARAMETERS
        if isinstance(request, View):
            seen = request
        elif request.parameters:
            seen = _seen_parameters(request.parameters)
        instance, age_ms, in_state_ms, failures = self.instance, 0, 0, 0
        if instance is not None:
            age_ms = max(0, submitted_at_ms - instance.created_at_ms)
            since_ms = instance.state_since_ms or instance.updated_at_ms
            in_state_ms = 0 if self.moved else max(0, submitted_at_ms - since_ms)
            failures = 0 if request.operation in self.done else instance.failures.get(request.operation, 0)
        return View(
            operation=request.operation,
            vm_state=self.vm_state,
            role=request.role,
            requested_by=request.requested_by,
            project=request.project,
            groups=request.groups,
            windows=request.windows,
            approver=request.approver,
            project_outstanding=request.project_outstanding,
            host_outstanding=request.host_outstanding,
            tags=self.tags,
            host_reachable=self.host_reachable,
            power_state=self.power_state,
            hard=request.hard,
            launched=self.launched,
            failures=failures,
            age_ms=age_ms,
            in_state_ms=in_state_ms,
            vcpus=seen.vcpus,
            memory_mib=seen.memory_mib,
            root_gib=seen.root_gib,
            target_host=seen.target_host,
            image=request.image,
        )

    def recorded(self) -> dict[str, Any]:
        """Return what the event of a decision has of it, from which a replay makes the view in this state."""
        return {
            "vm_state": self.vm_state.value,
            "launched": self.launched,
            "host_reachable": self.host_reachable,
            "power_state": self.power_state.value,
            "moved": self.moved,
        }

    @property
    def power_state(self) -> PowerState:
        """Return what the hypervisor has reported, or will report once the state changes have succeeded."""
        if self.instance is None or self.done:
            return power_in(self.vm_state, self.memory)
        return self.instance.power_state


def at_present(instance: Instance, *, host_reachable: bool = True) -> Foreseen:
    """Return the present state of an instance."""
    return Foreseen(instance.vm_state, instance.state_stack, instance.launched, host_reachable, instance.tags, instance)


def power_in(vm_state: VmState, memory: Memory) -> PowerState:
    """Return what a hypervisor reports after a state change has succeeded and led to the vm_state."""
    if vm_state is VmState.PAUSED:
        return PowerState.PAUSED
    executing = vm_state in EXECUTING_STATES and not rests(vm_state, memory)
    return PowerState.RUNNING if executing else PowerState.NONE
