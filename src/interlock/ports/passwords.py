"""Passwords on their way to a guest: never written down, and therefore in no record that anything else is in."""

from __future__ import annotations

from typing import Protocol


class Passwords(Protocol):
    """What is to be set, in memory only, from the submission of a request to its end."""

    def of(self, request_id: str) -> str | None:
        """The password that this request is to set; None where the server was restarted since it was submitted."""
        ...
