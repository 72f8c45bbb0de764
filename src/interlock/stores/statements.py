"""The statements that write a batch, each for many rows at once. Nothing is executed by itself here.

One statement for many rows is not only fewer statements: apsw gives the interpreter away around each one and has to
win it back, which on a busy event loop takes longer than the writing itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import apsw

_CHUNKS: Final = (64, 16, 4, 1)
"""How many rows one statement writes. Few sizes, so that all of them stay prepared."""


class ManyRows:
    """A statement whose rows stand between `head` and `tail`, each with `width` values."""

    def __init__(self, head: str, width: int, tail: str = "") -> None:
        row = f"({','.join('?' * width)})"
        self._width: Final = width
        self._by_rows: Final = {rows: f"{head} {','.join([row] * rows)} {tail}" for rows in _CHUNKS}

    def run(self, connection: apsw.Connection, bindings: Sequence[Any]) -> None:
        """Write the rows whose values follow each other in `bindings`."""
        begin = 0
        left = len(bindings) // self._width
        for rows in _CHUNKS:
            sql = self._by_rows[rows]
            while left >= rows:
                end = begin + rows * self._width
                connection.execute(sql, bindings if end - begin == len(bindings) else bindings[begin:end])
                begin, left = end, left - rows


NEW_INSTANCE: Final = ManyRows(
    "INSERT INTO instances (seq, generation, fence, updated_at_ms, last_request, body, id, project, "
    "name, vm_state, host, task_state, unsettled) VALUES",
    13,
)
NEW_REQUEST: Final = ManyRows(
    "INSERT INTO requests (seq, id, instance_seq, previous, operation, status, admitted_at_ms, body) VALUES", 8
)
CHANGED_REQUEST: Final = ManyRows(
    "UPDATE requests SET status = changed.column2, body = changed.column3 FROM (VALUES",
    3,
    ") AS changed WHERE requests.id = changed.column1",
)
EVENT: Final = ManyRows(
    "INSERT INTO events (sequence, instance_seq, project, request_id, kind, at_ms, generation, data) VALUES", 8
)
KEY: Final = ManyRows("INSERT OR REPLACE INTO idempotency_keys (scope, key, fingerprint, answer, at_ms) VALUES", 5)
TAG: Final = ManyRows("INSERT OR IGNORE INTO instance_tags (tag, instance_seq) VALUES", 2)

_ALWAYS: Final = ("generation", "fence", "updated_at_ms", "last_request", "body")


@lru_cache(maxsize=64)
def changed_instance(columns: tuple[str, ...]) -> ManyRows:
    """The statement that writes seq, what changes always, and those of `rows.FILED_COLUMNS` that did change.

    SQLite rewrites the index entries of every column that an UPDATE names, changed or not; so it names few.
    """
    names = (*_ALWAYS, *columns)
    settings = ", ".join(f"{name} = changed.column{place}" for place, name in enumerate(names, 2))
    return ManyRows(
        f"UPDATE instances SET {settings} FROM (VALUES",  # noqa: S608  (names of columns, from this package)
        1 + len(names),
        ") AS changed WHERE instances.seq = changed.column1",
    )


SEEN: Final = "UPDATE clock SET seen_ms = max(seen_ms, ?)"
"""Time does not go back behind what was written."""
FORGET_KEYS: Final = "DELETE FROM idempotency_keys WHERE at_ms < ?"
FORGET_TAGS: Final = "DELETE FROM instance_tags WHERE instance_seq = ?"
