"""The store port: persistent instances, requests, events, tokens, images, volumes, networks, policies, hosts and the
audit log.

Its conformance suite is `tests/conformance/store/`: docstrings here are tested there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from enum import StrEnum
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from interlock.core.holds import NOT_COUNTED, Counts
from interlock.core.networks import Network, SecurityGroup
from interlock.core.policy import CompiledPolicy
from interlock.core.policy_switches import PolicyBundle, PolicySwitch
from interlock.core.records import Change, Event, Image, Instance, Request
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.ports.audit import AuditRecords
from interlock.ports.hosts import Host
from interlock.ports.projects import Project

AnswerT = TypeVar("AnswerT")


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """A bearer token, with the SHA-256 of its secret."""

    id: str
    name: str
    role: Role
    project: str
    secret_sha256: str
    created_at_ms: int
    groups: tuple[str, ...] = ()
    """The groups of its holder, which policies may name."""
    host: str | None = None
    """The only host as which an agent may connect with it; None for other roles, and for an old token until its first
    use."""
    created_by: str | None = None
    """The name of who created it; None: the server, or unknown."""
    expires_at_ms: int | None = None
    """When its secret expires; None: never."""
    rotated_at_ms: int | None = None
    """When it got its present secret; None: at its creation."""
    former_sha256: str | None = None
    """Hash of the secret before the last rotation."""
    former_until_ms: int | None = None
    """Until when the former secret is valid."""
    last_used_at_ms: int | None = None
    """When it was last used, to within the interval at which that is written; None: never, or unknown."""


class Volume(msgspec.Struct, frozen=True, kw_only=True):
    """A disk that can be attached to one instance at a time."""

    id: str
    name: str
    project: str
    path: str
    size_bytes: int
    attached_to: str | None = None
    created_at_ms: int


class IdempotencyKey(msgspec.Struct, frozen=True, kw_only=True):
    """A caller's idempotency key."""

    scope: str
    """The id of the caller's token."""
    key: str
    fingerprint: str
    """A hash of the submission, to detect the reuse of a key for another one."""


class InstanceFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Filter of a list of instances; None matches any. Deleted instances are listed only by vm_state."""

    project: str | None = None
    vm_state: VmState | None = None
    task_state: str | None = None
    host: str | None = None
    tag: str | None = None
    name: str | None = None
    upkeep: bool = False
    """Only those that may have a scheduled action, by `core.scheduled_actions.concerns`."""


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """One page of a list, and the cursor of the next one; None at the end."""

    items: tuple[Any, ...]
    next_cursor: str | None = None


class Jump(msgspec.Struct, frozen=True, kw_only=True):
    """A jump of the wall clock relative to the time since boot."""

    at_ms: int
    """When it was detected, on the store's clock."""
    by_ms: int
    """Its size; positive is forward."""
    between_boots: bool = False
    """Whether it was detected after a reboot: the machine may have been off instead."""


class Tally(StrEnum):
    """A sum over all instances, as decided so far; its key is in brackets."""

    STATES = "states"
    """Instances (by vm_state), without deleted ones."""
    RECORDED = "recorded"
    """Instances recorded on a host (by host), without deleted ones."""
    GUESTS = "guests"
    """Instances with a claim on a host (by host)."""
    MEMORY_MIB = "memory_mib"
    """Allocated memory (by host); the next two likewise."""
    VCPUS = "vcpus"
    DISK_MIB = "disk_mib"
    APART = "apart"
    """Instances of an anti-affinity group with a claim on a host (by `core.resource_claims.apart_place`)."""
    IMAGES = "images"
    """Instances that need an image (by its id), see `Instance.image_ids`; without deleted ones."""
    NETWORKS = "networks"
    """Instances with an interface in a network, or a request for one (by its id); without deleted ones."""
    SECURITY_GROUPS = "security_groups"
    """The same of a security group (by `core.resource_claims.group_place`)."""
    SHARED = "shared"
    """Instances with their root disk in a shared folder (by `core.resource_claims.shared_place`), without deleted ones.
    """
    OUTSTANDING_IN_PROJECT = "outstanding_in_project"
    """Outstanding requests (by project of their instance)."""
    OUTSTANDING_ON_HOST = "outstanding_on_host"
    """Outstanding requests (by host of their instance)."""
    HELD_IN_PROJECT = "held_in_project"
    """Held requests (by project of their instance)."""
    IMAGES_IN_PROJECT = "images_in_project"
    """Outstanding and held requests that make an image (by project of their instance)."""
    QUOTA = "quota"
    """What instances use of `instances`, `vcpus`, `memory_mib` and `disk_mib` of a quota (by `core.quotas.place`)."""


