"""Passwords between their submission and the end of their request: in memory, and nowhere else.

A password is in no record, no event and no log. A server that ends forgets it, and the request then fails with that.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Sequence
from typing import Final

from interlock.core.operations import Operation
from interlock.core.records import Admitted, Disposition, Event, Held, Submission

_BYTES: Final = 15
_ENDED: Final = frozenset({"request.succeeded", "request.failed", "request.cancelled", "request.superseded"})


class Offer:
    """What a submission brings that must not be kept with it."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self.taken = False
        self.made_up: str | None = None
        """The password that was made up for it, to be told once; None where the caller brought one."""

    def settle(self, disposition: Disposition) -> None:
        """Take note of what became of the submission. One with the key of an earlier one is not this one."""
        match disposition:
            case Admitted(request=request) | Held(request=request):
                self.taken = request.id == self._request_id
            case _:
                self.taken = False


class PasswordBox:
    """Satisfies `ports.Passwords`; `heed` is a store's listener."""

    def __init__(self) -> None:
        self._kept: dict[str, str] = {}

    def of(self, request_id: str) -> str | None:
        return self._kept.get(request_id)

    @contextlib.contextmanager
    def offered(self, submission: Submission, password: str | None) -> Iterator[Offer]:
        """Keep the password of a submission; it is forgotten at the end of the block unless its request came to be.

        Where the submission sets none, nothing is kept.
        """
        offer = Offer(submission.request_id)
        if submission.operation is Operation.SET_PASSWORD:
            kept = password or secrets.token_urlsafe(_BYTES)
            offer.made_up = kept if password is None else None
            # Before it is admitted: from then on a worker may ask for it.
            self._kept[submission.request_id] = kept
        try:
            yield offer
        finally:
            if not offer.taken:
                self.forget(submission.request_id)
                offer.made_up = None

    def forget(self, request_id: str) -> None:
        self._kept.pop(request_id, None)

    def heed(self, events: Sequence[Event]) -> None:
        """Forget what has come to its end."""
        if self._kept:
            for event in events:
                if event.kind in _ENDED and event.request_id is not None:
                    self.forget(event.request_id)
