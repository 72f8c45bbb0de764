"""Root disks, rescue disk and cloud-init seed of an instance: created, copied, checked and removed.

Each is created atomically: written to a draft, made durable, and then renamed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

from interlock.core.errors import Invalid, OperationRejected, StoreError
from interlock.core.records import Disk, Image, Spec
from interlock.hypervisors.qemu.files import qcow2
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder
from interlock.hypervisors.qemu.files.root_folder import RootFolder, SharedRootFolder
from interlock.hypervisors.qemu.files.sparse_copy import uninterrupted
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.images import cloud_init
from interlock.images.atomic_files import sync_file, sync_folder
from interlock.images.subprocess_runner import run
from interlock.ports import Permit

GIB: Final = 1024**3
_ATTEMPTS = itertools.count()
_PROCESS_TOKEN: Final = secrets.token_hex(6)
"""Identifies this process among all that create disks in a folder; those of other hosts may have the same pid."""
Commit = Callable[[Permit, Path, Path], Awaitable[None]]
"""Makes a draft durable and renames it: `replace` or `create`."""


def require_files(folder: InstanceFolder, spec: Spec) -> None:
    """Raise `OperationRejected` if a file that the guest needs is missing or damaged, and is not created by `define`.

    That is: its images, its volumes, and a root disk that was created before.
    """
    if spec.has_root:
        root = folder.roots(spec).disk(spec.root)
        if spec.root_made or spec.root_is_whole or root.exists():
            require_root(root)
    for disk in spec.disks:
        require_volume(disk)
    images = [] if spec.root_is_whole and spec.image.kind == "disk" else [spec.image]
    if spec.rescue_image is not None:
        images.append(spec.rescue_image)
    for image in images:
        for path in filter(None, (image.path, image.initrd)):
            fault = _fault(Path(path), image.format if image.kind == "disk" else "raw")
            if fault is not None:
                what = "no longer exists" if fault == "is missing" else "cannot be used"
                raise OperationRejected(
                    f"The image {image.name} {what}: {path} {fault}.",
                    remedy="Restore the file from a backup, or use another image.",
                )


def _fault(path: Path, form: str) -> str | None:
    """Return what is wrong with a file, such as `is missing`; None if its header is valid."""
    if form == "qcow2":
        return qcow2.fault_of(path)
    if not path.is_file():
        return "is missing"
    return None if path.stat().st_size else "is empty"


def require_root(root: Path) -> None:
    """Raise `OperationRejected` if a root disk that was created before is missing or damaged."""
    fault = qcow2.fault_of(root)
    if fault is not None:
        raise OperationRejected(
            f"The root disk {root} {fault}.",
            remedy="Restore the file from a backup, or rebuild the VM, which creates a new one.",
        )


def require_volume(disk: Disk) -> None:
    """Raise `OperationRejected` if the file of a volume is missing or damaged."""
    fault = _fault(Path(disk.path), disk.format)
    if fault is not None:
        raise OperationRejected(
            f"The volume {disk.id} cannot be used: {disk.path} {fault}.",
            remedy="Restore the file from a backup, or detach the volume.",
        )


async def make_root_disk(permit: Permit, folder: InstanceFolder, spec: Spec, settings: QemuSettings) -> None:
    """Create the root disk if it is missing: an empty overlay of its image, or an empty disk.

    Raises:
        OperationRejected: it could not be created; the message is that of qemu-img.
        NotResponding: qemu-img timed out.
    """
    if not spec.has_root:
        return
    roots = folder.roots(spec)
    root = roots.disk(spec.root)
    if root.exists():
        return
    prepare_shared(permit, roots)
    base = spec.image if spec.image.kind == "disk" else None
    size_bytes = spec.root_gib * GIB or spec.image.size_bytes
    await _create_overlay(permit, root, base, size_bytes, settings, create)


async def make_rescue_disk(permit: Permit, folder: InstanceFolder, spec: Spec, settings: QemuSettings) -> None:
    """Create the rescue disk if the instance is being rescued from a disk image, and else remove it. Raises as above.

    An overlay of another image is left over from an earlier rescue, and is replaced.
    """
    disk, image = folder.rescue_disk, spec.rescue_image
    if image is None or image.kind != "disk":
        if disk.exists():
            permit.check()
            disk.unlink(missing_ok=True)
        return
    if disk.exists() and qcow2.read_header(disk).backing == image.path:
        return
    folder.require_ended()
    await _create_overlay(permit, disk, image, image.size_bytes, settings, replace)


async def make_seed_disk(permit: Permit, folder: InstanceFolder, instance_id: str, spec: Spec) -> None:
    """Write the cloud-init seed if it is missing or changed; remove it if the spec has none."""
    disk, seed = folder.seed_disk, spec.seed
    if seed is None:
        if disk.exists():
            permit.check()
            disk.unlink(missing_ok=True)
        return
    try:
        content = cloud_init.build(seed, instance_id)
        if not disk.exists() or disk.read_bytes() != content:
            permit.check()
            await uninterrupted(lambda: cloud_init.write(disk, seed, instance_id))
    except (Invalid, StoreError) as error:
        raise OperationRejected(error.message, remedy=error.remedy) from error


def prepare_shared(permit: Permit, roots: RootFolder) -> None:
    """Create a shared folder, and remove the drafts in it that a crash left."""
    if isinstance(roots, SharedRootFolder):
        roots.make(permit)
        remove_drafts(permit, roots.path)


async def _create_overlay(
    permit: Permit, disk: Path, base: Image | None, size_bytes: int, settings: QemuSettings, commit: Commit
) -> None:
    # -u: the image is not opened, so that its content is not trusted.
    command = [settings.image_tool_binary, "create", "-q", "-u", "-f", "qcow2"]
    if base is not None:
        command += ["-b", base.path, "-F", base.format]
    with draft(disk) as fresh:
        permit.check()
        fresh.touch(mode=0o600)
        ended = await asyncio.to_thread(
            run, [*command, str(fresh), str(size_bytes)], timeout_s=settings.image_tool_timeout_ms / 1000
        )
        if ended.status != 0:
            raise OperationRejected(
                f"The disk {disk} could not be created: {ended.complaint.rstrip('.')}.",
                remedy=f"Check the free space and the permissions in {disk.parent}.",
            )
        await commit(permit, fresh, disk)


# --------------------------------------------------------------------------------------------- drafts


@contextlib.contextmanager
def draft(disk: Path) -> Iterator[Path]:
    """Return a path to create a disk at; the file is removed at the end of the block if it is still there.

    No two workers share a path: a cancelled one may have left its qemu-img running.
    """
    fresh = disk.with_suffix(f".{_PROCESS_TOKEN}-{next(_ATTEMPTS)}.new")
    fresh.unlink(missing_ok=True)
    try:
        yield fresh
    finally:
        fresh.unlink(missing_ok=True)


async def replace(permit: Permit, fresh: Path, disk: Path) -> None:
    """Make a draft durable and rename it to `disk`, which it replaces."""
    await asyncio.to_thread(sync_file, fresh)
    _rename(permit, fresh, disk)
    await asyncio.to_thread(sync_folder, disk.parent)


def _rename(permit: Permit, fresh: Path, disk: Path) -> None:
    permit.check()
    fresh.replace(disk)


async def create(permit: Permit, fresh: Path, disk: Path) -> None:
    """As `replace`, but a disk that exists already stays.

    In a shared folder it may be that of a host which took over while this one was stopped.
    """
    await asyncio.to_thread(sync_file, fresh)
    _link(permit, fresh, disk)
    await asyncio.to_thread(sync_folder, disk.parent)


def _link(permit: Permit, fresh: Path, disk: Path) -> None:
    permit.check()
    with contextlib.suppress(FileExistsError):
        disk.hardlink_to(fresh)
    fresh.unlink(missing_ok=True)


def remove_drafts(permit: Permit, folder: Path) -> None:
    """Remove the drafts of processes other than this one, which have ended."""
    for path in folder.glob("*.*-*.new"):
        if not path.name.split(".")[-2].startswith(f"{_PROCESS_TOKEN}-"):
            permit.check()
            path.unlink(missing_ok=True)
