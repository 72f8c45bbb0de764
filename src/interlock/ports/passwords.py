"""Passwords to be set in guests: kept in memory only, and in no record."""

from __future__ import annotations

from typing import Protocol


class Passwords(Protocol):
    """The passwords of outstanding requests, from submission to end."""

    def of(self, request_id: str) -> str | None:
        """Return the password of this request; None if the server was restarted since its submission."""
        ...
