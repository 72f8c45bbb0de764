"""The states of an instance, in the words of the field.

`vm_state` and `task_state` are OpenStack Nova's; `power_state` is what the hypervisor last said. Which operation
leads from which state to which is not here: see `operations`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class VmState(StrEnum):
    """The stable state that the owner of an instance would expect to find it in."""

    BUILDING = "building"
    """Asked for and not there yet."""
    ACTIVE = "active"
    """Running."""
    PAUSED = "paused"
    """In memory, its processors halted."""
    SUSPENDED = "suspended"
    """Its memory is in a file; no process holds it."""
    STOPPED = "stopped"
    """Powered off; its disks are kept."""
    RESCUED = "rescued"
    """Running from a rescue image, its own disk attached beside it."""
    RESIZED = "resized"
    """With its new size, waiting for the owner to confirm or revert, also where its guest has ended meanwhile."""
    SHELVED = "shelved"
    """Powered off, with an image of its disk; the disk is still on its host."""
    SHELVED_OFFLOADED = "shelved_offloaded"
    """Only the image is left; no host holds anything of it."""
    SOFT_DELETED = "soft_deleted"
    """Deleted for its owner, and restorable until it is reclaimed."""
    DELETED = "deleted"
    """Gone. Nothing leads out of it."""
    MIGRATED_OUT = "migrated_out"
    """Gone to another host; only its record is left here."""
    ERROR = "error"
    """A state change failed, or the guest crashed, and somebody has to choose what comes next."""


class PowerState(StrEnum):
    """What the hypervisor last said of the instance."""

    NONE = "none"
    """The hypervisor knows nothing of it: no process holds it."""
    RUNNING = "running"
    PAUSED = "paused"
    SHUTDOWN = "shutdown"
    """The guest has powered itself off."""
    CRASHED = "crashed"
    """The guest has panicked."""


NO_TASK: Final = "none"
"""The task_state of an instance of which no state change is being served."""

EXECUTING_STATES: Final = frozenset({VmState.ACTIVE, VmState.PAUSED, VmState.RESCUED, VmState.RESIZED})
"""The states in which a hypervisor holds the guest, so that the end of the guest is news."""

LEFT_AT_END: Final = EXECUTING_STATES - {VmState.RESIZED}
"""The states that the end of the guest leads out of, to stopped or error.

What was resized goes on waiting for its owner to confirm or revert: both disks are there."""