class StoreTime(Protocol):
    """The store's clock, and the jumps of the wall clock."""

    @property
    def cautious_until_ms(self) -> int:
        """Until then no irreversible scheduled action is taken, because the wall clock has jumped forward, or the
        machine was off for long.
        """
        ...

    @property
    def jump_at_opening(self) -> Jump | None:
        """The jump of the wall clock that was detected when the store was opened."""
        ...

    @property
    def last_jump(self) -> Jump | None:
        """The last jump of the wall clock."""
        ...

    async def look(self) -> Jump | None:
        """Synchronise displayed times with the wall clock, and write the store's time.

        Return the jump of the wall clock since the last call, if there was one.
        """
        ...


class TokenRecords(Protocol):
    """Access tokens."""

    async def put(self, token: Token) -> None: ...
    async def replace(self, token: Token) -> None:
        """Update a token; does nothing if it does not exist."""
        ...

    async def note_uses(self, uses: Mapping[str, int]) -> None:
        """Store when tokens were last used, by id, in one transaction; unknown ids are left out."""
        ...

    async def delete(self, token_id: str) -> bool: ...
    async def all(self) -> tuple[Token, ...]: ...


class ImageRecords(Protocol):
    """Images."""

    async def put(self, image: Image) -> None:
        """Store an image. Raises `NameTaken` (names are unique per project, and among public images)."""
        ...

    async def delete(self, image_id: str) -> bool: ...
    async def all(self) -> tuple[Image, ...]: ...
    def count(self, project: str) -> int:
        """Return how many images a project has, without public ones, as last committed."""
        ...


class VolumeRecords(Protocol):
    """Volumes."""

    async def put(self, volume: Volume) -> None:
        """Store a new volume. Raises `NameTaken` (per project)."""
        ...

    async def claim(self, volume_id: str, instance_id: str) -> bool:
        """Claim the volume for the instance in the record; return False if another instance has it."""
        ...

    async def release(self, volume_id: str, instance_id: str) -> None:
        """Release a claim of that instance; does nothing if it has none."""
        ...

    async def delete(self, volume_id: str) -> bool:
        """Delete an unclaimed volume; return False if it does not exist or is claimed."""
        ...

    async def get(self, volume_id: str) -> Volume | None: ...
    async def all(self, project: str | None = None) -> tuple[Volume, ...]: ...


class ProjectRecords(Protocol):
    """Projects."""

    async def put(self, project: Project) -> None:
        """Store a project. Raises `NameTaken`."""
        ...

    async def replace(self, project: Project) -> None:
        """Update a project; does nothing if it does not exist."""
        ...

    async def delete(self, name: str) -> bool: ...
    async def all(self) -> tuple[Project, ...]:
        """Return projects in the order of their names."""
        ...


class NetworkRecords(Protocol):
    """Networks."""

    async def put(self, network: Network) -> None:
        """Store a network. Raises `NameTaken` (names are unique per project, and among shared networks)."""
        ...

    async def replace(self, network: Network) -> None:
        """Update a network, except for its name; does nothing if it does not exist."""
        ...

    async def delete(self, network_id: str) -> bool: ...
    async def all(self) -> tuple[Network, ...]:
        """Return networks in the order created."""
        ...


