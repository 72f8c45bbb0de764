"""What goes over the wire of instances and requests, as `schemas` has the rest. Clients import all of it from there."""

from __future__ import annotations

from typing import Any

from interlock.api.inventory_schemas import Seconds, Timestamp, Wire
from interlock.core.operations import Operation
from interlock.core.records import Status
from interlock.core.restart_policy import RestartPolicy
from interlock.core.states import PowerState, VmState
from interlock.service.wishes import NewForward


class ImageReference(Wire, frozen=True, kw_only=True):
    """The image that an instance was made from."""

    id: str
    name: str


class Interface(Wire, frozen=True, kw_only=True):
    """A network interface of an instance."""

    id: str
    mac: str


class Size(Wire, frozen=True, kw_only=True):
    """How large an instance is."""

    vcpus: int
    memory_mib: int
    root_gib: int
    """Of the root disk; 0: as the image has it."""


class Due(Wire, frozen=True, kw_only=True):
    """What the server will ask for by itself, unless something happens before."""

    operation: Operation
    at: Timestamp


class Request(Wire, frozen=True, kw_only=True):
    """One asked-for operation."""

    id: str
    instance: str
    """The id of its instance."""
    operation: Operation
    parameters: dict[str, Any]
    status: Status
    """`succeeded`, `failed`, `cancelled` and `superseded` are ends; a request reaches exactly one of them."""
    requested_by: str
    role: str
    rule: str
    """The id of the rule that admitted it."""
    preempts: bool
    """Whether it goes before everything that waits."""
    phase: str | None
    """The task state while it is served; the last one after it has ended."""
    progress: float | None
    """How much of the phase is done, 0 to 1, where the operation can tell."""
    bytes_done: int | None = None
    """How many bytes the phase has moved so far, where it moves any."""
    bytes_total: int | None = None
    """How many bytes it has to move, as far as is known."""
    bytes_per_s: int | None = None
    """How many bytes a second it moved lately."""
    detail: str | None
    """What the worker last said for people."""
    admitted_at: Timestamp
    """When it was admitted; of one that is held, when it was asked for."""
    held_until_at: Timestamp | None
    """Of one that was submitted with a hold: when it is, or would have been, given up."""
    taken_at: Timestamp | None
    last_sign_of_life_at: Timestamp | None
    interrupt_at: Timestamp | None
    """When its worker was asked to stop half-way."""
    interrupt_deadline_at: Timestamp | None
    """When it is fenced if its worker has not confirmed by then."""
    interrupted_for: str | None
    """The id of the request that preempts it."""
    ended_at: Timestamp | None
    duration_s: Seconds | None
    """From its admission to its end."""
    reason: str | None
    """Why it ended as it did, as a stable code; null when it succeeded."""
    message: str | None
    """The same for people."""


class Instance(Wire, frozen=True, kw_only=True):
    """One VM, with everything outstanding for it."""

    id: str
    name: str
    project: str
    host: str
    vm_state: VmState
    """The stable state that its owner would expect to find it in."""
    prior_vm_state: VmState | None
    """What held before the rescue, resize, shelve or soft delete that is not undone yet."""
    further_vm_states: tuple[VmState, ...]
    """What it remembers beyond that, the nearest first: of one soft-deleted while it was rescued, what held before."""
    task_state: str
    """The phase of the state change being served, or `none`."""
    power_state: PowerState
    """What the hypervisor last said of it."""
    generation: int
    """Grows with every change; also the ETag."""
    created_at: Timestamp
    updated_at: Timestamp
    """The last sign of life: a state change, a phase, or progress."""
    locked_by: str | None
    blocked_operations: tuple[Operation, ...]
    """Operations refused whatever the policy says."""
    tags: tuple[str, ...]
    metadata: dict[str, str]
    """What its owner noted of it, by `set_metadata`."""
    error: str | None
    """Why it is in error, for people."""
    launched_at: Timestamp | None
    """When a hypervisor first held its guest."""
    restart: RestartPolicy | None
    """What is done when its guest ends by itself."""
    restarts: int
    """How often that was done lately."""
    restart_due_at: Timestamp | None
    image: ImageReference | None
    vcpus: int
    memory_mib: int
    root_gib: int
    root_shared: bool = False
    """Whether its root disk is in a folder that hosts share, so that it goes to another host without it."""
    forwards: tuple[NewForward, ...]
    seeded: bool = False
    """Whether its guest was given something to read by cloud-init, which is not shown."""
    volumes: tuple[str, ...]
    """Ids of the attached volumes, in the order attached."""
    interfaces: tuple[Interface, ...] = ()
    """Network interfaces beyond the first, in the order attached."""
    prior_size: Size | None = None
    """Of one that was resized: what a revert brings back."""
    due: Due | None = None
    """What happens to it by itself: a resize is confirmed, what is soft-deleted goes for good, a guest is restarted."""
    shelved_image: ImageReference | None = None
    """Of one that is shelved: the image of its root disk, which is its own and in no list."""
    outstanding: tuple[Request, ...]
    """Requests that have not ended, in the order in which they will be served."""
    held: tuple[Request, ...]
    """Requests that wait for the policy to admit them, in the order asked."""


class InstancePage(Wire, frozen=True, kw_only=True):
    """One page of instances, oldest first."""

    items: tuple[Instance, ...]
    next_cursor: str | None
    """What to pass as `cursor` for the next page; null at the end."""


class RequestPage(Wire, frozen=True, kw_only=True):
    """One page of an instance's requests, newest first."""

    items: tuple[Request, ...]
    next_cursor: str | None


class Created(Wire, frozen=True, kw_only=True):
    """A new instance, and the request that makes it unless it was only recorded."""

    instance: Instance
    request: Request | None
    rule: str
    because: str | None
