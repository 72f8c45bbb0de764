"""Passwords of pending set_password requests, kept in memory only.

A password is in no record, event or log. If the server stops, it is lost and the request fails.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Final, Self

from interlock.core.operations import CATALOGUE
from interlock.core.records import Admitted, Denied, Disposition, Event, Held, Redundant, Submission

_BYTES: Final = 15
_ENDED: Final = frozenset({"request.succeeded", "request.failed", "request.cancelled", "request.superseded"})


class PendingPassword:
    """The password of one submission: kept from its block's start on, and discarded at its end unless accepted."""

    def __init__(self, kept: dict[str, str], submission: Submission, password: str | None) -> None:
        self._kept = kept
        self._submission = submission
        self._password = password
        self._taken = False
        self.made_up: str | None = None
        """The generated password, returned once; None if the caller gave one."""

    def __enter__(self) -> Self:
        if CATALOGUE[self._submission.operation].parameters.secret is not None:
            kept = self._password or secrets.token_urlsafe(_BYTES)
            self.made_up = kept if self._password is None else None
            # Before admission: from then on a worker may read it.
            self._kept[self._submission.request_id] = kept
        return self

    def settle(self, disposition: Disposition) -> None:
        """Record whether the submission became a request; a repeated idempotency key returns an earlier one."""
        match disposition:
            case Admitted(request=request) | Held(request=request):
                self._taken = request.id == self._submission.request_id
            case Redundant() | Denied():
                self._taken = False

    def __exit__(self, *_: object) -> None:
        if not self._taken:
            self._kept.pop(self._submission.request_id, None)
            self.made_up = None


class PendingPasswords:
    """Satisfies `ports.Passwords`; `on_events` is a listener of the store."""

    def __init__(self) -> None:
        self._kept: dict[str, str] = {}

    def of(self, request_id: str) -> str | None:
        return self._kept.get(request_id)

    def offered(self, submission: Submission, password: str | None) -> PendingPassword:
        """Keep the password of a submission that needs one for a block, and after it if it was accepted."""
        return PendingPassword(self._kept, submission, password)

    def forget(self, request_id: str) -> None:
        self._kept.pop(request_id, None)

    def on_events(self, events: Sequence[Event]) -> None:
        """Discard the passwords of ended requests."""
        if self._kept:
            for event in events:
                if event.kind in _ENDED and event.request_id is not None:
                    self.forget(event.request_id)
