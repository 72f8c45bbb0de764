"""The database file: lock, integrity check and connections."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Final

import apsw

from interlock.core.errors import StoreCorrupt, StoreError
from interlock.stores.file_lock import FileLock
from interlock.stores.reserve import clear_log, keep_log, log_of
from interlock.stores.schema import bring_up
from interlock.stores.sqlite_errors import RESTORE_REMEDY, store_error

CHECKED_BYTES_MAX: Final = 64 * 1024 * 1024
"""Databases up to this size are checked for corruption at each open, within a fraction of a second."""

_BUSY_TIMEOUT_MS: Final = 5_000
_WRITER_CACHE_KIB: Final = 64 * 1024
_READER_CACHE_KIB: Final = 8 * 1024
_STATEMENTS_CACHED: Final = 256
_WAL_KEPT_BYTES_MAX: Final = 64 * 1024 * 1024
_SETTINGS: Final = {"journal_mode": "wal", "synchronous": "full", "temp_store": "memory"}


class DatabaseFile:
    """A database file, locked by at most one process."""

    def __init__(self, path: Path) -> None:
        self.path: Final = path
        self._lock: Final = FileLock(path)

    def take(self) -> None:
        """Lock the file, create or migrate the database, and check its integrity.

        Raises:
            StoreBusy, StoreCorrupt, StoreNewer, StoreError: nothing was changed, and the file is not locked.
        """
        self._lock.take()
        try:
            bring_up(self.path)
            self.path.chmod(0o600)
            self._check_whole()
        except OSError as error:
            self.unlock()
            raise StoreError(
                f"{self.path} cannot be used: {error.strerror}.", remedy="Give the server's user read and write access."
            ) from error
        except BaseException:
            self.unlock()
            raise

    async def take_in_thread(self) -> None:
        """As `take`, in a thread. If cancelled, the file is not locked."""
        taking = asyncio.create_task(asyncio.to_thread(self.take), name="take the database file")
        try:
            await asyncio.shield(taking)
        except asyncio.CancelledError:
            # The thread continues, and would leave the file locked.
            while not taking.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({taking})
            if taking.exception() is None:
                self.unlock()
            raise

    def unlock(self, *, checkpointed: bool = False) -> None:
        """Unlock the file. All connections must be closed. Idempotent.

        `checkpointed` says that the database contains the whole write-ahead log, which is then cleared.
        """
        if checkpointed:
            with contextlib.suppress(OSError):
                clear_log(log_of(self.path))
        self._lock.unlock()

    def writer(self) -> apsw.Connection:
        """Open the writing connection. The caller ensures that there is only one."""
        return self._connect(
            {
                "cache_size": -_WRITER_CACHE_KIB,
                "foreign_keys": True,
                "wal_autocheckpoint": 0,
                "journal_size_limit": _WAL_KEPT_BYTES_MAX,
            }
        )

    def reader(self) -> apsw.Connection:
        """Open a read-only connection, which never waits for the writer."""
        return self._connect({"cache_size": -_READER_CACHE_KIB, "query_only": True})

    def _connect(self, settings: dict[str, int]) -> apsw.Connection:
        """Open a connection with additional pragmas. Raises `StoreError`."""
        try:
            connection = apsw.Connection(
                str(self.path), flags=apsw.SQLITE_OPEN_READWRITE, statementcachesize=_STATEMENTS_CACHED
            )
            try:
                connection.set_busy_timeout(_BUSY_TIMEOUT_MS)
                keep_log(connection)
                for name, value in {**_SETTINGS, **settings}.items():
                    connection.pragma(name, value)
            except BaseException:
                connection.close()
                raise
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
