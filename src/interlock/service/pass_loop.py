"""A task that looks through the records for what is to be done, whenever something has changed.

What it does is recomputed in each pass, so that nothing but the records has to survive a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from interlock.core.errors import InterlockError, StoreClosed

_LOG: Final = structlog.get_logger(__name__)


class PassLoop:
    """Runs a pass at the start, after each change, and after a while if something is left to do.

    Args:
        name: of the task.
        one_pass: does what is due; returns whether anything is left.
        retry_ms: how long after a pass that left something the next one is run without a change.
        failed: the event that is logged when a pass raises an error of the core's tree.
        broke: the same for any other error.
        interval_min_s: the shortest time between two passes, which batches simultaneous changes.
    """

    def __init__(
        self,
        name: str,
        one_pass: Callable[[], Awaitable[bool]],
        retry_ms: int,
        *,
        failed: str,
        broke: str,
        interval_min_s: float = 0.0,
    ) -> None:
        self._name = name
        self._one_pass = one_pass
        self._retry_ms = retry_ms
        self._failed = failed
        self._broke = broke
        self._interval_min_s = interval_min_s
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Start the task, on the event loop that runs."""
        self._task = asyncio.create_task(self._run(), name=self._name)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def wake(self) -> None:
        """Run a pass soon: something has changed."""
        self._changed.set()

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            waiting = True
            try:
                waiting = await self._one_pass()
            except StoreClosed:
                return
            except InterlockError as error:
                _LOG.error(self._failed, why=error.message)
            except Exception:  # noqa: BLE001 - the outermost frame of a task
                # A bug with one instance must not end what is done for the others.
                _LOG.exception(self._broke)
            if self._interval_min_s:
                await asyncio.sleep(self._interval_min_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._retry_ms / 1000 if waiting else None):
                    await self._changed.wait()
