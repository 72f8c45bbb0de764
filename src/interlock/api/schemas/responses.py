"""Wire types of instances, requests, dispositions, events and problems, independent of the stored records.

`serializers` converts between them. Times are RFC 3339 in UTC with milliseconds (`*_at`), durations are seconds
(`*_s`), ids are strings. Docstrings of fields appear in OpenAPI.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from interlock.api.schemas.networks import Interface
from interlock.api.schemas.wire import Seconds, Timestamp, Wire
from interlock.core.holds import ApprovalOutcome
from interlock.core.operations import Operation
from interlock.core.records import Cancellation, Status
from interlock.core.restart_policy import Evacuate, RestartPolicy
from interlock.core.roles import Role
from interlock.core.specs import repr_hiding
from interlock.core.states import GuestTrouble, PowerState, VmState
from interlock.ports import HostState
from interlock.service.request_models import NewForward

# ------------------------------------------------------------------------------------------ instances and requests


class ImageReference(Wire, frozen=True, kw_only=True):
    """The image that an instance was made from."""

    id: str
    name: str


class Size(Wire, frozen=True, kw_only=True):
    """Resources of an instance."""

    vcpus: int
    memory_mib: int
    root_gib: int
    """Size of the root disk; 0: the image's size."""


class Evacuated(Wire, frozen=True, kw_only=True):
    """The last evacuation of an instance."""

    from_host: str
    at: Timestamp
    lost: tuple[str, ...]
    """What was lost with the source host, as sentences."""


class Due(Wire, frozen=True, kw_only=True):
    """The next scheduled action of the server."""

    operation: Operation
    at: Timestamp


class Approval(Wire, frozen=True, kw_only=True):
    """The approval of a request by another caller."""

    by: str
    belongs: tuple[str, ...]
    """The approver's role and groups then: `role:admin`, `group:ops`."""
    at: Timestamp


class Request(Wire, frozen=True, kw_only=True):
    """A submitted operation."""

    id: str
    instance: str
    """The id of its instance."""
    operation: Operation
    parameters: dict[str, Any]
    status: Status
    """`succeeded`, `failed`, `cancelled` and `superseded` are final; a request reaches exactly one of them."""
    requested_by: str
    role: Role
    project: str = ""
    """The project of its requester; empty if it was submitted by an older version."""
    groups: tuple[str, ...] = ()
    """The groups of its requester then."""
    windows: tuple[str, ...] = ()
    """The time windows of the policy that were open when it was evaluated."""
    approvals: tuple[Approval, ...] = ()
    """Who approved it."""
    rule: str
    """The id of the rule that admitted it."""
    preempts: bool
    """Whether it goes to the front of the queue."""
    phase: str | None
    """The task state while it is in flight; after its end, the last one."""
    progress: float | None
    """Progress of the phase, 0 to 1; null if unknown."""
    bytes_done: int | None = None
    """Bytes transferred in the phase; null if it transfers none."""
    bytes_total: int | None = None
    """Bytes to transfer in the phase; null if unknown."""
    bytes_per_s: int | None = None
    """Recent transfer rate."""
    detail: str | None
    """Last progress message of the worker."""
    warning: str | None = None
    """Why it will probably not end, such as `does not converge`."""
    admitted_at: Timestamp
    """When it was admitted; of a held request, when it was submitted."""
    held_until_at: Timestamp | None
    """Of a request submitted with a hold: when the hold expires or would have expired."""
    taken_at: Timestamp | None
    last_sign_of_life_at: Timestamp | None
    interrupt_at: Timestamp | None
    """When its worker was asked to interrupt it."""
    interrupt_deadline_at: Timestamp | None
    """When it is fenced unless its worker has confirmed the interrupt."""
    interrupted_for: str | None
    """The id of the request that preempts it."""
    ended_at: Timestamp | None
    duration_s: Seconds | None
    """From admission to end."""
    reason: str | None
    """Stable code of why it did not succeed; null if it succeeded."""
    message: str | None
    """The same as a sentence."""


