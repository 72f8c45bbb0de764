"""The catalogue: every operation that can be asked for, and what is true of it whatever the policy says.

An entry says which phases (task states) serving it goes through, where it leads, and what it may be served beside. It
does not say when it is allowed: that is the policy's. Names and phases are OpenStack Nova's wherever Nova has one
(`nova/compute/task_states.py`), written with underscores.
"""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import Final

import msgspec

from interlock.core.states import VmState


class Lane(StrEnum):
    """How an operation is served."""

    STATE = "state"
    """A state change: at most one is in flight per instance, in the order admitted."""
    COMPONENT = "component"
    """A component change: one at a time, also beside a state change that lists it as compatible."""
    RECORD = "record"
    """Changes only what is recorded of the instance; done when it is admitted."""


class Operation(StrEnum):
    """What can be asked. A new one goes to the end: recorded history names kinds by their place here (`BIT`)."""

    CREATE = "create"
    START = "start"
    STOP = "stop"
    REBOOT = "reboot"
    PAUSE = "pause"
    UNPAUSE = "unpause"
    SUSPEND = "suspend"
    RESUME = "resume"
    RESCUE = "rescue"
    UNRESCUE = "unrescue"
    REBUILD = "rebuild"
    RESIZE = "resize"
    CONFIRM_RESIZE = "confirm_resize"
    REVERT_RESIZE = "revert_resize"
    SHELVE = "shelve"
    SHELVE_OFFLOAD = "shelve_offload"
    UNSHELVE = "unshelve"
    SNAPSHOT = "snapshot"
    BACKUP = "backup"
    MIGRATE = "migrate"
    LIVE_MIGRATE = "live_migrate"
    EVACUATE = "evacuate"
    CRASH_DUMP = "crash_dump"
    DELETE = "delete"
    SOFT_DELETE = "soft_delete"
    RESTORE = "restore"
    FORCE_DELETE = "force_delete"
    ATTACH_VOLUME = "attach_volume"
    DETACH_VOLUME = "detach_volume"
    SWAP_VOLUME = "swap_volume"
    ATTACH_INTERFACE = "attach_interface"
    DETACH_INTERFACE = "detach_interface"
    LOCK = "lock"
    UNLOCK = "unlock"
    RESET_STATE = "reset_state"
    SET_PASSWORD = "set_password"  # noqa: S105 - an operation's name
    SET_METADATA = "set_metadata"
    LIVE_MIGRATE_ABORT = "live_migrate_abort"
    LIVE_MIGRATE_FORCE_COMPLETE = "live_migrate_force_complete"


