"""Sums over all instances: counts by state, and the claims on each host (`core.resource_claims`).

They are updated with each decision, before it is committed, and written in its transaction: the next decision sees all
claims before it, and a start reads a few rows instead of every instance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from interlock import __version__
from interlock.core.operations import Operation
from interlock.core.quotas import MAKES_IMAGE, use_of
from interlock.core.quotas import place as quota_place
from interlock.core.records import Instance
from interlock.core.resource_claims import (
    AWAY,
    CLAIMING,
    LEASING,
    Claim,
    apart_place,
    claims_of,
    leases_of,
    security_groups_of,
    shared_place,
)
from interlock.core.states import VmState
from interlock.ports import Tally

_MIB: Final = 1024**2
_COUNTED: Final = CLAIMING | LEASING | {Operation.RESCUE, Operation.SET_INTERFACE}
"""The operations that count while outstanding or held: they claim resources, lease addresses, or refer to an image
or a security group."""
_STATES, _RECORDED, _GUESTS, _MEMORY_MIB, _VCPUS, _DISK_MIB, _APART, _IMAGES, _NETWORKS, _GROUPS, _SHARED, *_OTHERS = (
    tally.value for tally in Tally
)
_IN_PROJECT, _ON_HOST, _HELD, _MAKING_IMAGES, _QUOTA = _OTHERS
_QUOTA_SUMS: Final = ("instances", "vcpus", "memory_mib", "disk_mib")
"""The resources of a quota whose use changes with an instance's claims; the others have sums of their own."""
_VERSION: Final = "version"
"""Key of the row with the version that computed the sums."""
COUNTED_BY: Final = f"{__version__} 6"
"""Change it together with `core.resource_claims` and `core.quotas`: sums of another version are computed again."""


Place = tuple[str, str | int]
"""A host and a port of it, or the id of a network and an address of it."""


class PlaceChanges(NamedTuple):
    """The changes of a `Places`."""

    taken: list[Any]
    """The values of rows, one after the other: a place and the id of its instance."""
    freed: list[Place]


class TallyChanges(NamedTuple):
    """The changes of sums, ports and leases."""

    amounts: list[Any]
    """The values of rows, one after the other: what, of and amount."""
    ports: PlaceChanges
    leases: PlaceChanges


NO_CHANGES: Final = TallyChanges([], PlaceChanges([], []), PlaceChanges([], []))


class Places:
    """What at most one instance has at a time: a port of a host, or an address of a network."""

    def __init__(self, users: dict[Place, str]) -> None:
        self.users = users
        """The id of the instance that has each."""
        self._changed: set[Place] = set()

    def move(self, instance_id: str, before: frozenset[Place], after: frozenset[Place]) -> None:
        """Free what an instance no longer has, and give it what it has now and nobody else has."""
        for place in before - after:
            if self.users.get(place) == instance_id:
                del self.users[place]
                self._changed.add(place)
        for place in after - before:
            if self.users.setdefault(place, instance_id) == instance_id:
                self._changed.add(place)

    def changes(self) -> PlaceChanges:
        """Return and clear the changes since the last call."""
        taken = [value for place in self._changed if place in self.users for value in (*place, self.users[place])]
        freed = [place for place in self._changed if place not in self.users]
        self._changed.clear()
        return PlaceChanges(taken, freed)


