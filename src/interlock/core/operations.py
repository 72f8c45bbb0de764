"""The operation catalogue: the definition of every operation.

It holds under every policy; when an operation is allowed is up to the policy. Names and phases are OpenStack Nova's
where Nova has one (`nova/compute/task_states.py`), written with underscores.

What needs more than data is registered by the operation's name: `record_operations` and `preconditions` here, the
handlers in `driver/operations`. The command line, the OpenAPI description and the documentation are made from this.
"""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from typing import Any, Final

import msgspec

from interlock.core import parameters as given
from interlock.core.command_forms import Topic
from interlock.core.parameters import Field, NoParameters, Parameters, fields_of
from interlock.core.states import Target, VmState


class Lane(StrEnum):
    """How an operation is scheduled."""

    STATE = "state"
    """A state change: at most one is in flight per instance, in the order admitted."""
    COMPONENT = "component"
    """A component change: one at a time, concurrently with a state change that it is compatible with."""
    RECORD = "record"
    """Changes only the record of the instance; done when it is admitted."""


class Operation(StrEnum):
    """The operations. Append new ones: recorded history refers to them by position (`BIT`)."""

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
    RENAME = "rename"
    MOVE_INTERFACE = "move_interface"
    SET_INTERFACE = "set_interface"
    ADD_FORWARD = "add_forward"
    REMOVE_FORWARD = "remove_forward"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """The definition of one operation."""

    operation: Operation
    summary: str
    """What it does, for the command line and the documentation: a sentence or two."""
    topic: Topic
    lane: Lane
    phases: tuple[str, ...] = ()
    """Its task states, in order; the first holds from the moment it is taken."""
    hard_phases: tuple[str, ...] = ()
    """The task states of its hard variant, if it has one."""
    sources: frozenset[VmState]
    """The vm_states in which a driver can perform it."""
    to: VmState | Target
    """The vm_state after success."""
    on_failure: VmState | None = None
    """The vm_state after failure; None: unchanged, unless the hypervisor reports otherwise."""
    parameters: type[Parameters] = NoParameters
    command: str | None
    """Its command of `interlock vm`, made from this definition; None: it has none, or one written by hand."""
    confirm: str | None = None
    """The question before the command submits it; `{vm}` stands for the VM."""
    remembers: bool = False
    """Whether the vm_state before it is pushed to the state stack, for a later operation with `Target.PRIOR`."""
    interruptible: bool = False
    """Whether its worker can be asked to stop and undo; otherwise it can only be fenced."""
    details: bool = False
    """For a record operation: whether it changes only what people read, on which no rule and no driver depends."""
    guest_agent: bool = False
    """Whether it needs a guest agent that responds."""
    compatible_with: frozenset[Operation] = frozenset()
    """For a component change: the state changes that it may run concurrently with."""


_V = VmState
_O = Operation
_T = Topic
_ANYWHERE = frozenset(VmState) - {VmState.DELETED}
_SETTLED = frozenset({_V.ACTIVE, _V.STOPPED, _V.PAUSED, _V.SUSPENDED})
_PLUGGABLE = frozenset({_V.BUILDING, _V.ACTIVE, _V.PAUSED, _V.STOPPED, _V.RESIZED})
# Without a QEMU process, attaching and detaching a volume changes only the record.
_WITH_VOLUMES = _PLUGGABLE | {_V.SHELVED, _V.SHELVED_OFFLOADED, _V.SOFT_DELETED}


def _entry(
    lane: Lane,
    operation: Operation,
    topic: Topic,
    summary: str,
    *,
    transition: tuple[frozenset[VmState] | set[VmState], VmState | Target],
    phases: str = "",
    hard: str = "",
    **more: Any,
) -> Entry:
    """Return a definition. The command has the operation's name unless `command` says otherwise."""
    return Entry(
        operation=operation,
        topic=topic,
        lane=lane,
        summary=summary,
        sources=frozenset(transition[0]),
        to=transition[1],
        phases=tuple(phases.split()),
        hard_phases=tuple(hard.split()),
        **{"command": operation.value.replace("_", "-"), **more},
    )


_state = partial(_entry, Lane.STATE)
_record = partial(_entry, Lane.RECORD, transition=(_ANYWHERE, Target.SAME))


def _component(operation: Operation, summary: str, *beside: Operation, **more: Any) -> Entry:
    more = {"transition": (_PLUGGABLE, Target.SAME), "compatible_with": frozenset(beside), **more}
    return _entry(Lane.COMPONENT, operation, Topic.DISKS, summary, **more)


