"""Quotas of projects: what an instance uses of its project's quota, and which growth exceeds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import msgspec

from interlock.core.errors import QuotaExceeded
from interlock.core.operations import Operation
from interlock.core.records import Instance
from interlock.core.resource_claims import resources_of
from interlock.core.states import VmState

_MIB: Final = 1024**2
MAKES_IMAGE: Final = frozenset({Operation.SNAPSHOT, Operation.BACKUP})
"""The operations that add an image to the project."""


class Resource(NamedTuple):
    """What a quota limits, for people."""

    units: str
    """After an amount, as in "3 MiB of memory"."""
    title: str
    """Of a column."""
    meaning: str = ""
    """What is counted."""


RESOURCES: Final = {
    "instances": Resource("VMs", "VMs", "VMs, unless deleted or migrated out."),
    "vcpus": Resource("vCPUs", "vCPUs", "Of VMs that are not shelved and offloaded; so are the next two."),
    "memory_mib": Resource("MiB of memory", "Memory (MiB)"),
    "disk_mib": Resource("MiB of disk", "Disk (MiB)", "Root disks and volumes."),
    "volumes": Resource("volumes", "Volumes"),
    "images": Resource("images", "Images", "Snapshots and backups of the project, with those that are being made."),
    "networks": Resource("networks", "Networks", "The project's own networks."),
    "outstanding_requests": Resource("outstanding requests", "Outstanding requests"),
    "held_requests": Resource("held requests", "Held requests"),
}
"""What a quota limits. The names are the fields of `Quota`; HTTP and the command line are made from this."""


class Quota(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The most that a project may use; None: no limit."""

    instances: int | None = None
    vcpus: int | None = None
    memory_mib: int | None = None
    disk_mib: int | None = None
    volumes: int | None = None
    images: int | None = None
    networks: int | None = None
    outstanding_requests: int | None = None
    held_requests: int | None = None

    @property
    def limits(self) -> dict[str, int]:
        """The resources that are limited, with their limits."""
        found = {what: getattr(self, what) for what in RESOURCES}
        return {what: limit for what, limit in found.items() if limit is not None}


def place(what: str, project: str) -> str:
    """Return the tally key of a project's use of a resource."""
    return f"{what} {project}"


def use_of(instance: Instance) -> dict[str, int]:
    """Return what an instance uses of its project's quota, with what its outstanding and held requests add."""
    if instance.vm_state is VmState.DELETED:
        return {}
    claim = resources_of(instance)
    waiting = (*instance.outstanding, *instance.held)
    return {
        "instances": int(instance.vm_state is not VmState.MIGRATED_OUT),
        "vcpus": 0 if claim is None else claim.vcpus,
        "memory_mib": 0 if claim is None else claim.memory_mib,
        "disk_mib": 0 if claim is None else -(-claim.disk_bytes // _MIB),
        "images": sum(request.operation in MAKES_IMAGE for request in waiting),
        "outstanding_requests": len(instance.outstanding),
        "held_requests": len(instance.held),
    }


def require_within(project: str, what: str, quota: Quota, used: Mapping[str, int], growth: Mapping[str, int]) -> None:
    """Raise `QuotaExceeded` if a project may not use `growth` more than `used`.

    Args:
        project: its name.
        what: what would grow, for people.
        quota: its limits.
        used: its present use of each resource.
        growth: how much more of each is wanted; what does not grow is not checked.
    """
    limits = quota.limits
    short = [one for one in limits if growth.get(one, 0) > 0 and used[one] + growth[one] > limits[one]]
    if not short:
        return
    free = {one: max(0, limits[one] - used[one]) for one in short}
    parts = [
        f"{used[one]} of {limits[one]} {RESOURCES[one].units} are used, {free[one]} left, {growth[one]} more needed"
        for one in short
    ]
    raise QuotaExceeded(
        f"{what} exceeds the quota of the project {project}: {'; '.join(parts)}.",
        needed={one: growth[one] for one in short},
        used={one: used[one] for one in short},
        limit={one: limits[one] for one in short},
        free=free,
        remedy="Delete what is not needed, wait for requests to end, or ask an admin to raise the quota "
        f"(`interlock project quota {project}`).",
    )
