"""The disks that are made for an instance on its host: its root disks, what it is rescued from, and its seed.

Each is there whole or not at all: it is made under another name, made durable, and then given its own. What they are
used for, and by which process, is elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

from interlock.core.errors import Invalid, NotResponding, Refused, StoreError
from interlock.core.records import Image, Spec
from interlock.hypervisors import seed_iso
from interlock.hypervisors.commands import run
from interlock.hypervisors.durable_files import sync_file, sync_folder
from interlock.hypervisors.qemu import qcow2
from interlock.hypervisors.qemu.copying import copy_sparse, whole
from interlock.hypervisors.qemu.image_tool import use_image_tool
from interlock.hypervisors.qemu.instance_folder import InstanceFolder
from interlock.hypervisors.qemu.root_folder import RootFolder, SharedRootFolder
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.ports import Permit, Report

GIB: Final = 1024**3
_ATTEMPTS = itertools.count()
_OURS: Final = secrets.token_hex(6)
"""This process, among all that make disks in one folder: those of other hosts may have its number."""
Keeping = Callable[[Permit, Path, Path], Awaitable[None]]
"""Makes a disk durable, and gives it its name."""


def require_files(folder: InstanceFolder, spec: Spec) -> None:
    """Raise `Refused` if something is not there that the guest needs and that nobody makes for it.

    That is what it boots, what its disks are layers over, and a root disk that stands by itself.
    """
    if spec.has_root:
        root = folder.roots(spec).disk(spec.root)
        if spec.root_is_whole:
            _require_file(root)
    images = [] if spec.root_is_whole and spec.image.kind == "disk" else [spec.image]
    if spec.rescue_image is not None:
        images.append(spec.rescue_image)
    for image in images:
        for path in filter(None, (image.path, image.initrd)):
            if not Path(path).is_file():
                raise Refused(
                    f"The image {image.name} is not there any more: {path} is missing.",
                    remedy="Put the file back, or use another image.",
                )


async def make_root_disk(permit: Permit, folder: InstanceFolder, spec: Spec, settings: QemuSettings) -> None:
    """Make the instance's root disk, an empty layer over its image or an empty disk; does nothing where it is there.

    Raises:
        Refused: it could not be made; the message is the image tool's.
        NotResponding: the image tool took too long.
    """
    if not spec.has_root:
        return
    roots = folder.roots(spec)
    root = roots.disk(spec.root)
    if root.exists():
        return
    _make(permit, roots)
    base = spec.image if spec.image.kind == "disk" else None
    size_bytes = spec.root_gib * GIB or spec.image.size_bytes
    await _make_layer(permit, root, base, size_bytes, settings, keep_new)


async def make_rescue_disk(permit: Permit, folder: InstanceFolder, spec: Spec, settings: QemuSettings) -> None:
    """Make the disk that the instance is rescued from, if it is rescued from one, and else remove it. Raises as above.

    One over another image is what a rescue left that never came to be undone.
    """
    disk, image = folder.rescue_disk, spec.rescue_image
    if image is None or image.kind != "disk":
        if disk.exists():
            permit.check()
            disk.unlink(missing_ok=True)
        return
    if disk.exists() and qcow2.read_header(disk).backing == image.path:
        return
    _require_ended(folder)
    await _make_layer(permit, disk, image, image.size_bytes, settings, keep)


async def make_seed_disk(permit: Permit, folder: InstanceFolder, instance_id: str, spec: Spec) -> None:
    """Write the instance's seed, if it has one, and else remove it; does nothing where it is there."""
    disk, seed = folder.seed_disk, spec.seed
    if seed is None:
        if disk.exists():
            permit.check()
            disk.unlink(missing_ok=True)
        return
    try:
        content = seed_iso.build(seed, instance_id)
        if not disk.exists() or disk.read_bytes() != content:
            permit.check()
            await whole(lambda: seed_iso.write(disk, seed, instance_id))
    except (Invalid, StoreError) as error:
        raise Refused(error.message, remedy=error.remedy) from error


def _make(permit: Permit, roots: RootFolder) -> None:
    """Have the folder there, where it is not the instance's own, and nothing in it that a crash left half-made."""
    if isinstance(roots, SharedRootFolder):
        roots.make(permit)
        drop_half_made(permit, roots.path)


async def _make_layer(
    permit: Permit, disk: Path, base: Image | None, size_bytes: int, settings: QemuSettings, kept: Keeping
) -> None:
    # -u: the image is not opened here, so that nothing in it is believed.
    command = [settings.image_tool_binary, "create", "-q", "-u", "-f", "qcow2"]
    if base is not None:
        command += ["-b", base.path, "-F", base.format]
    with half_made(disk) as fresh:
        permit.check()
        ended = await asyncio.to_thread(
            run, [*command, str(fresh), str(size_bytes)], timeout_s=settings.image_tool_timeout_ms / 1000
        )
        if ended.status != 0:
            raise Refused(
                f"The disk {disk} could not be made: {ended.complaint}",
                remedy=f"Check the room and the permissions in {disk.parent}.",
            )
        await kept(permit, fresh, disk)


