# ruff: noqa: PLC0414 - the parts of a record are imported from here
"""Persistent instance and request records, and gate results.

Everything is frozen: a change is a new value. Times are whole milliseconds on the store's clock (`*_at_ms`), comparable
only with other times of the same store. Records have no reference cycles, so those created for every request are
excluded from garbage collection (`gc=False`).

Stores omit fields that have their default (`omit_defaults`), which halves what is written: a default must never change.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Generic, TypeVar

import msgspec

from interlock.core.facts import NO_FACTS as NO_FACTS
from interlock.core.facts import Facts as Facts
from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.restart_policy import Evacuate, RestartPolicy, Restarts
from interlock.core.roles import Role, named_role
from interlock.core.specs import Disk as Disk
from interlock.core.specs import Forward as Forward
from interlock.core.specs import Image as Image
from interlock.core.specs import Interface as Interface
from interlock.core.specs import Seed as Seed
from interlock.core.specs import SharedFolder as SharedFolder
from interlock.core.specs import Spec as Spec
from interlock.core.state_stack import Memory, remembered_in, rests
from interlock.core.states import EXECUTING_STATES, NO_TASK, GuestTrouble, PowerState, VmState

AnswerT = TypeVar("AnswerT")
_AnswerT_co = TypeVar("_AnswerT_co", covariant=True)


class Status(StrEnum):
    """The status of a request. The last four are final, and a request reaches exactly one of them."""

    HELD = "held"
    """Denied for now, and held until the policy admits it or the hold expires. It is not in the queue."""
    QUEUED = "queued"
    IN_FLIGHT = "in_flight"
    UNKNOWN = "unknown"
    """In flight, with an outcome that is unknown until the hypervisor has been inspected."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"


ENDS = frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELLED, Status.SUPERSEDED})
SERVED = frozenset({Status.IN_FLIGHT, Status.UNKNOWN})


class Outcome(StrEnum):
    """The outcome of a request, as reported by its worker."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    """It was interrupted and rolled back: the instance is unchanged."""
    UNKNOWN = "unknown"
    UNTOUCHED = "untouched"
    """It failed before it changed anything: the instance is unchanged."""


class GuestEvent(StrEnum):
    """An event from a hypervisor."""

    STOPPED = "stopped"
    """The guest powered itself off."""
    RESET = "reset"
    """The guest rebooted itself."""
    CRASHED = "crashed"
    """The guest panicked."""
    VANISHED = "vanished"
    """The QEMU process ended unexpectedly."""
    LEASE_ENDED = "lease_ended"
    """The guest was ended because its host's lease expired."""
    NOT_RESPONDING = "not_responding"
    """The QEMU process does not respond."""
    RESPONDING = "responding"
    """The QEMU process responds again."""
    NO_SPACE = "no_space"
    """The guest was halted, because a write failed with ENOSPC."""
    IO_ERROR = "io_error"
    """The guest was halted, because reading or writing one of its disks failed."""
    WENT_ON = "went_on"
    """A guest halted for such an error runs again."""
    CHANGED = "changed"
    """An operation that had timed out took effect later; inspect the guest to see which."""