class SecurityGroupRecords(Protocol):
    """Security groups."""

    async def put(self, group: SecurityGroup) -> None:
        """Store a security group. Raises `NameTaken` (names are unique per project)."""
        ...

    async def replace(self, group: SecurityGroup) -> None:
        """Update a security group, except for its name; does nothing if it does not exist."""
        ...

    async def delete(self, group_id: str) -> bool: ...
    async def all(self) -> tuple[SecurityGroup, ...]:
        """Return security groups in the order created."""
        ...


class PolicyRecords(Protocol):
    """Policies and their activations."""

    async def switch(self, switch: PolicySwitch, bundle: PolicyBundle) -> int:
        """Record a policy activation with its text; return the number of the switch."""
        ...

    async def settle(self, number: int, cancelled: int) -> None: ...

    async def switches(self, limit: int, before: int | None = None) -> tuple[PolicySwitch, ...]:
        """Return switches, newest first, with a number smaller than `before`."""
        ...

    async def bundle(self, number: int) -> PolicyBundle | None: ...


class HostRecords(Protocol):
    """Hosts other than the server's own."""

    async def put(self, host: Host) -> None:
        """Store a host, replacing the record of that name."""
        ...

    async def delete(self, name: str) -> bool: ...
    async def all(self) -> tuple[Host, ...]:
        """Return hosts in the order of their names."""
        ...