class Landing(Enum):
    """Where an operation leads when that depends on where the instance was."""

    SAME = "same"
    """The vm_state does not change."""
    REPAIRED = "repaired"
    """The vm_state does not change, but an instance in error becomes active."""
    PRIOR = "prior"
    """The vm_state that held before the operation that this one undoes."""
    PRESENT = "present"
    """The vm_state that holds for the guest now, whatever held before."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """What is true of one operation under every policy."""

    operation: Operation
    lane: Lane
    phases: tuple[str, ...] = ()
    """The task states that serving it goes through, in order; the first holds from the moment it is taken."""
    hard_phases: tuple[str, ...] = ()
    """The same for its hard variant, for an operation that has one."""
    sources: frozenset[VmState]
    """The vm_states from which a driver may be asked to perform it."""
    to: VmState | Landing
    """The vm_state once it has succeeded."""
    on_failure: VmState | None = None
    """The vm_state once it has failed; None leaves it as it was, and the hypervisor tells if that is wrong."""
    remembers: bool = False
    """Whether the vm_state it was asked in is remembered, for a later operation that lands on `Landing.PRIOR`."""
    interruptible: bool = False
    """Whether its worker can be asked to stop half-way and undo; otherwise it can only be fenced."""
    compatible_with: frozenset[Operation] = frozenset()
    """For a component change: the state changes beside which it may be served."""


_V = VmState
_O = Operation
_ANYWHERE = frozenset(VmState) - {VmState.DELETED}
_SETTLED = frozenset({_V.ACTIVE, _V.STOPPED, _V.PAUSED, _V.SUSPENDED})
_PLUGGABLE = frozenset({_V.BUILDING, _V.ACTIVE, _V.PAUSED, _V.STOPPED, _V.RESIZED})
# Where no process holds the guest, a volume is attached and detached by what is recorded.
_WITH_VOLUMES = _PLUGGABLE | {_V.SHELVED, _V.SHELVED_OFFLOADED, _V.SOFT_DELETED}


def _state(
    operation: Operation,
    phases: str,
    sources: frozenset[VmState] | set[VmState],
    to: VmState | Landing,
    *,
    hard: str = "",
    on_failure: VmState | None = None,
    remembers: bool = False,
    interruptible: bool = False,
) -> Entry:
    return Entry(
        operation=operation,
        lane=Lane.STATE,
        phases=tuple(phases.split()),
        hard_phases=tuple(hard.split()),
        sources=frozenset(sources),
        to=to,
        on_failure=on_failure,
        remembers=remembers,
        interruptible=interruptible,
    )


def _component(
    operation: Operation, phase: str, *beside: Operation, sources: frozenset[VmState] | set[VmState] | None = None
) -> Entry:
    return Entry(
        operation=operation,
        lane=Lane.COMPONENT,
        phases=(phase,),
        sources=_PLUGGABLE if sources is None else frozenset(sources),
        to=Landing.SAME,
        compatible_with=frozenset(beside),
    )


def _record(operation: Operation) -> Entry:
    return Entry(operation=operation, lane=Lane.RECORD, sources=_ANYWHERE, to=Landing.SAME)


_ENTRIES = (
    _state(
        _O.CREATE,
        "scheduling block_device_mapping networking spawning",
        {_V.BUILDING},
        _V.ACTIVE,
        on_failure=_V.ERROR,
        interruptible=True,
    ),
    # A start from `building` is change 880's: its instances are made not started. One that was resized while it was
    # stopped is started with its new size.
    _state(
        _O.START,
        "powering_on",
        {_V.BUILDING, _V.STOPPED, _V.RESIZED, _V.ERROR},
        _V.ACTIVE,
        on_failure=_V.ERROR,
        interruptible=True,
    ),
    _state(
        _O.STOP,
        "powering_off",
        {_V.BUILDING, _V.ACTIVE, _V.PAUSED, _V.RESCUED, _V.RESIZED, _V.STOPPED, _V.ERROR},
        _V.STOPPED,
        hard="powering_off_hard",
        interruptible=True,
    ),
    _state(
        _O.REBOOT,
        "rebooting reboot_pending reboot_started",
        _SETTLED | {_V.ERROR, _V.RESCUED},
        _V.ACTIVE,
        hard="rebooting_hard reboot_pending_hard reboot_started_hard",
        interruptible=True,
    ),
    _state(_O.PAUSE, "pausing", {_V.ACTIVE}, _V.PAUSED),
    _state(_O.UNPAUSE, "unpausing", {_V.PAUSED}, _V.ACTIVE),
    _state(_O.SUSPEND, "suspending", {_V.ACTIVE, _V.PAUSED}, _V.SUSPENDED, interruptible=True),
    # A memory that could not be read is still saved: it can be resumed again, or given up by a hard reboot.
    _state(_O.RESUME, "resuming", {_V.SUSPENDED}, _V.ACTIVE),
    _state(
        _O.RESCUE,
        "rescuing",
        {_V.ACTIVE, _V.STOPPED, _V.ERROR},
        _V.RESCUED,
        on_failure=_V.ERROR,
        remembers=True,
    ),
    _state(_O.UNRESCUE, "unrescuing", {_V.RESCUED}, Landing.PRIOR, on_failure=_V.ERROR),
    _state(
        _O.REBUILD,
        "rebuilding rebuild_block_device_mapping rebuild_spawning",
        {_V.ACTIVE, _V.STOPPED, _V.ERROR},
        Landing.REPAIRED,
        on_failure=_V.ERROR,
    ),
    _state(
        _O.RESIZE,
        "resize_prep resize_migrating resize_migrated resize_finish",
        {_V.ACTIVE, _V.STOPPED},
        _V.RESIZED,
        on_failure=_V.ERROR,
        remembers=True,
    ),
    _state(_O.CONFIRM_RESIZE, "resize_confirming", {_V.RESIZED}, Landing.PRESENT, on_failure=_V.ERROR),
    _state(_O.REVERT_RESIZE, "resize_reverting", {_V.RESIZED}, Landing.PRIOR, on_failure=_V.ERROR),
    _state(
        _O.SHELVE,
        "shelving shelving_image_pending_upload shelving_image_uploading",
        _SETTLED,
        _V.SHELVED,
        on_failure=_V.ERROR,
        remembers=True,
        interruptible=True,
    ),
    _state(_O.SHELVE_OFFLOAD, "shelving_offloading", {_V.SHELVED}, _V.SHELVED_OFFLOADED),
    _state(_O.UNSHELVE, "unshelving", {_V.SHELVED, _V.SHELVED_OFFLOADED}, Landing.PRIOR, interruptible=True),
    _state(
        _O.SNAPSHOT,
        "image_snapshot image_snapshot_pending image_pending_upload image_uploading",
        _SETTLED,
        Landing.SAME,
        interruptible=True,
    ),
    _state(_O.BACKUP, "image_backup", _SETTLED, Landing.SAME, interruptible=True),
    # Out of this host, as change 880 means it. A start may still be outstanding there. Between hosts of one server the
    # record goes along, and then it leads nowhere (`ARRIVES`); what is foreseen stays the worse of the two.
    _state(_O.MIGRATE, "migrating_out", {_V.BUILDING, _V.ACTIVE, _V.STOPPED}, _V.MIGRATED_OUT, interruptible=True),
    _state(_O.LIVE_MIGRATE, "migrating", {_V.ACTIVE, _V.PAUSED}, Landing.SAME, interruptible=True),
    _state(
        _O.EVACUATE,
        "evacuating",
        {_V.ACTIVE, _V.STOPPED, _V.ERROR},
        Landing.REPAIRED,
        on_failure=_V.ERROR,
    ),
    _state(
        _O.CRASH_DUMP,
        "crash_dumping",
        {_V.ACTIVE, _V.PAUSED, _V.RESCUED, _V.RESIZED, _V.ERROR},
        Landing.SAME,
    ),
    _state(_O.SET_PASSWORD, "updating_password", {_V.ACTIVE}, Landing.SAME),
    _state(_O.DELETE, "deleting", _ANYWHERE, _V.DELETED),
    _state(
        _O.SOFT_DELETE,
        "soft_deleting",
        _ANYWHERE,
        _V.SOFT_DELETED,
        remembers=True,
    ),
    _state(_O.RESTORE, "restoring", {_V.SOFT_DELETED}, Landing.PRIOR),
    _state(_O.FORCE_DELETE, "force_deleting", _ANYWHERE, _V.DELETED),
    _component(_O.ATTACH_VOLUME, "attaching_volume", _O.START, sources=_WITH_VOLUMES),
    _component(_O.DETACH_VOLUME, "detaching_volume", _O.START, sources=_WITH_VOLUMES),
    # A start, a stop or a migration may be unable to end until a volume's backing is replaced (change 880).
    _component(_O.SWAP_VOLUME, "swapping_volume", _O.START, _O.STOP, _O.REBOOT, _O.MIGRATE),
    _component(_O.ATTACH_INTERFACE, "attaching_interface", _O.START),
    _component(_O.DETACH_INTERFACE, "detaching_interface", _O.START),
    # Told to the migration in flight: to stop, with the guest where it runs; or to end, whatever that costs the guest.
    _record(_O.LIVE_MIGRATE_ABORT),
    _record(_O.LIVE_MIGRATE_FORCE_COMPLETE),
    _record(_O.SET_METADATA),
    _record(_O.LOCK),
    _record(_O.UNLOCK),
    _record(_O.RESET_STATE),
)

CATALOGUE: Final[dict[Operation, Entry]] = {entry.operation: entry for entry in _ENTRIES}
"""Every operation's entry. Complete: a test compares its keys with `Operation`."""

