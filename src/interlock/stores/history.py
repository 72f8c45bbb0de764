"""Reads recorded events from a database file, also while a server uses it.

The file is opened read-only and not locked. Events are read in short transactions, because a long one would block the
server's checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote

import apsw

from interlock.core.errors import Invalid, StoreError, StoreNewer
from interlock.stores.clock import Offsets
from interlock.stores.reserve import has_changes, log_of
from interlock.stores.schema import HEAD
from interlock.stores.sqlite_errors import store_error
from interlock.stores.statements import OFFSETS

_SUBMISSIONS: Final = ("request.admitted", "request.redundant", "request.denied", "request.held")
_SERVICE: Final = (
    "request.taken",
    "request.progress",
    "request.succeeded",
    "request.failed",
    "request.cancelled",
    "request.superseded",
    "instance.adopted",
)
_BATCH: Final = 50_000
"""Number of events per transaction."""
_BUSY_TIMEOUT_MS: Final = 5_000
_NEEDED: Final = {
    "events": {"sequence", "instance_seq", "project", "request_id", "kind", "at_ms", "data"},
    "instances": {"seq", "id"},
    "alembic_version": {"version_num"},
}
"""The columns that are read; every schema version has them."""


class History:
    """The events of a database, in order."""

    def __init__(self, path: Path) -> None:
        """Open the database.

        Raises:
            Invalid: it does not exist, or is empty.
            StoreNewer, StoreCorrupt, StoreError: it cannot be read, or is not an Interlock database.
        """
        self.path: Final = path
        self._connection = _open(path)
        try:
            self._check_layout()
            self._offsets = self._find_offsets()
            self._first, self._last = self._ends()
        except apsw.Error as error:
            self._connection.close()
            raise store_error(error, path) from error
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def _check_layout(self) -> None:
        for table, needed in _NEEDED.items():
            columns = {row[1] for row in self._connection.execute(f"PRAGMA table_info({table})")}
            if not columns:
                tables = self._connection.execute("SELECT count(*) FROM sqlite_schema WHERE type = 'table'").get
                if not tables:
                    raise Invalid(f"The database {self.path} is empty.", remedy=_NAME_ONE)
                raise StoreError(f"{self.path} is not an Interlock database.", remedy=_NAME_ONE)
            if not needed <= columns:
                raise StoreError(
                    f"The schema of {self.path} is older than this Interlock reads.",
                    remedy="Copy it, and migrate the copy with `interlock db upgrade`.",
                )
        revision = str(self._connection.execute("SELECT version_num FROM alembic_version").get)
        if revision > HEAD:
            raise StoreNewer(
                f"{self.path} was written by a newer Interlock (schema {revision}; this one knows up to {HEAD}).",
                remedy="Use the Interlock that wrote it.",
            )

    def _ends(self) -> tuple[int, int]:
        """Return the first and the present last sequence number; later events are ignored."""
        row = self._connection.execute("SELECT min(sequence), max(sequence) FROM events").fetchone()
        return (0, 0) if row is None or row[0] is None else (row[0], row[1])

    def _find_offsets(self) -> Offsets:
        """Return the offsets to displayed time; none in a database without them."""
        if not self._connection.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'clock_offsets'").get:
            return Offsets()
        found: list[Any] = self._connection.execute(OFFSETS).fetchall()
        return Offsets(tuple(found))

    @property
    def first_at_ms(self) -> int | None:
        """Time of the first event in ms since the Unix epoch; None if there is none."""
        return self._shown_from(self._first)

    @property
    def last_at_ms(self) -> int | None:
        """Time of the last event; None if there is none."""
        return self._shown_from(self._last)

    def _shown_from(self, sequence: int) -> int | None:
        at_ms = self._time_from(sequence)
        return None if at_ms is None else self._offsets.shown_ms(at_ms)

    def submissions(
        self, since_ms: int | None = None, until_ms: int | None = None, project: str | None = None
    ) -> Iterator[tuple[int, int, str, str, int, str]]:
        """Yield the submissions from `since_ms` (inclusive) to `until_ms` (exclusive), in wall-clock time.

        Each as sequence number, instance number, project, kind of event, time in ms, and data as JSON.
        """
        columns = f"sequence, instance_seq, project, kind, {self._offsets.shown_sql('at_ms')}, data"
        return self._read(columns, _SUBMISSIONS, since_ms, until_ms, project)

    def service(
        self, since_ms: int | None = None, until_ms: int | None = None, project: str | None = None
    ) -> Iterator[tuple[str | None, str, int, str]]:
        """Yield the events of request execution from `since_ms` (inclusive) to `until_ms` (exclusive).

        Each as request id, kind, time in ms on the store's clock (for differences), and data as JSON.
        """
        return self._read("request_id, kind, at_ms, data", _SERVICE, since_ms, until_ms, project)

    def instance_id(self, number: int) -> str:
        """Return the id of an instance by its number in `submissions`."""
        row = self._ask("SELECT id FROM instances WHERE seq = ?", (number,))
        return f"#{number}" if row is None else str(row[0])

    def _read(
        self, columns: str, kinds: Iterable[str], since_ms: int | None, until_ms: int | None, project: str | None
    ) -> Iterator[Any]:
        begin = self._first if since_ms is None else self._sequence_at(since_ms)
        end = self._last + 1 if until_ms is None else self._sequence_at(until_ms)
        conditions = ["sequence >= ?", "sequence < ?", f"kind IN ({', '.join(repr(kind) for kind in kinds)})"]
        values: tuple[str, ...] = ()
        if project is not None:
            conditions.append("project = ?")
            values = (project,)
        statement = f"SELECT {columns} FROM events WHERE {' AND '.join(conditions)} ORDER BY sequence"  # noqa: S608
        try:
            for start in range(begin, end, _BATCH):
                yield from self._connection.execute(statement, (start, min(end, start + _BATCH), *values))
        except apsw.Error as error:
            raise store_error(error, self.path) from error

    def _sequence_at(self, at_ms: int) -> int:
        """Return the first sequence number at or after a wall-clock time, by binary search."""
        at_ms = self._offsets.stored_ms(at_ms)
        low, high = self._first, self._last + 1
        while low < high:
            middle = (low + high) // 2
            found = self._time_from(middle)
            if found is not None and found < at_ms:
                low = middle + 1
            else:
                high = middle
        return low

    def _time_from(self, sequence: int) -> int | None:
        row = self._ask("SELECT at_ms FROM events WHERE sequence >= ? ORDER BY sequence LIMIT 1", (sequence,))
        return None if row is None else int(row[0])

    def _ask(self, statement: str, values: Sequence[Any]) -> tuple[Any, ...] | None:
        try:
            row: tuple[Any, ...] | None = self._connection.execute(statement, values).fetchone()
        except apsw.Error as error:
            raise store_error(error, self.path) from error
        return row


_NAME_ONE: Final = "Name the database of a server with --database, or its configuration with --config."


def _open(path: Path) -> apsw.Connection:
    try:
        exists = path.is_file()
        size = path.stat().st_size if exists else 0
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}.", remedy="Give this user read access.") from error
    if not exists:
        raise Invalid(f"Database {path} not found.", remedy=_NAME_ONE)
    if size == 0:
        raise Invalid(f"The database {path} is empty.", remedy=_NAME_ONE)
    try:
        return _connect(f"file:{quote(str(path.absolute()))}?mode=ro")
    except (apsw.CantOpenError, apsw.ReadOnlyError) as error:
        # The folder is not writable and no process has the file open, so the file does not change.
        log = log_of(path)
        if has_changes(log):
            raise StoreError(
                f"{path} has changes in {log.name}, which cannot be read: {error}.",
                remedy="Give this user write access to the folder, or copy both files to a writable folder.",
            ) from error
    except apsw.NotADBError as error:
        raise Invalid(f"{path} is not an SQLite database.", remedy=_NAME_ONE) from error
    except apsw.Error as error:
        raise store_error(error, path) from error
    try:
        return _connect(f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1")
    except apsw.Error as error:
        raise store_error(error, path) from error


def _connect(uri: str) -> apsw.Connection:
    connection = apsw.Connection(uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
    try:
        connection.set_busy_timeout(_BUSY_TIMEOUT_MS)
        connection.pragma("query_only", True)
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
    except BaseException:
        connection.close()
        raise
    return connection
