"""The protections of this host against its guests: what confines each QEMU process, by name."""

from __future__ import annotations

from typing import Final

from interlock.confinement.control_groups import ControlGroups, Resource
from interlock.confinement.host_users import HostUsers
from interlock.confinement.sandbox import Namespaced, Namespaces
from interlock.ports.hosts import Protection

_RESOURCES: Final = {
    Resource.MEMORY: "memory_limit",
    Resource.THREADS: "thread_limit",
    Resource.CPU: "cpu_weight",
    Resource.IO: "io_weight",
}

_NO_PASST: Final = "passt is not installed; VMs have QEMU's own user network, and reach no address"


def protections(
    users: HostUsers | str,
    namespaced: Namespaced,
    groups: ControlGroups | None,
    no_groups: str,
    *,
    has_passt: bool,
    no_filter: str,
) -> tuple[Protection, ...]:
    """Describe the protections of a host.

    Args:
        users: the users of VMs, or why VMs share one.
        namespaced: how namespaces are made, or why not.
        groups: the control groups, if there are any.
        no_groups: why there are none, for people.
        has_passt: whether user networks are those of passt.
        no_filter: why nftables cannot refuse what passt does not, for people; empty if it can.
    """
    apart = namespaced.namespaces is not Namespaces.NONE
    spaces = namespaced.because or f"made {namespaced.namespaces}"
    return (
        _own_user(users),
        Protection(name="no_privileges", on=True, detail="no capabilities, no new privileges"),
        Protection(name="system_call_filter", on=True, detail="QEMU's seccomp sandbox"),
        *(Protection(name=f"{kind}_namespace", on=apart, detail=spaces) for kind in ("mount", "pid", "ipc", "uts")),
        Protection(name="net_namespace", on=apart and has_passt, detail=spaces if has_passt else _NO_PASST),
        _user_network_filter(users, no_filter if has_passt else _NO_PASST),
        *(_resource(resource, users, groups, no_groups) for resource in Resource),
    )


def _own_user(users: HostUsers | str) -> Protection:
    match users:
        case HostUsers():
            detail = f"user ids {users.first} to {users.first + users.count - 1}"
            return Protection(name="own_user", on=True, detail=detail)
        case str():
            return Protection(name="own_user", on=False, detail=users)


def _user_network_filter(users: HostUsers | str, missing: str) -> Protection:
    if not missing and isinstance(users, str):
        missing = f"VMs have no users of their own: {users}"
    detail = missing or "rules of nftables by the user of each passt process"
    return Protection(name="user_network_filter", on=not missing, detail=detail)


def _resource(resource: Resource, users: HostUsers | str, groups: ControlGroups | None, no_groups: str) -> Protection:
    name = _RESOURCES[resource]
    if groups is not None and resource in groups.resources:
        return Protection(name=name, on=True, detail=groups.kind)
    if resource is Resource.THREADS and isinstance(users, HostUsers):
        return Protection(name=name, on=True, detail="limit of its user")
    missing = no_groups if groups is None else f"{groups.kind}: this host has no controller for it"
    return Protection(name=name, on=False, detail=missing)
