"""What goes over the wire, apart from the records, so that the two can change at their own pace.

The shapes of answers and of those bodies that only HTTP has; bodies that the service takes as they are (`NewInstance`,
`NewRequest`, `NewVolume`) are re-exported from there. Times are RFC 3339 in UTC with milliseconds (`*_at`), durations
are seconds (`*_s`), ids are strings. The sentence under a field describes it in OpenAPI too; `views` makes the values.
"""

from __future__ import annotations

from typing import Any, Literal

from interlock.api.instance_schemas import (
    Created,
    Due,
    ImageReference,
    Instance,
    InstancePage,
    Interface,
    Request,
    RequestPage,
    Size,
)
from interlock.api.inventory_schemas import (
    Health,
    Image,
    ImageList,
    ImageUpload,
    MadeToken,
    NewSmallImage,
    NewToken,
    Policy,
    PolicyRule,
    Readiness,
    RefusedConfiguration,
    Seconds,
    Timestamp,
    Token,
    TokenList,
    Volume,
    VolumeList,
    Wire,
)
from interlock.core.operations import Operation
from interlock.core.records import Cancellation, Status
from interlock.core.states import VmState
from interlock.service.wishes import Name, NewForward, NewInstance, NewRequest, NewVolume

__all__ = [
    "Admitted",
    "AllowedOperation",
    "AllowedOperations",
    "Blocker",
    "Cancelled",
    "Created",
    "Due",
    "Event",
    "EventList",
    "Health",
    "Held",
    "Image",
    "ImageList",
    "ImageReference",
    "ImageUpload",
    "Instance",
    "InstancePage",
    "Interface",
    "MadeToken",
    "Name",
    "NewForward",
    "NewInstance",
    "NewRequest",
    "NewSmallImage",
    "NewToken",
    "NewVolume",
    "Policy",
    "PolicyRule",
    "Problem",
    "Readiness",
    "Redundant",
    "Refusal",
    "RefusedConfiguration",
    "Request",
    "RequestPage",
    "Size",
    "Stuck",
    "StuckList",
    "Timestamp",
    "Token",
    "TokenList",
    "Volume",
    "VolumeList",
]

# --------------------------------------------------------------------------------------------------- dispositions


class Admitted(Wire, frozen=True, kw_only=True, tag_field="disposition", tag="admitted"):
    """The request is kept, and will be permitted when its turn comes if everything before it succeeds."""

    rule: str
    because: str | None
    request: Request
    supersedes: tuple[str, ...]
    """Ids of the requests in flight that it ends, or asks to end."""
    cancels: tuple[str, ...]
    """Ids of the waiting requests that no longer make sense after it."""
    password: str | None = None
    """Of a set_password without one: what was made up. It is told this once, and kept nowhere."""


class Redundant(Wire, frozen=True, kw_only=True, tag_field="disposition", tag="redundant"):
    """What was asked for holds already, or is already on its way."""

    rule: str
    reason: str
    because: str | None
    request: Request | None
    """The earlier request that will bring it about; null when it holds already."""
    allowed_at: Timestamp | None
    """When asking again would take over from that request, if it shows no life until then."""
    retry_after_s: Seconds | None


class Held(Wire, frozen=True, kw_only=True, tag_field="disposition", tag="held"):
    """Refused for now, and kept until the policy admits it or its time is over."""

    request: Request
    rule: str
    reason: str
    because: str | None
    detail: str
    """Why it is not admitted yet, in one sentence for people."""
    blocked_by: Blocker | None
    allowed_at: Timestamp | None
    retry_after_s: Seconds | None
    until_at: Timestamp
    """When it is given up."""
    password: str | None = None
    """As that of `Admitted`."""


class Blocker(Wire, frozen=True, kw_only=True):
    """The outstanding request that stands in the way."""

    request: str
    operation: Operation
    phase: str | None
    status: Status
    since: Timestamp
    """When it was taken, or admitted if it waits still."""
    last_sign_of_life: Timestamp | None
    by: str
    """Who asked for it."""


class AllowedOperation(Wire, frozen=True, kw_only=True):
    """What the gate would answer to one operation now."""

    operation: Operation
    disposition: Literal["admitted", "redundant", "denied"]
    rule: str
    reason: str | None
    """The stable code; null when it would be admitted."""
    because: str | None
    detail: str
    """One sentence for people: what a refusal would say."""
    vm_state: VmState
    """The state on which the rule decided."""
    foreseen: bool
    """Whether `vm_state` is the state that will hold when everything outstanding has succeeded."""
    blocked_by: Blocker | None
    allowed_at: Timestamp | None
    retry_after_s: Seconds | None
    supersedes: tuple[str, ...]
    cancels: tuple[str, ...]


class AllowedOperations(Wire, frozen=True, kw_only=True):
    """What the gate would answer to every operation now, for this caller."""

    instance: str
    name: str
    generation: int
    vm_state: VmState
    task_state: str
    at: Timestamp
    """The moment for which this holds."""
    host_reachable: bool = True
    """False where the guests of its host have ended for certain, so that it may be taken up elsewhere."""
    operations: tuple[AllowedOperation, ...]


class Cancelled(Wire, frozen=True, kw_only=True):
    """What became of the wish to cancel a request."""

    outcome: Cancellation
    """`cancelled`: it has ended; `stopping`: its worker was asked to stop half-way."""
    request: Request


class Stuck(Wire, frozen=True, kw_only=True):
    """An instance whose operation has shown no life for longer than the policy waits for it."""

    instance: str
    name: str
    vm_state: VmState
    task_state: str
    request: Request
    why: str
    """One sentence for people."""
    silent_since_at: Timestamp
    silent_s: Seconds
    allowed: tuple[Operation, ...]
    """What would be admitted now."""
    takes_over: tuple[Operation, ...]
    """Those among them that would take over from the stuck operation."""


class StuckList(Wire, frozen=True, kw_only=True):
    """Everything that is stuck, those silent longest first."""

    items: tuple[Stuck, ...]


# --------------------------------------------------------------------------------------------------------- events


class Event(Wire, frozen=True, kw_only=True):
    """Something that happened."""

    sequence: int
    """Its place in the history; the id of a server-sent event."""
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
    """What to pass as `after` to go on from here."""


# ------------------------------------------------------------------------------------------------------- problems


class Problem(Wire, frozen=True, kw_only=True, omit_defaults=True):
    """An error, as RFC 9457 has it (`application/problem+json`)."""

    type: str
    """A stable URI of the kind of problem; see docs/reference/http.md."""
    title: str
    status: int
    detail: str
    """One sentence for people."""
    instance: str | None = None
    """The path that was asked for."""
    remedy: str | None = None
    """What to do about it."""
    occurrence: str | None = None
    """Of an internal error: the id under which the server's log tells more."""
    needed: dict[str, int] | None = None
    """Of `no-room`: how much more it needs of `memory_mib`, `vcpus`, `disk_mib`, `devices` or `interfaces`; and below,
    what is free of the same."""
    free: dict[str, int] | None = None


class Refusal(Problem, frozen=True, kw_only=True, omit_defaults=False):
    """The gate's refusal: what blocks, whose it is, since when, when to come back, and what is allowed instead."""

    operation: Operation
    reason: str
    """The stable code."""
    rule: str
    because: str | None
    vm_state: VmState
    """The state on which the rule decided."""
    foreseen: bool
    blocked_by: Blocker | None
    allowed_at: Timestamp | None
    retry_after_s: Seconds | None
    allowed_instead: tuple[Operation, ...]
