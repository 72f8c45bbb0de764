"""All queries of the store, on a read-only connection that never waits for the writer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Literal

import apsw
import msgspec

from interlock.core.errors import Invalid
from interlock.core.networks import Network, SecurityGroup
from interlock.core.policy_switches import PolicyBundle, PolicySwitch
from interlock.core.records import Event, Image, Instance, Request
from interlock.core.states import VmState
from interlock.ports import InstanceFilter, Page, Project, Token, Volume
from interlock.ports.audit import AuditEntry, AuditFilter
from interlock.ports.hosts import Host
from interlock.stores import row_codec
from interlock.stores.clock import KeptTime, Offsets
from interlock.stores.statements import OFFSETS
from interlock.stores.tallies import Tallies

_FILTERS: Final = (
    ("project", "i.project = ?"),
    ("task_state", "i.task_state = ?"),
    ("host", "i.host = ?"),
    ("name", "i.name = ?"),
    ("tag", "i.seq IN (SELECT instance_seq FROM instance_tags WHERE tag = ?)"),
)

_LIKE_MAX: Final = 6
_ENDS_MAX: Final = 20_000
"""Number of latest rows searched for an id by its end, which has no index."""
_REQUESTS: Final = """
    WITH RECURSIVE chain (seq, previous, body, place) AS (
        SELECT seq, previous, body, 0 FROM requests WHERE seq = ?
        UNION ALL
        SELECT r.seq, r.previous, r.body, chain.place + 1 FROM chain JOIN requests r ON r.seq = chain.previous
        WHERE chain.place < ?
    )
    SELECT seq, body FROM chain ORDER BY place
"""

_REQUEST_OF_PROJECT: Final = """
    SELECT r.body FROM requests r JOIN instances i ON i.seq = r.instance_seq WHERE r.id = ? AND i.project = ?
