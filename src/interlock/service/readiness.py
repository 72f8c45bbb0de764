"""Readiness of the server, with the reasons if it is not ready."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from interlock.core.errors import StoreError
from interlock.ports import Store

_WRITABLE_S = 1.0
"""Time limit of the check that the database is writable, in seconds."""


class Readiness:
    """Checks whether the server can serve requests.

    Args:
        store: checked for being writable.
        accepting: returns whether the server accepts requests.
        uninspected: returns the number of guests still to be inspected; None if not known yet.
    """

    def __init__(self, store: Store, accepting: Callable[[], bool], uninspected: Callable[[], int | None]) -> None:
        self._store = store
        self._accepting = accepting
        self._uninspected = uninspected

    async def missing(self) -> tuple[str, ...]:
        """Return why the server is not ready, one sentence each; empty if it is."""
        if not self._accepting():
            return ("The server is starting or stopping.",)
        left = self._uninspected()
        if left is None:
            return ("The server is looking for the guests of this host; requests are queued.",)
        if left:
            return (f"Guests of this host still to be inspected: {left}. Their requests are queued.",)
        return await self._unwritable()

    async def _unwritable(self) -> tuple[str, ...]:
        try:
            async with asyncio.timeout(_WRITABLE_S):
                await self._store.writable()
        except TimeoutError:
            why = (
                f"Database not writable: it is locked or its disk does not respond (timed out after {_WRITABLE_S:g} s)."
            )
            return (f"{why} Check whether another program has it open.",)
        except StoreError as error:
            return (f"Database not writable: {error.message} {error.remedy or ''}".rstrip(),)
        return ()
