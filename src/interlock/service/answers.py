"""What the service answers, where a record alone does not say enough."""

from __future__ import annotations

import msgspec

from interlock.core.operations import Operation
from interlock.core.records import Disposition, Instance, Request


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a submission, with what a caller needs to go on."""

    disposition: Disposition
    instance: Instance
    allowed_instead: tuple[Operation, ...] = ()
    """For a refusal: what would be admitted now."""
    password: str | None = None
    """One that was made up for a set_password, to be told this once."""


class Stuck(msgspec.Struct, frozen=True, kw_only=True):
    """An instance whose operation has shown no life for longer than the policy waits for it."""

    instance: Instance
    request: Request
    silent_since_ms: int
    allowed: tuple[Operation, ...]
    """What would be admitted now."""
    takes_over: tuple[Operation, ...]
    """Those among them that would take over from the stuck operation."""
