"""The hypervisor port's verbs for what a guest is made of: its disks, its root disks and its network interfaces.

Each does its steps, which are in the modules beside this one, and keeps what the running guest has now for a reset that
has to start another process. Verbs for the guest as a whole are in `adapter`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from interlock.core.errors import Refused
from interlock.core.records import Disk, Interface, Spec
from interlock.hypervisors.qemu import exporting, interfaces, plugging, root_disks, swapping, volume_copies
from interlock.hypervisors.qemu.charge import Charge
from interlock.hypervisors.qemu.instance_folder import InstanceFolder
from interlock.hypervisors.qemu.launch import refused
from interlock.ports import Permit, Report

PluggedT = TypeVar("PluggedT", bound=Disk | Interface)


class Components(Charge):
    """The part of the adapter that changes guests; see `ports.Hypervisor` for what its methods promise."""

    # --------------------------------------------------------------------------------------------- disks

    async def attach_disk(self, permit: Permit, instance_id: str, disk: Disk) -> None:
        guest = self._guest(instance_id)
        await plugging.plug(guest, permit, disk)
        self._remember_disk(permit, guest.folder, disk.id, disk)

    async def detach_disk(self, permit: Permit, instance_id: str, disk_id: str) -> None:
        guest = self._guest(instance_id)
        await plugging.unplug(guest, permit, disk_id)
        self._remember_disk(permit, guest.folder, disk_id, None)

    async def swap_disk(self, permit: Permit, instance_id: str, old: Disk, new: Disk, report: Report) -> None:
        guest = self._guest(instance_id)
        with refused(guest.folder):
            await swapping.swap(guest, permit, old, new, report)
        self._remember_disk(permit, guest.folder, old.id, new)

    async def copy_disk(self, permit: Permit, instance_id: str, old: Disk, new: Disk, report: Report) -> None:  # noqa: ARG002 - any host can
        await volume_copies.copy(permit, Path(old.path), Path(new.path), self._settings, report)

    def _remember_disk(self, permit: Permit, folder: InstanceFolder, disk_id: str, disk: Disk | None) -> None:
        """Keep what is plugged in for a reset that has to start another process."""
        spec = folder.spec()
        if spec is not None:
            wanted = _changed(spec.disks, disk_id, disk)
            self._keep_spec(permit, folder, spec, msgspec.structs.replace(spec, disks=wanted))

    # ---------------------------------------------------------------------------------------- interfaces

    async def attach_interface(self, permit: Permit, instance_id: str, interface: Interface) -> None:
        guest = self._guest(instance_id)
        await interfaces.plug(guest, permit, interface)
        self._remember_interface(permit, guest.folder, interface.id, interface)

    async def detach_interface(self, permit: Permit, instance_id: str, interface_id: str) -> None:
        guest = self._guest(instance_id)
        await interfaces.unplug(guest, permit, interface_id)
        self._remember_interface(permit, guest.folder, interface_id, None)

    def _remember_interface(
        self, permit: Permit, folder: InstanceFolder, interface_id: str, interface: Interface | None
    ) -> None:
        spec = folder.spec()
        if spec is not None:
            wanted = _changed(spec.interfaces, interface_id, interface)
            self._keep_spec(permit, folder, spec, msgspec.structs.replace(spec, interfaces=wanted))

    def _keep_spec(self, permit: Permit, folder: InstanceFolder, kept: Spec, wanted: Spec) -> None:
        if wanted != kept:
            permit.check()
            with refused(folder):
                folder.keep_spec(wanted)

    # -------------------------------------------------------------------------------------- the root disk

    async def copy_root_disk(self, permit: Permit, instance_id: str, old: Spec, new: Spec, report: Report) -> None:
        folder = self._folder_of(instance_id)
        with refused(folder):
            await root_disks.copy_root_disk(permit, folder, old, new, self._settings, report)

    async def root_disk_from(self, permit: Permit, instance_id: str, spec: Spec, source: Path, report: Report) -> None:
        folder = self._folder_of(instance_id)
        with refused(folder):
            folder.make(permit)
            await root_disks.root_disk_from(permit, folder, spec, source, self._settings, report)

    async def drop_root_disks(self, permit: Permit, instance_id: str, spec: Spec, kept: frozenset[int]) -> None:
        folder = self._folder_of(instance_id)
        with refused(folder):
            await root_disks.drop_root_disks(permit, folder, spec, kept)

    async def export_root_disk(
        self, permit: Permit, instance_id: str, spec: Spec, target: Path, report: Report
    ) -> None:
        if not spec.has_root:
            raise Refused(f"Instance {instance_id} has no root disk.")
        folder, guest = self._folder_of(instance_id), self._guests.get(instance_id)
        with refused(folder, target.parent):
            if exporting.is_there(target):
                return
            if guest is None:
                await exporting.export_at_rest(permit, folder, spec, target, self._settings, report)
            else:
                await exporting.export_live(guest, permit, target, report)


def _changed(those: tuple[PluggedT, ...], plugged_id: str, by: PluggedT | None) -> tuple[PluggedT, ...]:
    """Those, with another in the place of the one with that id, at the end where there is none, or without it."""
    if not any(one.id == plugged_id for one in those):
        return those if by is None or by in those else (*those, by)
    changed = ((by if one.id == plugged_id else one) for one in those)
    return tuple(one for one in changed if one is not None)
