# ruff: noqa: PLC0414 - a record is made of them, and they are found here with it
"""What is kept of an instance and of what was asked of it, and the shapes in which the core answers.

Everything is frozen: a change is a new value. Times are whole milliseconds on the store's clock (`*_at_ms`); they are
compared only with other times of the same store. What a record means to a hypervisor (`Spec`) is data here. No record
holds itself; those made for every request are therefore kept from the collector of cycles (`gc=False`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Generic, TypeVar

import msgspec

from interlock.core.operations import CATALOGUE, Lane, Memory, Operation, remembered_in, rests
from interlock.core.restart_policy import RestartPolicy, Restarts
from interlock.core.specs import Disk as Disk
from interlock.core.specs import Forward as Forward
from interlock.core.specs import Image as Image
from interlock.core.specs import Interface as Interface
from interlock.core.specs import Seed as Seed
from interlock.core.specs import SharedFolder as SharedFolder
from interlock.core.specs import Spec as Spec
from interlock.core.states import EXECUTING_STATES, NO_TASK, PowerState, VmState

AnswerT = TypeVar("AnswerT")
_AnswerT_co = TypeVar("_AnswerT_co", covariant=True)


class Status(StrEnum):
    """Where a request stands. The last four are ends, and a request reaches exactly one of them."""

    HELD = "held"
    """Refused for now, and kept until the policy admits it or its time is over. It has no place in the queue."""
    QUEUED = "queued"
    IN_FLIGHT = "in_flight"
    UNKNOWN = "unknown"
    """In flight, with an outcome that cannot be known until the hypervisor has been inspected."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"


ENDS = frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELLED, Status.SUPERSEDED})
SERVED = frozenset({Status.IN_FLIGHT, Status.UNKNOWN})


