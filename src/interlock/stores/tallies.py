"""Sums over all instances: counts by state, and the claims on each host (`core.resource_claims`).

They are updated with each decision, before it is committed, and written in its transaction: the next decision sees all
claims before it, and a start reads a few rows instead of every instance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

from interlock import __version__
from interlock.core.operations import Operation
from interlock.core.quotas import MAKES_IMAGE, use_of
from interlock.core.quotas import place as quota_place
from interlock.core.records import Instance
from interlock.core.resource_claims import AWAY, CLAIMING, Claim, apart_place, claims_of, shared_place
from interlock.core.states import VmState
from interlock.ports import Tally

_MIB: Final = 1024**2
_COUNTED: Final = CLAIMING | {Operation.RESCUE}
"""The operations that count while outstanding or held: they claim resources or refer to an image."""
_STATES, _RECORDED, _GUESTS, _MEMORY_MIB, _VCPUS, _DISK_MIB, _APART, _IMAGES, _SHARED, *_OTHERS = (
    tally.value for tally in Tally
)
_IN_PROJECT, _ON_HOST, _HELD, _MAKING_IMAGES, _QUOTA = _OTHERS
_QUOTA_SUMS: Final = ("instances", "vcpus", "memory_mib", "disk_mib")
"""The resources of a quota whose use changes with an instance's claims; the others have sums of their own."""
_VERSION: Final = "version"
"""Key of the row with the version that computed the sums."""
COUNTED_BY: Final = f"{__version__} 4"
"""Change it together with `core.resource_claims` and `core.quotas`: sums of another version are computed again."""


class Tallies:
    """Sums over all instances, including decisions that are not committed yet.

    Args:
        rows: of the table `tallies`, as `what`, `of` and `amount`.
        ports: of the table `host_ports`, as host, port and the instance's id.
    """

    def __init__(self, rows: Iterable[Sequence[Any]], ports: Iterable[Sequence[Any]]) -> None:
        self._amounts = {(what, of): int(amount) for what, of, amount in rows}
        self.current: Final = (_VERSION, COUNTED_BY) in self._amounts
        """Whether this version computed the sums."""
        self._ports: dict[tuple[str, int], str] = {(host, port): instance_id for host, port, instance_id in ports}
        self._changed: set[tuple[str, str]] = set()
        self._changed_ports: set[tuple[str, int]] = set()

    def amount(self, what: Tally, of: str) -> int:
        return self._amounts.get((what.value, of), 0)

    def all_of(self, what: Tally) -> dict[str, int]:
        """Every amount of that kind that is not 0."""
        return {of: amount for (kind, of), amount in self._amounts.items() if kind == what.value and amount}

    def port_user(self, host: str, port: int) -> str | None:
        """The id of the instance that has that port of that host."""
        return self._ports.get((host, port))

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
        self._move_ports(after.id, lost, won)

    def note_outstanding(self, before: Instance | None, after: Instance) -> None:
        """Count the outstanding and held requests.

        These sums are not written: a start reads unsettled instances anyway.
        """
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

    def _move_ports(self, instance_id: str, lost: Sequence[Claim], won: Sequence[Claim]) -> None:
        before, after = _ports(lost), _ports(won)
        for place in before - after:
            if self._ports.get(place) == instance_id:
                del self._ports[place]
                self._changed_ports.add(place)
        for place in after - before:
            if self._ports.setdefault(place, instance_id) == instance_id:
                self._changed_ports.add(place)

    def changes(self) -> tuple[list[Any], list[Any], list[tuple[str, int]]]:
        """Return and clear the changes since the last call: values of sums, values of used ports, and freed ports."""
        amounts = [value for key in self._changed for value in (*key, self._amounts[key])]
        taken = [place for place in self._changed_ports if place in self._ports]
        ports = [value for place in taken for value in (*place, self._ports[place])]
        free = [place for place in self._changed_ports if place not in self._ports]
        self._changed.clear()
        self._changed_ports.clear()
        return amounts, ports, free

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
        for what in _QUOTA_SUMS:
            change[_QUOTA, quota_place(what, instance.project)] += sign * used[what]
    for claim in claims:
        change[_GUESTS, claim.host] += sign
        change[_MEMORY_MIB, claim.host] += sign * claim.memory_mib
        change[_VCPUS, claim.host] += sign * claim.vcpus
        change[_DISK_MIB, claim.host] += sign * -(-claim.disk_bytes // _MIB)
        for group in claim.apart:
            change[_APART, apart_place(claim.host, group)] += sign


def _ports(claims: Sequence[Claim]) -> set[tuple[str, int]]:
    return {(claim.host, port) for claim in claims for port in claim.ports}
