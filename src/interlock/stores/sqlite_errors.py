"""Translates SQLite's errors to `StoreError`s with remedies."""

from __future__ import annotations

from pathlib import Path

import apsw

from interlock.core.errors import StoreBusy, StoreCorrupt, StoreError, StoreFull

RESTORE_REMEDY = "Stop the server, move the file aside together with its -wal file, and put a backup in its place."


def store_error(error: apsw.Error, path: Path) -> StoreError:
    """Return the `StoreError` for an error of SQLite."""
    match error:
        case apsw.FullError():
            return StoreFull(
                f"No space left to write {path}; nothing was written.",
                remedy=f"Free some space in {path.parent}, then retry. The server need not be restarted.",
            )
        case apsw.CorruptError() | apsw.NotADBError():
            return StoreCorrupt(f"The database {path} is damaged: {error}.", remedy=RESTORE_REMEDY)
        case apsw.BusyError() | apsw.LockedError():
            return StoreBusy(
                f"Another program holds a lock on {path}.",
                remedy="Close the program that has the file open (a backup, the sqlite3 shell), then retry.",
            )
        case apsw.ReadOnlyError() | apsw.PermissionsError() | apsw.CantOpenError():
            return StoreError(
                f"{path} cannot be written: {error}.",
                remedy=f"Give the server's user read and write access to {path} and the folder {path.parent}.",
            )
        case apsw.IOError():
            return StoreError(
                f"I/O error on {path}: {error}; nothing was written.",
                remedy="Check the kernel's log and the disk's health; retry when the disk responds.",
            )
        case _:
            return StoreError(f"SQLite failed on {path}: {error}.", remedy="This is a bug; please report it.")
