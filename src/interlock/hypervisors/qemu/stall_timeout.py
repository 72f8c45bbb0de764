"""A timeout for operations that may take any time as long as they make progress."""

from __future__ import annotations

import asyncio

from interlock.core.errors import InterlockError, OperationRejected


class StallTimeout:
    """Raises an error when the progress passed to `note` has not changed for longer than the limit."""

    def __init__(self, limit_ms: int, error: InterlockError) -> None:
        self._limit_ms = limit_ms
        self._error = error
        self._now = asyncio.get_running_loop().time
        self._last: object = None
        self._since = self._now()

    def note(self, progress: object) -> None:
        """Note the progress. Raises the error if it has stalled."""
        if progress != self._last:
            self._last, self._since = progress, self._now()
        elif (self._now() - self._since) * 1000 > self._limit_ms:
            raise self._error


def copy_stall(limit_ms: int, what: str) -> StallTimeout:
    """Return the timeout of an operation that is cancelled when it stalls. `what` begins the message."""
    return StallTimeout(
        limit_ms,
        OperationRejected(
            f"{what} made no progress for {limit_ms} ms and was cancelled.",
            remedy="Check the host's storage, or raise copy_silence_timeout_ms.",
        ),
    )
