"""The reserve for a full disk: space inside the database's files, for writes that free space.

In the database file it is rows of zeros, which are deleted to free their pages. In the write-ahead log it is
preallocated blocks: SQLite restarts the log at its beginning after each checkpoint and keeps the file's length. It is
not a separate file, because a guest's disk could take the space when that is deleted.

Used by the writer's thread only.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Final

import apsw

from interlock.core.errors import StoreError, StoreFull

LOG_PAGES: Final = 1_024
"""Number of pages preallocated for the log."""
CHECKPOINT_PAGES_WHEN_FULL: Final = 256
"""Log size that triggers a checkpoint while the disk is full; one more transaction still fits the allocated blocks."""
_ROW_PAGES: Final = 16
"""Minimum number of pages of a row of the reserve."""
_STEP_PAGES: Final = 256
"""Number of pages that are allocated in advance in the database file."""
_LOG_HEADER_BYTES: Final = 32
_FRAME_HEADER_BYTES: Final = 24
_MIB: Final = 1 << 20
NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error codes for no space left: on the disk, in a quota, or by a file size limit."""


class Reserve:
    """The reserve of a database, on its writer's connection."""

    def __init__(self, connection: apsw.Connection, path: Path, mib: int) -> None:
        self._connection = connection
        self._path = path
        self._log = log_of(path)
        self._log_allocated = False
        self._page_bytes = int(connection.pragma("page_size"))
        self._rows = int(connection.execute("SELECT count(*) FROM reserve").get)
        self._rows_wanted = mib * _MIB // (_ROW_PAGES * self._page_bytes)
        self._pages_allocated = 0
        self.whole = True
        """False while the disk is full and the reserve is in use."""

    def require(self, pages: int) -> None:
        """Ensure that `pages` can be written without the reserve; create or restore the reserve if needed.

        Blocks are allocated before the write, so that no checkpoint can fail for lack of space.

        Raises:
            StoreFull: no space left.
            StoreError: the log cannot be written.
            apsw.Error: the database cannot be written, such as if another program holds a lock.
        """
        try:
            if not (self.whole and self._log_allocated):
                _allocate(self._log, _LOG_HEADER_BYTES + LOG_PAGES * (_FRAME_HEADER_BYTES + self._page_bytes))
                self._log_allocated = True
            if self._rows < self._rows_wanted:
                self._fill(self._rows_wanted - self._rows)
            self._allocate(pages)
        except (OSError, apsw.FullError) as error:
            if isinstance(error, OSError) and error.errno not in NO_SPACE:
                raise StoreError(
                    f"{self._log} cannot be written: {error.strerror}; nothing was written.",
                    remedy=f"Check {self._path.parent} and the kernel's log, then retry.",
                ) from error
            self.whole = False
            raise StoreFull(
                f"No space left to write {self._path}; nothing was written.",
                remedy=f"Free some space in {self._path.parent}, then retry; the server need not be restarted. "
                "Stopping and deleting VMs works meanwhile.",
            ) from error
        self.whole = True

    def give_up(self, pages: int) -> None:
        """Free up to `pages` pages in the database file from the reserve. Raises `apsw.Error`."""
        missing = pages - int(self._connection.pragma("freelist_count"))
        if missing > 0 and self._rows:
            rows = -(-missing // _ROW_PAGES)
            self._connection.execute("DELETE FROM reserve WHERE id IN (SELECT id FROM reserve LIMIT ?)", (rows,))
            self._rows -= self._connection.changes()

    def checkpointed(self) -> None:
        """Handle that SQLite truncated the database file to the pages in use."""
        self._pages_allocated = 0

    def _fill(self, rows: int) -> None:
        self._allocate(rows * (_ROW_PAGES + 1))
        content = _ROW_PAGES * self._page_bytes
        self._connection.execute(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
            "INSERT INTO reserve (content) SELECT zeroblob(?) FROM n",
            (rows, content),
        )
        self._rows += rows

    def _allocate(self, pages: int) -> None:
        """Allocate blocks for so many more pages of the database file."""
        connection = self._connection
        free, used = int(connection.pragma("freelist_count")), int(connection.pragma("page_count"))
        needed = used + max(0, pages - free)
        if needed > self._pages_allocated:
            size = (needed + _STEP_PAGES) * self._page_bytes
            _control(connection, apsw.SQLITE_FCNTL_CHUNK_SIZE, ctypes.c_int(self._page_bytes))
            try:
                _control(connection, apsw.SQLITE_FCNTL_SIZE_HINT, ctypes.c_longlong(size))
            except apsw.IOError as error:
                reason = ctypes.c_int()
                _control(connection, apsw.SQLITE_FCNTL_LAST_ERRNO, reason)
                if reason.value not in NO_SPACE:
                    raise
                raise apsw.FullError(str(error)) from error
            self._pages_allocated = needed + _STEP_PAGES


def log_of(path: Path) -> Path:
    """The write-ahead log of the database at `path`."""
    return path.with_name(f"{path.name}-wal")


def keep_log(connection: apsw.Connection) -> None:
    """Have SQLite leave the log where it is when the connection is closed: its blocks are part of the reserve."""
    _control(connection, apsw.SQLITE_FCNTL_PERSIST_WAL, ctypes.c_int(1))


def has_changes(log: Path) -> bool:
    """Whether there is a log with something in it; True where it cannot be read."""
    try:
        with log.open("rb") as file:
            return any(file.read(_LOG_HEADER_BYTES))
    except FileNotFoundError:
        return False
    except OSError:
        return True


def clear_log(log: Path) -> None:
    """Void a log all of which is in the database, so that a backup put in its place is not changed by it.

    No connection may be open. Raises OSError.
    """
    if has_changes(log):
        descriptor = os.open(log, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(descriptor, bytes(_LOG_HEADER_BYTES), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _allocate(log: Path, size: int) -> None:
    # Unlike the database file, no lock is held on the log, which closing a descriptor of it would drop.
    descriptor = os.open(log, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)


def _control(connection: apsw.Connection, operation: int, value: ctypes.c_int | ctypes.c_longlong) -> None:
    connection.file_control("main", operation, ctypes.addressof(value))