class Instance(Wire, frozen=True, kw_only=True):
    """An instance, with its outstanding requests."""

    id: str
    name: str
    project: str
    host: str
    vm_state: VmState
    """The stable state."""
    prior_vm_state: VmState | None
    """The state before a rescue, resize, shelve or soft delete that can be undone."""
    further_vm_states: tuple[VmState, ...]
    """Earlier states below that, the latest first: of one soft-deleted while rescued, the state before the rescue."""
    task_state: str
    """The phase of the operation in flight, or `none`."""
    power_state: PowerState
    """Last reported by the hypervisor; `unknown` while the host of a running guest is lost or fenced."""
    host_state: HostState = HostState.UP
    """`lost`: the host does not respond; `fenced`: its guests have certainly ended."""
    guest_trouble: GuestTrouble | None = None
    """Trouble of the running guest; `power_state` is then the last known one."""
    guest_trouble_since_at: Timestamp | None = None
    generation: int
    """Incremented by every change; the first part of the ETag."""
    created_at: Timestamp
    updated_at: Timestamp
    """The last state change, phase or progress."""
    state_since_at: Timestamp | None = None
    """Since when it has been in its vm_state."""
    failures: dict[Operation, int] = msgspec.field(default_factory=dict)
    """How often each operation has failed since it last succeeded; without those that have not."""
    locked_by: str | None
    lock_role: Role | None = None
    """The role of who locked it: one that does not include it cannot unlock it. Null if it is not locked."""
    blocked_operations: tuple[Operation, ...]
    """Operations denied whatever the policy says."""
    tags: tuple[str, ...]
    metadata: dict[str, str]
    """Set by `set_metadata`."""
    error: str | None
    """Why it is in error."""
    launched_at: Timestamp | None
    """When its guest was first launched."""
    evacuate: Evacuate | None = None
    """Whether it is evacuated automatically when its host is fenced; null: the server's configuration decides."""
    apart_from: tuple[str, ...] = ()
    """Anti-affinity groups: no two instances of a group are on one host."""
    restart: RestartPolicy | None
    """Restart policy for when its guest ends by itself."""
    restarts: int
    """Number of recent automatic restarts."""
    restart_due_at: Timestamp | None
    image: ImageReference | None
    vcpus: int
    memory_mib: int
    root_gib: int
    evacuated: Evacuated | None = None
    """Its last evacuation, and what was lost by it; null if there was none."""
    root_shared: bool = False
    """Whether its root disk is on shared storage, so that migrations do not copy it."""
    forwards: tuple[NewForward, ...]
    seeded: bool = False
    """Whether it has cloud-init data, which is not shown."""
    volumes: tuple[str, ...]
    """Ids of the attached volumes, in the order attached."""
    detaching: tuple[str, ...] = ()
    """Ids of volumes and interfaces that the guest was asked to release and has not: they are detached when it
    does, or when it is reset or ends."""
    primary: Interface | None = None
    """The first interface; null: on the default user network."""
    interfaces: tuple[Interface, ...] = ()
    """Network interfaces beyond the first, in the order attached."""
    prior_size: Size | None = None
    """Of a resized instance: the size that a revert restores."""
    due: Due | None = None
    """The next scheduled action: confirm a resize, delete a soft-deleted instance, or restart a guest."""
    shelved_image: ImageReference | None = None
    """Of a shelved instance: the private image of its root disk, which is not listed."""
    outstanding: tuple[Request, ...]
    """Requests that have not ended, in the order of execution."""
    held: tuple[Request, ...]
    """Requests that wait for the policy to admit them, in the order submitted."""


class InstancePage(Wire, frozen=True, kw_only=True):
    """One page of instances, oldest first."""

    items: tuple[Instance, ...]
    next_cursor: str | None
    """`cursor` of the next page; null on the last."""


class RequestPage(Wire, frozen=True, kw_only=True):
    """One page of an instance's requests, newest first."""

    items: tuple[Request, ...]
    next_cursor: str | None


class Created(Wire, frozen=True, kw_only=True):
    """A new instance, and its create request unless it is not started."""

    instance: Instance
    request: Request | None
    rule: str
    because: str | None
    warnings: tuple[str, ...] = ()
    """Options without effect, one sentence each; such as user data that cloud-init ignores."""


