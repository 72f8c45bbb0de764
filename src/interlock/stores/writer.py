"""The writer thread: commits jobs in order and reports the results to the event loop.

While it waits for an fsync, the event loop collects the next batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import apsw

from interlock.core.errors import StoreClosed, StoreError, StoreFull
from interlock.stores.reserve import CHECKPOINT_PAGES_WHEN_FULL, NO_SPACE, Reserve
from interlock.stores.sqlite_errors import store_error
from interlock.stores.write_batch import Transaction

AnswerT = TypeVar("AnswerT")

CHECKPOINT_PAGES: Final = 4_000
"""Size of the write-ahead log that triggers a checkpoint, in pages of 4 KiB."""

RESERVE_MIB: Final = 1
"""Default size of the reserve for a full disk, in MiB."""
PAGES_OF_ONE_STATEMENT: Final = 16
"""Upper limit of the pages that a small transaction writes."""
CLOSED: Final = "The store is closed."
CLOSED_REMEDY: Final = "Retry when the server is up."

_Job = tuple[Callable[[apsw.Connection], Any], Callable[[Any, StoreError | None], None], int, Callable[[], bool]]


class Writer:
    """Runs jobs on the only writing connection."""

    def __init__(self, connect: Callable[[], apsw.Connection], path: Path, reserve_mib: int = RESERVE_MIB) -> None:
        self._connect = connect
        self._path = path
        self._reserve_mib = reserve_mib
        self.full = False
        """Whether the disk is full, so that only jobs that may use the reserve are written."""
        self.checkpointed = False
        """Whether the whole log had been checkpointed when the writer was closed."""
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._log_pages = 0
        self._thread = threading.Thread(target=self._run, name="interlock-writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    async def close(self) -> None:
        """Finish the queued jobs, then end. Later jobs fail."""
        self._closed = True
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def submit(
        self,
        job: Callable[[apsw.Connection], Any],
        done: Callable[[Any, StoreError | None], None],
        pages: int = PAGES_OF_ONE_STATEMENT,
        ordinary: Callable[[], bool] = lambda: False,
    ) -> None:
        """Queue a job; `done` is called on the event loop with its result or error.

        Args:
            job: run in the writer's thread.
            done: gets the result or None, and the error or None; `StoreClosed` once the writer closes.
            pages: upper limit of the pages it writes.
            ordinary: called in the writer's thread if the disk is full; true if the job may not use the reserve.
        """
        if self._closed:
            self._loop.call_soon(done, None, StoreClosed(CLOSED, remedy=CLOSED_REMEDY))
            return
        self._jobs.put((job, done, pages, ordinary))

    async def retry_full(self) -> None:
        """Try to restore the reserve. Raises `StoreFull` if there is no space."""
        await self.transaction(lambda _: None)

    async def transaction(
        self, statements: Callable[[apsw.Connection], AnswerT], *, when_full: bool = False
    ) -> AnswerT:
        """Run statements in their own transaction; with `when_full` it may use the reserve. Raises `StoreError`."""
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

        self.submit(job, done, ordinary=lambda: not when_full)
        return await answered

    def _run(self) -> None:
        try:
            connection = self._connect()
        except Exception as error:  # noqa: BLE001 - the waiting task must get the error
            self._refuse_jobs(self._as_store_error(error))
            return
        try:
            connection.set_wal_hook(self._note_log)
            self._reserve = Reserve(connection, self._path, self._reserve_mib)
        except Exception as error:  # noqa: BLE001 - the waiting task must get the error
            connection.close()
            self._refuse_jobs(self._as_store_error(error))
            return
        with contextlib.suppress(StoreError, apsw.Error):
            self._require(0, lambda: True)
        try:
            while (job := self._jobs.get()) is not None:
                self._do(connection, *job)
                if self._log_pages > (CHECKPOINT_PAGES_WHEN_FULL if self.full else CHECKPOINT_PAGES):
                    self._checkpoint(connection, apsw.SQLITE_CHECKPOINT_PASSIVE)
        finally:
            with contextlib.closing(connection):
                self.checkpointed = self._checkpoint(connection, apsw.SQLITE_CHECKPOINT_RESTART)
                # SQLite would cut the log to nothing when it is closed.
                connection.pragma("journal_size_limit", -1)

    def _refuse_jobs(self, error: StoreError) -> None:
        """Fail every job with the connection's error until the writer is closed."""
        while (job := self._jobs.get()) is not None:
            _, done, _, _ = job
            self._loop.call_soon_threadsafe(done, None, type(error)(error.message, remedy=error.remedy))

    def _as_store_error(self, error: Exception) -> StoreError:
        match error:
            case StoreError():
                return error
            case apsw.Error():
                return store_error(error, self._path)
            case _:
                return StoreError(f"Writing failed: {type(error).__name__}: {error}")

    def _require(self, pages: int, ordinary: Callable[[], bool]) -> None:
        """Raise `StoreFull` if an ordinary job would need the reserve."""
        try:
            self._reserve.require(pages)
        except StoreFull:
            if ordinary():
                raise
            self._reserve.give_up(pages)
        finally:
            self.full = not self._reserve.whole

    def _do(
        self,
        connection: apsw.Connection,
        job: Callable[[apsw.Connection], Any],
        done: Callable[[Any, StoreError | None], None],
        pages: int,
        ordinary: Callable[[], bool],
    ) -> None:
        answer: Any = None
        error: StoreError | None = None
        try:
            self._require(pages, ordinary)
            try:
                answer = _performed(job, connection)
            except apsw.FullError:
                # The log exceeded its allocated blocks. After a checkpoint it starts over in them.
                if not self._checkpoint(connection, apsw.SQLITE_CHECKPOINT_PASSIVE):
                    raise
                self._reserve.whole = False
                self._require(pages, ordinary)
                answer = _performed(job, connection)
        except Exception as failure:  # noqa: BLE001 - the thread must continue, and the caller gets the error
            error = self._as_store_error(failure)
            if isinstance(failure, apsw.FullError):
                self._reserve.whole = False
                self.full = True
        self._loop.call_soon_threadsafe(done, answer, error)

    def _note_log(self, _connection: apsw.Connection, _database: str, pages: int) -> int:
        self._log_pages = pages
        return apsw.SQLITE_OK

    def _checkpoint(self, connection: apsw.Connection, mode: int) -> bool:
        """Checkpoint the log; return whether it is complete. A passive one leaves the pages that readers need."""
        try:
            in_log, checkpointed = connection.wal_checkpoint(mode=mode)
        except apsw.Error:
            return False  # the log keeps growing, and the next commit reports a persistent error
        self._log_pages = 0
        self._reserve.checkpointed()
        return bool(in_log == checkpointed)


def _performed(job: Callable[[apsw.Connection], AnswerT], connection: apsw.Connection) -> AnswerT:
    """Run a job. Raises `apsw.FullError` for every lack of space: SQLite raises it for ENOSPC only."""
    try:
        return job(connection)
    except apsw.IOError as error:
        if connection.system_errno not in NO_SPACE:
            raise
        raise apsw.FullError(str(error)) from error
