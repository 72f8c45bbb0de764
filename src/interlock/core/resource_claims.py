"""Resource claims of an instance on hosts: memory, vCPUs, disk, ports and devices.

A claim lasts while the instance may need it: memory also while it is stopped or suspended, so that a start never fails
for lack of memory. An instance that is shelved and offloaded, migrated out or deleted has no claim. During a migration
it has the same claim on the target, from the request to its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from interlock.core.networks import mac_of
from interlock.core.operations import Operation
from interlock.core.parameters import group_names
from interlock.core.records import Instance, SharedFolder, Spec
from interlock.core.references import MIGRATIONS
from interlock.core.specs import PRIMARY
from interlock.core.states import VmState

_GIB: Final = 1024**3
AWAY: Final = frozenset({VmState.DELETED, VmState.SHELVED_OFFLOADED, VmState.MIGRATED_OUT})
GROWING: Final = frozenset({Operation.RESIZE, Operation.UNSHELVE, Operation.REBUILD})
"""The operations after which an instance may need more on its host than before."""
_ATTACHING: Final = frozenset({Operation.ATTACH_VOLUME, Operation.ATTACH_INTERFACE})
LEASING: Final = frozenset({Operation.ATTACH_INTERFACE, Operation.MOVE_INTERFACE})
"""The operations that lease addresses when they are admitted or held."""
CLAIMING: Final = GROWING | MIGRATIONS | _ATTACHING | {Operation.ADD_FORWARD}
"""The operations that claim resources on a host, or device slots in a guest, when they are admitted or held."""


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What one instance or volume claims of one host."""

    host: str
    memory_mib: int = 0
    vcpus: int = 0
    disk_bytes: int = 0
    ports: frozenset[int] = frozenset()
    """The host's TCP ports that are forwarded to the guest."""
    apart: frozenset[tuple[str, str]] = frozenset()
    """The anti-affinity groups, by project and name, of which no other instance may be on that host."""
    devices: int = 0
    """The guest's device slots: its disks and further interfaces, with one for a root disk even if it has none."""

    def joined(self, other: Claim) -> Claim:
        """Return the maximum of two claims, resource by resource."""
        return Claim(
            host=self.host,
            memory_mib=max(self.memory_mib, other.memory_mib),
            vcpus=max(self.vcpus, other.vcpus),
            disk_bytes=max(self.disk_bytes, other.disk_bytes),
            ports=self.ports | other.ports,
            apart=self.apart | other.apart,
            devices=max(self.devices, other.devices),
        )


def leases_of(instance: Instance) -> frozenset[tuple[str, str]]:
    """Return what the instance has of its networks: pairs of a network's id and an address, IP or MAC.

    No other instance has the same. Its outstanding and held requests have theirs already.
    """
    if instance.spec is None or instance.vm_state is VmState.DELETED:
        return frozenset()
    interfaces = instance.spec.all_interfaces
    found = {
        (one.network.id, address)
        for one in interfaces
        if one.network is not None
        for address in (one.mac, *one.addresses)
    }
    macs = {PRIMARY: mac_of(instance.id), **{one.id: one.mac for one in interfaces}}
    for request in (*instance.outstanding, *instance.held):
        given = request.parameters
        if request.operation in LEASING and given.get("network"):
            mac = given.get("mac") or macs.get(given.get("interface", ""), "")
            found |= {(given["network"], address) for address in (mac, *given.get("address", "").split(",")) if address}
    return frozenset(found)


def security_groups_of(instance: Instance) -> frozenset[str]:
    """Return the keys (`group_place`) of the security groups that an instance has, or has asked for."""
    if instance.spec is None or instance.vm_state is VmState.DELETED:
        return frozenset()
    names = {name for one in instance.spec.all_interfaces for name in one.security_groups}
    for request in (*instance.outstanding, *instance.held):
        if request.operation is Operation.SET_INTERFACE:
            names.update(group_names(request.parameters.get("security_groups") or ""))
    return frozenset(group_place(instance.project, name) for name in names)


def group_place(project: str, name: str) -> str:
    """Return the tally key of a security group. Names have no slash."""
    return f"{project}/{name}"


