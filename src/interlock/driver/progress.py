"""Progress of byte transfers: rate calculation, and recording in intervals."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

from interlock.core.records import TransferProgress

_LATELY_S: Final = 5.0
"""The averaging time of the rate, in seconds."""
_STEP: Final = 0.01
"""The smallest progress that is recorded at once, as a share of the total."""


class ProgressReporter:
    """Progress callback (`ports.Report`) that records new progress at most once in each interval.

    While there is little progress the interval is doubled, up to its maximum, so that hours at 97 % do not fill the
    history. A new or ended warning is recorded after the minimum.
    """

    def __init__(
        self, keep: Callable[[TransferProgress], Awaitable[None]], interval_ms: int, interval_max_ms: int
    ) -> None:
        self._keep = keep
        self._shortest_s = interval_ms / 1000
        self._longest_s = max(interval_ms, interval_max_ms) / 1000
        self._now = asyncio.get_running_loop().time
        self._seen: deque[tuple[float, int]] = deque()
        self._latest: TransferProgress | None = None
        self._kept: TransferProgress | None = None
        self._new = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name="progress")

    def __call__(
        self, done: int, total: int | None = None, *, detail: str | None = None, warning: str | None = None
    ) -> None:
        """Report progress. Raises errors of recording it, such as `Fenced`."""
        if self._task.done():
            self._task.result()
        progress = TransferProgress(done=done, total=total, detail=detail, warning=warning)
        if progress == self._latest:
            return
        self._latest = progress
        self._seen.append((self._now(), done))
        while len(self._seen) > 2 and self._seen[-1][0] - self._seen[1][0] >= _LATELY_S:  # noqa: PLR2004 - a span
            self._seen.popleft()
        self._new.set()

    def moved(self) -> TransferProgress | None:
        """Return the last report with the rate; None if there was none."""
        last = self._latest
        if last is None:
            return None
        (begun, before), (ended, after) = self._seen[0], self._seen[-1]
        per_s = int((after - before) / (ended - begun)) if ended > begun and after >= before else None
        return TransferProgress(done=last.done, total=last.total, per_s=per_s, detail=last.detail, warning=last.warning)

    async def _run(self) -> None:
        interval_s = self._shortest_s
        while True:
            await self._new.wait()
            # A shorter transfer is not recorded.
            await self._pause(interval_s)
            self._new.clear()
            moved = self.moved()
            if moved is not None:
                interval_s = self._shortest_s if self._is_significant(moved) else min(self._longest_s, interval_s * 2)
                self._kept = moved
                await self._keep(moved)

    async def _pause(self, interval_s: float) -> None:
        """Wait for the interval, or until there is enough progress."""
        until = self._now() + interval_s
        while (left := until - self._now()) > 0:
            await asyncio.sleep(min(left, self._shortest_s))
            if self._latest is not None and self._is_significant(self._latest):
                return

    def _is_significant(self, moved: TransferProgress) -> bool:
        """Whether to record it without waiting for a longer interval."""
        kept = self._kept
        if kept is None or moved.warning != kept.warning:
            return True
        if moved.fraction is None or kept.fraction is None:
            return moved.total is None and moved.done > kept.done * (1 + _STEP)
        return moved.fraction >= kept.fraction + _STEP

    async def close(self) -> None:
        """Stop recording. Raises errors of recording."""
        self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.result()
