"""Conversion of records to rows and back: a row has the record as JSON, and columns derived from it for search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from interlock.core import scheduled_actions
from interlock.core.errors import KeyReused, StoreCorrupt
from interlock.core.networks import Network, SecurityGroup
from interlock.core.policy_switches import Outstanding, PolicyBundle, PolicySwitch, SwitchSource, Walk
from interlock.core.records import Change, Disposition, Event, Image, Instance, Request
from interlock.ports import IdempotencyKey, Project, Token, Volume
from interlock.ports.audit import AuditEntry
from interlock.ports.hosts import Host
from interlock.stores.clock import KeptTime
from interlock.stores.sqlite_errors import RESTORE_REMEDY

Row = tuple[Any, ...]
"""The values of one row, in the order of its statement's parameters."""

EVENT_COLUMNS: Final = """
    e.sequence, i.id, e.request_id, e.kind, e.at_ms, e.generation, e.data
    FROM events e JOIN instances i ON i.seq = e.instance_seq
"""
"""Columns and tables for `event_of`."""
VOLUME_COLUMNS: Final = "id, name, project, path, size_bytes, attached_to, created_at_ms"
INTEGER_MAX: Final = 2**63 - 1
"""The greatest integer of SQLite."""
SWITCH_COLUMNS: Final = "number, digest, name, at_ms, made_by, source, configured_digest, outstanding, cancelled, walk"

_encode: Final = msgspec.json.Encoder().encode
_decode_walk: Final = msgspec.json.Decoder(Walk).decode
_decode_files: Final = msgspec.json.Decoder(dict[str, str]).decode
_decode_data: Final = msgspec.json.Decoder(dict[str, Any]).decode
decode_instance: Final = msgspec.json.Decoder(Instance).decode
decode_request: Final = msgspec.json.Decoder(Request).decode
decode_image: Final = msgspec.json.Decoder(Image).decode
decode_host: Final = msgspec.json.Decoder(Host).decode
decode_network: Final = msgspec.json.Decoder(Network).decode
decode_security_group: Final = msgspec.json.Decoder(SecurityGroup).decode
decode_project: Final = msgspec.json.Decoder(Project).decode
_decode_audit: Final = msgspec.json.Decoder(AuditEntry).decode
_decode_token: Final = msgspec.json.Decoder(Token).decode
decode_time: Final = msgspec.json.Decoder(KeptTime).decode
decode_answer: Final = msgspec.json.Decoder(Disposition).decode


def decode_token(text: str) -> Token:
    """Return a token. Raises `StoreCorrupt`: an unknown role would not be bound by rules that name roles."""
    try:
        return _decode_token(text)
    except msgspec.ValidationError as error:
        raise StoreCorrupt(f"A token in the database is invalid: {error}.", remedy=RESTORE_REMEDY) from None


def audit_entry_of(sequence: int, text: str) -> AuditEntry:
    return msgspec.structs.replace(_decode_audit(text), sequence=sequence)


def body(record: object) -> str:
    """Encode a record as JSON."""
    return _encode(record).decode()


def name_key(record: Image | Network | SecurityGroup) -> str:
    """Return the unique key of what may belong to a project: `name` or `project/name`. Names have no slash."""
    return record.name if record.project is None else f"{record.project}/{record.name}"


FILED_COLUMNS: Final = ("name", "vm_state", "host", "task_state", "unsettled", "upkeep")
"""The indexed columns of an instance, whose changes cost more than the row."""


def filed(instance: Instance) -> Row:
    """Return the values of `FILED_COLUMNS`."""
    return (
        instance.name,
        instance.vm_state.value,
        instance.host,
        instance.task_state,
        1 if instance.unsettled else 0,
        1 if scheduled_actions.concerns(instance) else 0,
    )


class EncodedDecision:
    """A decision as JSON. Created first, so that an encoding error leaves no state behind."""

    __slots__ = ("answer", "characters", "data", "instance", "requests")

    def __init__(self, change: Change[Any], before: Instance | None, key: IdempotencyKey | None) -> None:
        self.instance = body(change.instance) if change.instance is not before else ""
        self.requests = [body(request) for request in change.requests]
        self.data = [body(event.data) if event.data else "{}" for event in change.events]
        self.answer = body(change.answer) if key is not None and has_effect(change, before) else None
        self.characters = len(self.instance) + sum(map(len, self.requests)) + sum(map(len, self.data))


def is_new(request: Request, before: Instance | None) -> bool:
    """Whether the request is new: requests change only while they are outstanding or held."""
    return before is None or all(known.id != request.id for known in (*before.outstanding, *before.held))


def has_effect(change: Change[Any], before: Instance | None) -> bool:
    """Whether a decision changed anything: a denial has none, and may be decided differently when repeated."""
    return change.instance is not before or bool(change.requests)


def check_fingerprint(key: IdempotencyKey, fingerprint: str) -> None:
    """Raise `KeyReused` if the key was kept with another fingerprint."""
    if key.fingerprint != fingerprint:
        raise KeyReused(
            f"The idempotency key {key.key[:80]!r} was already used for another request.",
            remedy="Use a new key for a new request.",
        )


def event_of(row: Sequence[Any]) -> Event:
    """Return an event from `EVENT_COLUMNS`."""
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
    """Return a volume from `VOLUME_COLUMNS`."""
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


def switch_of(row: Sequence[Any]) -> PolicySwitch:
    """Return a policy switch from `SWITCH_COLUMNS`."""
    number, digest, name, at_ms, by, source, configured_digest, outstanding, cancelled, walk = row
    return PolicySwitch(
        number=number,
        digest=digest,
        name=name,
        at_ms=at_ms,
        by=by,
        source=SwitchSource(source),
        configured_digest=configured_digest,
        outstanding=Outstanding(outstanding),
        cancelled=cancelled,
        walk=None if walk is None else _decode_walk(walk),
    )


def bundle_of(main: str, files: str) -> PolicyBundle:
    """Return a policy bundle from its main file's name and the JSON of its files."""
    return PolicyBundle(main=main, files=_decode_files(files))