def shared_place(shared: SharedFolder) -> str:
    """Return the tally key of a shared folder."""
    return f"{shared.id} {shared.path}"


def shared_markers(places: Iterable[str], path: str) -> frozenset[str]:
    """Return the ids of the folders at `path` among those tally keys."""
    named = (place.split(" ", 1) for place in places)
    return frozenset(marker for marker, where in named if where == path)


def apart_place(host: str, group: tuple[str, str]) -> str:
    """Return the tally key of an anti-affinity group (project, name) on a host."""
    return "\n".join((host, *group))


def claims_of(instance: Instance) -> tuple[Claim, ...]:
    """Return the instance's claims: on its host first, then on migration targets and on a source not cleaned up yet."""
    claim = claim_of(instance)
    if claim is None:
        return ()
    migrations = [one for one in (*instance.outstanding, *instance.held) if one.operation in MIGRATIONS]
    hosts = {one.parameters.get("host") for one in migrations}
    if migrations:
        hosts.add(instance.left_host)
    others = sorted(host for host in hosts if isinstance(host, str) and host != instance.host)
    return (claim, *(msgspec.structs.replace(claim, host=host) for host in others))


def claim_of(instance: Instance) -> Claim | None:
    """Return the instance's claim on its host, including its outstanding requests; None if it has none."""
    claim = resources_of(instance)
    if claim is None or instance.spec is None or instance.spec.shared is None:
        return claim
    # A root disk in a shared folder takes no space on the host's own disk.
    return msgspec.structs.replace(claim, disk_bytes=0)


def resources_of(instance: Instance) -> Claim | None:
    """As `claim_of`, with its root disk also if that is in a shared folder."""
    growing = [one for one in (*instance.outstanding, *instance.held) if one.operation in GROWING]
    unshelving = any(one.operation is Operation.UNSHELVE for one in growing)
    if instance.spec is None:
        return None
    devices, attaching = _devices(instance, instance.spec)
    if instance.vm_state in AWAY and not unshelving:
        offloaded = instance.vm_state is VmState.SHELVED_OFFLOADED
        return Claim(host=instance.host, devices=devices) if attaching and offloaded else None
    apart = frozenset((instance.project, group) for group in instance.apart_from)
    claim = msgspec.structs.replace(_of_spec(instance.host, instance.spec), devices=devices, apart=apart)
    if instance.prior_spec is not None:
        claim = claim.joined(_of_spec(instance.host, instance.prior_spec))
    forwards = (one for one in (*instance.outstanding, *instance.held) if one.operation is Operation.ADD_FORWARD)
    ports = frozenset(one.parameters["host_port"] for one in forwards if "host_port" in one.parameters)
    claim = msgspec.structs.replace(claim, ports=claim.ports | ports) if ports else claim
    for request in growing:
        claim = claim.joined(_of_resize(claim, request.parameters))
    return claim


def _devices(instance: Instance, spec: Spec) -> tuple[int, int]:
    """Return how many device slots the guest needs, and how many of them are for devices being attached.

    A device that is being detached keeps its slot until it is gone: the guest may not release it.
    """
    there = {disk.id for disk in spec.disks} | {interface.id for interface in spec.interfaces}
    requests = [one for one in (*instance.outstanding, *instance.held) if one.operation in _ATTACHING]
    attaching = {str(one.parameters.get("volume", one.id)) for one in requests} - there
    return 1 + len(there) + len(attaching), len(attaching)


def _of_spec(host: str, spec: Spec) -> Claim:
    root_bytes = spec.root_gib * _GIB
    if spec.image.kind == "disk":
        root_bytes = max(root_bytes, spec.image.size_bytes)
    ports = frozenset(forward.host_port for forward in spec.forwards)
    return Claim(host=host, memory_mib=spec.memory_mib, vcpus=spec.vcpus, disk_bytes=root_bytes, ports=ports)


def _of_resize(claim: Claim, parameters: dict[str, Any]) -> Claim:
    return Claim(
        host=claim.host,
        memory_mib=int(parameters.get("memory_mib") or 0),
        vcpus=int(parameters.get("vcpus") or 0),
        disk_bytes=int(parameters.get("root_gib") or 0) * _GIB,
    )
