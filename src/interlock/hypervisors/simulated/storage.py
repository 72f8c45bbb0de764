"""Who has which disk on a simulated host, and what is on it: root disks by number, the rescue disk, volumes.

Effects only; nothing waits here, and whoever calls has the right to act. What content is, is in `contents`.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import msgspec

from interlock.core.errors import Refused
from interlock.core.records import Disk, Image, Spec
from interlock.hypervisors.simulated.contents import GIB, Content, read_file
from interlock.hypervisors.simulated.guest import RESCUE, ROOT, RUNS, Guest

_NOWHERE = "simulated:"


class Storage:
    """The disks of one host. With a folder, what is on volumes is kept there; each guest's file tells of its own."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else folder / "volumes"
        self._volumes: dict[str, Content] = {}

    # ----------------------------------------------------------------------------------------- an instance's own

    def prepare(self, guest: Guest, spec: Spec) -> bool:
        """Make the disks that the spec asks for and that are missing; whether anything was.

        Raises:
            Refused: a root disk that stands by itself is not there.
        """
        changed = False
        if spec.has_root and spec.root not in guest.roots:
            if spec.root_is_whole:
                raise missing_root(guest, spec)
            guest.roots[spec.root] = fresh(spec.image, spec.root_gib)
            changed = True
        if guest.rescued_from != rescued_from(spec):
            guest.rescued_from = rescued_from(spec)
            boots = spec.rescue_image if guest.rescued_from is not None else None
            guest.rescue = None if boots is None else fresh(boots, 0)
            changed = True
        return changed

    def plugged(self, guest: Guest, spec: Spec) -> dict[str, Disk]:
        """What a guest has that is started with this spec. Raises `Refused` for a root disk that is not there."""
        disks = {disk.id: disk for disk in spec.disks}
        own: dict[str, Disk] = {}
        if rescued_from(spec) is not None:
            own[RESCUE] = Disk(id=RESCUE, path=f"{_NOWHERE}{guest.instance_id}/rescue")
        if spec.has_root:
            if spec.root not in guest.roots:
                raise missing_root(guest, spec)
            own[ROOT] = Disk(id=ROOT, path=f"{_NOWHERE}{guest.instance_id}/root-{spec.root}")
        return {**own, **disks}

    def copy_root(self, guest: Guest, old: Spec, new: Spec) -> bool:
        """Make the root disk of `new` from that of `old` if it is missing; whether it was.

        Raises:
            Refused: it would be smaller, or there is nothing to copy.
        """
        if new.root in guest.roots or not (old.has_root or new.has_root):
            return False
        content = guest.roots.get(old.root) if old.has_root else fresh(new.image, new.root_gib)
        if content is None:
            raise missing_root(guest, old)
        size = new.root_gib * GIB or content.size_bytes
        if size < content.size_bytes:
            raise Refused(
                f"The root disk of instance {guest.instance_id} has {content.size_bytes} bytes, and {size} are fewer."
            )
        guest.roots[new.root] = msgspec.structs.replace(content, size_bytes=size)
        return True

    def root_from(self, guest: Guest, spec: Spec, source: Path) -> bool:
        """Make the root disk of the spec from the file at `source` if it is missing; whether it was.

        Raises:
            Refused: the file is not there, or cannot be read.
        """
        if spec.root in guest.roots:
            return False
        content = read_file(source)
        if content is None:
            raise Refused(f"The image file {source} is not there.")
        guest.roots[spec.root] = msgspec.structs.replace(
            content, size_bytes=max(content.size_bytes, spec.root_gib * GIB)
        )
        return True

    def drop_roots(self, guest: Guest, kept: frozenset[int]) -> bool:
        """Remove all root disks but those numbers; whether there were others.

        Raises:
            Refused: a guest has one of them.
        """
        dropped = set(guest.roots) - kept
        if guest.seen in RUNS and guest.spec.has_root and guest.spec.root in dropped:
            raise Refused(f"The guest of instance {guest.instance_id} has the root disk {guest.spec.root}.")
        for number in dropped:
            del guest.roots[number]
        return bool(dropped)

    # --------------------------------------------------------------------------------------------------- content

    def content(self, guest: Guest, disk_id: str) -> Content | None:
        """What is on a disk of the instance, which is plugged in or its own."""
        if disk_id == ROOT:
            return guest.roots.get(guest.spec.root)
        if disk_id == RESCUE:
            return guest.rescue
        disk = guest.disks.get(disk_id)
        return None if disk is None else self.volume(disk)

    def write(self, guest: Guest, disk_id: str, word: str) -> None:
        """Let the guest write to one of its disks."""
        content = self.content(guest, disk_id)
        assert content is not None
        if disk_id == ROOT:
            guest.roots[guest.spec.root] = content.plus(word)
        elif disk_id == RESCUE:
            guest.rescue = content.plus(word)
        else:
            self._keep(guest.disks[disk_id].path, content.plus(word))

    def volume(self, disk: Disk) -> Content:
        """What is on a volume; one that nothing was written to is what its file says, or empty."""
        kept = self._volumes.get(disk.path)
        if kept is None and self._folder is not None:
            try:
                kept = msgspec.json.decode(self._file(disk.path).read_bytes(), type=Content)
            except OSError:
                kept = None
        if kept is None and not disk.path.startswith(_NOWHERE):
            kept = read_file(Path(disk.path))
        return kept or Content(made_from="nothing")

    def copy_volume(self, old: Disk, new: Disk) -> None:
        """Put on `new` what is on `old`."""
        size = self.volume(new).size_bytes
        self._keep(new.path, msgspec.structs.replace(self.volume(old), size_bytes=size))

    def _keep(self, path: str, content: Content) -> None:
        self._volumes[path] = content
        if self._folder is not None:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            draft = self._file(path).with_suffix(".draft")
            draft.write_bytes(msgspec.json.encode(content))
            draft.replace(self._file(path))

    def _file(self, path: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{quote(path, safe='')[-200:]}.json"


def fresh(image: Image, gib: int) -> Content:
    """A new disk as an image makes it: a layer over it, or an empty one for an image that is booted directly."""
    if image.kind != "disk":
        return Content(made_from="nothing", size_bytes=gib * GIB)
    kept = None if image.path.startswith(_NOWHERE) else _carried(Path(image.path))
    size = max(image.size_bytes, gib * GIB)
    if kept is None:
        return Content(made_from=f"image:{image.id}", size_bytes=size)
    return msgspec.structs.replace(kept, size_bytes=size)


def _carried(path: Path) -> Content | None:
    """What a simulated disk left in an image; None for any other image."""
    content = read_file(path)
    return None if content is None or content.made_from.startswith("file:") else content


def rescued_from(spec: Spec) -> str | None:
    """The id of the disk image that is booted instead of the instance's own disk, if one is."""
    image = spec.rescue_image
    return None if image is None or image.kind != "disk" else image.id


def missing_root(guest: Guest, spec: Spec) -> Refused:
    return Refused(f"The root disk {spec.root} of instance {guest.instance_id} is not there.")
