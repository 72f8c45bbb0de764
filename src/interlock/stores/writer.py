"""The one thread that writes: it commits what it is given, in the order given, and tells the event loop.

While it waits for the disk it holds nothing back: the event loop gathers the next batch meanwhile, which is what makes
one fsync serve many decisions.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import apsw

from interlock.core.errors import StoreError
from interlock.stores.batch import Transaction
from interlock.stores.sqlite_errors import store_error

AnswerT = TypeVar("AnswerT")

CHECKPOINT_PAGES: Final = 4_000
"""How large the log grows before it is carried over into the database, in pages of 4 KiB."""

_Job = tuple[Callable[[apsw.Connection], Any], Callable[[Any, StoreError | None], None]]


class Writer:
    """Runs jobs on the one connection that may write."""

    def __init__(self, connect: Callable[[], apsw.Connection], path: Path) -> None:
        self._connect = connect
        self._path = path
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._log_pages = 0
        self._thread = threading.Thread(target=self._run, name="interlock-writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    async def close(self) -> None:
        """Finish what it was given, then end."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def submit(self, job: Callable[[apsw.Connection], Any], done: Callable[[Any, StoreError | None], None]) -> None:
        """Have a job done; `done` is called on the event loop with its answer, or with the error that undid it."""
        self._jobs.put((job, done))

    async def transaction(self, statements: Callable[[apsw.Connection], AnswerT]) -> AnswerT:
        """Run statements in a transaction of their own. Raises `StoreError`, or what they raise of the error tree."""
        answered: asyncio.Future[AnswerT] = self._loop.create_future()

        def job(connection: apsw.Connection) -> AnswerT:
            with Transaction(connection):
                return statements(connection)

        def done(answer: Any, error: StoreError | None) -> None:
            if not answered.done():
                if error is not None:
                    answered.set_exception(error)
                else:
                    answered.set_result(answer)

        self.submit(job, done)
        return await answered

    def _run(self) -> None:
        connection = self._connect()
        connection.set_wal_hook(self._note_log)
        try:
            while (job := self._jobs.get()) is not None:
                self._do(connection, *job)
                if self._log_pages > CHECKPOINT_PAGES:
                    self._checkpoint(connection)
        finally:
            connection.close()

    def _do(
        self,
        connection: apsw.Connection,
        job: Callable[[apsw.Connection], Any],
        done: Callable[[Any, StoreError | None], None],
    ) -> None:
        answer: Any = None
        error: StoreError | None = None
        try:
            answer = job(connection)
        except apsw.Error as refused:
            error = store_error(refused, self._path)
        except Exception as bug:  # noqa: BLE001 - the thread must go on, and whoever waits must hear of it
            error = bug if isinstance(bug, StoreError) else StoreError(f"Writing failed: {type(bug).__name__}: {bug}")
        self._loop.call_soon_threadsafe(done, answer, error)

    def _note_log(self, _connection: apsw.Connection, _database: str, pages: int) -> int:
        self._log_pages = pages
        return apsw.SQLITE_OK

    def _checkpoint(self, connection: apsw.Connection) -> None:
        """Carry the log over into the database; readers are not disturbed, and what they still need stays."""
        try:
            connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.Error:
            return  # the log goes on growing, and the next commit says what is wrong if something is
        self._log_pages = 0
