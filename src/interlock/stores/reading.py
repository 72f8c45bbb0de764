"""Everything that is read of a database, on a connection that never waits for the writer. Nothing is written here."""

from __future__ import annotations

from typing import Any, Final

import apsw

from interlock.core.errors import Invalid
from interlock.core.policy_switches import PolicyBundle, PolicySwitch
from interlock.core.records import Event, Image, Instance, Request
from interlock.core.states import VmState
from interlock.ports import InstanceFilter, Page, Token, Volume
from interlock.ports.hosts import Host
from interlock.stores import rows

_FILTERS: Final = (
    ("project", "i.project = ?"),
    ("task_state", "i.task_state = ?"),
    ("host", "i.host = ?"),
    ("name", "i.name = ?"),
    ("tag", "i.seq IN (SELECT instance_seq FROM instance_tags WHERE tag = ?)"),
)

_REQUESTS: Final = """
    WITH RECURSIVE chain (seq, previous, body, place) AS (
        SELECT seq, previous, body, 0 FROM requests WHERE seq = ?
        UNION ALL
        SELECT r.seq, r.previous, r.body, chain.place + 1 FROM chain JOIN requests r ON r.seq = chain.previous
        WHERE chain.place < ?
    )
    SELECT seq, body FROM chain ORDER BY place
"""


