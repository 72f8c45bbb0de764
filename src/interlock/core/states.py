"""The states of an instance: OpenStack Nova's `vm_state`, `task_state` and `power_state`.

Transitions are in `operations`.
"""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import Final


class VmState(StrEnum):
    """The stable state that the owner of an instance expects it to be in."""

    BUILDING = "building"
    """Requested and not created yet."""
    ACTIVE = "active"
    """Running."""
    PAUSED = "paused"
    """In memory, with its vCPUs stopped."""
    SUSPENDED = "suspended"
    """Its memory is saved to a file; no QEMU process runs."""
    STOPPED = "stopped"
    """Powered off; its disks are kept."""
    RESCUED = "rescued"
    """Running from a rescue image, with its own root disk attached as a second disk."""
    RESIZED = "resized"
    """With its new size, waiting for the owner to confirm or revert, even if its guest has ended meanwhile."""
    SHELVED = "shelved"
    """Powered off, with an image of its disk; the disk is still on its host."""
    SHELVED_OFFLOADED = "shelved_offloaded"
    """Only the image is left; nothing is on a host."""
    SOFT_DELETED = "soft_deleted"
    """Deleted, and restorable until it is reclaimed."""
    DELETED = "deleted"
    """Deleted for good; a final state."""
    MIGRATED_OUT = "migrated_out"
    """Migrated to another host; only its record is left here."""
    ERROR = "error"
    """A state change failed or the guest crashed, and the owner has to choose what comes next."""


class Target(Enum):
    """A target state that depends on the state before."""

    SAME = "same"
    """The vm_state does not change."""
    REPAIRED = "repaired"
    """The vm_state does not change, but an instance in error becomes active."""
    PRIOR = "prior"
    """The vm_state before the operation that this one undoes."""
    PRESENT = "present"
    """The vm_state that describes the guest now, whatever the state before."""
    EVACUATED = "evacuated"
    """The state after the loss of its host and of everything stored only there (`state_stack.evacuated`)."""


class PowerState(StrEnum):
    """The guest's state as last reported by the hypervisor."""

    NONE = "none"
    """No QEMU process runs."""
    RUNNING = "running"
    PAUSED = "paused"
    SHUTDOWN = "shutdown"
    """The guest powered itself off."""
    CRASHED = "crashed"
    """The guest panicked."""
    UNKNOWN = "unknown"
    """Its host does not respond or is fenced. Shown only: the record keeps the last known state."""


class GuestTrouble(StrEnum):
    """A present fault of a running guest."""

    NOT_RESPONDING = "not_responding"
    """Its QEMU process does not respond: it is stopped, or blocked on storage I/O."""
    NO_SPACE = "no_space"
    """It was halted, because a write failed with ENOSPC."""
    IO_ERROR = "io_error"
    """It was halted, because a read or write failed."""


HALTS: Final = frozenset({GuestTrouble.NO_SPACE, GuestTrouble.IO_ERROR})
"""The faults for which QEMU halts a guest."""

NO_TASK: Final = "none"
"""The task_state of an instance without a state change in flight."""

EXECUTING_STATES: Final = frozenset({VmState.ACTIVE, VmState.PAUSED, VmState.RESCUED, VmState.RESIZED})
"""The states in which a QEMU process runs the guest, so that the end of the guest is an event."""

LEFT_AT_END: Final = EXECUTING_STATES - {VmState.RESIZED}
"""The states that become stopped or error when the guest ends.

A resized instance stays resized: its owner can still confirm or revert, since both disks exist."""