class Tallies:
    """Sums over all instances, including decisions that are not committed yet.

    Args:
        rows: of the table `tallies`, as `what`, `of` and `amount`.
        ports: of the table `host_ports`, as host, port and the instance's id.
        leases: of the table `leases`, as the network's id, an address and the instance's id.
    """

    def __init__(
        self,
        rows: Iterable[Sequence[Any]],
        ports: Iterable[Sequence[Any]] = (),
        leases: Iterable[Sequence[Any]] = (),
    ) -> None:
        self._amounts = {(what, of): int(amount) for what, of, amount in rows}
        self.current: Final = (_VERSION, COUNTED_BY) in self._amounts
        """Whether this version computed the sums."""
        self._ports = Places({(host, port): instance_id for host, port, instance_id in ports})
        self._leases = Places({(network, address): instance_id for network, address, instance_id in leases})
        self._changed: set[tuple[str, str]] = set()

    def amount(self, what: Tally, of: str) -> int:
        return self._amounts.get((what.value, of), 0)

    def all_of(self, what: Tally) -> dict[str, int]:
        """Every amount of that kind that is not 0."""
        return {of: amount for (kind, of), amount in self._amounts.items() if kind == what.value and amount}

    def port_user(self, host: str, port: int) -> str | None:
        """The id of the instance that has that port of that host."""
        return self._ports.users.get((host, port))

    def lease_holder(self, network_id: str, address: str) -> str | None:
        """The id of the instance that has that address of that network."""
        return self._leases.users.get((network_id, address))

    def note(self, before: Instance | None, after: Instance) -> None:
        """Take note of what a decision makes of an instance."""
        if after.outstanding or after.held or (before is not None and (before.outstanding or before.held)):
            self.note_outstanding(before, after)
        if before is not None and _claims_alike(before, after):
            if before.vm_state is not after.vm_state:
                self._add((_STATES, before.vm_state.value), -1)
                self._add((_STATES, after.vm_state.value), 1)
            return
        change: Counter[tuple[str, str]] = Counter()
        lost, won = () if before is None else claims_of(before), claims_of(after)
        for instance, claims, sign in ((before, lost, -1), (after, won, 1)):
            if instance is not None:
                _count(change, instance, claims, sign)
        for key, amount in change.items():
            if amount:
                self._add(key, amount)
        self._ports.move(after.id, _ports(lost), _ports(won))
        self._leases.move(after.id, _leases(before), _leases(after))

    def note_outstanding(self, before: Instance | None, after: Instance) -> None:
        """Count the outstanding and held requests.

        These sums are not written: a start reads unsettled instances anyway.
        """
        if before is not None and _waits_alike(before, after):
            return
        for instance, sign in ((before, -1), (after, 1)):
            if instance is not None and instance.vm_state is not VmState.DELETED:
                project, outstanding = instance.project, len(instance.outstanding)
                self._note((_IN_PROJECT, project), sign * outstanding)
                self._note((_ON_HOST, instance.host), sign * outstanding)
                if instance.held:
                    self._note((_HELD, project), sign * len(instance.held))
                for request in (*instance.outstanding, *instance.held):
                    if request.operation in MAKES_IMAGE:
                        self._note((_MAKING_IMAGES, project), sign)

    def _note(self, key: tuple[str, str], amount: int) -> None:
        self._amounts[key] = self._amounts.get(key, 0) + amount

    def _add(self, key: tuple[str, str], amount: int) -> None:
        self._amounts[key] = self._amounts.get(key, 0) + amount
        self._changed.add(key)

    def changes(self) -> TallyChanges:
        """Return and clear the changes since the last call."""
        amounts = [value for key in self._changed for value in (*key, self._amounts[key])]
        self._changed.clear()
        return TallyChanges(amounts, self._ports.changes(), self._leases.changes())

    def mark_current(self) -> None:
        """Record that this version computed the sums."""
        self._amounts[_VERSION, COUNTED_BY] = 1
        self._changed.add((_VERSION, COUNTED_BY))


def _claims_alike(before: Instance, after: Instance) -> bool:
    """Whether a decision changed no sum except perhaps that of the vm_state, as most do."""
    return (
        before.spec is after.spec
        and before.prior_spec is after.prior_spec
        and before.host == after.host
        and before.left_host == after.left_host
        and before.apart_from == after.apart_from
        and (before.vm_state is after.vm_state or not (before.vm_state in AWAY or after.vm_state in AWAY))
        and not _counts_waiting(after)
        and not _counts_waiting(before)
    )


def _waits_alike(before: Instance, after: Instance) -> bool:
    """Whether a decision changed no sum of waiting requests, as one that takes a request or notes its progress."""
    if before.held or after.held or len(before.outstanding) != len(after.outstanding):
        return False
    if before.host != after.host or VmState.DELETED in {before.vm_state, after.vm_state}:
        return False
    for one, other in zip(before.outstanding, after.outstanding, strict=True):
        if one.operation is not other.operation:
            return False
    return True


def _counts_waiting(instance: Instance) -> bool:
    for request in instance.outstanding:
        if request.operation in _COUNTED:
            return True
    # Requests are rarely held.
    return bool(instance.held) and any(request.operation in _COUNTED for request in instance.held)


def _count(change: Counter[tuple[str, str]], instance: Instance, claims: Sequence[Claim], sign: int) -> None:
    if instance.vm_state is not VmState.DELETED:
        change[_STATES, instance.vm_state.value] += sign
        change[_RECORDED, instance.host] += sign
        for image_id in instance.image_ids:
            change[_IMAGES, image_id] += sign
        if instance.spec is not None and instance.spec.shared is not None:
            change[_SHARED, shared_place(instance.spec.shared)] += sign
        used = use_of(instance)
        for network_id in {network_id for network_id, _ in leases_of(instance)}:
            change[_NETWORKS, network_id] += sign
        for name in security_groups_of(instance):
            change[_GROUPS, name] += sign
        for what in _QUOTA_SUMS:
            change[_QUOTA, quota_place(what, instance.project)] += sign * used[what]
    for claim in claims:
        change[_GUESTS, claim.host] += sign
        change[_MEMORY_MIB, claim.host] += sign * claim.memory_mib
        change[_VCPUS, claim.host] += sign * claim.vcpus
        change[_DISK_MIB, claim.host] += sign * -(-claim.disk_bytes // _MIB)
        for group in claim.apart:
            change[_APART, apart_place(claim.host, group)] += sign


def _ports(claims: Sequence[Claim]) -> frozenset[Place]:
    return frozenset((claim.host, port) for claim in claims for port in claim.ports)


def _leases(instance: Instance | None) -> frozenset[Place]:
    return frozenset() if instance is None else frozenset[Place](leases_of(instance))
