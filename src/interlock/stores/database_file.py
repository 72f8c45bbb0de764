"""Taking the database file for this process, and connections to it. What is in it is not known here."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import apsw

from interlock.core.errors import StoreCorrupt, StoreError
from interlock.stores.file_lock import FileLock
from interlock.stores.schema import bring_up
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
        self._lock: Final = FileLock(path)

    def take(self) -> None:
        """Lock the file for this process, make or upgrade the database, and see that it is whole.

        Raises:
            StoreBusy, StoreCorrupt, StoreNewer, StoreError: nothing was changed, and nothing is held.
        """
        self._lock.take()
        try:
            bring_up(self.path)
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
        self._lock.let_go()

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
