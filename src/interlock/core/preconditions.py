"""Preconditions of each operation on the instance's record, which hold under every policy.

No policy can change them: a volume that is not attached cannot be detached. `admission` checks them after the policy,
and `request_queue` again whenever the queue is re-evaluated.

They are evaluated on the state after the earlier requests: a volume with a queued detachment can be attached after it.
Without parameters, a precondition is unmet only if no parameters could meet it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from interlock.core import interface_preconditions
from interlock.core.evacuation import loses_root
from interlock.core.interface_preconditions import PAUSED
from interlock.core.operations import Lane, Operation
from interlock.core.records import Facts, Instance, Request
from interlock.core.situations import Precondition, Situation, root_bytes, situation, words_of
from interlock.core.states import PowerState, VmState

_GIB: Final = 1 << 30
_O = Operation
_NEW_DISK: Final = frozenset({_O.REBUILD, _O.RESIZE, _O.REVERT_RESIZE, _O.UNSHELVE, _O.EVACUATE, _O.MIGRATE})
"""After these the root disk may have a backing file or not, whatever it has now."""
RULE: Final = "precondition"
"""The rule id reported for an unmet precondition."""


class Unmet(msgspec.Struct, frozen=True, kw_only=True):
    """A precondition that is not met, with its texts filled in."""

    reason: str
    because: str
    remedy: str


# ---------------------------------------------------------------------------------------------- root disks and images


def _boots_no_disk(of: Situation) -> bool:
    return of.spec.image.kind != "disk" and _O.REBUILD not in of.before


def _root_stands_alone(of: Situation) -> bool:
    spec = of.spec
    return spec.has_root and spec.root_is_whole and spec.shared is None and of.before.isdisjoint(_NEW_DISK)


def _root_is_lost(of: Situation) -> bool:
    return loses_root(of.instance) and not of.parameters.get("from_image")


def _no_shelved_image(of: Situation) -> bool:
    instance = of.instance
    return of.settled and instance.vm_state is VmState.SHELVED and of.spec.has_root and instance.shelved_image is None


def _image_lost_with_host(of: Situation) -> bool:
    """Not if a root disk was already created from the image: it has no backing file, and the image was removed."""
    instance, spec = of.instance, of.spec
    offloaded = of.settled and instance.vm_state is VmState.SHELVED_OFFLOADED
    return offloaded and spec.has_root and instance.shelved_image is None and not spec.root_is_whole


def _image_too_large(of: Situation) -> bool:
    image = of.facts.image
    return image is not None and image.kind == "disk" and 0 < of.spec.root_gib * _GIB < image.size_bytes


def _image_needs_memory(of: Situation) -> bool:
    image = of.facts.image
    return image is not None and of.spec.memory_mib < image.min_memory_mib


def _own_image_needs_memory(of: Situation) -> bool:
    wanted = of.parameters.get("memory_mib")
    return wanted is not None and _O.REBUILD not in of.before and wanted < of.spec.image.min_memory_mib


def _iso_without_disk(of: Situation) -> bool:
    image = of.facts.image
    return image is not None and image.kind == "iso" and not of.spec.root_gib


def _has_that_size(of: Situation) -> bool:
    named = {name: of.parameters.get(name) for name in ("vcpus", "memory_mib", "root_gib")}
    wanted = {name: value for name, value in named.items() if value is not None}
    return bool(wanted) and all(getattr(of.spec, name) == value for name, value in wanted.items())


def _root_would_shrink(of: Situation) -> bool:
    wanted = of.parameters.get("root_gib")
    return wanted is not None and _O.REBUILD not in of.before and wanted * _GIB < root_bytes(of.spec)


# ------------------------------------------------------------------------------------------------------------- hosts


def _nowhere_to_go(of: Situation) -> bool:
    return of.facts.targets is not None and not (set(of.facts.targets) - {of.host})


def _there_already(of: Situation) -> bool:
    return of.parameters.get("host") == of.host


def _lacks_root(of: Situation) -> bool:
    return of.spec.has_root and of.facts.target_lacks_root


def _lacks_volumes(of: Situation) -> bool:
    return bool(of.disks) and of.facts.target_lacks_volumes


def _target_lacks_network(of: Situation) -> bool:
    return bool(of.facts.target_lacks_network)


def _cannot_be_sent(of: Situation) -> bool:
    return of.facts.sends_guests is False


def _cannot_encrypt(of: Situation) -> bool:
    return of.facts.cannot_encrypt


def _no_live_migration(of: Situation) -> bool:
    serving = of.instance.served(Lane.STATE)
    return serving is None or serving.operation is not _O.LIVE_MIGRATE


def _no_agent(of: Situation) -> bool:
    return of.settled and of.facts.agent_answers is False


def _no_guest(of: Situation) -> bool:
    return of.settled and of.instance.power_state is PowerState.NONE


# ----------------------------------------------------------------------------------------------------------- volumes


def _memory_is_saved(of: Situation) -> bool:
    states = (of.vm_state, *of.memory)
    return VmState.SUSPENDED in states and VmState.SHELVED_OFFLOADED not in states


def _being_detached(of: Situation) -> bool:
    return of.parameters.get("volume") in of.instance.detaching


def _attached(parameter: str) -> Callable[[Situation], bool]:
    return lambda of: of.parameters.get(parameter) in of.disks


def _out_of_reach(parameter: str) -> Callable[[Situation], bool]:
    return lambda of: of.host == of.instance.host and of.parameters.get(parameter) in of.facts.host_lacks


def _not_attached(parameter: str) -> Callable[[Situation], bool]:
    def broken(of: Situation) -> bool:
        there, wanted = of.disks | of.facts.claimed, of.parameters.get(parameter)
        return not there if wanted is None else wanted not in there

    return broken


def _same_volume(of: Situation) -> bool:
    return "old" in of.parameters and of.parameters["old"] == of.parameters.get("new")


def _too_small(of: Situation) -> bool:
    sizes = of.facts.volume_bytes
    old, new = (sizes.get(of.parameters.get(name, "")) for name in ("old", "new"))
    return old is not None and new is not None and new < old


def _guest_uses_old(of: Situation) -> bool:
    copies = of.parameters.get("copy", True)
    return not copies and of.settled and of.instance.power_state is not PowerState.NONE


# ----------------------------------------------------------------------------------------------------------- the list

_OWN_BOOT: Final = Precondition(
    reason="no_bootable_disk",
    broken=_boots_no_disk,
    because="{name} boots {boots}, not its root disk: an image of that disk would not boot.",
    remedy="Copy the data from inside the guest.",
)
_IMAGE_MEMORY: Final = Precondition(
    reason="too_little_memory",
    broken=_image_needs_memory,
    because="{name} has {memory_mib} MiB of memory, and the image {image} needs at least {min_memory_mib} MiB to boot.",
    remedy="Resize the VM first, or choose another image.",
)
_ELSEWHERE: Final = (
    Precondition(
        reason="no_other_host",
        broken=_nowhere_to_go,
        because="No host other than {host} is up and can access the disks of {name}.",
        remedy="Start `interlock agent` on another host; `interlock host list` shows the hosts.",
    ),
    Precondition(
        reason="same_host",
        broken=_there_already,
        because="{name} is already on host {host}, or will be.",
        remedy="Choose another host.",
    ),
    Precondition(
        reason="host_lacks_root_disk",
        broken=_lacks_root,
        because="Host {target} does not have the shared folder with the root disk of {name}.",
        remedy="Choose a host that has it; `interlock host list` shows them.",
    ),
    Precondition(
        reason="host_lacks_volumes",
        broken=_lacks_volumes,
        because="Host {target} does not have the folder with a volume of {name}.",
        remedy="Detach the volume first, or choose a host that shares the server's volume folder "
        "(`interlock agent --shared`).",
    ),
    Precondition(
        reason="host_lacks_network",
        broken=_target_lacks_network,
        because="{target_lacks_network}",
        remedy="Choose another host, or move the interface to another network first; `interlock host show` says which "
        "kinds a host has.",
    ),
)
_MEMORY: Final = Precondition(
    reason="memory_saved",
    broken=_memory_is_saved,
    because="The memory of {name}'s guest is saved, and its volumes must not change until it is restored.",
    remedy="Resume the VM first; or hard-reboot it, which discards the saved memory.",
)
_REACHED: Final = Precondition(
    reason="host_lacks_volumes",
    broken=_out_of_reach("volume"),
    because="Host {host}, where {name} is, does not have the folder with the volume {volume}.",
    remedy="Start its agent with --shared and the server's volume folder, or migrate the VM first.",
)
_NEW_REACHED: Final = msgspec.structs.replace(
    _REACHED, broken=_out_of_reach("new"), because=_REACHED.because.replace("{volume}", "{new}")
)
_SHOW_VOLUMES: Final = "`interlock vm show {name}` shows the attached volumes; `interlock vm attach` attaches one."
_NO_MIGRATION: Final = Precondition(
    reason="not_migrating",
    broken=_no_live_migration,
    because="No live migration of {name} is in flight.",
    remedy="Start one with `interlock vm live-migrate`.",
)

PRECONDITIONS: Final[dict[Operation, tuple[Precondition, ...]]] = {
    **interface_preconditions.PRECONDITIONS,
    _O.SNAPSHOT: (_OWN_BOOT,),
    _O.BACKUP: (_OWN_BOOT,),
    _O.RESCUE: (_IMAGE_MEMORY,),
    _O.REBUILD: (
        _IMAGE_MEMORY,
        Precondition(
            reason="image_too_large",
            broken=_image_too_large,
            because="The image {image} is larger than the root disk of {name}, which has {root_gib} GiB.",
            remedy="Resize the VM first, or use a smaller image.",
        ),
        Precondition(
            reason="no_root_disk",
            broken=_iso_without_disk,
            because="The image {image} is an ISO, which needs an empty root disk, and {name} has no root disk size.",
            remedy="Resize the VM with --root-size first, or use a disk image.",
        ),
    ),
    _O.RESIZE: (
        Precondition(
            reason="same_size",
            broken=_has_that_size,
            because="{name} already has that size, or will have it.",
            remedy="Choose another size: `interlock vm show {name}` shows the present one.",
        ),
        Precondition(
            reason="disk_would_shrink",
            broken=_root_would_shrink,
            because="The root disk of {name} has {root_bytes} bytes, more than root_gib, and a disk cannot shrink.",
            remedy="Choose at least the present size, or omit root_gib.",
        ),
        Precondition(
            reason="too_little_memory",
            broken=_own_image_needs_memory,
            because="{wanted_mib} MiB of memory are too little: the image of {name} needs at least "
            "{own_min_memory_mib} MiB to boot.",
            remedy="Choose more memory.",
        ),
    ),
    _O.SHELVE_OFFLOAD: (
        Precondition(
            reason="no_shelved_image",
            broken=_no_shelved_image,
            because="{name} has no shelved image of its root disk, so the disk must stay on its host.",
            remedy="Unshelve the VM, and shelve it again.",
        ),
    ),
    _O.UNSHELVE: (
        Precondition(
            reason="no_shelved_image",
            broken=_image_lost_with_host,
            because="The shelved image of the root disk of {name} no longer exists.",
            remedy="Delete the VM, and create another from a snapshot or backup.",
        ),
    ),
    _O.MIGRATE: _ELSEWHERE,
    _O.LIVE_MIGRATE: (
        *_ELSEWHERE,
        Precondition(
            reason="cannot_migrate_live",
            broken=_cannot_be_sent,
            because="Host {host} does not support live migration.",
            remedy="Migrate it cold.",
        ),
        Precondition(
            reason="cannot_encrypt",
            broken=_cannot_encrypt,
            because="Cannot live-migrate {name} from host {host} to {target}: it must be encrypted, and the agent of "
            "one of them has no certificate, or speaks an earlier version of the protocol.",
            remedy="Upgrade and restart the agents; `interlock host show` says which has a certificate. Or migrate it "
            "cold, or set qemu.migration_unencrypted on the server and both hosts.",
        ),
        Precondition(
            reason="root_disk_stands_alone",
            broken=_root_stands_alone,
            because="Cannot live-migrate {name}: its root disk on host {host} has no backing image.",
            remedy="Use cold migration: the guest is powered off, and started again on the target host.",
        ),
    ),
    _O.EVACUATE: (
        *_ELSEWHERE,
        Precondition(
            reason="root_disk_on_lost_host",
            broken=_root_is_lost,
            because="The root disk of {name} is on host {host} and not in a shared folder.",
            remedy="Use from_image to create the root disk from its image again; the data on it is lost.",
        ),
    ),
    _O.CRASH_DUMP: (
        Precondition(
            reason="no_guest",
            broken=_no_guest,
            because="The guest of {name} is not running, so there is no memory to dump.",
            remedy="Start the VM first.",
        ),
    ),
    _O.ATTACH_VOLUME: (
        Precondition(
            reason="being_detached",
            broken=_being_detached,
            because="The volume {volume} is still being detached: the guest of {name} has not released it yet.",
            remedy="Wait until it has; a reboot or a stop detaches the volume.",
        ),
        Precondition(
            reason="already_attached",
            broken=_attached("volume"),
            because="The volume {volume} is already attached to {name}, or will be.",
            remedy="Detach it first, or choose another.",
        ),
        _REACHED,
        _MEMORY,
    ),
    _O.DETACH_VOLUME: (
        Precondition(
            reason="not_attached",
            broken=_not_attached("volume"),
            because="The volume {volume} is not attached to {name}, or will no longer be.",
            remedy=_SHOW_VOLUMES,
        ),
        PAUSED,
        _MEMORY,
    ),
    _O.SWAP_VOLUME: (
        Precondition(
            reason="same_volume",
            broken=_same_volume,
            because="The old and the new volume are the same: {old}.",
            remedy="Choose another volume.",
        ),
        Precondition(
            reason="already_attached",
            broken=_attached("new"),
            because="The new volume {new} is already attached to {name}, or will be.",
            remedy="Detach it first, or choose another.",
        ),
        Precondition(
            reason="not_attached",
            broken=_not_attached("old"),
            because="The old volume {old} is not attached to {name}, or will no longer be.",
            remedy=_SHOW_VOLUMES,
        ),
        Precondition(
            reason="volume_too_small",
            broken=_too_small,
            because="The new volume {new} is smaller than {old}.",
            remedy="Choose a volume that is at least as large.",
        ),
        Precondition(
            reason="guest_uses_volume",
            broken=_guest_uses_old,
            because="The guest of {name} uses the old volume, and would lose the data on it.",
            remedy="Stop the VM first, or have the content copied.",
        ),
        _NEW_REACHED,
        _MEMORY,
    ),
    _O.SET_PASSWORD: (
        Precondition(
            reason="no_guest_agent",
            broken=_no_agent,
            because="The guest agent of {name} does not respond, and a password can only be set through it.",
            remedy="Install and start qemu-guest-agent in the guest; if the guest is booting, retry later.",
        ),
    ),
    _O.LIVE_MIGRATE_ABORT: (_NO_MIGRATION,),
    _O.LIVE_MIGRATE_FORCE_COMPLETE: (_NO_MIGRATION,),
}
"""The preconditions of each operation, in the order checked; other operations have none."""


def unmet(
    instance: Instance,
    operation: Operation,
    parameters: dict[str, Any],
    facts: Facts,
    before: Sequence[Request] | None = None,
) -> Unmet | None:
    """Return the first unmet precondition; None if all are met, or if the instance has no spec.

    `before` is the earlier requests; by default everything outstanding.
    """
    listed = PRECONDITIONS.get(operation)
    if listed is None or instance.spec is None:
        return None
    of = situation(instance, instance.spec, instance.outstanding if before is None else before, parameters, facts)
    for one in listed:
        if one.broken(of):
            words = words_of(of)
            because, remedy = one.because.format_map(words), one.remedy.format_map(words)
            return Unmet(reason=one.reason, because=because, remedy=remedy)
    return None
