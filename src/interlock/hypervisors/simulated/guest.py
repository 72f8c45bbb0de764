"""The record of one simulated guest."""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec

from interlock.core.records import Disk, Forward, GuestEvent, Interface, Spec
from interlock.core.states import PowerState
from interlock.hypervisors.simulated.disk_content import Content
from interlock.hypervisors.simulated.faults import Method

ROOT: Final = "root"
"""The id of an instance's root disk."""

RESCUE: Final = "rescue"
"""The id of the disk that an instance boots during a rescue."""

RUNS: Final = frozenset({PowerState.RUNNING, PowerState.PAUSED})
"""The power states in which there is a guest, running or paused."""


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """A command to a guest or its process."""

    method: Method
    disk: Disk | None = None
    """The disk to attach."""
    disk_id: str | None = None
    """The disk to detach."""
    interface: Interface | None = None
    """The interface to attach or to update."""
    forwards: tuple[Forward, ...] = ()
    """With an update of the first interface."""
    interface_id: str | None = None
    """The interface to detach."""


class SimulatedGuest(msgspec.Struct, kw_only=True):
    """One instance on the host."""

    instance_id: str
    spec: Spec
    """As last defined or started."""
    power: PowerState = PowerState.NONE
    disks: dict[str, Disk] = msgspec.field(default_factory=dict)
    """The plugged-in disks, in order; kept when the guest ends, for a power cycle."""
    interfaces: dict[str, Interface] = msgspec.field(default_factory=dict)
    """The same for interfaces beyond the first."""
    roots: dict[int, Content] = msgspec.field(default_factory=dict)
    """The content of its root disks, by number."""
    rescue: Content | None = None
    """The content of its rescue disk."""
    rescued_from: str | None = None
    """The id of the rescue image."""
    memory_saved: bool = False
    """Whether its memory is saved."""
    paused_for_memory: bool = False
    """Whether it is paused only for an operation on its memory, and resumed afterwards."""
    has_agent: bool = True
    passwords: dict[str, str] = msgspec.field(default_factory=dict)
    """The password hashes, by user."""
    starting: bool = False
    """Whether its vCPUs have not run since the start of its process."""
    frozen: bool = False
    thaw_after_ms: int | None = None
    ignores_power_button: bool = False
    button_pressed: bool = False
    """Whether its power button was pressed, and it has not reacted yet."""
    release_requests: list[str] = msgspec.field(default_factory=list)
    """Ids of the disks and interfaces that it should release, and has not."""
    waiting_commands: list[Command] = msgspec.field(default_factory=list)
    """The commands that were sent to it while it was frozen."""
    pending_events: list[GuestEvent] = msgspec.field(default_factory=list)
    starts: int = 0
    """How often it was started."""
    resets: int = 0

    @property
    def seen(self) -> PowerState:
        """The power state that an inspection returns: `NONE` until the vCPUs have run."""
        return PowerState.NONE if self.starting else self.power

    @property
    def has_responsive_agent(self) -> bool:
        """Whether its guest agent responds."""
        return self.has_agent and self.power is PowerState.RUNNING and not self.frozen

    def uses(self, disk: Disk) -> bool:
        """Whether the guest's process locks the disk's file against this use."""
        return self.power is not PowerState.NONE and any(
            used.path == disk.path and not (used.read_only and disk.read_only) for used in self.disks.values()
        )


def hashed(instance_id: str, user: str, password: str) -> str:
    """Return the hash that a simulated guest stores of a password."""
    return hashlib.scrypt(password.encode(), salt=f"{instance_id}/{user}".encode(), n=2, r=1, p=1).hex()
