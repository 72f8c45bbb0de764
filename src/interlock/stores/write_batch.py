"""The rows of one transaction: all decisions that are committed together."""

from __future__ import annotations

import asyncio
from itertools import chain
from typing import Any, Final

import apsw

from interlock.core.full_store import kept_when_full
from interlock.core.records import Change, Event, Instance, Request
from interlock.stores import row_codec, statements
from interlock.stores.row_codec import Row
from interlock.stores.tallies import NO_CHANGES, TallyChanges

_PAGE_BYTES: Final = 4_096
_PAGES_OF_A_DECISION: Final = 4


class CachedInstance:
    """An instance in the store's cache.

    Decisions use `latest`, readers see `committed`. They differ while a change is being written.
    """

    __slots__ = ("batches", "committed", "filed", "last_request", "latest", "seq")

    def __init__(self, seq: int, instance: Instance, last_request: int | None, *, committed: bool) -> None:
        self.seq = seq
        self.latest = instance
        self.committed = instance if committed else None
        self.filed = row_codec.filed(instance) if committed else ()
        """The indexed columns of its committed row."""
        self.last_request = last_request
        self.batches = 0
        """Number of pending batches with a change of it."""


class WriteBatch:
    """The rows of one transaction, and the futures that wait for it."""

    def __init__(self) -> None:
        self.decisions = 0
        self.changes: list[tuple[Instance | None, Change[Any]]] = []
        """The decisions, each with the instance before it."""
        self.characters = 0
        """Length of its JSON."""
        self.seen_ms = 0
        self.instances: dict[str, CachedInstance] = {}
        self.new_instances: dict[str, CachedInstance] = {}
        self.results: dict[str, tuple[Instance, str, int | None]] = {}
        """Each changed instance after this batch, its JSON, and the number of its last request."""
        self.new_requests: dict[str, Row] = {}
        self.requests: dict[str, Row] = {}
        self.latest_requests: dict[str, tuple[str, Request]] = {}
        """Each changed request after this batch, with its project."""
        self.events: list[Event] = []
        self.event_values: list[Any] = []
        self.tags: dict[int, tuple[str, ...]] = {}
        self.key_values: list[Any] = []
        self.key_names: list[tuple[str, str]] = []
        self.names: list[tuple[str, str]] = []
        self.tallies = NO_CHANGES
        self.waiting: list[asyncio.Future[Any]] = []

    @property
    def empty(self) -> bool:
        return not self.decisions

    @property
    def pages(self) -> int:
        """Estimated upper limit of the pages it writes."""
        return self.decisions * _PAGES_OF_A_DECISION + self.characters * 2 // _PAGE_BYTES

    def ordinary(self) -> bool:
        """Whether it has a decision that may not use the reserve of a full disk."""
        return not all(kept_when_full(before, change) for before, change in self.changes)

    def write(self, connection: apsw.Connection) -> dict[str, Row]:
        """Write everything in one transaction; return the new indexed columns of each instance.

        Runs in the writer's thread. Raises `apsw.Error`.
        """
        filed: dict[str, Row] = {}
        new: list[Any] = []
        changed: dict[tuple[str, ...], list[Any]] = {}
        for id_, (instance, text, last_request) in self.results.items():
            kept = self.instances[id_]
            filed[id_] = columns = row_codec.filed(instance)
            always = (kept.seq, instance.generation, instance.fence, instance.updated_at_ms, last_request, text)
            if id_ in self.new_instances:
                new += (*always, id_, instance.project, *columns)
            else:
                names, values = _differences(kept.filed, columns)
                changed.setdefault(names, []).extend((*always, *values))
        with Transaction(connection):
            # Updates before inserts: a deleted instance may free the name of a new one.
            for names, bindings in changed.items():
                statements.changed_instance(names).run(connection, bindings)
            statements.NEW_INSTANCE.run(connection, new)
            statements.NEW_REQUEST.run(connection, [*chain.from_iterable(self.new_requests.values())])
            statements.CHANGED_REQUEST.run(connection, [*chain.from_iterable(self.requests.values())])
            statements.EVENT.run(connection, self.event_values)
            statements.KEY.run(connection, self.key_values)
            for seq, tags in self.tags.items():
                connection.execute(statements.FORGET_TAGS, (seq,))
                statements.TAG.run(connection, [value for tag in tags for value in (tag, seq)])
            write_tallies(connection, self.tallies)
            connection.execute(statements.SEEN, (self.seen_ms,))
        return filed


def write_tallies(connection: apsw.Connection, changes: TallyChanges) -> None:
    """Write changes of sums, ports and leases. Raises `apsw.Error`."""
    statements.TALLY.run(connection, changes.amounts)
    for places, free, taken in (
        (changes.ports, statements.FREE_PORT, statements.PORT),
        (changes.leases, statements.FREE_LEASE, statements.LEASE),
    ):
        for place in places.freed:
            connection.execute(free, place)
        taken.run(connection, places.taken)


def _differences(before: Row, after: Row) -> tuple[tuple[str, ...], Row]:
    """Return the names and new values of the indexed columns that changed."""
    if before == after:
        return (), ()
    places = [place for place, value in enumerate(after) if value != before[place]]
    return tuple(row_codec.FILED_COLUMNS[place] for place in places), tuple(after[place] for place in places)


class Transaction:
    """A transaction that commits at the end of its block, or rolls back on an exception."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> apsw.Connection:
        self._connection.execute("BEGIN IMMEDIATE")
        return self._connection

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self._connection.execute("COMMIT")
        finally:
            # SQLite rolls back automatically after some errors only.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
