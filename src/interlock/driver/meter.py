"""How far something is that moves bytes, and how fast: told often by who moves them, kept now and then."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

from interlock.core.records import Moved

_LATELY_S: Final = 5.0
"""Over how long the rate is taken, in seconds."""


class Meter:
    """Takes reports (`ports.Report`) and has what is new of them kept, at most once in each interval."""

    def __init__(self, keep: Callable[[Moved], Awaitable[None]], interval_ms: int) -> None:
        self._keep = keep
        self._interval_s = interval_ms / 1000
        self._now = asyncio.get_running_loop().time
        self._seen: deque[tuple[float, int]] = deque()
        self._latest: tuple[int, int | None] | None = None
        self._new = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name="meter")

    def __call__(self, done: int, total: int | None = None) -> None:
        """Take note; does nothing where nothing is new. Raises what keeping it raised, such as `Fenced`."""
        if self._task.done():
            self._task.result()
        if (done, total) == self._latest:
            return
        self._latest = (done, total)
        self._seen.append((self._now(), done))
        while len(self._seen) > 2 and self._seen[-1][0] - self._seen[1][0] >= _LATELY_S:  # noqa: PLR2004 - a span
            self._seen.popleft()
        self._new.set()

    def moved(self) -> Moved | None:
        """What was told last, with the rate; None while nothing was told."""
        if self._latest is None:
            return None
        done, total = self._latest
        (begun, before), (ended, after) = self._seen[0], self._seen[-1]
        per_s = int((after - before) / (ended - begun)) if ended > begun and after >= before else None
        return Moved(done=done, total=total, per_s=per_s)

    async def _run(self) -> None:
        while True:
            await self._new.wait()
            # Whatever is moved in less than that needs no telling.
            await asyncio.sleep(self._interval_s)
            self._new.clear()
            moved = self.moved()
            if moved is not None:
                await self._keep(moved)

    async def close(self) -> None:
        """Stop telling. Raises what keeping it raised."""
        self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.result()