class Reader:
    """Queries, as the records that they find."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection

    def close(self) -> None:
        self._connection.close()

    def _one(self, statement: str, *values: Any) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self._connection.execute(statement, values).fetchone()
        return row

    def _all(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        return self._connection.execute(statement, values).fetchall()

    # -------------------------------------------------------------------------------------------------- instances

    def instance(self, instance_id: str) -> tuple[int, Instance, int | None] | None:
        """The instance with its row's number and the number of its last request."""
        row = self._one("SELECT seq, body, last_request FROM instances WHERE id = ?", instance_id)
        return None if row is None else (row[0], rows.decode_instance(row[1]), row[2])

    def id_named(self, project: str, name: str) -> str | None:
        row = self._one(
            "SELECT id FROM instances WHERE project = ? AND name = ? AND vm_state <> 'deleted'", project, name
        )
        return None if row is None else str(row[0])

    def fences(self) -> dict[str, int]:
        return dict(self._all("SELECT id, fence FROM instances WHERE vm_state <> 'deleted'"))

    def instances(self, where: InstanceFilter, limit: int, cursor: str | None) -> Page:
        conditions: list[str] = ["i.seq > ?"]
        values: list[Any] = [_number(cursor, 0)]
        if where.vm_state is None or where.vm_state is VmState.DELETED:
            conditions.append(f"i.vm_state {'<>' if where.vm_state is None else '='} 'deleted'")
        else:
            conditions.append("i.vm_state <> 'deleted' AND i.vm_state = ?")
            values.append(where.vm_state.value)
        for field, condition in _FILTERS:
            value = getattr(where, field)
            if value is not None:
                conditions.append(condition)
                values.append(value)
        found = self._all(
            f"SELECT i.seq, i.body FROM instances i WHERE {' AND '.join(conditions)} ORDER BY i.seq LIMIT ?",  # noqa: S608
            *values,
            limit + 1,
        )
        items = tuple(rows.decode_instance(text) for _, text in found[:limit])
        return Page(items=items, next_cursor=str(found[limit - 1][0]) if len(found) > limit else None)

    def unsettled(self, host: str | None) -> tuple[Instance, ...]:
        host_too = "" if host is None else "AND host = ?"
        found = self._all(
            f"SELECT body FROM instances WHERE unsettled = 1 {host_too} ORDER BY seq",  # noqa: S608
            *(() if host is None else (host,)),
        )
        return tuple(rows.decode_instance(text) for (text,) in found)

    # --------------------------------------------------------------------------------------------------- requests

    def request(self, request_id: str) -> Request | None:
        row = self._one("SELECT body FROM requests WHERE id = ?", request_id)
        return None if row is None else rows.decode_request(row[0])

    def requests(self, instance_id: str, limit: int, cursor: str | None) -> Page:
        """Newest first, along the chain in which each names the one before it."""
        if cursor is None:
            row = self._one("SELECT last_request FROM instances WHERE id = ?", instance_id)
        else:
            row = self._one(
                """
                SELECT r.previous FROM requests r JOIN instances i ON i.seq = r.instance_seq
                WHERE r.seq = ? AND i.id = ?
                """,
                *(_number(cursor, 0), instance_id),
            )
            if row is None:
                raise _wrong_cursor(cursor)
        if row is None or row[0] is None:
            return Page(items=())
        found = self._all(_REQUESTS, row[0], limit)
        items = tuple(rows.decode_request(text) for _, text in found[:limit])
        return Page(items=items, next_cursor=str(found[limit - 1][0]) if len(found) > limit else None)

    # ----------------------------------------------------------------------------------------------------- events

    def events(self, after: int, limit: int, instance_id: str | None, project: str | None) -> tuple[Event, ...]:
        conditions: list[str] = ["e.sequence > ?"]
        values: list[Any] = [after]
        if instance_id is not None:
            row = self._one("SELECT seq FROM instances WHERE id = ?", instance_id)
            conditions.append("e.instance_seq = ?")
            values.append(-1 if row is None else row[0])
        if project is not None:
            conditions.append("e.project = ?")
            values.append(project)
        found = self._all(
            f"SELECT {rows.EVENT_COLUMNS} WHERE {' AND '.join(conditions)} ORDER BY e.sequence LIMIT ?",
            *values,
            limit,
        )
        return tuple(rows.event_of(row) for row in found)

    def last(self, table: str, column: str = "seq") -> int:
        """The greatest number in a table; 0 if it is empty."""
        row = self._one(f"SELECT max({column}) FROM {table}")  # noqa: S608
        return int(row[0] or 0) if row is not None else 0

    def newest_ms(self) -> int:
        """The latest time that the store has seen; 0 if it is empty."""
        row = self._one("SELECT seen_ms FROM clock")
        return int(row[0]) if row else 0

    # ------------------------------------------------------------------------------------- keys, tokens and the rest

    def key(self, scope: str, key: str, since_ms: int) -> tuple[str, str] | None:
        """The fingerprint and the answer's JSON kept with a key, if that was not before `since_ms`."""
        row = self._one(
            "SELECT fingerprint, answer FROM idempotency_keys WHERE scope = ? AND key = ? AND at_ms >= ?",
            *(scope, key, since_ms),
        )
        return None if row is None else (row[0], row[1])

    def tokens(self) -> tuple[Token, ...]:
        return tuple(rows.decode_token(text) for (text,) in self._all("SELECT body FROM tokens ORDER BY seq"))

    def images(self) -> tuple[Image, ...]:
        return tuple(rows.decode_image(text) for (text,) in self._all("SELECT body FROM images ORDER BY seq"))

    def volumes(self, project: str | None) -> tuple[Volume, ...]:
        where, values = ("", ()) if project is None else ("WHERE project = ?", (project,))
        found = self._all(f"SELECT {rows.VOLUME_COLUMNS} FROM volumes {where} ORDER BY seq", *values)  # noqa: S608
        return tuple(rows.volume_of(row) for row in found)

    def volume(self, volume_id: str) -> Volume | None:
        row = self._one(f"SELECT {rows.VOLUME_COLUMNS} FROM volumes WHERE id = ?", volume_id)  # noqa: S608
        return None if row is None else rows.volume_of(row)

    # --------------------------------------------------------------------------------------------------- policies

    def policy_switches(self, limit: int, before: int | None) -> tuple[PolicySwitch, ...]:
        where, values = ("", ()) if before is None else ("WHERE number < ?", (before,))
        found = self._all(
            f"SELECT {rows.SWITCH_COLUMNS} FROM policy_switches {where} ORDER BY number DESC LIMIT ?",  # noqa: S608
            *values,
            limit,
        )
        return tuple(rows.switch_of(row) for row in found)

    def policy_bundle(self, number: int) -> PolicyBundle | None:
        row = self._one(
            "SELECT p.main, p.files FROM policy_switches s JOIN policies p ON p.seq = s.policy_seq WHERE s.number = ?",
            number,
        )
        return None if row is None else rows.bundle_of(*row)

    def hosts(self) -> tuple[Host, ...]:
        return tuple(rows.decode_host(text) for (text,) in self._all("SELECT body FROM hosts ORDER BY name"))


def _number(cursor: str | None, default: int) -> int:
    if cursor is None:
        return default
    if not cursor.isdecimal() or len(cursor) > 18:  # noqa: PLR2004 - digits that fit SQLite's integers
        raise _wrong_cursor(cursor)
    return int(cursor)


def _wrong_cursor(cursor: str) -> Invalid:
    return Invalid(
        f"cursor: {cursor[:80]!r} was not given by an earlier page.",
        remedy="Use `next_cursor` of the page before, or leave it out to begin anew.",
    )
