"""What a simulated host holds of one instance, as its file says it. Nothing happens here: see `host`."""

from __future__ import annotations

from typing import Final

import msgspec

from interlock.core.records import Disk, GuestEvent, Interface, Spec
from interlock.core.states import PowerState
from interlock.hypervisors.simulated.contents import Content
from interlock.hypervisors.simulated.faults import Method

ROOT: Final = "root"
"""The id of an instance's own disk."""

RESCUE: Final = "rescue"
"""The id of the disk that a rescued instance boots."""

RUNS: Final = frozenset({PowerState.RUNNING, PowerState.PAUSED})
"""The power states in which a guest runs, or would if it were let."""


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """Something that what holds a guest is told to do."""

    method: Method
    disk: Disk | None = None
    """The disk to attach."""
    disk_id: str | None = None
    """The disk to detach."""
    interface: Interface | None = None
    """The interface to attach."""
    interface_id: str | None = None
    """The interface to detach."""


class Guest(msgspec.Struct, kw_only=True):
    """One instance on the host. Everything that its file says."""

    instance_id: str
    spec: Spec
    """As last defined or started."""
    power: PowerState = PowerState.NONE
    disks: dict[str, Disk] = msgspec.field(default_factory=dict)
    """What is plugged in, in the order plugged in; kept when the guest ends, for a power cycle."""
    interfaces: dict[str, Interface] = msgspec.field(default_factory=dict)
    """The same for interfaces beyond the first."""
    roots: dict[int, Content] = msgspec.field(default_factory=dict)
    """What is on its root disks, by number."""
    rescue: Content | None = None
    """What is on the disk that it boots while it is rescued from a disk image."""
    rescued_from: str | None = None
    """The id of that image."""
    memory_saved: bool = False
    """Whether it can go on from where it was, without a start."""
    standing_still: bool = False
    """Whether it is paused only for something long that is done with its memory, and runs on afterwards."""
    has_agent: bool = True
    passwords: dict[str, str] = msgspec.field(default_factory=dict)
    """What each user's password was made into, as in a system's own file of them."""
    starting: bool = False
    """Whether it is held with its processors halted since its start, until they are let go."""
    frozen: bool = False
    thaw_after_ms: int | None = None
    ignores_power_button: bool = False
    button_pressed: bool = False
    """Whether the guest has yet to react to its power button."""
    unread: list[Command] = msgspec.field(default_factory=list)
    """What was sent to it while it was frozen."""
    untold: list[GuestEvent] = msgspec.field(default_factory=list)
    starts: int = 0
    """How often a guest was started, and so which guest this is."""
    resets: int = 0

    @property
    def seen(self) -> PowerState:
        """What an inspection tells: a guest whose processors have never run is none yet."""
        return PowerState.NONE if self.starting else self.power

    def uses(self, disk: Disk) -> bool:
        """Whether what holds the guest keeps others from using the disk's file like this."""
        return self.power is not PowerState.NONE and any(
            used.path == disk.path and not (used.read_only and disk.read_only) for used in self.disks.values()
        )
