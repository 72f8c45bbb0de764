"""What the tests of operations on disks share: images that instances boot from, and what is on a simulated disk."""

from __future__ import annotations

from pathlib import Path

from in_process.embedded import Embedded
from interlock.core.records import Image, Instance
from interlock.hypervisors.simulated import SimulatedHost
from interlock.hypervisors.simulated.disk_content import Content

DISK = Image(id="disk", name="disk", kind="disk", path="", size_bytes=1 << 20, sha256="0" * 64)
OTHER = Image(id="other", name="other", kind="disk", path="", size_bytes=1 << 20, sha256="0" * 64)


async def put_images(fleet: Embedded) -> None:
    for image in (DISK, OTHER):
        await fleet.put_image(image)


async def now(fleet: Embedded, vm: str) -> Instance:
    instance = await fleet.server.store.instance(vm)
    assert instance is not None
    return instance


def root(host: SimulatedHost, vm: str) -> Content:
    """What is on the only root disk."""
    (content,) = host.guests[vm].roots.values()
    return content


def image_files(fleet: Embedded) -> set[str]:
    """What is in the image folder beside the images that the tests brought."""
    brought = {"nothing.kernel", f"{DISK.id}.disk", f"{OTHER.id}.disk"}
    return {path.name for path in Path(fleet.server.folder / "images").iterdir()} - brought
