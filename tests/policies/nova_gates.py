"""The gates of Nova 34.0.0, read off Nova by running its own guards over every combination.

This is what `nova.toml` is held against, and knows nothing of how that is written. Every allowed set is a full product.
"""

from __future__ import annotations

from typing import Final, NamedTuple

VM_STATES: Final = (
    *("building", "active", "paused", "suspended", "stopped", "rescued", "resized", "shelved", "shelved_offloaded"),
    *("soft_deleted", "deleted", "error"),
)
TASK_STATES: Final = (
    *("none", "scheduling", "block_device_mapping", "networking", "spawning", "image_snapshot"),
    *(
        "image_snapshot_pending",
        "image_pending_upload",
        "image_uploading",
        "image_backup",
        "updating_password",
        "resize_prep",
    ),
    *(
        "resize_migrating",
        "resize_migrated",
        "resize_finish",
        "resize_reverting",
        "resize_confirming",
        "rebooting",
        "reboot_pending",
    ),
    *("reboot_started", "rebooting_hard", "reboot_pending_hard", "reboot_started_hard", "pausing", "unpausing"),
    *("suspending", "resuming", "powering-off", "powering-on", "rescuing", "unrescuing", "rebuilding"),
    *("rebuild_block_device_mapping", "rebuild_spawning", "migrating", "deleting", "soft-deleting", "restoring"),
    *("shelving", "shelving_image_pending_upload", "shelving_image_uploading", "shelving_offloading", "unshelving"),
)


class Gate(NamedTuple):
    """What an operation is allowed in."""

    vm_states: frozenset[str]
    task_states: frozenset[str] = frozenset({"none"})
    launched: frozenset[bool] = frozenset({True})

    def allows(self, vm_state: str, task_state: str, *, launched: bool) -> bool:
        return vm_state in self.vm_states and task_state in self.task_states and launched in self.launched


def _in(*vm_states: str) -> frozenset[str]:
    return frozenset(vm_states)


_ANY_STATE: Final = frozenset(VM_STATES)
_ANY_TASK: Final = frozenset(TASK_STATES)
_AT_REST: Final = _in("active", "stopped", "paused", "suspended")
_VOLUMES: Final = _in("active", "paused", "stopped", "resized", "soft_deleted", "shelved", "shelved_offloaded")

GATES: Final[dict[str, Gate]] = {
    "start": Gate(_in("stopped")),
    "stop": Gate(_in("active", "error")),
    "reboot_soft": Gate(_in("active")),
    "reboot_hard": Gate(
        _in("active", "stopped", "paused", "suspended", "error"),
        _in("none", "rebooting", "reboot_pending", "reboot_started", "rebooting_hard", "resuming", "unpausing")
        | _in("pausing", "suspending"),
    ),
    "pause": Gate(_in("active")),
    "suspend": Gate(_in("active")),
    "set_admin_password": Gate(_in("active")),
    "unpause": Gate(_in("paused")),
    "resume": Gate(_in("suspended")),
    "rescue": Gate(_in("active", "stopped", "error")),
    "rebuild": Gate(_in("active", "stopped", "error")),
    "unrescue": Gate(_in("rescued")),
    "resize": Gate(_in("active", "stopped")),
    "confirm_resize": Gate(_in("resized")),
    "revert_resize": Gate(_in("resized")),
    "shelve": Gate(_AT_REST),
    "snapshot": Gate(_AT_REST),
    "snapshot_volume_backed": Gate(_AT_REST),
    "backup": Gate(_AT_REST),
    "shelve_offload": Gate(_in("shelved")),
    "unshelve": Gate(_in("shelved", "shelved_offloaded")),
    "live_migrate": Gate(_in("active", "paused")),
    "live_migrate_abort": Gate(_ANY_STATE, _in("migrating")),
    "live_migrate_force_complete": Gate(_in("active"), _in("migrating")),
    "evacuate": Gate(_in("active", "stopped", "error"), _ANY_TASK),
    "attach_volume": Gate(_VOLUMES),
    "detach_volume": Gate(_VOLUMES),
    "swap_volume": Gate(_in("active", "paused", "resized")),
    "attach_interface": Gate(_in("active", "paused", "stopped")),
    "detach_interface": Gate(_in("active", "paused", "stopped")),
    **dict.fromkeys(
        ("move_interface", "set_interface", "add_forward", "remove_forward"), Gate(_in("active", "paused", "stopped"))
    ),
    "update_instance_metadata": Gate(_AT_REST, _ANY_TASK),
    "delete_instance_metadata": Gate(_AT_REST, _ANY_TASK),
    "trigger_crash_dump": Gate(_in("active", "paused", "rescued", "resized", "error")),
    "restore": Gate(_in("soft_deleted")),
    "soft_delete": Gate(_ANY_STATE, _ANY_TASK),
    "delete": Gate(_ANY_STATE, _ANY_TASK, frozenset({True, False})),
    "force_delete": Gate(_ANY_STATE, _ANY_TASK, frozenset({True, False})),
}