class Store(Protocol):
    """Persistent storage. It has no policy.

    Writes are durable when they return. An error raised by `decide` is raised to the caller, and nothing of
    that decision is written; other decisions in the same transaction are not affected.
    """

    @property
    def time(self) -> StoreTime: ...
    @property
    def tokens(self) -> TokenRecords: ...
    @property
    def images(self) -> ImageRecords: ...
    @property
    def volumes(self) -> VolumeRecords: ...
    @property
    def projects(self) -> ProjectRecords: ...
    @property
    def networks(self) -> NetworkRecords: ...
    @property
    def security_groups(self) -> SecurityGroupRecords: ...
    @property
    def policies(self) -> PolicyRecords: ...
    @property
    def hosts(self) -> HostRecords: ...
    @property
    def audit(self) -> AuditRecords: ...

    async def open(self) -> None:
        """Open and lock the store for this process.

        Raises:
            StoreBusy, StoreCorrupt, StoreNewer, StoreError: each with its remedy.
        """
        ...

    async def close(self) -> None:
        """Write everything decided so far, then close the store."""
        ...

    def now_ms(self) -> int:
        """Return the store's clock, on which every age is measured (law 6): it is monotonic, also across restarts, and
        independent of the wall clock.
        """
        ...

    def shown_ms(self, at_ms: int) -> int:
        """Convert a time of the store's clock to milliseconds since the Unix epoch, for people."""
        ...

    async def writable(self) -> None:
        """Return when the store is writable and earlier writes are done. Writes nothing. Raises `StoreError`."""
        ...

    async def settled(self) -> None:
        """Return when every decision before this call is durable or has failed."""
        ...

    def paused(self) -> AbstractAsyncContextManager[None]:
        """Make no decision about an instance inside the block: `create` and `change` wait for its end.

        At its beginning every earlier decision is durable or has failed. Everything else can be read and written.
        """
        ...

    def listen(self, listener: Callable[[Sequence[Event]], None]) -> Callable[[], None]:
        """Call `listener` on the event loop with each commit's events, in order; return a function that stops it."""
        ...

    def on_admission(self, hint: Callable[[str], None]) -> Callable[[], None]:
        """Call `hint` with the id of an instance that was idle as soon as a request of it is admitted, before that is
        durable; return a function that stops it. What is decided about it at once shares the transaction.
        """
        ...

    async def create(self, decide: Callable[[int], Change[AnswerT]], key: IdempotencyKey | None = None) -> AnswerT:
        """Create an instance. `decide` gets the time and may be called again.

        Raises:
            NameTaken: the project has another instance of that name that is not deleted.
            KeyReused: the key was used with another fingerprint.
        """
        ...

    async def change(
        self,
        instance_id: str,
        decide: Callable[[Instance, int], Change[AnswerT]],
        key: IdempotencyKey | None = None,
    ) -> AnswerT:
        """Read, decide and write, atomically. `decide` is pure and may be called again.

        With a key that was stored before, `decide` is not called and the stored answer is returned (decoded
        from JSON as a `records.Disposition`). A refusal is not stored with its key: if a decision leaves the instance
        the same object and has no requests, a submission with the same key is evaluated again.

        A change that leaves the instance the same object, with no requests and no events, writes nothing.

        Raises:
            NotFound: the instance does not exist.
            NameTaken: the change gives the instance the name of another one of its project that is not deleted.
            KeyReused: the key was used with another fingerprint.
        """
        ...

    async def recorded_answer(self, scope: str, key: str) -> tuple[str, Any] | None:
        """Return the fingerprint and the answer stored with an idempotency key, or None."""
        ...

    def fence(self, instance_id: str) -> int | None:
        """Return the instance's fence as last committed; None if it does not exist. No I/O."""
        ...

    async def instance(self, instance_id: str) -> Instance | None: ...

    async def instance_named(self, project: str, name: str) -> Instance | None:
        """Return the instance of that name in the project that is not deleted, or None."""
        ...

    async def deleted_named(self, project: str, name: str) -> Instance | None:
        """Return the newest deleted instance of that name in the project, or None."""
        ...

    async def instances(self, where: InstanceFilter, limit: int, cursor: str | None = None) -> Page:
        """Return instances in the order created."""
        ...

    async def unsettled(self, host: str | None = None) -> tuple[Instance, ...]:
        """Return every instance with outstanding or held requests, or with a fault of its guest."""
        ...

    def tally(self, what: Tally, of: str) -> int:
        """Return a sum over all instances, including decisions that are not durable yet. No I/O."""
        ...

    def tallies(self, what: Tally) -> dict[str, int]:
        """Return every sum of that kind that is not 0, by key."""
        ...

    def port_user(self, host: str, port: int) -> str | None:
        """Return the id of the instance with a claim on that port of that host, as decided so far, or None."""
        ...

    def lease_holder(self, network_id: str, address: str) -> str | None:
        """Return the id of the instance with that IP or MAC address of that network, as decided so far, or None."""
        ...

    async def request(self, request_id: str, project: str | None = None) -> Request | None:
        """Return the request; None if it does not exist, or its instance is not in `project`, where that is given."""
        ...

    async def ids_like(self, what: Literal["instances", "requests"], project: str, part: str) -> tuple[str, ...]:
        """Return some ids in the project that start or end with `part`; ends are matched among the latest only."""
        ...

    async def requests(self, instance_id: str, limit: int, cursor: str | None = None) -> Page:
        """Return the instance's requests, newest first."""
        ...

    async def events(
        self, after: int, limit: int, instance_id: str | None = None, project: str | None = None
    ) -> tuple[Event, ...]:
        """Return events in order, with a sequence greater than `after`."""
        ...

    async def last_event(self) -> int:
        """Return the sequence of the newest event; 0 if there is none."""
        ...


def counts_around(instance: Instance, policy: CompiledPolicy, store: Store) -> Counts:
    """Return how many requests are outstanding around an instance, as decided so far, if rules of the policy look."""
    if not policy.counts:
        return NOT_COUNTED
    return Counts(
        project_outstanding=store.tally(Tally.OUTSTANDING_IN_PROJECT, instance.project),
        host_outstanding=store.tally(Tally.OUTSTANDING_ON_HOST, instance.host),
    )


_PAGE = 500


async def every_instance(store: Store, where: InstanceFilter | None = None) -> AsyncIterator[Instance]:
    """Yield all instances that match `where`, read page by page."""
    cursor: str | None = None
    while True:
        page = await store.instances(where or InstanceFilter(), _PAGE, cursor)
        for instance in page.items:
            yield instance
        cursor = page.next_cursor
        if cursor is None:
            return