async def copy_root_disk(
    permit: Permit, folder: InstanceFolder, old: Spec, new: Spec, settings: QemuSettings, report: Report
) -> None:
    """See `ports.Hypervisor.copy_root_disk`. A layer stays one, over the same image."""
    if not (old.has_root or new.has_root):
        return
    roots = folder.roots(new)
    target, source = roots.disk(new.root), folder.roots(old).disk(old.root)
    if target.exists():
        return
    if not old.has_root:
        await make_root_disk(permit, folder, new, settings)
        return
    _require_ended(folder)
    _require_file(source)
    held = qcow2.read_header(source).size_bytes
    wanted = (new.root_gib * GIB or held) if new.has_root else 0
    if wanted < held:
        raise Refused(
            f"The root disk would have {wanted} bytes, and what it is copied from has {held}.",
            remedy="A disk can only become larger.",
        )
    _make(permit, roots)
    await _copy(permit, old, (source, target), wanted, settings, report)


async def root_disk_from(
    permit: Permit, folder: InstanceFolder, spec: Spec, source: Path, settings: QemuSettings, report: Report
) -> None:
    """See `ports.Hypervisor.root_disk_from`."""
    roots = folder.roots(spec)
    target = roots.disk(spec.root)
    if target.exists():
        return
    _require_ended(folder)
    _require_file(source)
    header = qcow2.read_header(source)
    if not header.stands_alone:
        raise Refused(f"The image {source} needs another file.", remedy="Use one that stands by itself.")
    _make(permit, roots)
    await _copy(permit, spec, (source, target), max(header.size_bytes, spec.root_gib * GIB), settings, report)


async def _copy(
    permit: Permit, spec: Spec, between: tuple[Path, Path], wanted: int, settings: QemuSettings, report: Report
) -> None:
    """Copy from one path to another; what is copied stands by itself where the spec says so."""
    source, target = between
    held = qcow2.read_header(source).size_bytes
    with half_made(target) as fresh:
        await copy_sparse(permit, source, fresh, report)
        if wanted != held:
            permit.check()
            words = ["resize", "-q", qcow2.opened(fresh, spec), str(wanted)]
            await use_image_tool(words, f"Enlarging the copy of {source}", settings, lambda _done: None)
        await keep_new(permit, fresh, target)


def _require_file(source: Path) -> None:
    if not source.is_file():
        raise Refused(f"{source} is not there any more.", remedy="Put the file back, or rebuild the instance.")


def _require_ended(folder: InstanceFolder) -> None:
    if folder.held():
        raise NotResponding(
            f"A process still holds instance {folder.path.name}, whose disks are to change.",
            remedy="Stop it hard first.",
        )


async def drop_root_disks(permit: Permit, folder: InstanceFolder, spec: Spec, kept: frozenset[int]) -> None:
    """Remove the root disks with other numbers, and what a crash left half-made. Refused if a guest has one."""
    run = folder.spec()
    if run is not None and run.has_root and run.root not in kept and folder.held():
        raise Refused(f"The guest of instance {folder.path.name} has the root disk {run.root}.", remedy="Stop it.")
    roots = folder.roots(spec)
    for number, path in sorted(roots.disks().items()):
        if number not in kept:
            permit.check()
            path.unlink(missing_ok=True)
    drop_half_made(permit, roots.path)
    if isinstance(roots, SharedRootFolder):
        roots.remove(permit)


# --------------------------------------------------------------------------------------------- whole or not at all


@contextlib.contextmanager
def half_made(disk: Path) -> Iterator[Path]:
    """A name under which a disk can be made; what is still there under it at the end of the block is removed.

    A worker that was cancelled may have left its image tool at work: no two of them share a name.
    """
    fresh = disk.with_suffix(f".{_OURS}-{next(_ATTEMPTS)}.new")
    fresh.unlink(missing_ok=True)
    try:
        yield fresh
    finally:
        fresh.unlink(missing_ok=True)


async def keep(permit: Permit, fresh: Path, disk: Path) -> None:
    """Make a disk durable, and give it its name."""
    await asyncio.to_thread(sync_file, fresh)
    _name(permit, fresh, disk)
    await asyncio.to_thread(sync_folder, disk.parent)


def _name(permit: Permit, fresh: Path, disk: Path) -> None:
    permit.check()
    fresh.replace(disk)


async def keep_new(permit: Permit, fresh: Path, disk: Path) -> None:
    """As `keep`, for a disk that is never made again: one that is there already stays.

    In a shared folder it may be that of a host which took over while this one stood still.
    """
    await asyncio.to_thread(sync_file, fresh)
    _name_new(permit, fresh, disk)
    await asyncio.to_thread(sync_folder, disk.parent)


def _name_new(permit: Permit, fresh: Path, disk: Path) -> None:
    permit.check()
    with contextlib.suppress(FileExistsError):
        disk.hardlink_to(fresh)
    fresh.unlink(missing_ok=True)


def drop_half_made(permit: Permit, folder: Path) -> None:
    """Remove the disks that an earlier process, which has ended, did not come to finish."""
    for path in folder.glob("*.*-*.new"):
        if not path.name.split(".")[-2].startswith(f"{_OURS}-"):
            permit.check()
            path.unlink(missing_ok=True)