# --------------------------------------------------------------------------------------------------- dispositions


class Admitted(Wire, frozen=True, kw_only=True, tag_field="disposition", tag="admitted"):
    """The request is stored, and will be permitted in its turn if everything before it succeeds."""

    rule: str
    because: str | None
    request: Request
    supersedes: tuple[str, ...]
    """Ids of the requests in flight that it supersedes or interrupts."""
    cancels: tuple[str, ...]
    """Ids of the queued requests that are no longer possible after it."""
    loses: tuple[str, ...] = ()
    """Of an evacuation: what is lost with the host, as sentences."""
    waits_for_host: str | None = None
    """Name of its host, if that does not respond: the request waits until the host is back or fenced."""
    password: str | None = None
    """Of a set_password without a password: the generated one. It is shown only once and not stored."""

    __repr__ = repr_hiding("password")


class Redundant(Wire, frozen=True, kw_only=True, tag_field="disposition", tag="redundant"):
    """The requested state holds already, or an earlier request will reach it."""

    rule: str
    reason: str
    because: str | None
    request: Request | None
    """The earlier request; null if the state holds already."""
    allowed_at: Timestamp | None
    """When a new submission would take over from that request."""
    retry_after_s: Seconds | None
    allowed_if_silent: bool = False
    """Whether `allowed_at` holds only if the request in flight makes no progress until then."""
    allowed_latest_at: Timestamp | None = None
    """When it is admitted also if the request in flight makes progress for ever; null if that is unknown."""


class Held(Wire, frozen=True, kw_only=True, tag_field="disposition", tag="held"):
    """Denied now, and held until the policy admits it or the hold expires."""

    request: Request
    rule: str
    reason: str
    because: str | None
    detail: str
    """Why it is not admitted yet, in one sentence."""
    blocked_by: Blocker | None
    allowed_at: Timestamp | None
    retry_after_s: Seconds | None
    allowed_if_silent: bool = False
    """Whether `allowed_at` holds only if the request in flight makes no progress until then."""
    allowed_latest_at: Timestamp | None = None
    """When it is admitted also if the request in flight makes progress for ever; null if that is unknown."""
    remedy: str | None = None
    """What to do about it, such as whose approval it needs."""
    until_at: Timestamp
    """When the hold expires."""
    password: str | None = None
    """As in `Admitted`."""

    __repr__ = repr_hiding("password")


class Blocker(Wire, frozen=True, kw_only=True):
    """The outstanding request that blocks the operation."""

    request: str
    operation: Operation
    phase: str | None
    status: Status
    since: Timestamp
    """When it was started, or admitted if it is still queued."""
    last_sign_of_life: Timestamp | None
    by: str
    """Who requested it."""


class AllowedOperation(Wire, frozen=True, kw_only=True):
    """Disposition of one operation now."""

    operation: Operation
    disposition: Literal["admitted", "redundant", "denied"]
    rule: str
    reason: str | None
    """The stable code; null if it would be admitted."""
    because: str | None
    detail: str
    """One sentence, as in a denial."""
    vm_state: VmState
    """The state that the rule evaluated."""
    foreseen: bool
    """Whether `vm_state` is the foreseen state: after everything outstanding has succeeded."""
    blocked_by: Blocker | None
    remedy: str | None
    """What to do about a denial, if known."""
    allowed_at: Timestamp | None
    retry_after_s: Seconds | None
    allowed_if_silent: bool = False
    """Whether `allowed_at` holds only if the request in flight makes no progress until then."""
    allowed_latest_at: Timestamp | None = None
    """When it is admitted also if the request in flight makes progress for ever; null if that is unknown."""
    supersedes: tuple[str, ...]
    cancels: tuple[str, ...]


class AllowedOperations(Wire, frozen=True, kw_only=True):
    """Disposition of every operation now, for this caller."""

    instance: str
    name: str
    generation: int
    vm_state: VmState
    task_state: str
    at: Timestamp
    """Time of the evaluation."""
    host_reachable: bool = True
    """False if its host is fenced, so that it can be evacuated."""
    operations: tuple[AllowedOperation, ...]


