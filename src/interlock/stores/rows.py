"""How records become rows and rows records. No connection is here.

A record is kept whole, as JSON, and beside it the columns that are searched; those are always derived from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from interlock.core.errors import KeyReused
from interlock.core.policy_switches import Outstanding, PolicyBundle, PolicySwitch, SwitchSource
from interlock.core.records import Change, Disposition, Event, Image, Instance, Request
from interlock.ports import IdempotencyKey, Token, Volume
from interlock.ports.hosts import Host

Row = tuple[Any, ...]
"""The values of one row, in the order of its statement's parameters."""

EVENT_COLUMNS: Final = """
    e.sequence, i.id, e.request_id, e.kind, e.at_ms, e.generation, e.data
    FROM events e JOIN instances i ON i.seq = e.instance_seq
"""
"""What `event_of` reads, and where it stands."""
VOLUME_COLUMNS: Final = "id, name, project, path, size_bytes, attached_to, created_at_ms"
"""What `volume_of` reads."""
SWITCH_COLUMNS: Final = "number, digest, name, at_ms, made_by, source, configured_digest, outstanding, cancelled"
"""What `switch_of` reads."""

_encode: Final = msgspec.json.Encoder().encode
_decode_files: Final = msgspec.json.Decoder(dict[str, str]).decode
_decode_data: Final = msgspec.json.Decoder(dict[str, Any]).decode
decode_instance: Final = msgspec.json.Decoder(Instance).decode
decode_request: Final = msgspec.json.Decoder(Request).decode
decode_image: Final = msgspec.json.Decoder(Image).decode
decode_host: Final = msgspec.json.Decoder(Host).decode
decode_token: Final = msgspec.json.Decoder(Token).decode
decode_answer: Final = msgspec.json.Decoder(Disposition).decode


def body(record: object) -> str:
    """The whole record as JSON."""
    return _encode(record).decode()


def image_key(image: Image) -> str:
    """What is unique of an image: its name, behind its project where it has one. No name has a slash."""
    return image.name if image.project is None else f"{image.project}/{image.name}"


FILED_COLUMNS: Final = ("name", "vm_state", "host", "task_state", "unsettled")
"""The columns of an instance that are in an index, so that a change of one costs more than the row."""


def filed(instance: Instance) -> Row:
    """The values of `FILED_COLUMNS`."""
    return (
        instance.name,
        instance.vm_state.value,
        instance.host,
        instance.task_state,
        1 if instance.outstanding or instance.held else 0,
    )


class Texts:
    """A decision as JSON. Made before anything else is done with it: what cannot be written down fails here."""

    __slots__ = ("answer", "data", "instance", "requests")

    def __init__(self, change: Change[Any], before: Instance | None, key: IdempotencyKey | None) -> None:
        self.instance = body(change.instance) if change.instance is not before else ""
        self.requests = [body(request) for request in change.requests]
        self.data = [body(event.data) if event.data else "{}" for event in change.events]
        self.answer = body(change.answer) if key is not None and has_effect(change, before) else None


def is_new(request: Request, before: Instance | None) -> bool:
    """Whether the request was not known before: what is changed of a request is changed before it has ended."""
    return before is None or all(known.id != request.id for known in (*before.outstanding, *before.held))


def has_effect(change: Change[Any], before: Instance | None) -> bool:
    """Whether a decision did more than tell: a refusal that is only recorded may be answered otherwise next time."""
    return change.instance is not before or bool(change.requests)


def check_fingerprint(key: IdempotencyKey, fingerprint: str) -> None:
    """Raise `KeyReused` if the key was kept with another fingerprint."""
    if key.fingerprint != fingerprint:
        raise KeyReused(
            f"The idempotency key {key.key[:80]!r} was used for another request.",
            remedy="Use a new key for a new request.",
        )


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


def switch_of(row: Sequence[Any]) -> PolicySwitch:
    """A switch of the policy from `SWITCH_COLUMNS`."""
    number, digest, name, at_ms, by, source, configured_digest, outstanding, cancelled = row
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
    )


def bundle_of(main: str, files: str) -> PolicyBundle:
    """The text of a policy from its main file's name and the JSON of its files."""
    return PolicyBundle(main=main, files=_decode_files(files))
