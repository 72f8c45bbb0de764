"""A limit for something that may take any time as long as it gets on. What is watched is the caller's."""

from __future__ import annotations

import asyncio

from interlock.core.errors import Refused


class Silence:
    """Told again and again how far something is; raises when that has been the same for too long."""

    def __init__(self, limit_ms: int, what: str) -> None:
        self._limit_ms = limit_ms
        self._what = what
        self._now = asyncio.get_running_loop().time
        self._last: object = None
        self._since = self._now()

    def note(self, state: object) -> None:
        """Take note of how far it is. Raises `Refused` if it has not got on for longer than the limit."""
        if state != self._last:
            self._last, self._since = state, self._now()
        elif (self._now() - self._since) * 1000 > self._limit_ms:
            raise Refused(
                f"{self._what} made no progress for {self._limit_ms} ms, and was given up.",
                remedy="The host's storage probably does not answer; look at it, or raise copy_silence_timeout_ms.",
            )
