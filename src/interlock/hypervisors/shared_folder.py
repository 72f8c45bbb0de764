"""The folder that hosts share, in which root disks are kept for all of them, and the marker by which it is known.

DIR/
    interlock-shared-folder     the folder's id: whoever finds none, or another one, is not in that folder
    instances/ID/               the root disks of one instance, whichever host it is on

A folder that is not mounted is an empty folder of the same name, and two hosts may have different folders of one name:
nothing is looked for, made or removed in a folder whose marker is not the one that the instance was made with. The
server keeps which marker it found or made, and makes one only where it has never seen any. Other servers may use the
same folder: an instance's folder is touched only by who knows its id.
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
from interlock.core.errors import NoRoom, Refused, Unavailable
from interlock.core.records import SharedFolder
from interlock.hypervisors.durable_files import sync_folder, write_whole

MARKER: Final = "interlock-shared-folder"
INSTANCES: Final = "instances"
_ID_BYTES: Final = 16
_MARKER_BYTES_MAX: Final = 256
_GIB: Final = 1 << 30
_MIB: Final = 1 << 20
_LOG = structlog.get_logger(__name__)


def marker_of(folder: Path) -> str | None:
    """What the marker in the folder says; None where there is none. Raises OSError."""
    try:
        with (folder / MARKER).open("rb") as file:
            return file.read(_MARKER_BYTES_MAX).decode("ascii", "replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def instance_place(shared: SharedFolder, instance_id: str) -> Path:
    """Where the root disks of an instance are. Raises `Refused` where this host has not that folder."""
    folder = Path(shared.path)
    try:
        found = marker_of(folder)
    except OSError as error:
        raise Refused(f"The shared folder {folder} cannot be read: {error.strerror}.") from error
    if found is None:
        raise Refused(
            f"The shared folder {folder} is not there: it has no {MARKER}.", remedy="Mount it on this host, then retry."
        )
    if found != shared.id:
        raise Refused(
            f"The folder {folder} on this host is not the one that the instance's root disk is in.",
            remedy="Mount the same folder on all hosts that are to have it.",
        )
    return folder / INSTANCES / instance_id


def shared_roots_of(config: Config) -> MarkedFolder:
    """The folder that the configuration names, if it names one."""
    named = config.hosts.shared_dir
    kept = config.folder / "shared-folder.json"
    return MarkedFolder(Path(named) if named else None, kept, reserved_gib=config.host_disk_reserved_gib)


class MarkedFolder:
    """Implements `ports.SharedRoots` on one folder.

    Args:
        path: the folder; None: there is none.
        kept: the server's own file, in which it notes which folder it found there.
        reserved_gib: how much of its file system must stay free when an instance is made, in GiB.
    """

    def __init__(self, path: Path | None, kept: Path, *, reserved_gib: int) -> None:
        self.path = path
        self._kept = kept
        self._reserved_gib = reserved_gib

    def open(self) -> None:
        """Mark the folder, if neither it nor this server knows a marker. What is wrong is logged: VMs go on."""
        if self.path is None:
            return
        try:
            if self._known() is None:
                self._mark(self.path)
            self._find(self.path)
        except Unavailable as error:
            _LOG.warning("the shared folder cannot be used", folder=str(self.path), why=error.message)

    async def folder(self) -> SharedFolder | None:
        """See `ports.SharedRoots`."""
        return None if self.path is None else await asyncio.to_thread(self._usable, self.path)

    def _usable(self, path: Path) -> SharedFolder:
        found = self._find(path)
        room = os.statvfs(path)
        free_mib = room.f_bavail * room.f_frsize // _MIB
        if free_mib * _MIB < self._reserved_gib * _GIB:
            raise NoRoom(
                f"{self._reserved_gib} GiB of the shared folder {path} must stay free, {free_mib} MiB are.",
                needed={"disk_mib": self._reserved_gib * 1024},
                free={"disk_mib": free_mib},
                remedy="Make room on its file system.",
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
        """Which folder was found at this path before."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            known = msgspec.json.decode(self._kept.read_bytes(), type=SharedFolder)
            return known if known.path == str(self.path) else None
        return None

    def _mark(self, path: Path) -> None:
        """Find the folder's marker, or give it one; whoever comes first of several servers does."""
        try:
            if marker_of(path) is None:
                draft = path / f"{MARKER}.{secrets.token_hex(_ID_BYTES)}"
                write_whole(draft, secrets.token_hex(_ID_BYTES) + "\n", mode=0o644)
                try:
                    with contextlib.suppress(FileExistsError):
                        (path / MARKER).hardlink_to(draft)
                finally:
                    draft.unlink()
                sync_folder(path)
            found = marker_of(path)
            if found is not None:
                known = SharedFolder(path=str(path), id=found)
                write_whole(self._kept, msgspec.json.encode(known).decode(), mode=0o600)
        except OSError as error:
            raise Unavailable(
                f"The shared folder {path} cannot be marked: {error.strerror}.",
                remedy="Mount it, and give the server's user write access to it.",
            ) from error
