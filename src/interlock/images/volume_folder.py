"""The server's folders of volume files and of memory dumps.

Volumes are qcow2, not sparse raw files: they use only the space written on any file system, contain their size, and
have the format of root disks.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from interlock.core.errors import Invalid, StoreError, Unavailable
from interlock.images import subprocess_runner
from interlock.images.atomic_files import (
    DraftFile,
    checked_id,
    disk_errors_raised,
    full,
    make_folder,
    remove_drafts,
    remove_unknown,
    sync_folder,
)
from interlock.images.disk_headers import DISK_BYTES_MAX, SECTOR_BYTES
from interlock.ports import Dump

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
        """Create the folder and delete temporary files of a crash. Called on first use."""
        if not self._prepared:
            make_folder(self._folder)
            remove_drafts(self._folder)
            self._prepared = True

    def sweep(self, known: Collection[str]) -> tuple[str, ...]:
        """Delete the files of unknown volumes; return their names. Call it at the start with all ids of the store."""
        self.prepare()
        return remove_unknown(self._folder, known, {_SUFFIX})

    async def make(self, volume_id: str, size_bytes: int) -> Path:
        """See `ports.VolumeFiles`. Raises `Invalid` for an invalid size."""
        checked_id(volume_id)
        if not VOLUME_BYTES_MIN <= size_bytes <= VOLUME_BYTES_MAX or size_bytes % SECTOR_BYTES:
            raise Invalid(
                f"Invalid volume size {size_bytes} bytes: expected a multiple of {SECTOR_BYTES} bytes "
                f"from {VOLUME_BYTES_MIN >> 20} MiB to {VOLUME_BYTES_MAX >> 40} TiB."
            )
        self.prepare()
        return await asyncio.to_thread(self._make, volume_id, size_bytes)

    async def remove(self, volume_id: str) -> None:
        await asyncio.to_thread(self._remove, checked_id(volume_id))

    def _make(self, volume_id: str, size_bytes: int) -> Path:
        with DraftFile(self._folder, mode=_MODE) as disk:
            self._write_qcow2(disk.path, size_bytes)
            self._give_away(disk.path)
            return disk.keep(f"{volume_id}{_SUFFIX}")

    def _write_qcow2(self, path: Path, size_bytes: int) -> None:
        try:
            ended = subprocess_runner.run(
                ["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size_bytes)], timeout_s=_MAKE_S
            )
        except FileNotFoundError as error:
            raise Unavailable(
                "qemu-img is not installed.",
                remedy="Run `sudo apt-get install qemu-utils`.",
            ) from error
        if ended.status != 0:
            if "No space left" in ended.complaint or "quota exceeded" in ended.complaint:
                raise full(self._folder)
            raise StoreError(f"qemu-img failed to create a disk in {self._folder}: {ended.complaint}.")

    def _give_away(self, path: Path) -> None:
        if self._uid is None and self._gid is None:
            return
        try:
            os.chown(path, -1 if self._uid is None else self._uid, -1 if self._gid is None else self._gid)
        except PermissionError as error:
            raise Unavailable(
                f"Permission denied: cannot change the owner of a volume to {self._uid}:{self._gid}, the guests' user.",
                remedy="Start the server as root, or run guests as the server's user.",
            ) from error

    def _remove(self, volume_id: str) -> None:
        with disk_errors_raised(self._folder):
            (self._folder / f"{volume_id}{_SUFFIX}").unlink(missing_ok=True)
            if self._folder.is_dir():
                sync_folder(self._folder)


_DUMP_SUFFIX = ".kdump"


class DumpFolder:
    """Implements `ports.DumpFiles`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def dump_path(self, instance_id: str, request_id: str) -> Path:
        own = self._own(instance_id)
        make_folder(self._folder)
        with disk_errors_raised(self._folder):
            self._folder.chmod(0o700)
            own.mkdir(mode=0o700, exist_ok=True)
        return own / f"{checked_id(request_id)}{_DUMP_SUFFIX}"

    async def dumps(self, instance_id: str) -> tuple[Dump, ...]:
        return await asyncio.to_thread(self._dumps, self._own(instance_id))

    async def remove(self, instance_id: str) -> None:
        own = self._own(instance_id)
        if own.is_dir():
            await asyncio.to_thread(self._remove, own)

    async def discard(self, dump: Dump) -> None:
        await asyncio.to_thread(self._discard, dump.path)

    def _own(self, instance_id: str) -> Path:
        return self._folder / checked_id(instance_id)

    def _dumps(self, own: Path) -> tuple[Dump, ...]:
        found = []
        for path in own.glob(f"*{_DUMP_SUFFIX}"):
            try:
                seen = path.stat()
            except FileNotFoundError:  # deleted meanwhile
                continue
            made_at_ms = int(seen.st_mtime * 1000)
            found.append(Dump(id=path.stem, path=path, size_bytes=seen.st_size, made_at_ms=made_at_ms))
        return tuple(sorted(found, key=lambda dump: (dump.made_at_ms, dump.id)))

    def _discard(self, path: Path) -> None:
        with disk_errors_raised(self._folder):
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                sync_folder(path.parent)

    def _remove(self, own: Path) -> None:
        with disk_errors_raised(self._folder):
            shutil.rmtree(own)
            sync_folder(self._folder)
