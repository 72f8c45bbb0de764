"""Disks of instances that are created, copied, exported and removed on the host, whether a guest runs or not."""

from __future__ import annotations

import asyncio
from pathlib import Path

from interlock.core.errors import OperationRejected
from interlock.core.records import Disk, Spec
from interlock.hypervisors.qemu.disks import disk_export, root_disks
from interlock.hypervisors.qemu.disks.qemu_img import run_qemu_img
from interlock.hypervisors.qemu.files import qcow2
from interlock.hypervisors.qemu.files.root_folder import SharedRootFolder
from interlock.hypervisors.qemu.files.sparse_copy import copy_sparse
from interlock.hypervisors.qemu.process_registry import ProcessRegistry
from interlock.images.atomic_files import sync_file
from interlock.ports import Permit, Report


class HostDisks:
    """Root disks and volumes as files. See `ports.Hypervisor` for the methods."""

    def __init__(self, registry: ProcessRegistry) -> None:
        self._registry = registry

    async def copy_disk(self, permit: Permit, instance_id: str, old: Disk, new: Disk, report: Report) -> None:  # noqa: ARG002 - any host can
        # The locks of qemu-img refuse disks that are in use.
        source, target = Path(old.path), Path(new.path)
        held, offered = _volume_bytes(source), _volume_bytes(target)
        if offered < held:
            raise OperationRejected(
                f"The disk {target.name} has {offered} bytes, and {source.name}, which is copied to it, has {held}.",
                remedy="Use one that is at least as large.",
            )
        permit.check()
        words = ["convert", "-p", "-n", "-f", "qcow2", "-O", "qcow2", str(source), str(target)]
        await run_qemu_img(
            words,
            f"Copying {source.name}",
            self._registry.settings,
            lambda done: report(int(done * held), held),
            reads=[source],
            writes=target,
        )
        await asyncio.to_thread(sync_file, target)

    async def copy_root_disk(self, permit: Permit, instance_id: str, old: Spec, new: Spec, report: Report) -> None:
        # An overlay stays one, of the same image.
        folder = self._registry.folder(instance_id)
        with folder.os_errors_rejected():
            if not (old.has_root or new.has_root) or (target := folder.roots(new).disk(new.root)).exists():
                return
            if not old.has_root:
                await root_disks.make_root_disk(permit, folder, new, self._registry.settings)
                return
            folder.require_ended()
            source = folder.roots(old).disk(old.root)
            root_disks.require_root(source)
            held = qcow2.read_header(source).size_bytes
            wanted = (new.root_gib * root_disks.GIB or held) if new.has_root else 0
            if wanted < held:
                raise OperationRejected(
                    f"The root disk would have {wanted} bytes, and its source has {held}.",
                    remedy="A disk can only grow.",
                )
            root_disks.prepare_shared(permit, folder.roots(new))
            await self._copy(permit, old, (source, target), wanted, report)

    async def root_disk_from(self, permit: Permit, instance_id: str, spec: Spec, source: Path, report: Report) -> None:
        folder = self._registry.folder(instance_id)
        with folder.os_errors_rejected():
            folder.make(permit)
            roots = folder.roots(spec)
            if (target := roots.disk(spec.root)).exists():
                return
            folder.require_ended()
            if not source.is_file():  # noqa: ASYNC240 - one look at a local folder
                raise OperationRejected(f"{source} is missing.", remedy="Restore the file from a backup.")
            header = qcow2.read_header(source)
            if not header.stands_alone:
                raise OperationRejected(f"The image {source} has a backing file.", remedy="Use one without.")
            root_disks.prepare_shared(permit, roots)
            wanted = max(header.size_bytes, spec.root_gib * root_disks.GIB)
            await self._copy(permit, spec, (source, target), wanted, report)

    async def _copy(self, permit: Permit, spec: Spec, between: tuple[Path, Path], wanted: int, report: Report) -> None:
        """Copy from one path to another, and resize the copy to `wanted` bytes."""
        source, target = between
        with root_disks.draft(target) as fresh:
            await copy_sparse(permit, source, fresh, report)
            if wanted != qcow2.read_header(source).size_bytes:
                permit.check()
                words = ["resize", "-q", qcow2.open_options(fresh, spec), str(wanted)]
                what = f"Enlarging the copy of {source}"
                backings = [] if spec.root_is_whole else [Path(spec.image.path)]
                await run_qemu_img(
                    words, what, self._registry.settings, lambda _share: None, reads=backings, writes=fresh
                )
            await root_disks.create(permit, fresh, target)

    async def drop_root_disks(self, permit: Permit, instance_id: str, spec: Spec, kept: frozenset[int]) -> None:
        folder = self._registry.folder(instance_id)
        with folder.os_errors_rejected():
            run = folder.spec()
            if run is not None and run.has_root and run.root not in kept and folder.held():
                raise OperationRejected(f"VM {instance_id} has the root disk {run.root}.", remedy="Stop it.")
            roots = folder.roots(spec)
            for number, path in sorted(roots.disks().items()):
                if number not in kept:
                    permit.check()
                    path.unlink(missing_ok=True)
            root_disks.remove_drafts(permit, roots.path)
            if isinstance(roots, SharedRootFolder):
                roots.remove(permit)

    async def export_root_disk(
        self, permit: Permit, instance_id: str, spec: Spec, target: Path, report: Report
    ) -> None:
        if not spec.has_root:
            raise OperationRejected(f"VM {instance_id} has no root disk.")
        folder, guest = self._registry.folder(instance_id), self._registry.find(instance_id)
        with folder.os_errors_rejected(target.parent):
            if target.exists():  # noqa: ASYNC240 - one look at a local folder
                return
            if guest is None:
                await disk_export.export_offline(permit, folder, spec, target, self._registry.settings, report)
            else:
                await disk_export.export_live(guest, permit, target, report)


def _volume_bytes(path: Path) -> int:
    """Return the virtual size of a volume in bytes. Raises `OperationRejected` if it cannot be used."""
    if not path.is_file():
        raise OperationRejected(f"The disk {path} is missing.", remedy="Put the file back.")
    header = qcow2.read_header(path)
    if not header.stands_alone:
        raise OperationRejected(f"The disk {path} has a backing file, which a volume never has.")
    return header.size_bytes
