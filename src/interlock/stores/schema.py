"""Schema versions: detection, creation and migration of a database. Each function opens and closes the file."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Final

import apsw
import msgspec

from interlock.core.errors import StoreCorrupt, StoreError, StoreNewer
from interlock.stores.file_lock import FileLock
from interlock.stores.migrations import STEPS
from interlock.stores.reserve import has_changes, keep_log, log_of
from interlock.stores.sqlite_errors import RESTORE_REMEDY, store_error

HEAD: Final = next(reversed(STEPS))
"""The newest revision."""

_FILLED: Final = ("guests/vms", "simulated", "volumes", "dumps")
"""Folders that stay empty until the database has records of their content."""
_NONE: Final = "none"
_MAGIC: Final = b"SQLite format 3\x00"


class Age(Enum):
    """Age of a database's schema."""

    FRESH = "fresh"
    """The file does not exist or is empty."""
    OLDER = "older"
    CURRENT = "current"


class Upgrade(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `upgrade`."""

    before: str | None
    """The revision before; None if the database was created."""
    after: str
    copy: Path | None = None
    """The backup of the database before a migration; None if there was none."""


def upgrade(path: Path) -> Upgrade:
    """Migrate the database at `path` to the newest schema, or create it. No server may use it.

    Raises:
        StoreBusy, StoreCorrupt, StoreNewer, StoreError
    """
    with FileLock(path):
        return bring_up(path)


def bring_up(path: Path) -> Upgrade:
    """As `upgrade`, for the holder of the lock. No connection to the database may be open.

    Migrates in one transaction, so that a killed process leaves the old schema. An older database is first copied to
    `<name>.before-<newest revision>`.

    Raises:
        StoreCorrupt, StoreNewer, StoreError
    """
    age, revision = look(path)
    match age:
        case Age.CURRENT:
            return Upgrade(before=revision, after=HEAD)
        case Age.FRESH:
            _require_nothing_known(path)
            _make(path)
            return Upgrade(before=None, after=HEAD)
        case Age.OLDER:
            copy = _copy_aside(path)
            _migrate(path)
            return Upgrade(before=revision, after=HEAD, copy=copy)


def _require_nothing_known(path: Path) -> None:
    """Raise `StoreCorrupt` if files beside it show that there was a database, which a new one must not replace."""
    log = log_of(path)
    folders = (path.parent / name for name in _FILLED)
    found = [folder for folder in folders if folder.is_dir() and any(folder.iterdir())]
    if found or has_changes(log):
        raise StoreCorrupt(
            f"The database {path} {'is empty' if path.exists() else 'is missing'}, but {found[0] if found else log} is "
            "not empty.",
            remedy="Restore a backup of the database. To start with an empty one, without the former records and "
            "tokens, run `interlock db new`; the files of VMs and volumes are kept.",
        )


def make_new(path: Path) -> None:
    """Create an empty database if there is none or an empty one; move a write-ahead log beside it aside.

    Raises:
        StoreBusy: a server uses it.
        StoreError: a database exists.
    """
    with FileLock(path):
        if look(path)[0] is not Age.FRESH:
            raise StoreError(
                f"The database {path} already exists.", remedy="Move it aside first, together with its -wal file."
            )
        log = log_of(path)
        if has_changes(log):
            log.replace(log.with_name(f"{log.name}.old"))
        _make(path)


def look(path: Path) -> tuple[Age, str | None]:
    """Return the age of the database's schema, and its revision if it has one. Changes nothing.

    Raises:
        StoreCorrupt: not a database, or a damaged one.
        StoreNewer: the revision is unknown.
        StoreError: another program's database, or not readable.
    """
    if not path.exists() or path.stat().st_size == 0:
        return Age.FRESH, None
    _check_magic(path)
    try:
        revision = _read_revision(path)
    except apsw.Error as error:
        raise store_error(error, path) from error
    if revision == HEAD:
        return Age.CURRENT, revision
    if revision == _NONE:
        return Age.FRESH, None
    if revision in STEPS:
        return Age.OLDER, revision
    raise StoreNewer(
        f"{path} was written by a newer Interlock (schema {revision}; this one knows up to {HEAD}).",
        remedy="Start the Interlock that wrote it, or restore the copy made before the upgrade.",
    )


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read: {error.strerror}.", remedy="Give the server's user read and write access."
        ) from error
    if magic != _MAGIC:
        raise StoreCorrupt(
            f"{path} is not an SQLite database.",
            remedy="Name another file for the database, or move this one aside; it was not changed.",
        )


def _read_revision(path: Path) -> str:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        keep_log(connection)
        tables = {str(name) for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        if not tables:
            return _NONE
        if "alembic_version" not in tables or "instances" not in tables:
            raise StoreError(
                f"{path} is not an Interlock database.",
                remedy="Name another file for the database; this one was not changed.",
            )
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    finally:
        connection.close()
    if row is None:
        raise StoreCorrupt(f"{path} has no schema version.", remedy=RESTORE_REMEDY)
    return str(row[0])


def _make(path: Path) -> None:
    was_there = path.exists()
    _make_empty(path)
    try:
        _migrate(path)
    except BaseException:
        if not was_there:
            path.unlink(missing_ok=True)
        raise


def _make_empty(path: Path) -> None:
    # SQLite gives its -wal and -shm files the mode of the database.
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))


def _copy_aside(path: Path) -> Path:
    copy = path.with_name(f"{path.name}.before-{HEAD}")
    unfinished = path.with_name(f"{copy.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    _make_empty(unfinished)
    try:
        source, target = apsw.Connection(str(path)), apsw.Connection(str(unfinished))
        try:
            with target.backup("main", source, "main") as backup:
                backup.step(-1)
        finally:
            target.close()
            source.close()
    except apsw.Error as error:
        unfinished.unlink(missing_ok=True)
        raise store_error(error, unfinished) from error
    unfinished.rename(copy)
    _sync_folder(path.parent)
    return copy


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _migrate(path: Path) -> None:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        keep_log(connection)
        connection.execute("PRAGMA synchronous = FULL; BEGIN EXCLUSIVE")
        _take_steps(connection)
        connection.execute("COMMIT")
    except apsw.Error as error:
        raise StoreError(
            f"Migrating {path} to schema {HEAD} failed: {error}; it was not changed.",
            remedy="Free space, check that no other program has the file open, then retry.",
        ) from error
    finally:
        connection.close()


def _take_steps(connection: apsw.Connection) -> None:
    """Run the migrations and record the revision, in the table that Alembic used for the first databases."""
    connection.execute("CREATE TABLE IF NOT EXISTS alembic_version (version_num TEXT NOT NULL PRIMARY KEY)")
    before = connection.execute("SELECT version_num FROM alembic_version").get
    for revision, statements in STEPS.items():
        if before is None or revision > before:
            for statement in statements:
                connection.execute(statement)
    connection.execute("DELETE FROM alembic_version")
    connection.execute("INSERT INTO alembic_version VALUES (?)", (HEAD,))
