"""Image files that the guests of a host use: those they were started with, and the backing files of their disks.

Read from the instances' folders, so that it does not depend on any other record.
"""

from __future__ import annotations

from pathlib import Path

from interlock.hypervisors.qemu.files import qcow2
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder


def images_in_use(guests: Path) -> frozenset[str]:
    """Return the paths, of every instance with a folder in `guests`.

    Raises:
        OperationRejected: a disk has no valid header.
        OSError: a folder or disk cannot be read.
    """
    if not guests.is_dir():
        return frozenset()
    return frozenset(path for place in guests.iterdir() for path in _images_of(InstanceFolder(place)))


def _images_of(folder: InstanceFolder) -> set[str]:
    found: set[str] = set()
    spec = folder.spec()
    for image in () if spec is None else (spec.image, spec.rescue_image):
        if image is not None:
            found |= {path for path in (image.path, image.initrd) if path is not None}
    # A disk that is being created may have no header yet; its image was fetched just now, and is kept.
    for disk in folder.path.glob("*.qcow2"):
        try:
            backing = qcow2.read_header(disk).backing
        except FileNotFoundError:
            continue
        if backing is not None:
            found.add(backing)
    return found