class Cancelled(Wire, frozen=True, kw_only=True):
    """Result of cancelling a request."""

    outcome: Cancellation
    """`cancelled`: it has ended; `stopping`: its worker was asked to stop half-way."""
    request: Request


class Approved(Wire, frozen=True, kw_only=True):
    """Result of approving a request, with the request as the gate has then evaluated it."""

    outcome: ApprovalOutcome
    """`approved`, or `already` if everything that the caller may approve had been approved."""
    request: Request


class Stuck(Wire, frozen=True, kw_only=True):
    """An instance whose operation makes no progress for longer than the policy's threshold or will probably not end
    (`request.warning`), or whose guest or host is in trouble.
    """

    instance: str
    name: str
    vm_state: VmState
    task_state: str
    guest_trouble: GuestTrouble | None = None
    """Trouble of its guest, if that is the reason."""
    host: str = ""
    host_state: HostState = HostState.UP
    """`lost` or `fenced`, if that is the reason."""
    fenced_at: Timestamp | None = None
    """Of a lost host: when it is fenced at the latest, so that the instance can be evacuated."""
    request: Request | None
    """The operation in flight; null if there is none."""
    why: str
    """The reason, as a sentence."""
    remedy: str | None = None
    """What to do about it."""
    silent_since_at: Timestamp
    silent_s: Seconds
    allowed: tuple[Operation, ...]
    """Operations that would be admitted now."""
    takes_over: tuple[Operation, ...]
    """Those of `allowed` that would take over from the stuck operation."""


class StuckList(Wire, frozen=True, kw_only=True):
    """Stuck instances, longest without progress first."""

    items: tuple[Stuck, ...]


# --------------------------------------------------------------------------------------------------------- events


class Event(Wire, frozen=True, kw_only=True):
    """An event of an instance."""

    sequence: int
    """Sequence number; the id of a server-sent event."""
    kind: str
    """`request.*`, `instance.*` or `guest.*`."""
    instance: str
    request: str | None
    at: Timestamp
    generation: int
    """The instance's generation after it."""
    data: dict[str, Any]
    """As recorded."""


class EventList(Wire, frozen=True, kw_only=True):
    """Events in order."""

    items: tuple[Event, ...]
    next_after: int
    """`after` of the next page."""


# ------------------------------------------------------------------------------------------------------- problems


class Problem(Wire, frozen=True, kw_only=True, omit_defaults=True):
    """An error (RFC 9457, `application/problem+json`)."""

    type: str
    """Stable URI of the problem type; see docs/reference/http.md."""
    title: str
    status: int
    detail: str
    """One sentence."""
    instance: str | None = None
    """Path of the request."""
    remedy: str | None = None
    """What to do about it."""
    occurrence: str | None = None
    """Of an internal error: the id of the server's log entry."""
    needed: dict[str, int] | None = None
    """Of `no-room`: the missing amounts of `memory_mib`, `vcpus`, `disk_mib`, `devices` or `interfaces`. Of `quota`:
    how much more is needed of those resources of a quota of which too little is left."""
    free: dict[str, int] | None = None
    """The free amounts of the same."""
    used: dict[str, int] | None = None
    """Of `quota`: the used amounts of the same."""
    limit: dict[str, int] | None = None
    """Of `quota`: the limits of the same."""


class Refusal(Problem, frozen=True, kw_only=True, omit_defaults=False):
    """A denial by the gate: the blocking request, when to retry, and what is allowed instead."""

    operation: Operation
    reason: str
    """The stable code."""
    rule: str
    because: str | None
    vm_state: VmState
    """The state that the rule evaluated."""
    foreseen: bool
    blocked_by: Blocker | None
    allowed_at: Timestamp | None
    retry_after_s: Seconds | None
    allowed_if_silent: bool = False
    """Whether `allowed_at` holds only if the request in flight makes no progress until then."""
    allowed_latest_at: Timestamp | None = None
    """When it is admitted also if the request in flight makes progress for ever; null if that is unknown."""
    allowed_instead: tuple[Operation, ...]
