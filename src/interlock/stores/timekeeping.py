"""Persistence of the store's clock in SQLite."""

from __future__ import annotations

from typing import Final

import apsw

from interlock.ports import Jump
from interlock.stores import row_codec
from interlock.stores.database import Database
from interlock.stores.statements import OFFSET, TIME

_KEPT_EVERY_MS: Final = 300_000
"""Interval at which an idle store persists its time: the most that ages lose in a power failure."""


class StoreTime:
    """The store's clock, persisted in the database. Satisfies `ports.StoreTime`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._kept_at_ms = 0

    @property
    def cautious_until_ms(self) -> int:
        return self._database.clock.kept.cautious_until_ms

    @property
    def jump_at_opening(self) -> Jump | None:
        return self._database.clock.jump_at_opening

    @property
    def last_jump(self) -> Jump | None:
        return self._database.clock.kept.jump

    async def look(self) -> Jump | None:
        clock = self._database.clock
        before = clock.offsets
        jump = clock.look()
        if clock.offsets is not before or clock.now_ms() - self._kept_at_ms >= _KEPT_EVERY_MS:
            await self.keep()
        return jump

    async def keep(self) -> None:
        """Write the time. Raises `StoreError`."""
        self._kept_at_ms = now_ms = self._database.clock.now_ms()
        body = row_codec.body(self._database.clock.kept)
        (offset,) = self._database.clock.offsets.kept[-1:]

        def write(connection: apsw.Connection) -> None:
            connection.execute(TIME, (now_ms, body))
            OFFSET.run(connection, offset)

        await self._database.writer.transaction(write, when_full=True)
