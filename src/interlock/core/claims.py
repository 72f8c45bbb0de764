"""What an instance is promised of hosts: memory, processors, disk and ports. Pure sums; who has room is not here.

A promise is kept while the instance may come to need it: memory also while it is stopped or suspended, so that
starting it never fails for lack of room. What is offloaded, has gone to another host or is deleted is promised nothing.
What is on its way to another host is promised the same there, from when that is asked for until it has ended.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from interlock.core.operations import TRAVELS, Operation
from interlock.core.records import Instance, Spec
from interlock.core.states import VmState

_GIB: Final = 1024**3
_AWAY: Final = frozenset({VmState.DELETED, VmState.SHELVED_OFFLOADED, VmState.MIGRATED_OUT})
GROWING: Final = frozenset({Operation.RESIZE, Operation.UNSHELVE, Operation.REBUILD})
"""The operations after which an instance may be promised more than before on its host."""
_ATTACHING: Final = frozenset({Operation.ATTACH_VOLUME, Operation.ATTACH_INTERFACE})
CLAIMING: Final = GROWING | TRAVELS | _ATTACHING
"""The operations that are promised room on a host, or in a guest there, when they are admitted or held."""


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What is promised of one host to one instance or volume."""

    host: str
    memory_mib: int = 0
    vcpus: int = 0
    disk_bytes: int = 0
    ports: frozenset[int] = frozenset()
    """The host's own TCP ports that are forwarded to the guest."""
    devices: int = 0
    """How many disks and interfaces beyond the first its guest has, with a root disk's place also where it has none."""

    def joined(self, other: Claim) -> Claim:
        """The larger of two claims, in each respect."""
        return Claim(
            host=self.host,
            memory_mib=max(self.memory_mib, other.memory_mib),
            vcpus=max(self.vcpus, other.vcpus),
            disk_bytes=max(self.disk_bytes, other.disk_bytes),
            ports=self.ports | other.ports,
            devices=max(self.devices, other.devices),
        )


def claims_of(instance: Instance) -> tuple[Claim, ...]:
    """What is promised to the instance: on its host first, then on each host that it is on its way to, or has not left
    for good.
    """
    claim = claim_of(instance)
    if claim is None:
        return ()
    journeys = [one for one in (*instance.outstanding, *instance.held) if one.operation in TRAVELS]
    hosts = {one.parameters.get("host") for one in journeys}
    if journeys:
        hosts.add(instance.left_host)
    others = sorted(host for host in hosts if isinstance(host, str) and host != instance.host)
    return (claim, *(msgspec.structs.replace(claim, host=host) for host in others))


def claim_of(instance: Instance) -> Claim | None:
    """What is promised to the instance on its host, with what is outstanding for it; None if nothing is."""
    asked = [one for one in (*instance.outstanding, *instance.held) if one.operation in GROWING]
    coming_back = any(one.operation is Operation.UNSHELVE for one in asked)
    if instance.spec is None:
        return None
    devices, attaching = _devices(instance, instance.spec)
    if instance.vm_state in _AWAY and not coming_back:
        offloaded = instance.vm_state is VmState.SHELVED_OFFLOADED
        return Claim(host=instance.host, devices=devices) if attaching and offloaded else None
    claim = msgspec.structs.replace(_of_spec(instance.host, instance.spec), devices=devices)
    if instance.prior_spec is not None:
        claim = claim.joined(_of_spec(instance.host, instance.prior_spec))
    for request in asked:
        claim = claim.joined(_of_wish(claim, request.parameters))
    # What is in a folder that hosts share takes nothing of the host's own disk, wherever the instance is.
    return claim if instance.spec.shared is None else msgspec.structs.replace(claim, disk_bytes=0)


def _devices(instance: Instance, spec: Spec) -> tuple[int, int]:
    """How many places the instance's guest needs, and how many of them for what is only being attached.

    What is being detached has its place until it is gone: it may stay.
    """
    there = {disk.id for disk in spec.disks} | {interface.id for interface in spec.interfaces}
    asked = [one for one in (*instance.outstanding, *instance.held) if one.operation in _ATTACHING]
    attaching = {str(one.parameters.get("volume", one.id)) for one in asked} - there
    return 1 + len(there) + len(attaching), len(attaching)


def _of_spec(host: str, spec: Spec) -> Claim:
    root_bytes = spec.root_gib * _GIB
    if spec.image.kind == "disk":
        root_bytes = max(root_bytes, spec.image.size_bytes)
    ports = frozenset(forward.host_port for forward in spec.forwards)
    return Claim(host=host, memory_mib=spec.memory_mib, vcpus=spec.vcpus, disk_bytes=root_bytes, ports=ports)


def _of_wish(claim: Claim, parameters: dict[str, Any]) -> Claim:
    """What a resize asks for: what it does not name stays."""
    return Claim(
        host=claim.host,
        memory_mib=int(parameters.get("memory_mib") or 0),
        vcpus=int(parameters.get("vcpus") or 0),
        disk_bytes=int(parameters.get("root_gib") or 0) * _GIB,
    )
