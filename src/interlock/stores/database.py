"""The open database: a connection that reads, a thread that writes, and the store's clock."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import apsw

from interlock.core.errors import NameTaken
from interlock.ports import Clock
from interlock.stores.clock import StoreClock
from interlock.stores.database_file import DatabaseFile
from interlock.stores.queries import Queries
from interlock.stores.statements import SEEN
from interlock.stores.writer import Writer


class Database:
    """The parts that every table of the store uses. `read`, `writer` and `clock` exist while it is open."""

    read: Queries
    writer: Writer
    clock: StoreClock

    def __init__(self, path: Path, clock: Clock, reserve_mib: int, *, jump_ms: int, grace_ms: int) -> None:
        self._file = DatabaseFile(path)
        self._machine_clock = clock
        self._reserve_mib = reserve_mib
        self._jump_ms = jump_ms
        self._grace_ms = grace_ms

    async def open(self) -> None:
        """Lock and open the file. On an error nothing stays open or locked. Raises as `DatabaseFile.take`."""
        await self._file.take_in_thread()
        with contextlib.ExitStack() as opened:
            opened.callback(self._file.unlock)
            self.read = Queries(self._file.reader())
            opened.callback(self.read.close)
            kept, offsets = self.read.kept_time(), self.read.offsets()
            self.clock = StoreClock(self._machine_clock, kept, offsets, jump_ms=self._jump_ms, grace_ms=self._grace_ms)
            self.writer = Writer(self._file.writer, self._file.path, self._reserve_mib)
            self.writer.start()
            opened.pop_all()

    async def close(self) -> None:
        """Finish what was submitted to the writer, and close and unlock the file."""
        await self.writer.close()
        self.read.close()
        self._file.unlock(checkpointed=self.writer.checkpointed)

    async def write(self, statement: str, *values: Any, when_full: bool = False) -> int:
        """Run one statement in its own transaction; return the number of changed rows.

        `when_full` lets it use the reserve when the disk is full: it frees space, or a stop or delete needs it.
        """
        now_ms = self.clock.now_ms()

        def run(connection: apsw.Connection) -> int:
            connection.execute(statement, values)
            changes = connection.changes()
            connection.execute(SEEN, (now_ms,))
            return changes

        return await self.writer.transaction(run, when_full=when_full)

    async def insert(self, taken: str, statement: str, *values: Any) -> None:
        """Insert a row, or raise `NameTaken` with the message `taken`."""
        if not await self.write(f"{statement} ON CONFLICT DO NOTHING", *values):
            raise NameTaken(taken, remedy="Choose another name.")