"""


class Queries:
    """Queries that return records."""

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
        """Return the row number, the instance, and the row number of its last request."""
        row = self._one("SELECT seq, body, last_request FROM instances WHERE id = ?", instance_id)
        return None if row is None else (row[0], row_codec.decode_instance(row[1]), row[2])

    def id_named(self, project: str, name: str) -> str | None:
        row = self._one(
            "SELECT id FROM instances WHERE project = ? AND name = ? AND vm_state <> 'deleted'", project, name
        )
        return None if row is None else str(row[0])

    def fence(self, instance_id: str) -> int | None:
        row = self._one("SELECT fence FROM instances WHERE id = ?", instance_id)
        return None if row is None else int(row[0])

    def tallies(self) -> Tallies:
        """Return the sums in the database."""
        return Tallies(
            self._all("SELECT what, of, amount FROM tallies"),
            self._all("SELECT host, port, instance_id FROM host_ports"),
            self._all("SELECT network_id, address, instance_id FROM leases"),
        )

    def every_instance(self) -> Iterator[Instance]:
        """Yield all instances that are not deleted (a full table scan)."""
        for (text,) in self._connection.execute("SELECT body FROM instances WHERE vm_state <> 'deleted'"):
            yield row_codec.decode_instance(text)

    def deleted_named(self, project: str, name: str) -> Instance | None:
        row = self._one(
            "SELECT body FROM instances WHERE project = ? AND name = ? AND vm_state = 'deleted' ORDER BY seq DESC",
            *(project, name),
        )
        return None if row is None else row_codec.decode_instance(row[0])

    def instances(self, where: InstanceFilter, limit: int, cursor: str | None) -> Page:
        conditions: list[str] = ["i.seq > ?"]
        values: list[Any] = [_number(cursor, 0)]
        if where.vm_state is None or where.vm_state is VmState.DELETED:
            conditions.append(f"i.vm_state {'<>' if where.vm_state is None else '='} 'deleted'")
        else:
            conditions.append("i.vm_state <> 'deleted' AND i.vm_state = ?")
            values.append(where.vm_state.value)
        if where.upkeep:
            conditions.append("i.upkeep = 1")
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
        items = tuple(row_codec.decode_instance(text) for _, text in found[:limit])
        return Page(items=items, next_cursor=str(found[limit - 1][0]) if len(found) > limit else None)

    def unsettled(self, host: str | None) -> tuple[Instance, ...]:
        host_too = "" if host is None else "AND host = ?"
        # Sorted here: with ORDER BY, SQLite scans the whole table instead of the index.
        found = self._all(
            f"SELECT seq, body FROM instances INDEXED BY instances_unsettled WHERE unsettled = 1 {host_too}",  # noqa: S608
            *(() if host is None else (host,)),
        )
        return tuple(row_codec.decode_instance(text) for _, text in sorted(found))

    # --------------------------------------------------------------------------------------------------- requests

    def request(self, request_id: str, project: str | None = None) -> Request | None:
        row = (
            self._one("SELECT body FROM requests WHERE id = ?", request_id)
            if project is None
            else self._one(_REQUEST_OF_PROJECT, request_id, project)
        )
        return None if row is None else row_codec.decode_request(row[0])

    def ids_like(self, what: Literal["instances", "requests"], project: str, part: str) -> tuple[str, ...]:
        owner = "i.seq = x.instance_seq" if what == "requests" else "i.seq = x.seq"
        columns = "seq, id, instance_seq" if what == "requests" else "seq, id"
        alive = "" if what == "requests" else "AND i.vm_state <> 'deleted'"
        ours = f"JOIN instances i ON {owner} WHERE i.project = ? {alive}"
        found = self._all(
            f"""
            SELECT id FROM (
                SELECT x.id FROM {what} x {ours} AND x.id >= ? AND x.id < ? LIMIT {_LIKE_MAX}
            ) UNION SELECT id FROM (
                SELECT x.id FROM (SELECT {columns} FROM {what} ORDER BY seq DESC LIMIT {_ENDS_MAX}) x {ours}
                AND substr(x.id, ?) = ? LIMIT {_LIKE_MAX}
            )
            """,  # noqa: S608 - made of constants
            *(project, part, f"{part}~", project, -len(part), part),
        )
        return tuple(row[0] for row in found)

    def requests(self, instance_id: str, limit: int, cursor: str | None) -> Page:
        """Return a page of requests, newest first, along the chain in which each names its predecessor."""
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
        items = tuple(row_codec.decode_request(text) for _, text in found[:limit])
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
            f"SELECT {row_codec.EVENT_COLUMNS} WHERE {' AND '.join(conditions)} ORDER BY e.sequence LIMIT ?",
            *values,
            limit,
        )
        return tuple(row_codec.event_of(row) for row in found)

    def last(self, table: str, column: str = "seq") -> int:
        """Return the greatest number in a table; 0 if it is empty."""
        row = self._one(f"SELECT max({column}) FROM {table}")  # noqa: S608
        return int(row[0] or 0) if row is not None else 0

    def kept_time(self) -> KeptTime:
        """Return the persistent state of the clock."""
        row = self._one("SELECT seen_ms, body FROM clock")
        return KeptTime() if row is None else msgspec.structs.replace(row_codec.decode_time(row[1]), seen_ms=row[0])

    def offsets(self) -> Offsets:
        """Return the offsets to displayed time."""
        return Offsets(tuple((from_ms, offset_ms) for from_ms, offset_ms in self._all(OFFSETS)))

    # ------------------------------------------------------------------------------------- keys, tokens and the rest

    def key(self, scope: str, key: str, since_ms: int) -> tuple[str, str] | None:
        """Return fingerprint and response JSON of an idempotency key, unless older than `since_ms`."""
        row = self._one(
            "SELECT fingerprint, answer FROM idempotency_keys WHERE scope = ? AND key = ? AND at_ms >= ?",
            *(scope, key, since_ms),
        )
        return None if row is None else (row[0], row[1])

    def images_of(self, project: str) -> int:
        """Count the images of a project; their keys begin with its name and a slash."""
        statement = "SELECT count(*) FROM images WHERE name >= ? AND name < ?"
        return int(self._all(statement, f"{project}/", f"{project}0")[0][0])

    def projects(self) -> tuple[Project, ...]:
        found = self._all("SELECT body FROM projects ORDER BY name")
        return tuple(row_codec.decode_project(text) for (text,) in found)

    def networks(self) -> tuple[Network, ...]:
        return tuple(row_codec.decode_network(text) for (text,) in self._all("SELECT body FROM networks ORDER BY seq"))

    def security_groups(self) -> tuple[SecurityGroup, ...]:
        found = self._all("SELECT body FROM security_groups ORDER BY seq")
        return tuple(row_codec.decode_security_group(text) for (text,) in found)

    def tokens(self) -> tuple[Token, ...]:
        return tuple(row_codec.decode_token(text) for (text,) in self._all("SELECT body FROM tokens ORDER BY seq"))

    def images(self) -> tuple[Image, ...]:
        return tuple(row_codec.decode_image(text) for (text,) in self._all("SELECT body FROM images ORDER BY seq"))

    def volumes(self, project: str | None) -> tuple[Volume, ...]:
        where, values = ("", ()) if project is None else ("WHERE project = ?", (project,))
        found = self._all(f"SELECT {row_codec.VOLUME_COLUMNS} FROM volumes {where} ORDER BY seq", *values)  # noqa: S608
        return tuple(row_codec.volume_of(row) for row in found)

    def volume(self, volume_id: str) -> Volume | None:
        row = self._one(f"SELECT {row_codec.VOLUME_COLUMNS} FROM volumes WHERE id = ?", volume_id)  # noqa: S608
        return None if row is None else row_codec.volume_of(row)

    # --------------------------------------------------------------------------------------------------- policies

    def policy_switches(self, limit: int, before: int | None) -> tuple[PolicySwitch, ...]:
        where, values = ("", ()) if before is None else ("WHERE number < ?", (before,))
        found = self._all(
            f"SELECT {row_codec.SWITCH_COLUMNS} FROM policy_switches {where} ORDER BY number DESC LIMIT ?",  # noqa: S608
            *values,
            limit,
        )
        return tuple(row_codec.switch_of(row) for row in found)

    def policy_bundle(self, number: int) -> PolicyBundle | None:
        row = self._one(
            "SELECT p.main, p.files FROM policy_switches s JOIN policies p ON p.seq = s.policy_seq WHERE s.number = ?",
            number,
        )
        return None if row is None else row_codec.bundle_of(*row)

    def audit(self, place: str, sequence: int, order: str, limit: int, where: AuditFilter) -> tuple[AuditEntry, ...]:
        """Return entries of the audit log that match, from a place on and in an order given as SQL."""
        conditions: list[str] = [place]
        values: list[Any] = [sequence]
        if where.action is not None:
            conditions.append("(action = ? OR substr(action, 1, ?) = ?)")
            values += (where.action, len(where.action) + 1, f"{where.action}.")
        for name, value in (("who", where.who), ("outcome", where.outcome)):
            if value is not None:
                conditions.append(f"{name} = ?")
                values.append(str(value))
        found = self._all(
            f"SELECT sequence, body FROM audit WHERE {' AND '.join(conditions)} ORDER BY {order} LIMIT ?",  # noqa: S608
            *values,
            limit,
        )
        return tuple(row_codec.audit_entry_of(*row) for row in found)

    def hosts(self) -> tuple[Host, ...]:
        return tuple(row_codec.decode_host(text) for (text,) in self._all("SELECT body FROM hosts ORDER BY name"))


def _number(cursor: str | None, default: int) -> int:
    if cursor is None:
        return default
    if not cursor.isdecimal() or len(cursor) > 18:  # noqa: PLR2004 - digits that fit SQLite's integers
        raise _wrong_cursor(cursor)
    return int(cursor)


def _wrong_cursor(cursor: str) -> Invalid:
    return Invalid(
        f"Invalid cursor {cursor[:80]!r}: not returned by an earlier page.",
        remedy="Use `next_cursor` of the previous page, or omit it for the first page.",
    )
