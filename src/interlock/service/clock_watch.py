"""Clock monitor: tracks the wall clock and reports jumps."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Final

import structlog

from interlock.core.errors import StoreClosed, StoreError
from interlock.ports import Jump, Store

_LOG = structlog.get_logger(__name__)
_INTERVAL_S: Final = 1.0
_DAY_MS: Final = 86_400_000
_REPORTED_FOR_MS: Final = 600_000
"""How long a backward jump is reported; a forward jump is reported while it delays anything."""


class ClockWatch:
    """Keeps the store's displayed times in step with the wall clock.

    Args:
        store: its clock is checked.
        note: records an event of this host: kind, detail.
        resolve: called when times of the wall clock have to be converted to the store's again.
    """

    def __init__(
        self, store: Store, note: Callable[[str, str], Awaitable[None]], resolve: Callable[[], None] = lambda: None
    ) -> None:
        self._store = store
        self._note = note
        self._resolve = resolve
        self._resolved: tuple[int, int] | None = None
        """The offset to the wall clock, and the day of it, for which it was called last."""
        self._task: asyncio.Task[None] | None = None
        self.jumps = {"forward": 0, "backward": 0}
        """Number of jumps since `open`, including one found when the store was opened."""

    def open(self) -> None:
        """Report a jump found when the store was opened, then check periodically."""
        self._task = asyncio.create_task(self._run(), name="clock watch")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        jump = self._store.time.jump_at_opening
        while True:
            try:
                if jump is not None:
                    await self._report(jump)
                await asyncio.sleep(_INTERVAL_S)
                jump = await self._store.time.look()
                self._resolve_again()
            except StoreClosed:
                return
            except StoreError as error:
                _LOG.error("failed to persist the clock", why=error.message)
                jump = None

    def _resolve_again(self) -> None:
        """Follow the wall clock, each day and after a correction; after a jump not before scheduled actions do."""
        now_ms = self._store.now_ms()
        shown_ms = self._store.shown_ms(now_ms)
        latest = (shown_ms - now_ms, shown_ms // _DAY_MS)
        if latest != self._resolved and not self.cautious:
            self._resolved = latest
            self._resolve()

    async def _report(self, jump: Jump) -> None:
        self.jumps["forward" if jump.by_ms > 0 else "backward"] += 1
        _LOG.warning("clock jumped", what=sentence(jump), remedy=_REMEDY)
        await self._note("clock_jumped", sentence(jump))

    @property
    def offset_s(self) -> float:
        """Displayed time minus the store's time, in seconds."""
        now_ms = self._store.now_ms()
        return (self._store.shown_ms(now_ms) - now_ms) / 1000

    @property
    def cautious(self) -> bool:
        """Whether irreversible server-initiated actions are delayed because the clock jumped."""
        return self._store.now_ms() < self._store.time.cautious_until_ms

    def reasons(self) -> tuple[str, ...]:
        """Return warnings about a recent jump, one sentence each."""
        jump, now_ms = self._store.time.last_jump, self._store.now_ms()
        if jump is None or (not self.cautious and now_ms - jump.at_ms >= _REPORTED_FOR_MS):
            return ()
        left_ms = self._store.time.cautious_until_ms - now_ms
        waits = f" Irreversible scheduled actions are delayed for {left_ms // 1000} s." if left_ms > 0 else ""
        return (f"{sentence(jump)}{waits} {_REMEDY}",)


_REMEDY: Final = "Check the clock and its synchronization (chronyd, systemd-timesyncd)."


def sentence(jump: Jump) -> str:
    """Describe a jump in one sentence."""
    way = "ahead" if jump.by_ms > 0 else "back"
    length = timedelta(seconds=round(abs(jump.by_ms) / 1000))
    if jump.between_boots and jump.by_ms > 0:
        return f"The clock is {length} ahead of the time in the database: it is wrong, or the machine was off."
    return f"The clock jumped {length} {way}."
