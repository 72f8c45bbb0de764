"""Wire types of hosts: capacity, state, drain, evacuation, rebalancing and events."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from interlock.api.schemas.responses import Request
from interlock.api.schemas.wire import Wire
from interlock.core.networks import NetworkKind
from interlock.core.operations import Operation
from interlock.core.parameters import Name
from interlock.core.states import VmState
from interlock.ports import HostState


class Resources(Wire, frozen=True, kw_only=True):
    """Amounts of a host's resources; null: unlimited."""

    memory_mib: int | None
    vcpus: int | None
    """Virtual processors."""
    disk_mib: int | None


class Protection(Wire, frozen=True, kw_only=True):
    """What confines the guests of a host."""

    name: str
    """What it is, such as `own_user` or `mount_namespace`; SECURITY.md explains them."""
    on: bool
    detail: str
    """How it is done, or why it is off."""


class NetworkAbility(Wire, frozen=True, kw_only=True):
    """Whether a host can connect VMs to networks of a kind."""

    kind: NetworkKind
    available: bool
    detail: str = ""
    """What is missing, or how it is done."""


class HostCapacity(Wire, frozen=True, kw_only=True):
    """Capacity of the server's own host. Claims count whether or not they are used."""

    name: str
    hypervisor: Literal["qemu", "simulated"]
    accelerator: str | None
    """`tcg` or `kvm`; null where the hypervisor has none."""
    protections: tuple[Protection, ...] = ()
    """What confines its guests; empty for simulated ones."""
    networks: tuple[NetworkAbility, ...] = ()
    """The kinds of network that its guests can have."""
    guests: int
    """Number of instances, running or not."""
    total: Resources
    """What can be claimed in total."""
    promised: Resources
    """What is claimed."""
    free: Resources
    """What can still be claimed."""
    disk_free_mib: int | None
    """Free space of the file system of its data folder; null if unknown."""


class HostDrain(Wire, frozen=True, kw_only=True):
    """A drain in progress: no new instances are scheduled to the host, and its instances are migrated away."""

    by: str
    """Who requested it."""
    since_at: str
    cold: bool
    """Whether instances that cannot be live-migrated are cold-migrated."""
    left: int
    """Number of instances still on the host."""


class HostRenameRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The new name of a host."""

    name: Name


class HostDrainRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a drain."""

    cold: bool = False
    """Cold-migrate instances that cannot be live-migrated."""
    dry_run: bool = False
    """Only return the plan."""


class HostEvacuationRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the evacuation of a fenced host."""

    host: Annotated[str, Meta(min_length=1, max_length=255)] = "any"
    """Target host, or `any` for all hosts with free capacity."""
    from_image: bool = False
    """Recreate root disks that are lost with the host from their images."""
    dry_run: bool = False
    """Only return the plan, as if the host were fenced."""


class RebalanceRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a rebalance."""

    dry_run: bool = True
    """False submits the migrations; by default only the plan is returned."""


class HostMove(Wire, frozen=True, kw_only=True):
    """The planned or submitted move of one instance."""

    instance: str
    name: str
    project: str
    host: str
    """Source host."""
    vm_state: VmState
    operation: Operation | None
    """Operation of the move; null if it stays."""
    target: str | None
    """Target host; null if it stays."""
    request: str | None
    """Id of the submitted request; null if there is none."""
    reason: str | None
    """Why it stays; null if it moves."""
    losses: tuple[str, ...] = ()
    """What is lost by the move, as sentences."""


class HostMoves(Wire, frozen=True, kw_only=True):
    """The planned or submitted move of each instance."""

    dry_run: bool
    items: tuple[HostMove, ...]


class HostMoveProgress(Wire, frozen=True, kw_only=True):
    """The requests of a bulk move."""

    items: tuple[Request, ...]


class Host(Wire, frozen=True, kw_only=True):
    """A host other than the server's own."""

    name: str
    former: str | None = None
    """Former name that its agent still uses after a rename; null if it uses the present name."""
    identity: str | None
    """The id in its agent's data folder, to which the name is bound."""
    state: HostState
    drain: HostDrain | None = None
    """The drain in progress; null if there is none."""
    linked: bool
    """Whether its agent is connected."""
    certified: bool = False
    """Whether its agent got a certificate when it last connected, for encrypted live migration."""
    lost_since_at: str | None = None
    """Since when its agent does not respond, though its lease may still be valid, or since when it is fenced."""
    fenced_at: str | None = None
    """While its agent is disconnected: when it is fenced at the latest; null if only an admin can fence it."""
    to_evacuate: int = 0
    """Of a fenced host: number of instances that can be evacuated."""
    last_seen_at: str
    fenced_by: str | None
    """`lease`, or the admin who confirmed that its guests have ended."""
    address: str | None
    """Address for incoming migrations."""
    shared: str | None
    """Folder that it shares with other hosts."""
    instances: int
    total: Resources
    """What can be claimed in total, as last reported by its agent."""
    promised: Resources
    """Claimed by its instances and by incoming migrations."""
    free: Resources
    """What can still be claimed."""
    disk_free_mib: int | None
    """Free space of the file system of its data folder; null while its agent is disconnected."""
    protections: tuple[Protection, ...] = ()
    """What confines its guests, as last reported by its agent; empty if unknown."""
    networks: tuple[NetworkAbility, ...] = ()
    """The kinds of network that its guests can have, as last reported by its agent; empty for one of an older version.
    """


class HostEnrolment(Wire, frozen=True, kw_only=True):
    """A one-time secret for the first connection of a host's agent, which has no certificate yet."""

    host: str
    secret: str
    """Shown only here."""
    expires_at: str


class HostEvent(Wire, frozen=True, kw_only=True):
    """An event of a host."""

    kind: str
    """`joined`, `lost` (its agent does not respond), `fenced`, or `back`; of the server's own host `clock_jumped`,
    `disk_full` and `disk_has_space`."""
    at: str
    by: str | None
    """Of `fenced`: `lease`, or an admin's name."""
    detail: str | None
    """Details of an event of the server's own host, as a sentence."""


class HostEventList(Wire, frozen=True, kw_only=True):
    """The last 100 events of a host, oldest first."""

    items: tuple[HostEvent, ...]


class HostList(Wire, frozen=True, kw_only=True):
    own: str
    """The name of the server's own host, which is not in `items`."""
    own_drain: HostDrain | None = None
    """The drain of the server's own host; null if there is none."""
    items: tuple[Host, ...]


class FenceConfirmation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An admin's confirmation that the guests of a host have ended."""

    guests_have_ended: bool
    """Must be true. If guests still run, a guest may run twice and corrupt its disks."""