class Approval(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The approval of a held request by another caller."""

    by: str
    """The approver's name."""
    belongs: tuple[str, ...]
    """The approver's role and groups then, as rules name them: `role:admin`, `group:ops`."""
    at_ms: int


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One request for an operation."""

    id: str
    instance_id: str
    operation: Operation
    parameters: dict[str, Any] = {}
    requested_by: str
    role: Role = Role.MEMBER
    project: str = ""
    """The project of its requester."""
    groups: tuple[str, ...] = ()
    """The groups of its requester."""
    windows: tuple[str, ...] = ()
    """The time windows of the policy that were open when it was evaluated."""
    image: str = ""  # the name, at its submission, of the image in its parameters
    approver: tuple[str, ...] = ()
    """The roles and groups of those who approved it."""
    approvals: tuple[Approval, ...] = ()
    project_outstanding: int = 0
    """As in the submission, if a rule of the policy looked at it."""
    host_outstanding: int = 0
    rule: str
    """The id of the rule that admitted it."""
    admitted_at_ms: int
    status: Status = Status.QUEUED
    preempts: bool = False
    """Whether it goes before every other queued request."""
    in_turn: bool = True
    """Whether it was evaluated on the foreseen state too (law 2)."""
    served_at_most_ms: int | None = None
    """How long it may be served in total, with progress or without; None: any time. The policy's at its admission."""
    phase: str | None = None
    """Its task state; the last one after it has ended."""
    progress: float | None = None
    """The share of the phase that is done, 0 to 1; None if unknown."""
    bytes_done: int | None = None
    """Bytes transferred in the phase so far, if it transfers any."""
    bytes_total: int | None = None
    """Bytes to transfer, as far as is known now."""
    bytes_per_s: int | None = None
    """The recent transfer rate."""
    detail: str | None = None
    """The worker's last status text, such as `waiting for the guest to power off`."""
    warning: str | None = None
    """Why it will not complete as things are, such as `does not converge`; None if nothing is known."""
    fence: int = 0
    """The instance's fence when it was taken; its worker may act only while the two are equal."""
    taken_at_ms: int | None = None
    last_progress_at_ms: int | None = None
    interrupt_at_ms: int | None = None
    """When its worker was asked to stop; None if it was not."""
    interrupt_deadline_ms: int | None = None
    """When it is fenced if its worker has not stopped by then."""
    overdue: bool = False
    """Whether its worker was asked to stop because it was served for `served_at_most_ms`."""
    held_until_ms: int | None = None
    """For one that was submitted with a hold: when the hold expires or would have expired."""
    interrupted_for: str | None = None
    """The id of the request that preempts it; None if it was cancelled by its owner."""
    ended_at_ms: int | None = None
    reason: str | None = None
    """Stable reason code of its end; None if it succeeded."""
    message: str | None = None
    """The reason for people."""

    @property
    def lane(self) -> Lane:
        return CATALOGUE[self.operation].lane

    @property
    def hard(self) -> bool:
        return self.parameters.get("hard") is True

    @property
    def image_name(self) -> str | None:
        """Return the name of the snapshot that it creates, if it was given one."""
        name = self.parameters.get("name")
        return name if self.operation is Operation.SNAPSHOT and isinstance(name, str) else None


class TransferProgress(msgspec.Struct, frozen=True, kw_only=True):
    """The progress of a phase that transfers bytes."""

    done: int
    total: int | None = None
    """None while unknown."""
    per_s: int | None = None
    detail: str | None = None
    """Status text; None leaves the last one."""
    warning: str | None = None
    """Why it will not complete as things are."""

    @property
    def fraction(self) -> float | None:
        """Return the share that is done, 0 to 1; None if the total is unknown."""
        return min(1.0, self.done / self.total) if self.total else None


class Evacuated(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The last evacuation of an instance."""

    from_host: str
    at_ms: int
    lost: tuple[str, ...] = ()
    """What was lost with the host, as sentences for people."""


class InstanceUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """An update of the instance record by a worker; unset fields stay."""

    spec: Spec | msgspec.UnsetType = msgspec.UNSET
    host: str | msgspec.UnsetType = msgspec.UNSET
    left_host: str | msgspec.UnsetType | None = msgspec.UNSET
    prior_spec: Spec | msgspec.UnsetType | None = msgspec.UNSET
    shelved_image: Image | msgspec.UnsetType | None = msgspec.UNSET
    detaching: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    prior_vm_state: VmState | msgspec.UnsetType = msgspec.UNSET
    """For an instance that can no longer return to the state before."""
    evacuated: Evacuated | msgspec.UnsetType = msgspec.UNSET


class Instance(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One instance, with its outstanding and held requests.

    Invariants: at most one state change and one component change of `outstanding` are in flight, each with a fence no
    greater than the instance's; those in flight come first in `outstanding`, then preempting ones, then the rest in the
    order admitted. `generation` grows with every change, `fence` whenever a worker loses the right to act.
    """

    id: str
    name: str
    project: str
    host: str
    vm_state: VmState = VmState.BUILDING
    power_state: PowerState = PowerState.NONE
    prior_vm_state: VmState | None = None
    """The vm_state before the rescue, resize, shelve or soft delete that is not undone yet."""
    further_vm_states: tuple[VmState, ...] = ()
    """The rest of the state stack, latest first: the vm_state before a rescue, resize or shelve, if it was soft-deleted
    after that; `stopped`, if it is resized and its guest has ended since."""
    generation: int = 0
    fence: int = 0
    created_at_ms: int = 0
    updated_at_ms: int = 0
    """The time of the last state change, phase or progress."""
    locked_by: str | None = None
    lock_role: Role = Role.MEMBER
    """The role of who locked it: a caller whose role does not include it cannot remove the lock."""
    blocked_operations: tuple[Operation, ...] = ()
    tags: tuple[str, ...] = ()
    metadata: dict[str, str] = {}
    """The owner's own keys and values; not interpreted."""
    error: str | None = None
    """Why it is in error, or was when it was rescued or soft-deleted, for people."""
    launched_at_ms: int | None = None
    """When its guest first ran; None if it never did."""
    failures: dict[Operation, int] = {}  # of each operation since it last succeeded; without those that have none
    state_since_ms: int = 0
    """When its vm_state last changed; 0: unknown (recorded by an older version)."""
    detaching: tuple[str, ...] = ()
    """Ids of the volumes and interfaces whose unplug was requested and that its guest has not released yet: they are
    detached when it does, or when it is reset or ends."""
    guest_trouble: GuestTrouble | None = None
    """The present fault of its running guest; None: none known."""
    guest_trouble_since_ms: int | None = None
    restart: RestartPolicy | None = None
    """What is done when its guest ends on its own; None: nothing."""
    restarts: Restarts | None = None
    """Its recent automatic restarts; None: none."""
    evacuate: Evacuate | None = None
    """Whether it is evacuated automatically once its host is fenced; None: the server's configuration decides."""
    apart_from: tuple[str, ...] = ()
    """Its anti-affinity groups: no two instances of one are on one host."""
    spec: Spec | None = None
    left_host: str | None = None
    """The migration source, until it is cleaned up."""
    evacuated: Evacuated | None = None
    """Its last evacuation; None: none."""
    host_fenced: bool = False
    """Whether its host was fenced when its queue was last evaluated."""
    prior_spec: Spec | None = None
    """Its spec before the resize that is neither confirmed nor reverted."""
    shelved_image: Image | None = None
    """The image of its root disk that shelving created; private to the instance, and in no list."""
    outstanding: tuple[Request, ...] = ()
    held: tuple[Request, ...] = ()
    """The held requests, in the order submitted."""
    held_due_ms: int | None = None
    """When held requests are evaluated next; None: only after a change of the instance."""

    def served(self, lane: Lane) -> Request | None:
        """Return the request in flight in `lane`, or None."""
        for request in self.outstanding:
            if request.status in SERVED and request.lane is lane:
                return request
        return None

    @property
    def task_state(self) -> str:
        """Return the phase of the state change in flight, or `none`."""
        serving = self.served(Lane.STATE)
        return NO_TASK if serving is None else (serving.phase or NO_TASK)

    @property
    def state_stack(self) -> Memory:
        """Return the vm_states that it can return to, latest first."""
        prior = () if self.prior_vm_state is None else (self.prior_vm_state,)
        return remembered_in(self.vm_state, (*prior, *self.further_vm_states))

    def come_to(self, vm_state: VmState, memory: Memory, **more: Any) -> Instance:
        """Return the instance in `vm_state`, with the part of the state stack that is valid there, and more changed."""
        left = remembered_in(vm_state, memory)
        prior = left[0] if left else None
        return msgspec.structs.replace(
            self, vm_state=vm_state, prior_vm_state=prior, further_vm_states=left[1:], **more
        )

    @property
    def executing(self) -> bool:
        """Whether its guest should be running in a QEMU process."""
        return self.vm_state in EXECUTING_STATES and not rests(self.vm_state, self.state_stack)

    @property
    def unsettled(self) -> bool:
        """Whether a request is outstanding or held, or its guest has a fault."""
        return bool(self.outstanding or self.held or self.guest_trouble is not None)

    @property
    def image_ids(self) -> frozenset[str]:
        """Return the ids of the images that it needs, now or after its requests: to boot, or as backing files."""
        specs = (spec for spec in (self.spec, self.prior_spec) if spec is not None)
        images = [image for spec in specs for image in (spec.image, spec.rescue_image) if image is not None]
        named = (request.parameters.get("image") for request in (*self.outstanding, *self.held))
        return frozenset(image.id for image in images) | frozenset(name for name in named if isinstance(name, str))

    @property
    def launched(self) -> bool:
        """Whether its guest has ever run."""
        return self.launched_at_ms is not None or self.vm_state in EXECUTING_STATES


class Submission(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A submitted operation, with the id of its request if it is admitted."""

    request_id: str
    operation: Operation
    parameters: dict[str, Any] = {}
    requested_by: str
    role: Role = Role.MEMBER
    project: str = ""
    """The caller's project, not the instance's."""
    groups: tuple[str, ...] = ()
    """The caller's groups."""
    windows: tuple[str, ...] = ()
    """The time windows that are open, for a policy without a calendar."""
    image: str = ""  # the name of the image in the parameters, which may have its id
    approver: tuple[str, ...] = ()
    """The roles and groups of those who approved the request; empty for a new one."""
    approvals: tuple[Approval, ...] = ()
    project_outstanding: int = 0
    """How many requests are outstanding in the instance's project."""
    host_outstanding: int = 0
    """How many are outstanding on its host."""
    host_reachable: bool = True
    """False if the instance's host is fenced: its guests have ended for certain."""
    host_fenced_at_ms: int | None = None
    """When a host that does not respond will be fenced at the latest; None if it responds, or the time is unknown."""
    facts: Facts = NO_FACTS
    hold_ms: int | None = None
    """How long to hold it if the policy denies it now; None: not at all."""
    approvable: bool = False
    """Whether to hold it if a rule demands an approval, for as long as the rule says; False for dry runs."""

    def __post_init__(self) -> None:
        """Raise `Invalid` for an unknown role: no rule of a policy would name it."""
        if self.role.__class__ is not Role:
            msgspec.structs.force_setattr(self, "role", named_role(self.role))

    @property
    def hard(self) -> bool:
        return self.parameters.get("hard") is True


class Admitted(
    msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True, tag_field="disposition", tag="admitted"
):
    """The request is queued, and will be permitted when its turn comes if everything before it succeeds."""

    request: Request
    rule: str
    because: str | None = None
    supersedes: tuple[str, ...] = ()
    """Ids of the requests in flight that it supersedes or interrupts."""
    cancels: tuple[str, ...] = ()
    """Ids of the queued requests that it cancels, because they are no longer permitted after it."""


class Redundant(
    msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True, tag_field="disposition", tag="redundant"
):
    """The requested state holds already, or is already requested."""

    rule: str
    reason: str
    because: str | None = None
    request: Request | None = None
    """The earlier request for it; None if it holds already."""
    allowed_at_ms: int | None = None
    """When a new submission would take over from that request."""
    allowed_if_silent: bool = False
    """Whether `allowed_at_ms` holds only if that request makes no progress until then."""
    allowed_latest_at_ms: int | None = None
    """When a new submission is admitted also if that request makes progress for ever; None: unknown."""


class Denied(
    msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True, tag_field="disposition", tag="denied"
):
    """Denied, with the rule and, if known, the time at which it would be admitted."""

    operation: Operation
    reason: str
    rule: str
    because: str | None = None
    vm_state: VmState
    """The state on which the rule decided: the present or the foreseen one."""
    foreseen: bool = False
    """Whether `vm_state` is the foreseen state, after everything outstanding has succeeded."""
    blocked_by: Request | None = None
    allowed_at_ms: int | None = None
    allowed_if_silent: bool = False
    """Whether `allowed_at_ms` holds only if what is in flight makes no progress until then."""
    allowed_latest_at_ms: int | None = None
    """When it would be admitted also if what is in flight makes progress for ever, since that may be served for a
    limited time only; None: unknown."""
    remedy: str | None = None
    """What to do about it, if known."""


class Held(
    msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True, tag_field="disposition", tag="held"
):
    """Denied for now, and held until the policy admits it."""

    request: Request
    denied: Denied
    """Why it is not admitted yet."""


Disposition = Admitted | Redundant | Denied | Held


class StaleFence(msgspec.Struct, frozen=True, kw_only=True):
    """The reporting worker has been fenced; its attempt was recorded and changed nothing."""

    request_id: str
    fence: int
    current_fence: int


class Cancellation(StrEnum):
    """The result of cancelling a request."""

    CANCELLED = "cancelled"
    """It was queued or held, and has ended."""
    STOPPING = "stopping"
    """It is in flight; its worker was asked to stop."""
    TOO_LATE = "too_late"
    """It is in flight and not interruptible, or it has ended."""


class Event(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A recorded event, for the audit log and for listeners."""

    kind: str
    """`request.*`, `instance.*` or `guest.*`; the kinds are listed in docs/reference/events.md."""
    instance_id: str
    at_ms: int
    generation: int
    """The instance's generation after it."""
    request_id: str | None = None
    data: dict[str, Any] = {}
    sequence: int = 0
    """Its position in the store's history; assigned by the store."""


class Change(msgspec.Struct, Generic[_AnswerT_co], frozen=True, kw_only=True, gc=False):
    """The result of a decision. A store writes all of it in one transaction, or none."""

    instance: Instance
    requests: tuple[Request, ...] = ()
    """The new and changed requests, in their new versions."""
    events: tuple[Event, ...] = ()
    answer: _AnswerT_co