class Outcome(StrEnum):
    """What a worker says of a request that it served."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    """It stopped half-way because it was asked to, and left the instance as it had found it."""
    UNKNOWN = "unknown"


class GuestEvent(StrEnum):
    """What a hypervisor tells of its own accord."""

    STOPPED = "stopped"
    """The guest powered itself off."""
    RESET = "reset"
    """The guest rebooted itself."""
    CRASHED = "crashed"
    """The guest panicked."""
    VANISHED = "vanished"
    """What held the guest is gone, and nobody asked for that."""


class Request(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One asked-for operation."""

    id: str
    instance_id: str
    operation: Operation
    parameters: dict[str, Any] = {}
    requested_by: str
    role: str = "member"
    rule: str
    """The id of the rule that admitted it."""
    admitted_at_ms: int
    status: Status = Status.QUEUED
    preempts: bool = False
    """Whether it goes before everything that waits."""
    in_turn: bool = True
    """Whether it was judged on the foreseen state too, and so holds the promise of law 2."""
    phase: str | None = None
    """The task state while it is served; the last one after it has ended."""
    progress: float | None = None
    """How much of the phase is done, 0 to 1, where the operation can tell."""
    bytes_done: int | None = None
    """How many bytes the phase has moved so far, where it moves any."""
    bytes_total: int | None = None
    """How many it has to move, as far as is known now."""
    bytes_per_s: int | None = None
    """How fast it moved them lately."""
    detail: str | None = None
    """What the worker last said for people, such as `waiting for the guest to power off`."""
    fence: int = 0
    """The instance's fence when it was taken; its worker may act only while the two are equal."""
    taken_at_ms: int | None = None
    last_progress_at_ms: int | None = None
    interrupt_at_ms: int | None = None
    """When its worker was asked to stop half-way; None while it was not."""
    interrupt_deadline_ms: int | None = None
    """When it is fenced if its worker has not confirmed by then."""
    held_until_ms: int | None = None
    """For one that was submitted with a hold: when it was, or would have been, given up."""
    interrupted_for: str | None = None
    """The id of the request that preempts it; None when it is being cancelled by its owner."""
    ended_at_ms: int | None = None
    reason: str | None = None
    """Why it ended as it did, as a stable code; None when it succeeded."""
    message: str | None = None
    """The same for people."""

    @property
    def lane(self) -> Lane:
        return CATALOGUE[self.operation].lane

    @property
    def hard(self) -> bool:
        return self.parameters.get("hard") is True

    @property
    def image_name(self) -> str | None:
        """The name of the image that it makes, if it makes one that was given a name."""
        name = self.parameters.get("name")
        return name if self.operation is Operation.SNAPSHOT and isinstance(name, str) else None


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """How far a phase is that moves bytes."""

    done: int
    total: int | None = None
    """None while it is not known."""
    per_s: int | None = None

    @property
    def fraction(self) -> float | None:
        """How much of it is done, 0 to 1; None where the total is not known."""
        return min(1.0, self.done / self.total) if self.total else None


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker found or made that the instance is to be known by from now on; what is not named stays."""

    spec: Spec | msgspec.UnsetType = msgspec.UNSET
    host: str | msgspec.UnsetType = msgspec.UNSET
    left_host: str | msgspec.UnsetType | None = msgspec.UNSET
    prior_spec: Spec | msgspec.UnsetType | None = msgspec.UNSET
    shelved_image: Image | msgspec.UnsetType | None = msgspec.UNSET
    prior_vm_state: VmState | msgspec.UnsetType = msgspec.UNSET
    """For what can no more be brought back as it was."""


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """One VM, with everything outstanding for it.

    Invariants: at most one state change and one component change of `outstanding` are served, each under a fence no
    greater than the instance's; what is served comes first in `outstanding`, then what preempts, then the rest in the
    order admitted. `generation` grows with every change, `fence` whenever a worker loses the right to act.
    """

    id: str
    name: str
    project: str
    host: str
    vm_state: VmState = VmState.BUILDING
    power_state: PowerState = PowerState.NONE
    prior_vm_state: VmState | None = None
    """What held before the rescue, resize, shelve or soft delete that is not undone yet."""
    further_vm_states: tuple[VmState, ...] = ()
    """What it remembers beyond that, the nearest first: of one that was soft-deleted while it was rescued, resized or
    shelved, what had held before that; `stopped`, of one resized whose guest has ended since."""
    generation: int = 0
    fence: int = 0
    created_at_ms: int = 0
    updated_at_ms: int = 0
    """The last sign of life: a state change, a phase, or progress."""
    locked_by: str | None = None
    blocked_operations: tuple[Operation, ...] = ()
    tags: tuple[str, ...] = ()
    metadata: dict[str, str] = {}
    """What its owner noted of it. Nothing here is decided by it."""
    error: str | None = None
    """Why it is in error, or was when it was rescued or soft-deleted, for people."""
    launched_at_ms: int | None = None
    """When it first reached a state in which a hypervisor holds the guest; None while it never did."""
    state_since_ms: int = 0
    """When its vm_state last became what it is; 0 for what was kept before that was noted."""
    restart: RestartPolicy | None = None
    """What is done when its guest ends by itself; None: nothing."""
    restarts: Restarts | None = None
    """What was done of that lately; None: nothing."""
    spec: Spec | None = None
    left_host: str | None = None
    """The host that it has just left, until what is there is removed."""
    prior_spec: Spec | None = None
    """What it was before the resize that is neither confirmed nor reverted."""
    shelved_image: Image | None = None
    """The image of its root disk that shelving made; it is the instance's own, and in no list."""
    outstanding: tuple[Request, ...] = ()
    held: tuple[Request, ...] = ()
    """What waits for the policy to admit it, in the order submitted."""
    held_due_ms: int | None = None
    """When what is held is judged next; None if only a change of the instance can make a difference."""

    def served(self, lane: Lane) -> Request | None:
        """The request that is being served in `lane`, or None."""
        for request in self.outstanding:
            if request.status in SERVED and request.lane is lane:
                return request
        return None

    @property
    def task_state(self) -> str:
        """The phase of the state change being served, or `none`."""
        serving = self.served(Lane.STATE)
        return NO_TASK if serving is None else (serving.phase or NO_TASK)

    @property
    def memory(self) -> Memory:
        """What it remembers, so that it can be undone."""
        prior = () if self.prior_vm_state is None else (self.prior_vm_state,)
        return remembered_in(self.vm_state, (*prior, *self.further_vm_states))

    def come_to(self, vm_state: VmState, memory: Memory) -> Instance:
        """The instance in a vm_state, with what is left of a memory there."""
        left = remembered_in(vm_state, memory)
        prior = left[0] if left else None
        return msgspec.structs.replace(self, vm_state=vm_state, prior_vm_state=prior, further_vm_states=left[1:])

    @property
    def executing(self) -> bool:
        """Whether a hypervisor should hold its guest."""
        return self.vm_state in EXECUTING_STATES and not rests(self.vm_state, self.memory)

    @property
    def image_ids(self) -> frozenset[str]:
        """The images that must not go while it is there: what its disks are built on, or it boots, or soon will."""
        specs = (spec for spec in (self.spec, self.prior_spec) if spec is not None)
        images = [image for spec in specs for image in (spec.image, spec.rescue_image) if image is not None]
        named = (request.parameters.get("image") for request in (*self.outstanding, *self.held))
        return frozenset(image.id for image in images) | frozenset(name for name in named if isinstance(name, str))

    @property
    def launched(self) -> bool:
        """Whether a hypervisor has ever held its guest."""
        return self.launched_at_ms is not None or self.vm_state in EXECUTING_STATES


