"""The disks that are made for an instance on its host: its root disks, and the one that it is rescued from.

Each is there whole or not at all: it is made under another name, made durable, and then given its own. What they are
used for, and by which process, is elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from interlock.core.errors import NotResponding, Refused
from interlock.core.records import Image, Spec
from interlock.hypervisors.commands import run
from interlock.hypervisors.durable_files import sync_file, sync_folder
from interlock.hypervisors.qemu import qcow2
from interlock.hypervisors.qemu.instance_folder import InstanceFolder
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.ports import Permit

GIB: Final = 1024**3
_ATTEMPTS = itertools.count()


def require_images(spec: Spec) -> None:
    """Raise `Refused` if something that the guest boots, or that a disk of it is a layer over, is not there any more.

    The image of a guest whose root disk is whole is needed only if it is booted directly.
    """
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

    One that is whole is not made here: its content comes from elsewhere.

    Raises:
        Refused: it could not be made; the message is the image tool's.
        NotResponding: the image tool took too long.
    """
    root = folder.root_disk(spec.root)
    if not spec.has_root or spec.root_is_whole or root.exists():
        return
    base = spec.image if spec.image.kind == "disk" else None
    size_bytes = spec.root_gib * GIB or spec.image.size_bytes
    await _make_layer(permit, root, base, size_bytes, settings)


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
    if folder.held():
        raise NotResponding(
            f"A process still holds instance {folder.path.name}, which is to be rescued.", remedy="Stop it hard first."
        )
    await _make_layer(permit, disk, image, image.size_bytes, settings)


async def _make_layer(permit: Permit, disk: Path, base: Image | None, size_bytes: int, settings: QemuSettings) -> None:
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
        await keep(permit, fresh, disk)


async def drop_root_disks(permit: Permit, folder: InstanceFolder, kept: frozenset[int]) -> None:
    """Remove the root disks with other numbers, and what a crash left half-made."""
    for number, path in sorted(folder.root_disks().items()):
        if number not in kept:
            permit.check()
            path.unlink(missing_ok=True)
    drop_half_made(permit, folder)


# --------------------------------------------------------------------------------------------- whole or not at all


@contextlib.contextmanager
def half_made(disk: Path) -> Iterator[Path]:
    """A name under which a disk can be made; what is still there under it at the end of the block is removed.

    A worker that was cancelled may have left its image tool at work: no two of them share a name.
    """
    fresh = disk.with_suffix(f".{os.getpid()}-{next(_ATTEMPTS)}.new")
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


def drop_half_made(permit: Permit, folder: InstanceFolder) -> None:
    """Remove the disks that an earlier process of ours, which has ended, did not come to finish."""
    for path in folder.path.glob("*.*-*.new"):
        if not path.name.split(".")[-2].startswith(f"{os.getpid()}-"):
            permit.check()
            path.unlink(missing_ok=True)