_COMPONENT_CHANGES = (
    _component(
        _O.ATTACH_VOLUME, "Attach a volume to a VM, running or not.", _O.START, phases="attaching_volume",
        transition=(_WITH_VOLUMES, Target.SAME), parameters=given.AttachVolumeParameters, command="attach",
    ),
    _component(
        _O.DETACH_VOLUME, "Detach a volume from a VM.", _O.START, phases="detaching_volume",
        transition=(_WITH_VOLUMES, Target.SAME), parameters=given.DetachVolumeParameters, command="detach",
    ),
    # A start, stop or migration may be blocked until a volume's backing is replaced (change 880).
    _component(
        _O.SWAP_VOLUME, "Replace the attached volume OLD by NEW, copying its data. The guest sees the same device.",
        *(_O.START, _O.STOP, _O.REBOOT, _O.MIGRATE), phases="swapping_volume", parameters=given.SwapVolumeParameters,
    ),
    _component(
        _O.ATTACH_INTERFACE, "Attach another network interface to a VM, running or not.", _O.START,
        phases="attaching_interface", parameters=given.AttachInterfaceParameters,
    ),
    _component(
        _O.DETACH_INTERFACE, "Detach a network interface; `vm show` lists their ids.", _O.START,
        phases="detaching_interface", parameters=given.DetachInterfaceParameters,
    ),
    _component(
        _O.MOVE_INTERFACE, "Move a network interface to another network. The guest keeps the device.", _O.START,
        phases="moving_interface", parameters=given.MoveInterfaceParameters,
    ),
    _component(
        _O.SET_INTERFACE, "Change the bandwidth limits of an interface, and who may connect to it.", _O.START,
        phases="setting_interface", parameters=given.SetInterfaceParameters,
    ),
    _component(
        _O.ADD_FORWARD, "Forward a host's port to the first interface. Open connections of a user network end.",
        _O.START, phases="adding_forward", parameters=given.AddForwardParameters,
    ),
    _component(
        _O.REMOVE_FORWARD, "End the forward of a port of the host. Open connections of a user network end.", _O.START,
        phases="removing_forward", parameters=given.RemoveForwardParameters),
)  # fmt: skip
_ENTRIES = (
    _state(
        _O.CREATE,
        _T.VMS,
        "Create a VM and boot it.",
        phases="scheduling block_device_mapping networking spawning",
        transition=({_V.BUILDING}, _V.ACTIVE),
        on_failure=_V.ERROR,
        interruptible=True,
        command=None,
    ),
    # Change 880 starts instances from `building`: it creates them without starting them. An instance that was resized
    # while stopped starts with its new size.
    _state(
        _O.START,
        _T.POWER,
        "Boot a stopped VM. Confirms its resize, if it was resized.",
        phases="powering_on",
        transition=({_V.BUILDING, _V.STOPPED, _V.RESIZED, _V.ERROR}, _V.ACTIVE),
        on_failure=_V.ERROR,
        interruptible=True,
    ),
    _state(
        _O.STOP,
        _T.POWER,
        "Shut the guest down by ACPI; power it off after a timeout.",
        phases="powering_off",
        hard="powering_off_hard",
        transition=({_V.BUILDING, _V.ACTIVE, _V.PAUSED, _V.RESCUED, _V.RESIZED, _V.STOPPED, _V.ERROR}, _V.STOPPED),
        interruptible=True,
        parameters=given.StopParameters,
    ),
    _state(
        _O.REBOOT,
        _T.POWER,
        "Reboot the guest by ACPI; reset it after a timeout.",
        phases="rebooting reboot_pending reboot_started",
        hard="rebooting_hard reboot_pending_hard reboot_started_hard",
        transition=(_SETTLED | {_V.ERROR, _V.RESCUED}, _V.ACTIVE),
        interruptible=True,
        parameters=given.RebootParameters,
    ),
    _state(
        _O.PAUSE,
        _T.POWER,
        "Pause a VM's vCPUs; its memory is kept.",
        phases="pausing",
        transition=({_V.ACTIVE}, _V.PAUSED),
    ),
    _state(_O.UNPAUSE, _T.POWER, "Unpause a VM.", phases="unpausing", transition=({_V.PAUSED}, _V.ACTIVE)),
    _state(
        _O.SUSPEND,
        _T.POWER,
        "Save a VM's memory to disk, and free its resources.",
        phases="suspending",
        transition=({_V.ACTIVE, _V.PAUSED}, _V.SUSPENDED),
        interruptible=True,
    ),
    # If restoring the memory fails, it is still saved: resume can be retried, or a hard reboot discards it.
    _state(
        _O.RESUME,
        _T.POWER,
        "Restore a suspended VM's memory, and continue it.",
        phases="resuming",
        transition=({_V.SUSPENDED}, _V.ACTIVE),
    ),
    _state(
        _O.RESCUE,
        _T.RECOVERY,
        "Boot a rescue image, with the VM's own disk attached.",
        phases="rescuing",
        transition=({_V.ACTIVE, _V.STOPPED, _V.ERROR}, _V.RESCUED),
        on_failure=_V.ERROR,
        remembers=True,
        parameters=given.RescueParameters,
    ),
    _state(
        _O.UNRESCUE,
        _T.RECOVERY,
        "End a rescue, and restore the VM's state before it.",
        phases="unrescuing",
        transition=({_V.RESCUED}, Target.PRIOR),
        on_failure=_V.ERROR,
    ),
    *_COMPONENT_CHANGES,
    _state(
        _O.REBUILD,
        _T.DISKS,
        "Recreate a VM's root disk. Its id, name, size and volumes are kept.",
        phases="rebuilding rebuild_block_device_mapping rebuild_spawning",
        transition=({_V.ACTIVE, _V.STOPPED, _V.ERROR}, Target.REPAIRED),
        on_failure=_V.ERROR,
        parameters=given.RebuildParameters,
        confirm="Rebuild {vm}, and lose the data on its root disk?",
    ),
    _state(
        _O.RESIZE,
        _T.DISKS,
        "Resize a VM, which is powered off for it; then confirm or revert that.",
        phases="resize_prep resize_migrating resize_migrated resize_finish",
        transition=({_V.ACTIVE, _V.STOPPED}, _V.RESIZED),
        on_failure=_V.ERROR,
        remembers=True,
        parameters=given.ResizeParameters,
    ),
    _state(
        _O.CONFIRM_RESIZE,
        _T.DISKS,
        "Confirm a resize, and delete the old disk.",
        phases="resize_confirming",
        transition=({_V.RESIZED}, Target.PRESENT),
        on_failure=_V.ERROR,
    ),
    _state(
        _O.REVERT_RESIZE,
        _T.DISKS,
        "Revert a resize: restore the old size and disk.",
        phases="resize_reverting",
        transition=({_V.RESIZED}, Target.PRIOR),
        on_failure=_V.ERROR,
    ),
    _state(
        _O.SNAPSHOT,
        _T.COPIES,
        "Snapshot a VM's root disk as the image NAME. The guest keeps running.",
        phases="image_snapshot image_snapshot_pending image_pending_upload image_uploading",
        transition=(_SETTLED, Target.SAME),
        interruptible=True,
        parameters=given.SnapshotParameters,
    ),
    _state(
        _O.BACKUP,
        _T.COPIES,
        "Back a VM's root disk up as an image, and delete the oldest ones.",
        phases="image_backup",
        transition=(_SETTLED, Target.SAME),
        interruptible=True,
        parameters=given.BackupParameters,
    ),
    _state(
        _O.SHELVE,
        _T.COPIES,
        "Power a VM off, and save an image of its root disk.",
        phases="shelving shelving_image_pending_upload shelving_image_uploading",
        transition=(_SETTLED, _V.SHELVED),
        on_failure=_V.ERROR,
        remembers=True,
        interruptible=True,
    ),
    _state(
        _O.SHELVE_OFFLOAD,
        _T.COPIES,
        "Remove a shelved VM from its host; the image is kept.",
        phases="shelving_offloading",
        transition=({_V.SHELVED}, _V.SHELVED_OFFLOADED),
        command="offload",
    ),
    _state(
        _O.UNSHELVE,
        _T.COPIES,
        "Restore a shelved VM.",
        phases="unshelving",
        transition=({_V.SHELVED, _V.SHELVED_OFFLOADED}, Target.PRIOR),
        interruptible=True,
    ),
    # To another host, as in change 880. A start may still be outstanding there. Between hosts of one server the record
    # moves too and the vm_state stays (`ARRIVES`); the foreseen state is the worse of the two.
    _state(
        _O.MIGRATE,
        _T.MIGRATION,
        "Migrate a VM cold, with its root disk, to another host.",
        phases="migrating_out",
        transition=({_V.BUILDING, _V.ACTIVE, _V.STOPPED}, _V.MIGRATED_OUT),
        interruptible=True,
        parameters=given.MigrateParameters,
        command=None,
    ),
    _state(
        _O.LIVE_MIGRATE,
        _T.MIGRATION,
        "Migrate a running or paused VM live, with its root disk, to another host.",
        phases="migrating",
        transition=({_V.ACTIVE, _V.PAUSED}, Target.SAME),
        interruptible=True,
        parameters=given.LiveMigrateParameters,
        command=None,
    ),
    _state(
        _O.EVACUATE,
        _T.MIGRATION,
        "Evacuate a VM from a fenced host to another.",
        phases="evacuating",
        transition=(_ANYWHERE - {_V.MIGRATED_OUT}, Target.EVACUATED),
        on_failure=_V.ERROR,
        parameters=given.EvacuateParameters,
        command=None,
    ),
    _state(
        _O.CRASH_DUMP,
        _T.RECOVERY,
        "Dump the guest's memory for a debugger.",
        phases="crash_dumping",
        transition=({_V.ACTIVE, _V.PAUSED, _V.RESCUED, _V.RESIZED, _V.ERROR}, Target.SAME),
        command=None,
    ),
    _state(
        _O.SET_PASSWORD,
        _T.ACCESS,
        "Set a user's password by the guest agent.",
        phases="updating_password",
        transition=({_V.ACTIVE}, Target.SAME),
        parameters=given.SetPasswordParameters,
        guest_agent=True,
    ),
    _state(
        _O.DELETE,
        _T.DELETION,
        "Delete a VM and its root disk. Volumes are kept.",
        phases="deleting",
        transition=(_ANYWHERE, _V.DELETED),
        confirm="Delete {vm} and its root disk?",
    ),
    _state(
        _O.SOFT_DELETE,
        _T.DELETION,
        "Power a VM off, and delete it later unless it is restored.",
        phases="soft_deleting",
        transition=(_ANYWHERE, _V.SOFT_DELETED),
        remembers=True,
    ),
    _state(
        _O.RESTORE,
        _T.DELETION,
        "Restore a soft-deleted VM.",
        phases="restoring",
        transition=({_V.SOFT_DELETED}, Target.PRIOR),
    ),
    _state(
        _O.FORCE_DELETE,
        _T.DELETION,
        "Delete a VM whatever is in flight.",
        phases="force_deleting",
        transition=(_ANYWHERE, _V.DELETED),
        confirm="Delete {vm} and its root disk?",
    ),
    _record(
        _O.LIVE_MIGRATE_ABORT,
        _T.MIGRATION,
        "Abort the live migration in flight; the guest stays on the source.",
        command=None,
    ),
    _record(
        _O.LIVE_MIGRATE_FORCE_COMPLETE,
        _T.MIGRATION,
        "Complete the live migration in flight, with the guest paused for it.",
        command=None,
    ),
    _record(
        _O.SET_METADATA,
        _T.VMS,
        "Set or remove a VM's metadata.",
        parameters=given.MetadataParameters,
        details=True,
        command=None,
    ),
    _record(
        _O.RENAME,
        _T.VMS,
        "Rename a VM, whatever is in flight. Its id stays, and the hostname in the guest.",
        parameters=given.RenameParameters,
        details=True,
    ),
    _record(_O.LOCK, _T.VMS, "Lock a VM: only admins can change it until it is unlocked."),
    _record(_O.UNLOCK, _T.VMS, "Unlock a VM. Only an admin can remove the lock of an admin."),
    _record(
        _O.RESET_STATE,
        _T.RECOVERY,
        "Correct the recorded state of a VM, ending whatever is outstanding. For admins.",
        parameters=given.ResetStateParameters,
    ),
)

CATALOGUE: Final[dict[Operation, Entry]] = {entry.operation: entry for entry in _ENTRIES}
"""Every operation's definition."""

FIELDS: Final[dict[Operation, tuple[Field, ...]]] = {entry.operation: fields_of(entry.parameters) for entry in _ENTRIES}
"""The parameters of each operation."""

TASK_STATES: Final[tuple[str, ...]] = tuple(
    dict.fromkeys(phase for entry in _ENTRIES if entry.lane is Lane.STATE for phase in entry.phases + entry.hard_phases)
)
"""Every task_state but `none`: the phases of the state changes, in catalogue order."""

TASK_OPERATION: Final[dict[str, Operation]] = {
    phase: entry.operation for entry in _ENTRIES for phase in entry.phases + entry.hard_phases
}
"""The operation of each phase. No two operations share one."""

BIT: Final[dict[Operation, int]] = {operation: 1 << index for index, operation in enumerate(Operation)}
"""One bit for each operation, so that a set of operations is one integer."""