class Submission(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An operation that somebody asks for, with the id it will have as a request if it is admitted."""

    request_id: str
    operation: Operation
    parameters: dict[str, Any] = {}
    requested_by: str
    role: str = "member"
    host_reachable: bool = True
    hold_ms: int | None = None
    """How long to wait for the policy to admit it, if it does not at once; None: not at all."""


class Admitted(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag_field="disposition", tag="admitted"):
    """The request is kept, and will be permitted when its turn comes if everything before it succeeds."""

    request: Request
    rule: str
    because: str | None = None
    supersedes: tuple[str, ...] = ()
    """Ids of the requests in flight that it ends, or asks to end."""
    cancels: tuple[str, ...] = ()
    """Ids of the waiting requests that no longer make sense after it."""


class Redundant(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag_field="disposition", tag="redundant"):
    """What is asked for holds already, or is already on its way."""

    rule: str
    reason: str
    because: str | None = None
    request: Request | None = None
    """The earlier request that will bring it about; None when it holds already."""
    allowed_at_ms: int | None = None
    """When asking again would take over from that request, if it shows no life until then."""


class Denied(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag_field="disposition", tag="denied"):
    """Refused, with the rule that says so and, where there is one, the moment at which it would be admitted."""

    operation: Operation
    reason: str
    rule: str
    because: str | None = None
    vm_state: VmState
    """The state on which the rule decided: the instance's own, or the foreseen one."""
    foreseen: bool = False
    """Whether `vm_state` is the state that will hold when everything outstanding has succeeded."""
    blocked_by: Request | None = None
    allowed_at_ms: int | None = None


class Held(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag_field="disposition", tag="held"):
    """Refused for now, and kept until the policy admits it."""

    request: Request
    denied: Denied
    """Why it is not admitted yet."""


Disposition = Admitted | Redundant | Denied | Held


class StaleFence(msgspec.Struct, frozen=True, kw_only=True):
    """The worker that reported has lost the right to act; what it said was recorded and changed nothing."""

    request_id: str
    fence: int
    current_fence: int


class Cancellation(StrEnum):
    """What became of the wish to cancel a request."""

    CANCELLED = "cancelled"
    """It was waiting, and has ended."""
    STOPPING = "stopping"
    """It is being served; its worker was asked to stop half-way."""
    TOO_LATE = "too_late"
    """It is being served and cannot be stopped half-way, or it has ended."""


class Event(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Something that happened, as it is audited and told."""

    kind: str
    """`request.*`, `instance.*` or `guest.*`; the kinds are listed in docs/reference/events.md."""
    instance_id: str
    at_ms: int
    generation: int
    """The instance's generation after it."""
    request_id: str | None = None
    data: dict[str, Any] = {}
    sequence: int = 0
    """Its place in the store's history; given by the store when it is kept."""


class Change(msgspec.Struct, Generic[_AnswerT_co], frozen=True, kw_only=True, gc=False):
    """What a decision leads to. A store keeps all of it in one transaction, or none."""

    instance: Instance
    requests: tuple[Request, ...] = ()
    """The requests that are new or changed, as they are now."""
    events: tuple[Event, ...] = ()
    answer: _AnswerT_co
