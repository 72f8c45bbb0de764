"""Recorded history, read from a database file. Nothing is written, and no server is kept from anything.

The file is opened for reading only and its lock file is left alone, so that this works beside a server, and on a copy.
Events are read in pieces, each in a short transaction of its own: a long one would keep the server's log from being
carried over into the database.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote

import apsw

from interlock.core.errors import Invalid, StoreError, StoreNewer
from interlock.stores.schema import HEAD
from interlock.stores.sqlite_errors import store_error

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
_AT_ONCE: Final = 50_000
"""How many events one transaction passes over."""
_BUSY_TIMEOUT_MS: Final = 5_000
_NEEDED: Final = {
    "events": {"sequence", "instance_seq", "project", "request_id", "kind", "at_ms", "data"},
    "instances": {"seq", "id"},
    "alembic_version": {"version_num"},
}
"""What is read, which every layout so far has."""


class History:
    """The events of one database, in the order in which they happened."""

    def __init__(self, path: Path) -> None:
        """Open the database.

        Raises:
            Invalid: there is none.
            StoreNewer, StoreCorrupt, StoreError: it cannot be read, or is another program's.
        """
        self.path: Final = path
        self._connection = _open(path)
        try:
            self._check_layout()
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
                    raise Invalid(f"{self.path} is empty: nothing was recorded in it.", remedy=_NAME_ONE)
                raise StoreError(f"{self.path} is another program's database.", remedy=_NAME_ONE)
            if not needed <= columns:
                raise StoreError(
                    f"{self.path} has an older layout than this Interlock reads.",
                    remedy="Copy it, and bring the copy to this version's layout with `interlock db upgrade`.",
                )
        revision = str(self._connection.execute("SELECT version_num FROM alembic_version").get)
        if revision > HEAD:
            raise StoreNewer(
                f"{self.path} was written by a newer Interlock (its layout is {revision}, and {HEAD} is known here).",
                remedy="Use the Interlock that wrote it.",
            )

    def _ends(self) -> tuple[int, int]:
        """The first sequence number, and the last of now: what comes while this is read is not looked at."""
        row = self._connection.execute("SELECT min(sequence), max(sequence) FROM events").fetchone()
        return (0, 0) if row is None or row[0] is None else (row[0], row[1])

    @property
    def first_at_ms(self) -> int | None:
        """When the first event was recorded, in ms since the Unix epoch; None if there is none."""
        return self._time_from(self._first)

    @property
    def last_at_ms(self) -> int | None:
        """When the last event was recorded; None if there is none."""
        return self._time_from(self._last)

    def submissions(
        self, since_ms: int | None = None, until_ms: int | None = None, project: str | None = None
    ) -> Iterator[tuple[int, int, str, str, int, str]]:
        """Every submission from `since_ms` on and before `until_ms`.

        Each with its sequence number, its instance's number, its project, the kind of its event, its time in ms, and
        its data as JSON.
        """
        return self._read(
            "sequence, instance_seq, project, kind, at_ms, data", _SUBMISSIONS, since_ms, until_ms, project
        )

    def service(
        self, since_ms: int | None = None, until_ms: int | None = None, project: str | None = None
    ) -> Iterator[tuple[str | None, str, int, str]]:
        """What tells how requests were served, from `since_ms` on and before `until_ms`.

        Each event with its request, its kind, its time in ms, and its data as JSON.
        """
        return self._read("request_id, kind, at_ms, data", _SERVICE, since_ms, until_ms, project)

    def instance_id(self, number: int) -> str:
        """The id of the instance with a number, as `submissions` tells it."""
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
            for start in range(begin, end, _AT_ONCE):
                yield from self._connection.execute(statement, (start, min(end, start + _AT_ONCE), *values))
        except apsw.Error as error:
            raise store_error(error, self.path) from error

    def _sequence_at(self, at_ms: int) -> int:
        """The first sequence number of that time or later: numbers and times grow together."""
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
        there = path.is_file()
        size = path.stat().st_size if there else 0
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}.", remedy="Let this user read it.") from error
    if not there:
        raise Invalid(f"There is no database {path}.", remedy=_NAME_ONE)
    if size == 0:
        raise Invalid(f"{path} is empty: nothing was recorded in it.", remedy=_NAME_ONE)
    try:
        return _connect(f"file:{quote(str(path.absolute()))}?mode=ro")
    except (apsw.CantOpenError, apsw.ReadOnlyError) as error:
        # A folder that may not be written, and nobody has the file open: then it does not change either.
        log = path.with_name(f"{path.name}-wal")
        if log.exists() and log.stat().st_size:
            raise StoreError(
                f"{path} has changes in {log.name}, which cannot be read here: {error}.",
                remedy="Let this user write the folder, or copy both files to one that it may write.",
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
