"""Calls of the port on a simulated instance's disks: root disks copied, made, dropped and exported, volumes swapped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from interlock.core.errors import Refused
from interlock.core.records import Disk, Spec
from interlock.hypervisors.simulated.calls import Calls
from interlock.hypervisors.simulated.contents import GIB, write_qcow2
from interlock.hypervisors.simulated.faults import AnswerLost, Method
from interlock.hypervisors.simulated.guest import Guest
from interlock.hypervisors.simulated.storage import missing_root
from interlock.ports import Permit, Report


class DiskCalls(Calls):
    """What can be done with an instance's disks."""

    async def swap_disk(self, permit: Permit, instance_id: str, old: Disk, new: Disk, report: Report) -> None:
        guest = self._guest(instance_id)
        self._must_run(guest)
        if new.id in guest.disks and old.id not in guest.disks:
            return
        fault, _ = self._meets(instance_id, Method.SWAP_DISK)
        await self._meet(guest, fault)

        def swappable() -> None:
            self._must_run(guest)
            if old.id not in guest.disks:
                raise Refused(f"The guest of instance {instance_id} has no disk {old.id}.")

        swappable()
        self.host.refuse_if_in_use(guest, new)
        before, after = self.host.storage.volume(old).size_bytes, self.host.storage.volume(new).size_bytes
        if 0 < after < before:
            raise Refused(f"The disk {new.id} has {after} bytes, which are fewer than the {before} of {old.id}.")
        await self._take_long(permit, Method.SWAP_DISK, fault, report, before or GIB, swappable)
        permit.check()
        self.host.swap_disk(guest, old, new)
        await self._afterwards(instance_id, fault)

    async def copy_disk(self, permit: Permit, instance_id: str, old: Disk, new: Disk, report: Report) -> None:
        self._must_be_open()
        fault, _ = self._meets(instance_id, Method.COPY_DISK)
        before, after = self.host.storage.volume(old).size_bytes, self.host.storage.volume(new).size_bytes
        if 0 < after < before:
            raise Refused(f"The disk {new.id} has {after} bytes, which are fewer than the {before} of {old.id}.")

        def unused() -> None:
            self.host.refuse_if_in_use(None, old, new)

        unused()
        await self._take_long(permit, Method.COPY_DISK, fault, report, before or GIB, unused)
        permit.check()
        self.host.storage.copy_volume(old, new)
        if isinstance(fault, AnswerLost):
            await self._no_answer(instance_id)

    async def copy_root_disk(self, permit: Permit, instance_id: str, old: Spec, new: Spec, report: Report) -> None:
        self._must_be_open()
        await self._make(
            permit,
            (instance_id, new),
            Method.COPY_ROOT_DISK,
            report,
            lambda guest: self.host.storage.copy_root(guest, old, new),
        )

    async def root_disk_from(self, permit: Permit, instance_id: str, spec: Spec, source: Path, report: Report) -> None:
        self._must_be_open()
        await self._make(
            permit,
            (instance_id, spec),
            Method.ROOT_DISK_FROM,
            report,
            lambda guest: self.host.storage.root_from(guest, spec, source),
        )

    async def _make(
        self,
        permit: Permit,
        made: tuple[str, Spec],
        method: Method,
        report: Report,
        make: Callable[[Guest], bool],
    ) -> None:
        """Make the root disk of an instance's spec where it is missing."""
        instance_id, spec = made
        guest = self.host.guests.get(instance_id)
        if not spec.has_root or (guest is not None and spec.root in guest.roots):
            return
        fault, _ = self._meets(instance_id, method)
        await self._take_long(permit, method, fault, report, max(spec.image.size_bytes, spec.root_gib * GIB))
        permit.check()
        guest = self.host.folder_of(instance_id, spec)
        if make(guest):
            self.host.changed(guest)
        if isinstance(fault, AnswerLost):
            await self._no_answer(instance_id)

    async def drop_root_disks(self, permit: Permit, instance_id: str, spec: Spec, kept: frozenset[int]) -> None:  # noqa: ARG002 - simulated hosts share nothing
        self._must_be_open()
        guest = self.host.guests.get(instance_id)
        if guest is None or kept.issuperset(guest.roots):
            return
        fault, quiet = self._meets(instance_id, Method.DROP_ROOT_DISKS)
        if not quiet:
            await self._take_long(permit, Method.DROP_ROOT_DISKS, fault, _say_nothing, 0)
        permit.check()
        if self.host.storage.drop_roots(guest, kept):
            self.host.changed(guest)
        if isinstance(fault, AnswerLost):
            await self._no_answer(instance_id)

    async def export_root_disk(
        self, permit: Permit, instance_id: str, spec: Spec, target: Path, report: Report
    ) -> None:
        guest = self._guest(instance_id)
        content = guest.roots.get(spec.root) if spec.has_root else None
        if content is None:
            raise missing_root(guest, spec)
        fault, _ = self._meets(instance_id, Method.EXPORT_ROOT_DISK)
        await self._take_long(permit, Method.EXPORT_ROOT_DISK, fault, report, content.size_bytes)
        permit.check()
        write_qcow2(target, content)
        if isinstance(fault, AnswerLost):
            await self._no_answer(instance_id)


def _say_nothing(done: int, total: int | None = None) -> None:
    """Take a report of what nobody waits long for."""
