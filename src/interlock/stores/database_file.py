"""Taking the database file for this process, and connections to it. What is in it is not known here."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final

import apsw

from interlock.core.errors import StoreBusy, StoreCorrupt, StoreError
from interlock.stores.schema import upgrade
from interlock.stores.sqlite_errors import RESTORE_REMEDY, store_error

CHECKED_BYTES_MAX: Final = 64 * 1024 * 1024
"""A database up to this size is checked for damage whenever it is opened; that takes a fraction of a second."""

_BUSY_TIMEOUT_MS: Final = 5_000
_WRITER_CACHE_KIB: Final = 64 * 1024
_READER_CACHE_KIB: Final = 8 * 1024
_STATEMENTS_CACHED: Final = 256
_WAL_KEPT_BYTES_MAX: Final = 64 * 1024 * 1024


class DatabaseFile:
    """One database file, held by at most one process: whoever has the lock file beside it."""

    def __init__(self, path: Path) -> None:
        self.path: Final = path
        self._lock: int | None = None

    def take(self) -> None:
        """Lock the file for this process, make or upgrade the database, and see that it is whole.

        Raises:
            StoreBusy, StoreCorrupt, StoreNewer, StoreError: nothing was changed, and nothing is held.
        """
        self._check_place()
        self._lock = self._take_lock()
        try:
            upgrade(self.path)
            self.path.chmod(0o600)
            self._check_whole()
        except OSError as error:
            self.let_go()
            raise StoreError(
                f"{self.path} cannot be used: {error.strerror}.", remedy="Let the server's user read and write it."
            ) from error
        except BaseException:
            self.let_go()
            raise

    def let_go(self) -> None:
        """Give the file up. Every connection must be closed by now. Does nothing a second time."""
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def writer(self) -> apsw.Connection:
        """A connection that may write. The caller sees that there is only one."""
        connection = self._connect()
        connection.pragma("cache_size", -_WRITER_CACHE_KIB)
        connection.pragma("foreign_keys", True)
        connection.pragma("wal_autocheckpoint", 0)
        connection.pragma("journal_size_limit", _WAL_KEPT_BYTES_MAX)
        return connection

    def reader(self) -> apsw.Connection:
        """A connection that only reads, and never waits for the writer."""
        connection = self._connect()
        connection.pragma("cache_size", -_READER_CACHE_KIB)
        connection.pragma("query_only", True)
        return connection

    def _connect(self) -> apsw.Connection:
        try:
            connection = apsw.Connection(
                str(self.path), flags=apsw.SQLITE_OPEN_READWRITE, statementcachesize=_STATEMENTS_CACHED
            )
            connection.set_busy_timeout(_BUSY_TIMEOUT_MS)
            connection.pragma("journal_mode", "wal")
            connection.pragma("synchronous", "full")
            connection.pragma("temp_store", "memory")
        except apsw.Error as error:
            raise store_error(error, self.path) from error
        return connection

    def _check_place(self) -> None:
        folder = self.path.parent
        if not folder.is_dir():
            raise StoreError(f"The folder {folder} does not exist.", remedy=f"Make it: mkdir -p {folder}")
        if self.path.exists() and not self.path.is_file():
            raise StoreError(f"{self.path} is not a file.", remedy="Name another file for the database.")
        wanted = [folder, *([self.path] if self.path.exists() else [])]
        for place in wanted:
            if not os.access(place, os.W_OK | os.R_OK):
                raise StoreError(f"{place} cannot be written.", remedy=f"Let the server's user read and write {place}.")

    def _take_lock(self) -> int:
        lock_path = self.path.with_name(f"{self.path.name}.lock")
        try:
            descriptor = os.open(lock_path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(
                f"{lock_path} cannot be made: {error.strerror}.", remedy="Let the server's user write the folder."
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "of unknown id"
            os.close(descriptor)
            raise StoreBusy(
                f"Process {holder} holds {self.path}.",
                remedy=f"Stop that server (kill {holder}), or name another database file.",
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        return descriptor

    def _check_whole(self) -> None:
        if self.path.stat().st_size > CHECKED_BYTES_MAX:
            return
        connection = self.reader()
        try:
            verdict = connection.execute("PRAGMA quick_check(1)").get
        except apsw.Error as error:
            raise store_error(error, self.path) from error
        finally:
            connection.close()
        if verdict != "ok":
            raise StoreCorrupt(f"{self.path} is damaged: {verdict}.", remedy=RESTORE_REMEDY)
