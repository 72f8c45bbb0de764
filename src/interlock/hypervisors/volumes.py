"""The server's volume folder: disks that live on their own. Whose they are and who has them is the store's to know.

Volumes are qcow2 and not sparse raw files: they take only the room that was written on any file system, their size
travels with the file, and they are the format of instances' root disks, so that there is one kind of disk to attach.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection
from pathlib import Path

from interlock.core.errors import Invalid, StoreError, Unavailable
from interlock.hypervisors import commands
from interlock.hypervisors.disk_headers import DISK_BYTES_MAX, SECTOR_BYTES
from interlock.hypervisors.durable_files import (
    HalfMade,
    checked_id,
    full,
    make_folder,
    remove_half_made,
    remove_unknown,
    sync_folder,
    telling_of_full_disk,
)

VOLUME_BYTES_MIN = 1 << 20
VOLUME_BYTES_MAX = DISK_BYTES_MAX

_MODE = 0o600
_SUFFIX = ".qcow2"
_MAKE_S = 60.0


class VolumeFolder:
    """Implements `ports.VolumeFiles` on one folder, which belongs to one server.

    Volumes belong to user `uid` and group `gid`, under which guests run; None leaves them the server's.
    """

    def __init__(self, folder: Path, *, uid: int | None = None, gid: int | None = None) -> None:
        self._folder = folder
        self._uid = uid
        self._gid = gid
        self._prepared = False

    def prepare(self) -> None:
        """Make the folder, and remove what a crash left half-made. The first use does it where nobody has."""
        if not self._prepared:
            make_folder(self._folder)
            remove_half_made(self._folder)
            self._prepared = True

    def sweep(self, known: Collection[str]) -> tuple[str, ...]:
        """Remove every volume's file whose id is not in `known`; the names of those files.

        To be called at the start, with every id that the store has, before anything is made.
        """
        self.prepare()
        return remove_unknown(self._folder, known, {_SUFFIX})

    async def make(self, volume_id: str, size_bytes: int) -> Path:
        """As the port says; also raises `Invalid` for a size that no volume can have."""
        checked_id(volume_id)
        if not VOLUME_BYTES_MIN <= size_bytes <= VOLUME_BYTES_MAX or size_bytes % SECTOR_BYTES:
            raise Invalid(
                f"A volume of {size_bytes} bytes is not possible; it must be whole sectors of {SECTOR_BYTES} bytes, "
                f"from {VOLUME_BYTES_MIN >> 20} MiB to {VOLUME_BYTES_MAX >> 40} TiB."
            )
        self.prepare()
        return await asyncio.to_thread(self._make, volume_id, size_bytes)

    async def remove(self, volume_id: str) -> None:
        await asyncio.to_thread(self._remove, checked_id(volume_id))

    def _make(self, volume_id: str, size_bytes: int) -> Path:
        with HalfMade(self._folder, mode=_MODE) as disk:
            self._write_qcow2(disk.path, size_bytes)
            self._give_away(disk.path)
            return disk.keep(f"{volume_id}{_SUFFIX}")

    def _write_qcow2(self, path: Path, size_bytes: int) -> None:
        try:
            ended = commands.run(
                ["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size_bytes)], timeout_s=_MAKE_S
            )
        except FileNotFoundError as error:
            raise Unavailable(
                "The program qemu-img, which makes disks, is not installed.",
                remedy="Run `sudo apt-get install qemu-utils`.",
            ) from error
        if ended.status != 0:
            if "No space left" in ended.complaint or "quota exceeded" in ended.complaint:
                raise full(self._folder)
            raise StoreError(f"qemu-img could not make a disk in {self._folder}: {ended.complaint}.")

    def _give_away(self, path: Path) -> None:
        if self._uid is None and self._gid is None:
            return
        try:
            os.chown(path, -1 if self._uid is None else self._uid, -1 if self._gid is None else self._gid)
        except PermissionError as error:
            raise Unavailable(
                f"The server may not give a volume to user {self._uid} and group {self._gid}, under which guests run.",
                remedy="Start the server as root, or let guests run under the server's own user.",
            ) from error

    def _remove(self, volume_id: str) -> None:
        with telling_of_full_disk(self._folder):
            (self._folder / f"{volume_id}{_SUFFIX}").unlink(missing_ok=True)
            if self._folder.is_dir():
                sync_folder(self._folder)