TASK_STATES: Final[tuple[str, ...]] = tuple(
    dict.fromkeys(phase for entry in _ENTRIES if entry.lane is Lane.STATE for phase in entry.phases + entry.hard_phases)
)
"""Every task_state but none: the phases of the state changes, in catalogue order."""

TASK_OPERATION: Final[dict[str, Operation]] = {
    phase: entry.operation for entry in _ENTRIES for phase in entry.phases + entry.hard_phases
}
"""Which operation a phase belongs to. No two operations share one."""

BIT: Final[dict[Operation, int]] = {operation: 1 << index for index, operation in enumerate(Operation)}
"""One bit an operation, so that a set of kinds is one number."""


TRAVELS: Final[frozenset[Operation]] = frozenset({Operation.MIGRATE, Operation.LIVE_MIGRATE, Operation.EVACUATE})
"""The operations during which an instance is on two hosts."""


ARRIVES: Final[frozenset[Operation]] = frozenset({Operation.MIGRATE})
"""The operations that lead out of a host, and may tell at their end that the instance has arrived at another one that
this record is kept of too: then its vm_state is what it was."""


Memory = tuple[VmState, ...]
"""What an instance remembers: first the vm_state that held before what can be undone now, behind it those before that.

One that was rescued, resized or shelved remembers one; a soft delete puts that state before them, and undoes nothing.
One that was resized has `stopped` behind it where its guest has ended since.
"""

