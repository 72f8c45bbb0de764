"""The server's folder of memory dumps, with a folder per instance."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from interlock.images.atomic_files import checked_id, disk_errors_raised, make_folder, sync_folder
from interlock.ports import Dump

_SUFFIX = ".kdump"


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
        return own / f"{checked_id(request_id)}{_SUFFIX}"

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
        for path in own.glob(f"*{_SUFFIX}"):
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
