"""Which files of images the guests of a host need: what they were started with, and what their disks are layers over.

Looked up in the instances' folders, so that it holds whatever anybody else has forgotten. Nothing is changed.
"""

from __future__ import annotations

from pathlib import Path

from interlock.hypervisors.qemu import qcow2
from interlock.hypervisors.qemu.instance_folder import InstanceFolder


def images_in_use(guests: Path) -> frozenset[str]:
    """The paths of those files, of every instance that has a folder in `guests`.

    Raises:
        Refused: what a disk is a layer over cannot be told.
        OSError: a folder or disk cannot be read.
    """
    if not guests.is_dir():
        return frozenset()
    return frozenset(path for place in guests.iterdir() for path in _of(InstanceFolder(place)))


def _of(folder: InstanceFolder) -> set[str]:
    found: set[str] = set()
    spec = folder.spec()
    for image in () if spec is None else (spec.image, spec.rescue_image):
        if image is not None:
            found |= {path for path in (image.path, image.initrd) if path is not None}
    # One that is being made may not have its header yet; its image was asked for just now, and is kept for that.
    for disk in folder.path.glob("*.qcow2"):
        try:
            backing = qcow2.read_header(disk).backing
        except FileNotFoundError:
            continue
        if backing is not None:
            found.add(backing)
    return found