REMEMBERING: Final[frozenset[VmState]] = frozenset(
    state for entry in _ENTRIES if entry.to is Landing.PRIOR for state in entry.sources
)
"""The vm_states in which something can be undone. In every other one nothing is remembered."""


def remembered_in(vm_state: VmState, memory: Memory) -> Memory:
    """What is left of a memory once the instance has come to that vm_state."""
    return memory if vm_state in REMEMBERING else ()


def rests(vm_state: VmState, memory: Memory) -> bool:
    """Whether no guest is held in a state that holds one otherwise.

    What was resized while it was stopped is not started, and one whose guest has ended since is left so.
    """
    return vm_state is VmState.RESIZED and memory[-1:] == (VmState.STOPPED,)


def without_guest(vm_state: VmState, memory: Memory) -> Memory:
    """What is remembered in a vm_state that the end of the guest does not lead out of, once it has ended."""
    if vm_state is not VmState.RESIZED or rests(vm_state, memory):
        return memory
    return (*(memory or (VmState.ACTIVE,)), VmState.STOPPED)


def land(operation: Operation, vm_state: VmState, memory: Memory) -> tuple[VmState, Memory]:
    """Where a successful operation leads from `vm_state`: the new vm_state, and what is remembered there.

    An operation that undoes another lands on what was remembered, or on active where nothing was. What is there already
    keeps what it remembers. A memory goes along with what is asked where the catalogue has it asked, and no further: so
    no policy can make one longer and longer.
    """
    entry = CATALOGUE[operation]
    match entry.to:
        case Landing.SAME:
            state = vm_state
        case Landing.REPAIRED:
            state = VmState.ACTIVE if vm_state is VmState.ERROR else vm_state
        case Landing.PRIOR:
            state, memory = (memory[0], memory[1:]) if memory else (VmState.ACTIVE, ())
        case Landing.PRESENT:
            state, memory = (memory[-1] if memory else VmState.ACTIVE), ()
        case state:
            if state is not vm_state:
                known = memory if vm_state in entry.sources else ()
                memory = (vm_state, *known) if entry.remembers else known
    return state, remembered_in(state, memory)
