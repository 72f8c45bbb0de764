"""The SQL statements that write a batch, each for many rows.

Few statements also save time because apsw releases the GIL around each: on a busy event loop, acquiring it again takes
longer than the write.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import apsw

_CHUNKS: Final = (64, 16, 4, 1)
"""Numbers of rows per statement: few, so that all stay in the cache of prepared statements."""


class ManyRows:
    """A statement with rows of `width` values between `head` and `tail`."""

    def __init__(self, head: str, width: int, tail: str = "") -> None:
        row = f"({','.join('?' * width)})"
        self._width: Final = width
        self._by_rows: Final = {rows: f"{head} {','.join([row] * rows)} {tail}" for rows in _CHUNKS}

    def run(self, connection: apsw.Connection, bindings: Sequence[Any]) -> None:
        """Write rows; `bindings` has their values one after the other."""
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
    "name, vm_state, host, task_state, unsettled, upkeep) VALUES",
    14,
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

TALLY: Final = ManyRows("INSERT OR REPLACE INTO tallies (what, of, amount) VALUES", 3)
PORT: Final = ManyRows("INSERT OR REPLACE INTO host_ports (host, port, instance_id) VALUES", 3)
FREE_PORT: Final = "DELETE FROM host_ports WHERE host = ? AND port = ?"
LEASE: Final = ManyRows("INSERT OR REPLACE INTO leases (network_id, address, instance_id) VALUES", 3)
FREE_LEASE: Final = "DELETE FROM leases WHERE network_id = ? AND address = ?"

_ALWAYS: Final = ("generation", "fence", "updated_at_ms", "last_request", "body")


@lru_cache(maxsize=64)
def changed_instance(columns: tuple[str, ...]) -> ManyRows:
    """Return the UPDATE of the columns that always change and of the given ones of `row_codec.FILED_COLUMNS`.

    SQLite rewrites the index entries of every column in an UPDATE, changed or not.
    """
    names = (*_ALWAYS, *columns)
    settings = ", ".join(f"{name} = changed.column{place}" for place, name in enumerate(names, 2))
    return ManyRows(
        f"UPDATE instances SET {settings} FROM (VALUES",  # noqa: S608  (names of columns, from this package)
        1 + len(names),
        ") AS changed WHERE instances.seq = changed.column1",
    )


SEEN: Final = "UPDATE clock SET seen_ms = max(seen_ms, ?)"
"""The store's time never decreases."""
TIME: Final = "UPDATE clock SET seen_ms = max(seen_ms, ?), body = ?"
OFFSETS: Final = "SELECT from_ms, offset_ms FROM clock_offsets ORDER BY from_ms"
OFFSET: Final = ManyRows("INSERT OR REPLACE INTO clock_offsets (from_ms, offset_ms) VALUES", 2)
FORGET_KEYS: Final = "DELETE FROM idempotency_keys WHERE at_ms < ?"
FORGET_TAGS: Final = "DELETE FROM instance_tags WHERE instance_seq = ?"
