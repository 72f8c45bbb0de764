"""What one transaction will write: the rows of all decisions that are kept together, in memory until then."""

from __future__ import annotations

import asyncio
from itertools import chain
from typing import Any

import apsw

from interlock.core.records import Event, Instance
from interlock.stores import rows, statements
from interlock.stores.rows import Row


class Kept:
    """One instance as the store holds it in memory.

    `latest` is what decisions are made on; `committed` is what readers see. They differ while a change of it is on its
    way to the disk.
    """

    __slots__ = ("batches", "committed", "filed", "last_request", "latest", "seq")

    def __init__(self, seq: int, instance: Instance, last_request: int | None, *, committed: bool) -> None:
        self.seq = seq
        self.latest = instance
        self.committed = instance if committed else None
        self.filed = rows.filed(instance) if committed else ()
        """The indexed columns of its row on the disk."""
        self.last_request = last_request
        self.batches = 0
        """How many batches on their way hold a change of it."""


class Batch:
    """The rows of one transaction, and who waits for it."""

    def __init__(self) -> None:
        self.decisions = 0
        self.seen_ms = 0
        self.instances: dict[str, Kept] = {}
        self.new_instances: dict[str, Kept] = {}
        self.results: dict[str, tuple[Instance, str, int | None]] = {}
        """Each changed instance as this batch leaves it, its JSON, and the number of its last request."""
        self.new_requests: dict[str, Row] = {}
        self.requests: dict[str, Row] = {}
        self.events: list[Event] = []
        self.event_values: list[Any] = []
        self.tags: dict[int, tuple[str, ...]] = {}
        self.key_values: list[Any] = []
        self.key_names: list[tuple[str, str]] = []
        self.names: list[tuple[str, str]] = []
        self.waiting: list[asyncio.Future[Any]] = []

    @property
    def empty(self) -> bool:
        return not self.decisions

    def write(self, connection: apsw.Connection) -> dict[str, Row]:
        """Write everything, durably, or nothing; the indexed columns of each instance as they are then.

        Runs in the writer's thread. Raises `apsw.Error`.
        """
        filed: dict[str, Row] = {}
        new: list[Any] = []
        changed: dict[tuple[str, ...], list[Any]] = {}
        for id_, (instance, text, last_request) in self.results.items():
            kept = self.instances[id_]
            filed[id_] = columns = rows.filed(instance)
            always = (kept.seq, instance.generation, instance.fence, instance.updated_at_ms, last_request, text)
            if id_ in self.new_instances:
                new += (*always, id_, instance.project, *columns)
            else:
                names, values = _differences(kept.filed, columns)
                changed.setdefault(names, []).extend((*always, *values))
        with Transaction(connection):
            # Those that are deleted come first: they may make way for a new one of the same name.
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
            connection.execute(statements.SEEN, (self.seen_ms,))
        return filed


def _differences(before: Row, after: Row) -> tuple[tuple[str, ...], Row]:
    """The names and new values of the indexed columns that changed."""
    if before == after:
        return (), ()
    places = [place for place, value in enumerate(after) if value != before[place]]
    return tuple(rows.FILED_COLUMNS[place] for place in places), tuple(after[place] for place in places)


class Transaction:
    """One transaction that commits at the end of its block, or leaves nothing."""

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
            # SQLite has rolled back by itself after some errors, and not after others.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
