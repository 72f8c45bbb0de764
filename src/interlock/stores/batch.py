"""What one transaction will write: the rows of all decisions that are kept together, in memory until then."""

from __future__ import annotations

import asyncio
from typing import Any

import apsw

from interlock.core.records import Event, Instance
from interlock.stores import rows
from interlock.stores.rows import Row


class Kept:
    """One instance as the store holds it in memory.

    `latest` is what decisions are made on; `committed` is what readers see. They differ while a change of it is on its
    way to the disk.
    """

    __slots__ = ("batches", "committed", "last_request", "latest", "seq")

    def __init__(self, seq: int, instance: Instance, last_request: int | None, *, committed: bool) -> None:
        self.seq = seq
        self.latest = instance
        self.committed = instance if committed else None
        self.last_request = last_request
        self.batches = 0
        """How many batches on their way hold a change of it."""


class Batch:
    """The rows of one transaction, and who waits for it."""

    def __init__(self) -> None:
        self.decisions = 0
        self.instances: dict[str, Kept] = {}
        self.new_instances: dict[str, Kept] = {}
        self.results: dict[str, Instance] = {}
        """Each changed instance as this batch leaves it."""
        self.instance_rows: dict[str, Row] = {}
        self.new_requests: dict[str, Row] = {}
        self.requests: dict[str, Row] = {}
        self.events: list[Event] = []
        self.event_rows: list[Row] = []
        self.tags: dict[int, tuple[str, ...]] = {}
        self.keys: list[Row] = []
        self.key_names: list[tuple[str, str]] = []
        self.names: list[tuple[str, str]] = []
        self.waiting: list[asyncio.Future[Any]] = []

    @property
    def empty(self) -> bool:
        return not self.decisions

    def write(self, connection: apsw.Connection) -> None:
        """Write everything, durably, or nothing. Runs in the writer's thread. Raises `apsw.Error`."""
        known = [
            (*row, self.instances[id_].seq) for id_, row in self.instance_rows.items() if id_ not in self.new_instances
        ]
        new = [
            (*self.instance_rows[id_], kept.seq, id_, kept.latest.project) for id_, kept in self.new_instances.items()
        ]
        with Transaction(connection):
            # Those that are deleted come first: they may make way for a new one of the same name.
            connection.executemany(rows.UPDATE_INSTANCE, known)
            connection.executemany(rows.INSERT_INSTANCE, new)
            connection.executemany(rows.INSERT_REQUEST, self.new_requests.values())
            connection.executemany(rows.UPDATE_REQUEST, self.requests.values())
            connection.executemany(rows.INSERT_EVENT, self.event_rows)
            connection.executemany(rows.INSERT_KEY, self.keys)
            for seq, tags in self.tags.items():
                connection.execute(rows.DELETE_TAGS, (seq,))
                connection.executemany(rows.INSERT_TAG, [(tag, seq) for tag in tags])


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
