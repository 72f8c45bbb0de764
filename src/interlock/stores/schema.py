"""Which layout a database has, and how it is brought to this one's. Rows are neither read nor written here.

SQLite drops every lock that a process has on a file as soon as any library of that process closes it. Alembic works
through Python's own SQLite and the store through apsw's, so the two must never have the file open at the same time:
every function here opens the file by itself and has closed it when it returns.
"""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Any, Final

import apsw
import msgspec

from interlock.core.errors import StoreCorrupt, StoreError, StoreNewer
from interlock.stores.file_lock import FileLock
from interlock.stores.sqlite_errors import RESTORE_REMEDY, store_error

HEAD: Final = "0003"
"""The newest revision in `migrations/versions`, so that a database that has it is opened without Alembic."""

_NONE: Final = "none"
_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_MAGIC: Final = b"SQLite format 3\x00"


class Age(Enum):
    """How a database's layout stands to this one's."""

    FRESH = "fresh"
    """There is no file, or nothing is in it."""
    OLDER = "older"
    CURRENT = "current"


class Upgrade(msgspec.Struct, frozen=True, kw_only=True):
    """What `upgrade` did."""

    before: str | None
    """The revision that the database had; None if it was made now."""
    after: str
    copy: Path | None = None
    """Where the database as it was before is kept; None where there was nothing to keep."""


def upgrade(path: Path) -> Upgrade:
    """Bring the database at `path` to this layout, or make it, if no server has it.

    Raises:
        StoreBusy, StoreCorrupt, StoreNewer, StoreError
    """
    with FileLock(path):
        return bring_up(path)


def bring_up(path: Path) -> Upgrade:
    """What `upgrade` does, for whoever has the lock already. Nobody may have the database open.

    The layout changes in one transaction: a process that is killed in the middle leaves the old one. An older
    database is copied aside first, to `<name>.before-<this revision>`.

    Raises:
        StoreCorrupt, StoreNewer, StoreError
    """
    age, revision = look(path)
    match age:
        case Age.CURRENT:
            return Upgrade(before=revision, after=HEAD)
        case Age.FRESH:
            _make(path)
            return Upgrade(before=None, after=HEAD)
        case Age.OLDER:
            copy = _copy_aside(path)
            _migrate(path)
            return Upgrade(before=revision, after=HEAD, copy=copy)


def look(path: Path) -> tuple[Age, str | None]:
    """How old the database is, and its revision if it has one. Changes nothing.

    Raises:
        StoreCorrupt: it is no database, or a broken one.
        StoreNewer: its revision is not known here.
        StoreError: it is another program's database, or cannot be read.
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
    if revision in _revisions():
        return Age.OLDER, revision
    raise StoreNewer(
        f"{path} was written by a newer Interlock (its layout is {revision}; this one knows up to {HEAD}).",
        remedy="Start the Interlock that wrote it, or put back the copy that was taken before the upgrade.",
    )


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read: {error.strerror}.", remedy="Let the server's user read and write it."
        ) from error
    if magic != _MAGIC:
        raise StoreCorrupt(
            f"{path} is not an SQLite database.",
            remedy="Name another file for the database, or move this one aside; nothing in it was changed.",
        )


def _read_revision(path: Path) -> str:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        tables = {str(name) for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        if not tables:
            return _NONE
        if "alembic_version" not in tables or "instances" not in tables:
            raise StoreError(
                f"{path} is another program's database.",
                remedy="Name another file for the database; nothing in this one was changed.",
            )
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    finally:
        connection.close()
    if row is None:
        raise StoreCorrupt(f"{path} does not say which layout it has.", remedy=RESTORE_REMEDY)
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


def _revisions() -> frozenset[str]:
    from alembic.script import ScriptDirectory

    return frozenset(script.revision for script in ScriptDirectory(str(_MIGRATIONS)).walk_revisions())


def _migrate(path: Path) -> None:
    from alembic import command
    from alembic.config import Config
    from sqlalchemy import create_engine, event
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.pool import NullPool

    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)

    # Python's driver begins and ends transactions on its own, and not around schema changes, unless it is told not to.
    @event.listens_for(engine, "connect")
    def _leave_transactions_alone(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN EXCLUSIVE")

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except DBAPIError as error:
        raise StoreError(
            f"The layout of {path} could not be brought to {HEAD}: {error.orig}; it was left as it was.",
            remedy="Make room and see that nobody else has the file open, then start again.",
        ) from error
    finally:
        engine.dispose()
