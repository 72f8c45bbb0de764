"""How records become rows and rows records, and the statements that write them. No connection is here.

A record is kept whole, as JSON, and beside it the columns that are searched; those are always derived from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from interlock.core.records import Change, Disposition, Event, Image, Instance, Request
from interlock.ports import IdempotencyKey, Token, Volume

Row = tuple[Any, ...]
"""The values of one row, in the order of its statement's parameters."""

UPDATE_INSTANCE: Final = """
    UPDATE instances
    SET name = ?, vm_state = ?, host = ?, task_state = ?, unsettled = ?, generation = ?, fence = ?, updated_at_ms = ?,
        last_request = ?, body = ?
    WHERE seq = ?
"""
INSERT_INSTANCE: Final = """
    INSERT INTO instances (name, vm_state, host, task_state, unsettled, generation, fence, updated_at_ms, last_request,
        body, seq, id, project)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
INSERT_REQUEST: Final = """
    INSERT INTO requests (status, body, seq, id, instance_seq, previous, operation, admitted_at_ms)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?)
"""
UPDATE_REQUEST: Final = "UPDATE requests SET status = ?, body = ? WHERE id = ?"
INSERT_EVENT: Final = """
    INSERT INTO events (sequence, instance_seq, project, request_id, kind, at_ms, generation, data)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?)
"""
INSERT_KEY: Final = """
    INSERT OR REPLACE INTO idempotency_keys (scope, key, fingerprint, answer, at_ms) VALUES (?, ?, ?, ?, ?)
"""
DELETE_TAGS: Final = "DELETE FROM instance_tags WHERE instance_seq = ?"
INSERT_TAG: Final = "INSERT OR IGNORE INTO instance_tags (tag, instance_seq) VALUES (?, ?)"

EVENT_COLUMNS: Final = """
    e.sequence, i.id, e.request_id, e.kind, e.at_ms, e.generation, e.data
    FROM events e JOIN instances i ON i.seq = e.instance_seq
"""
"""What `event_of` reads, and where it stands."""
VOLUME_COLUMNS: Final = "id, name, project, path, size_bytes, attached_to, created_at_ms"
"""What `volume_of` reads."""

_encode: Final = msgspec.json.Encoder().encode
_decode_data: Final = msgspec.json.Decoder(dict[str, Any]).decode
decode_instance: Final = msgspec.json.Decoder(Instance).decode
decode_request: Final = msgspec.json.Decoder(Request).decode
decode_image: Final = msgspec.json.Decoder(Image).decode
decode_token: Final = msgspec.json.Decoder(Token).decode
decode_answer: Final = msgspec.json.Decoder(Disposition).decode


def body(record: object) -> str:
    """The whole record as JSON."""
    return _encode(record).decode()


def instance_row(instance: Instance, last_request: int | None) -> Row:
    """For `UPDATE_INSTANCE`, but for the seq; and for `INSERT_INSTANCE`, but for seq, id and project."""
    return (
        instance.name,
        instance.vm_state.value,
        instance.host,
        instance.task_state,
        1 if instance.outstanding else 0,
        instance.generation,
        instance.fence,
        instance.updated_at_ms,
        last_request,
        body(instance),
    )


def request_row(request: Request, seq: int, instance_seq: int, previous: int | None) -> Row:
    """For `INSERT_REQUEST`. `seq` stands at place 2 and `previous`, the instance's request before it, at place 5."""
    return (
        request.status.value,
        body(request),
        seq,
        request.id,
        instance_seq,
        previous,
        request.operation.value,
        request.admitted_at_ms,
    )


def event_row(event: Event, sequence: int, instance_seq: int, project: str) -> Row:
    """For `INSERT_EVENT`."""
    data = body(event.data) if event.data else "{}"
    return (sequence, instance_seq, project, event.request_id, event.kind, event.at_ms, event.generation, data)


def key_row(key: IdempotencyKey, answer: object, at_ms: int) -> Row:
    """For `INSERT_KEY`."""
    return (key.scope, key.key, key.fingerprint, body(answer), at_ms)


def is_new(request: Request, before: Instance | None) -> bool:
    """Whether the request was not outstanding before: what is changed of a request is changed before it has ended."""
    return before is None or all(known.id != request.id for known in before.outstanding)


def has_effect(change: Change[Any], before: Instance | None) -> bool:
    """Whether a decision did more than tell: a refusal that is only recorded may be answered otherwise next time."""
    return change.instance is not before or bool(change.requests)


def event_of(row: Sequence[Any]) -> Event:
    """An event from `EVENT_COLUMNS`."""
    sequence, instance_id, request_id, kind, at_ms, generation, data = row
    return Event(
        kind=kind,
        instance_id=instance_id,
        at_ms=at_ms,
        generation=generation,
        request_id=request_id,
        data=_decode_data(data),
        sequence=sequence,
    )


def volume_of(row: Sequence[Any]) -> Volume:
    """A volume from `VOLUME_COLUMNS`."""
    volume_id, name, project, path, size_bytes, attached_to, created_at_ms = row
    return Volume(
        id=volume_id,
        name=name,
        project=project,
        path=path,
        size_bytes=size_bytes,
        attached_to=attached_to,
        created_at_ms=created_at_ms,
    )
