"""The disks of a simulated host and their content: root disks by number, the rescue disk, volumes."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import msgspec

from interlock.core.errors import OperationRejected
from interlock.core.records import Disk, Image, Spec
from interlock.hypervisors.simulated.disk_content import GIB, Content, read_file
from interlock.hypervisors.simulated.guest import RESCUE, ROOT, RUNS, SimulatedGuest

_NOWHERE = "simulated:"


class Storage:
    """The disks of one host. The content of volumes is kept in a folder, if there is one."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else folder / "volumes"
        self._volumes: dict[str, Content] = {}

    # ----------------------------------------------------------------------------------------- disks of an instance

    def prepare(self, guest: SimulatedGuest, spec: Spec) -> bool:
        """Create the disks of the spec that are missing; return whether any was.

        Raises:
            OperationRejected: a root disk that was created before is missing.
        """
        changed = False
        if spec.has_root and spec.root not in guest.roots:
            if spec.root_made or spec.root_is_whole:
                raise missing_root(guest, spec)
            guest.roots[spec.root] = fresh(spec.image, spec.root_gib)
            changed = True
        if guest.rescued_from != rescued_from(spec):
            guest.rescued_from = rescued_from(spec)
            boots = spec.rescue_image if guest.rescued_from is not None else None
            guest.rescue = None if boots is None else fresh(boots, 0)
            changed = True
        return changed

    def plugged(self, guest: SimulatedGuest, spec: Spec) -> dict[str, Disk]:
        """Return the disks of a guest with this spec. Raises `OperationRejected` if its root disk is missing."""
        disks = {disk.id: disk for disk in spec.disks}
        own: dict[str, Disk] = {}
        if rescued_from(spec) is not None:
            own[RESCUE] = Disk(id=RESCUE, path=f"{_NOWHERE}{guest.instance_id}/rescue")
        if spec.has_root:
            if spec.root not in guest.roots:
                raise missing_root(guest, spec)
            own[ROOT] = Disk(id=ROOT, path=f"{_NOWHERE}{guest.instance_id}/root-{spec.root}")
        return {**own, **disks}

    def copy_root(self, guest: SimulatedGuest, old: Spec, new: Spec) -> bool:
        """Create the root disk of `new` from that of `old` if it is missing; return whether it was.

        Raises:
            OperationRejected: it would be smaller, or its source is missing.
        """
        if new.root in guest.roots or not (old.has_root or new.has_root):
            return False
        content = guest.roots.get(old.root) if old.has_root else fresh(new.image, new.root_gib)
        if content is None:
            raise missing_root(guest, old)
        size = new.root_gib * GIB or content.size_bytes
        if size < content.size_bytes:
            raise OperationRejected(
                f"The root disk of VM {guest.instance_id} has {content.size_bytes} bytes, and {size} are fewer."
            )
        guest.roots[new.root] = msgspec.structs.replace(content, size_bytes=size)
        return True

    def root_from(self, guest: SimulatedGuest, spec: Spec, source: Path) -> bool:
        """Create the root disk of the spec from the file at `source` if it is missing; return whether it was.

        Raises:
            OperationRejected: the file is missing, or cannot be read.
        """
        if spec.root in guest.roots:
            return False
        content = read_file(source)
        if content is None:
            raise OperationRejected(f"The image file {source} is missing.")
        guest.roots[spec.root] = msgspec.structs.replace(
            content, size_bytes=max(content.size_bytes, spec.root_gib * GIB)
        )
        return True

    def drop_roots(self, guest: SimulatedGuest, kept: frozenset[int]) -> bool:
        """Remove all root disks but those numbers; return whether there were others.

        Raises:
            OperationRejected: a guest uses one of them.
        """
        dropped = set(guest.roots) - kept
        if guest.seen in RUNS and guest.spec.has_root and guest.spec.root in dropped:
            raise OperationRejected(f"VM {guest.instance_id} has the root disk {guest.spec.root}.")
        for number in dropped:
            del guest.roots[number]
        return bool(dropped)

    # --------------------------------------------------------------------------------------------------- content

    def content(self, guest: SimulatedGuest, disk_id: str) -> Content | None:
        """Return the content of a disk of the instance, or None if it has no such disk."""
        if disk_id == ROOT:
            return guest.roots.get(guest.spec.root)
        if disk_id == RESCUE:
            return guest.rescue
        disk = guest.disks.get(disk_id)
        return None if disk is None else self.volume(disk)

    def write(self, guest: SimulatedGuest, disk_id: str, word: str) -> None:
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
        """Return the content of a volume: what was written, else what is in its file."""
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
        """Copy the content of `old` to `new`."""
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
    """Return the content of a new disk: an overlay of a disk image, else empty."""
    if image.kind != "disk":
        return Content(made_from="nothing", size_bytes=gib * GIB)
    kept = None if image.path.startswith(_NOWHERE) else _simulated_content(Path(image.path))
    size = max(image.size_bytes, gib * GIB)
    if kept is None:
        return Content(made_from=f"image:{image.id}", size_bytes=size)
    return msgspec.structs.replace(kept, size_bytes=size)


def _simulated_content(path: Path) -> Content | None:
    """Return the content of an image that was exported from a simulated disk; None for any other image."""
    content = read_file(path)
    return None if content is None or content.made_from.startswith("file:") else content


def rescued_from(spec: Spec) -> str | None:
    """Return the id of the disk image that the instance is rescued from, if any."""
    image = spec.rescue_image
    return None if image is None or image.kind != "disk" else image.id


def missing_root(guest: SimulatedGuest, spec: Spec) -> OperationRejected:
    return OperationRejected(
        f"The root disk {spec.root} of VM {guest.instance_id} is missing.",
        remedy="Restore it, or rebuild the VM.",
    )
