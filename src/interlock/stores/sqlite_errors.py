"""What SQLite's errors mean to the people who have to do something about them. Nothing is raised or handled here."""

from __future__ import annotations

from pathlib import Path

import apsw

from interlock.core.errors import StoreBusy, StoreCorrupt, StoreError, StoreFull

RESTORE_REMEDY = "Stop the server, move the file aside together with its -wal file, and put a backup in its place."


def store_error(error: apsw.Error, path: Path) -> StoreError:
    """The error of the store's own tree that stands for one of SQLite's."""
    match error:
        case apsw.FullError():
            return StoreFull(
                f"There is no room to write {path}; nothing was kept.",
                remedy=f"Free some space in {path.parent}, then ask again. The server need not be restarted.",
            )
        case apsw.CorruptError() | apsw.NotADBError():
            return StoreCorrupt(f"{path} is not a whole database: {error}.", remedy=RESTORE_REMEDY)
        case apsw.BusyError() | apsw.LockedError():
            return StoreBusy(
                f"Another program holds a lock on {path}.",
                remedy="Close whatever has the file open (a backup, the sqlite3 shell), then ask again.",
            )
        case apsw.ReadOnlyError() | apsw.PermissionsError() | apsw.CantOpenError():
            return StoreError(
                f"{path} cannot be written: {error}.",
                remedy=f"Let the server's user read and write {path} and the folder {path.parent}.",
            )
        case apsw.IOError():
            return StoreError(
                f"Reading or writing {path} failed: {error}; nothing was kept.",
                remedy="Look at the kernel's log and the disk's health; ask again when the disk answers.",
            )
        case _:
            return StoreError(f"SQLite refused to use {path}: {error}.", remedy="This is a defect; please report it.")
