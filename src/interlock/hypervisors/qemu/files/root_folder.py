"""The folder of an instance's root disks: local, or on a file system that hosts share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from interlock.core.records import Spec
from interlock.images.shared_folder import instance_place
from interlock.ports import Permit

_ROOT_DISK: Final = re.compile(r"root(?:-([1-9][0-9]*))?\.qcow2")


class RootFolder:
    """A folder with root disks."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def disk(self, number: int) -> Path:
        """Return the path of the root disk with that number, which may not exist."""
        return self.path / (f"root-{number}.qcow2" if number else "root.qcow2")

    def disks(self) -> dict[int, Path]:
        """Return the existing root disks, by number."""
        found = ((_ROOT_DISK.fullmatch(path.name), path) for path in self.path.glob("root*.qcow2"))
        return {int(match[1] or 0): path for match, path in found if match is not None}


class SharedRootFolder(RootFolder):
    """The same in a shared folder: it exists only while it has root disks or drafts."""

    def make(self, permit: Permit) -> None:
        for path in (self.path.parent, self.path):
            permit.check()
            path.mkdir(mode=0o700, exist_ok=True)

    def remove(self, permit: Permit) -> None:
        """Remove it with the drafts in it, of any host, unless a root disk is in it."""
        if not self.path.is_dir() or self.disks():
            return
        for path in self.path.glob("*.new"):
            permit.check()
            path.unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            permit.check()
            self.path.rmdir()


def root_folder(own: Path, spec: Spec) -> RootFolder:
    """Return the folder of an instance's root disks; `own` is its local folder.

    Raises:
        OperationRejected: the shared folder is missing, or another one.
    """
    if spec.shared is None:
        return RootFolder(own)
    return SharedRootFolder(instance_place(spec.shared, own.name))
