"""The shared folder of root disks on several hosts, and its marker file.

DIR/
    interlock-shared-folder     marker: the folder's id
    instances/ID/               the root disks of one instance, on any host

An unmounted folder is an empty folder of the same name, and hosts may have different folders of the same name. So
nothing is read, created or deleted in a folder whose marker differs from that of the instance. The server records the
marker, and creates one only if it has never seen any and no instance is recorded in one. Several servers may share the
folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from pathlib import Path
from typing import Final

import msgspec
import structlog

from interlock.config import Config
from interlock.core.errors import InsufficientCapacity, OperationRejected, Unavailable
from interlock.core.records import SharedFolder
from interlock.images.atomic_files import sync_folder, write_atomically

MARKER: Final = "interlock-shared-folder"
INSTANCES: Final = "instances"
_ID_BYTES: Final = 16
_MARKER_BYTES_MAX: Final = 256
_GIB: Final = 1 << 30
_MIB: Final = 1 << 20
_LOG = structlog.get_logger(__name__)


def marker_of(folder: Path) -> str | None:
    """Return the id in the folder's marker; None if there is none. Raises OSError."""
    try:
        with (folder / MARKER).open("rb") as file:
            return file.read(_MARKER_BYTES_MAX).decode("ascii", "replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def instance_place(shared: SharedFolder, instance_id: str) -> Path:
    """Return the folder of an instance's root disks. Raises `OperationRejected` if this host does not have it."""
    folder = Path(shared.path)
    try:
        found = marker_of(folder)
    except OSError as error:
        raise OperationRejected(f"The shared folder {folder} cannot be read: {error.strerror}.") from error
    if found is None:
        raise OperationRejected(
            f"The shared folder {folder} is not there: it has no {MARKER}.", remedy="Mount it on this host, then retry."
        )
    if found != shared.id:
        raise OperationRejected(
            f"The folder {folder} on this host is not the one that the instance's root disk is in.",
            remedy="Mount the same folder on all hosts that are to have it.",
        )
    return folder / INSTANCES / instance_id


def shared_roots_of(config: Config) -> MarkedFolder:
    """Return the configured shared folder, if any."""
    named = config.hosts.shared_dir
    kept = config.folder / "shared-folder.json"
    return MarkedFolder(Path(named) if named else None, kept, reserved_gib=config.host_disk_reserved_gib)


def _require_one_of(recorded: frozenset[str], path: Path) -> None:
    """Raise `Unavailable` if there are recorded markers and the folder has none of them."""
    if recorded and marker_of(path) not in recorded:
        raise Unavailable(
            f"The shared folder {path} is not there: VMs have root disks in one that was marked, not in this one.",
            remedy="Mount the one from before, and start the server again.",
        )


class MarkedFolder:
    """Implements `ports.SharedRoots` on one folder.

    Args:
        path: the folder; None if not configured.
        kept: the server's file with the marker.
        reserved_gib: minimum free space for a new instance, in GiB.
    """

    def __init__(self, path: Path | None, kept: Path, *, reserved_gib: int) -> None:
        self.path = path
        self._kept = kept
        self._reserved_gib = reserved_gib

    def open(self, recorded: frozenset[str] = frozenset()) -> None:
        """Find the folder's marker, or create one if there was never any. Errors are logged.

        `recorded` are the markers of the folders at this path that instances use: if there are any, none is created.
        """
        if self.path is None:
            return
        try:
            if self._known() is None:
                _require_one_of(recorded, self.path)
                self._mark(self.path)
            self._find(self.path)
        except (Unavailable, OSError) as error:
            _LOG.warning("shared folder not usable", folder=str(self.path), why=str(error))

    async def folder(self) -> SharedFolder | None:
        """See `ports.SharedRoots`."""
        return None if self.path is None else await asyncio.to_thread(self._usable, self.path)

    def _usable(self, path: Path) -> SharedFolder:
        found = self._find(path)
        room = os.statvfs(path)
        free_mib = room.f_bavail * room.f_frsize // _MIB
        if free_mib * _MIB < self._reserved_gib * _GIB:
            raise InsufficientCapacity(
                f"No space left in the shared folder {path}: {free_mib} MiB free, {self._reserved_gib} GiB reserved.",
                needed={"disk_mib": self._reserved_gib * 1024},
                free={"disk_mib": free_mib},
                remedy="Free space on its file system.",
            )
        return found

    def _find(self, path: Path) -> SharedFolder:
        try:
            found = marker_of(path)
        except OSError as error:
            raise Unavailable(f"The shared folder {path} cannot be read: {error.strerror}.") from error
        known = self._known()
        if found is None or known is None:
            raise Unavailable(
                f"The shared folder {path} is not there: it has no {MARKER}.",
                remedy="Mount it. A new one is marked when the server starts, and must be writable then.",
            )
        if found != known.id:
            raise Unavailable(
                f"Another folder is mounted at {path} than before.",
                remedy=f"Mount the one from before; or remove {self._kept}, and new instances are made in this one.",
            )
        return known

    def _known(self) -> SharedFolder | None:
        """Return the recorded folder at this path."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            known = msgspec.json.decode(self._kept.read_bytes(), type=SharedFolder)
            return known if known.path == str(self.path) else None
        return None

    def _mark(self, path: Path) -> None:
        """Find or create the folder's marker; of several servers, the first creates it."""
        try:
            if marker_of(path) is None:
                draft = path / f"{MARKER}.{secrets.token_hex(_ID_BYTES)}"
                write_atomically(draft, secrets.token_hex(_ID_BYTES) + "\n", mode=0o644)
                try:
                    with contextlib.suppress(FileExistsError):
                        (path / MARKER).hardlink_to(draft)
                finally:
                    draft.unlink()
                sync_folder(path)
            found = marker_of(path)
            if found is not None:
                known = SharedFolder(path=str(path), id=found)
                write_atomically(self._kept, msgspec.json.encode(known).decode(), mode=0o600)
        except OSError as error:
            raise Unavailable(
                f"The shared folder {path} cannot be marked: {error.strerror}.",
                remedy="Mount it, and give the server's user write access to it.",
            ) from error
