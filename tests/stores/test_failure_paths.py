"""When a part of the SQLite store fails, whoever waits for it is told, and nothing is left open or locked."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import apsw
import pytest

from conformance.store.harness import creating, growing
from interlock.core.errors import StoreBusy, StoreClosed, StoreError, StoreFull
from interlock.core.records import Change, Instance
from interlock.ports.projects import Project
from interlock.stores import database_file
from interlock.stores import reserve as reserve_module
from interlock.stores import sqlite as sqlite_store
from interlock.stores import writer as writer_module
from interlock.stores.database_file import DatabaseFile
from interlock.stores.decision_gate import DecisionGate
from interlock.stores.file_lock import FileLock
from interlock.stores.queries import Queries
from interlock.stores.reserve import Reserve, log_of
from interlock.stores.schema import bring_up
from interlock.stores.sqlite import SqliteStore
from interlock.stores.timekeeping import StoreTime
from interlock.stores.writer import RESERVE_MIB, Writer
from waiting import PATIENCE_S


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


async def opened(path: Path, reserve_mib: int = RESERVE_MIB) -> SqliteStore:
    store = SqliteStore(path, reserve_mib=reserve_mib)
    await asyncio.wait_for(store.open(), PATIENCE_S)
    return store


def fail_next_job(store: SqliteStore) -> threading.Event:
    """Have the next job of the writer fail as on a broken disk, when what is returned is set."""
    submit, due = store._database.writer.submit, threading.Event()

    def submit_failing(job: Any, done: Any, *space: Any) -> None:
        del store._database.writer.submit

        def fail(_: apsw.Connection) -> None:
            due.wait()
            raise apsw.IOError("the disk is broken")

        submit(fail, done, *space)

    store._database.writer.submit = submit_failing  # type: ignore[method-assign,assignment]
    return due


async def test_those_who_wait_for_room_go_on_after_a_commit_that_failed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that was gathered is left then which could be written, and wake them."""
    monkeypatch.setattr(sqlite_store, "DECISIONS_PER_TRANSACTION", 2)
    store = await opened(path)
    await store.create(creating("a"))
    fail = fail_next_job(store)
    changing = [asyncio.create_task(store.change("a", growing)) for _ in range(6)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert store._writing is not None
    assert store._gate._waiting
    fail.set()
    answers = await asyncio.wait_for(asyncio.gather(*changing, return_exceptions=True), PATIENCE_S)
    assert {type(answer) for answer in answers} == {StoreError, int}, answers
    kept = [answer for answer in answers if isinstance(answer, int)]
    assert sorted(kept) == list(range(1, len(kept) + 1))
    await store.close()


async def test_a_writer_that_cannot_connect_tells_everybody_why(path: Path) -> None:
    """Also those who ask later."""

    def refuse() -> apsw.Connection:
        raise apsw.CantOpenError("unable to open")

    writer = Writer(refuse, path)
    writer.start()
    for _ in range(2):
        with pytest.raises(StoreError, match="cannot be written: unable to open"):
            await asyncio.wait_for(writer.transaction(lambda _: None), PATIENCE_S)
    await asyncio.wait_for(writer.close(), PATIENCE_S)


async def test_a_writer_whose_database_has_no_tables_tells_everybody_why(path: Path) -> None:
    """What is read right after connecting fails, and the connection is closed again."""
    connection = apsw.Connection(str(path))
    writer = Writer(lambda: connection, path)
    writer.start()
    with pytest.raises(StoreError, match="no such table: reserve"):
        await asyncio.wait_for(writer.transaction(lambda _: None), PATIENCE_S)
    await asyncio.wait_for(writer.close(), PATIENCE_S)
    with pytest.raises(apsw.ConnectionClosedError):
        connection.pragma("page_size")


async def test_what_is_asked_of_a_closed_store_is_refused(path: Path) -> None:
    """Also what asks the writer itself, such as the watch on the clock and the check of health."""
    store = await opened(path)
    await store.create(creating("a"))
    await store.close()
    for ask in (
        store._database.writer.transaction(lambda _: None),
        store.retry_full(),
        store.writable(),
        store.change("a", growing),
        store.create(creating("b")),
    ):
        with pytest.raises(StoreClosed):
            await asyncio.wait_for(ask, PATIENCE_S)


async def test_what_is_asked_while_the_writer_ends_is_refused(path: Path) -> None:
    store = await opened(path)
    closing = asyncio.create_task(store._database.writer.close())
    await asyncio.sleep(0)
    with pytest.raises(StoreClosed):
        await asyncio.wait_for(store.retry_full(), PATIENCE_S)
    await closing
    await asyncio.wait_for(store.close(), PATIENCE_S)


def stop(*_: object, **__: object) -> None:
    raise StoreError("stopped here")


async def stop_later(*_: object) -> None:
    stop()


def break_disk(_: object) -> None:
    raise apsw.IOError("disk I/O error")


OPENING: Final[dict[str, tuple[object, str, object]]] = {
    "connecting": (database_file, "keep_log", break_disk),
    "reading the time": (Queries, "kept_time", stop),
    "reading the sums": (SqliteStore, "_find_ends", stop),
    "making the writer": (Writer, "__init__", stop),
    "starting the writer": (Writer, "start", stop),
    "connecting the writer": (DatabaseFile, "writer", stop),
    "keeping the time": (StoreTime, "keep", stop_later),
    "counting": (SqliteStore, "_count_anew", stop_later),
}


@pytest.mark.parametrize("step", OPENING)
async def test_a_store_that_does_not_open_leaves_nothing_open(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    await (await opened(path)).close()
    with apsw.Connection(str(path)) as connection:
        connection.execute("UPDATE tallies SET of = 'older' WHERE what = 'version'")
    connection.close()
    with monkeypatch.context() as broken:
        broken.setattr(*OPENING[step])
        with pytest.raises(StoreError, match=r"stopped here|disk I/O error") as failure:
            await opened(path)
        assert open_files(path.parent) == []
        assert "interlock-writer" not in [thread.name for thread in threading.enumerate()]
        del failure  # kept until here, since nothing may be closed only for want of references
    await (await opened(path)).close()


async def test_a_store_whose_opening_is_cancelled_leaves_no_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is taken in a thread, which goes on whoever waits for it."""
    begun, go_on = threading.Event(), threading.Event()

    def bring_up_late(path: Path) -> None:
        begun.set()
        go_on.wait(PATIENCE_S)
        bring_up(path)

    monkeypatch.setattr(database_file, "bring_up", bring_up_late)
    opening = asyncio.create_task(SqliteStore(path).open())
    await asyncio.to_thread(begun.wait, PATIENCE_S)
    for _ in range(2):
        opening.cancel()
        await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert open_files(path.parent) == []
    with FileLock(path):
        pass


def open_files(folder: Path) -> list[str]:
    """Which files of a folder this process has open."""
    names = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            names.append(str(descriptor.readlink()))
    return [name for name in names if name.startswith(f"{folder}/")]


async def test_a_lock_is_not_told_as_a_full_disk_while_the_reserve_is_made(path: Path) -> None:
    store = await opened(path)
    reserve = store._database.writer._reserve
    reserve._connection.set_busy_timeout(0)
    reserve._rows_wanted += 1
    with closing(apsw.Connection(str(path))) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreBusy):
            await store.retry_full()
        assert not store.full
        other.execute("ROLLBACK")
    await store.retry_full()
    assert reserve._rows == reserve._rows_wanted
    await store.close()


@pytest.mark.parametrize(
    ("code", "full"),
    [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EFBIG, True), (errno.EIO, False), (errno.EACCES, False)],
)
async def test_only_a_want_of_space_is_told_as_a_full_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int, *, full: bool
) -> None:
    store = await opened(path)
    store._database.writer._reserve._log_allocated = False

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as broken:
        broken.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(StoreError, match="No space left" if full else os.strerror(code)) as failure:
            await store.retry_full()
    assert isinstance(failure.value, StoreFull) is full
    assert store.full is full
    await store.retry_full()
    assert not store.full
    await store.close()


async def test_what_frees_space_or_ends_guests_is_written_while_the_disk_is_full(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await opened(path)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr(os, "posix_fallocate", refuse)
        store._database.writer._reserve._log_allocated = False
        with pytest.raises(StoreFull):
            await store.retry_full()
        for table in (store.tokens, store.images, store.volumes, store.projects, store.hosts):
            assert not await table.delete("none")
        await store.volumes.release("none", "none")
        await store.policies.settle(1, 0)
        with pytest.raises(StoreFull):
            await store.projects.put(Project(name="p"))
        with pytest.raises(StoreFull):
            await store.create(creating("a"))
    await store.close()


def test_the_connection_that_writes_enforces_references_and_the_one_that_reads_cannot_write(path: Path) -> None:
    file = DatabaseFile(path)
    file.take()
    try:
        for connection, pragma in ((file.writer(), "foreign_keys"), (file.reader(), "query_only")):
            with closing(connection):
                assert connection.pragma(pragma) == 1
    finally:
        file.unlock()


async def test_no_decision_is_made_while_the_gate_is_paused_full_or_closing() -> None:
    full = False
    gate = DecisionGate(lambda: full)
    assert not gate.shut
    with gate.paused():
        assert gate.shut
        waiting = asyncio.ensure_future(gate.passed())
        with gate.paused():
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done()
    await asyncio.wait_for(waiting, PATIENCE_S)
    full = True
    assert gate.shut
    full, gate.closing = False, True
    assert gate.shut
    with pytest.raises(StoreClosed):
        await gate.passed()


@pytest.mark.parametrize("what", ["commit", "growth"])
@pytest.mark.parametrize(
    ("code", "full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EFBIG, True), (errno.EIO, False)]
)
async def test_what_a_write_of_sqlite_fails_with_says_whether_there_is_no_space(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int, what: str, *, full: bool
) -> None:
    store = await opened(path)
    await store.create(creating("a"))
    if what == "growth":
        monkeypatch.setattr(reserve_module, "_STEP_PAGES", 1_024)
        store._database.writer._reserve.checkpointed()  # so that blocks are asked for again
    with writes_failing(code), pytest.raises(StoreError) as failure:
        await store.change("a", growing)
    assert isinstance(failure.value, StoreFull) is full, failure.value.message
    assert store.full is full
    assert await store.change("a", growing) == 1
    assert not store.full
    await store.close()


@contextmanager
def writes_failing(code: int) -> Iterator[None]:
    """Within the block every write of SQLite fails with that number of an error."""
    called = ctypes.CFUNCTYPE(ctypes.c_ssize_t, *(ctypes.c_ssize_t,) * 4, use_errno=True)

    def fail(*_: int) -> int:
        ctypes.set_errno(code)
        return -1

    failing = called(fail)
    vfs = apsw.VFS("failing", "")
    for name in ("write", "pwrite64"):
        vfs.xSetSystemCall(name, ctypes.cast(failing, ctypes.c_void_p).value or 0)
    try:
        yield
    finally:
        for name in ("write", "pwrite64"):
            vfs.xSetSystemCall(name, 0)
        vfs.unregister()


async def test_a_broken_disk_is_not_told_as_a_full_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's own errors neither, whichever step they come from."""
    store = await opened(path)
    for step in ("_allocate", "_fill"):
        store._database.writer._reserve._rows_wanted += 1
        with monkeypatch.context() as broken:
            broken.setattr(store._database.writer._reserve, step, break_disk)
            with pytest.raises(StoreError, match="disk I/O error") as failure:
                await store.retry_full()
        assert not isinstance(failure.value, StoreFull)
        assert not store.full
    await store.close()


def test_the_reserve_gives_up_what_is_missing_in_whole_rows_and_no_more(path: Path) -> None:
    bring_up(path)
    with closing(apsw.Connection(str(path))) as connection:
        log_of(path).touch()
        reserve = Reserve(connection, path, mib=1)
        reserve.require(0)
        left = []
        for pages in (0, 1, 17, 17, 1, 1_000_000, 1_000_000):
            free = int(connection.pragma("freelist_count"))
            reserve.give_up(free + pages if pages != 1 else pages)
            left.append(int(connection.execute("SELECT count(*) FROM reserve").get))
    assert left == [16, 15, 13, 11, 11, 0, 0]


# ----------------------------------------------------------------------------------------- what has to go on working


async def test_the_log_does_not_grow_beyond_what_is_carried_over(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reserve_module, "LOG_PAGES", 16)
    monkeypatch.setattr(writer_module, "CHECKPOINT_PAGES", 50)
    store = await opened(path, reserve_mib=0)
    await store.create(creating("a"))
    for _ in range(30):
        await store.change("a", growing_by(100_000))
    pages = log_of(path).stat().st_size // 4_096
    await store.close()
    assert 50 < pages < 150, f"{pages} for 30 transactions of more than 25 pages each"


def growing_by(characters: int) -> Callable[[Instance, int], Change[int]]:
    def decide(instance: Instance, now_ms: int) -> Change[int]:
        change = growing(instance, now_ms)
        change.events[0].data["ballast"] = "x" * characters
        return change

    return decide


async def test_what_is_on_its_way_to_the_disk_is_not_forgotten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from the disk again, it would lack the change that is on its way, and the next would undo that."""
    monkeypatch.setattr(sqlite_store, "INSTANCES_IN_MEMORY", 10)
    store = await opened(path)
    names = [f"i{number}" for number in range(30)]
    await asyncio.gather(*(store.create(creating(name)) for name in names))
    await store.close()
    store = await opened(path)
    written = threading.Event()
    store._database.writer.submit(lambda _: written.wait(), lambda *_: None)
    changing = [asyncio.create_task(store.change("i0", growing))]
    for _ in range(3):
        await asyncio.sleep(0)
    assert store._writing is not None
    for name in names[1:] * 2:
        await store.change(name, lambda instance, _: Change(instance=instance, answer=None))
    assert len(store._kept) <= 11
    changing.append(asyncio.create_task(store.change("i0", growing)))
    await asyncio.sleep(0)
    written.set()
    assert await asyncio.wait_for(asyncio.gather(*changing), PATIENCE_S) == [1, 2]
    await store.close()


def test_a_second_lock_is_refused_until_the_first_is_let_go(path: Path) -> None:
    first, second = FileLock(path), FileLock(path)
    with first:
        with pytest.raises(StoreBusy, match=f"Process {os.getpid()} holds"):
            second.take()
        with pytest.raises(StoreBusy):
            second.take()
    with second, pytest.raises(StoreBusy):
        first.take()


@pytest.mark.parametrize("taken_again", [False, True])
def test_a_lock_on_a_file_that_its_holder_removed_meanwhile_is_none(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, taken_again: bool
) -> None:
    """It was opened before it was removed, and is locked after that."""
    first, late, third = FileLock(path), FileLock(path), FileLock(path)
    first.take()
    flock = fcntl.flock

    def flock_late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        first.unlock()
        if taken_again:
            third.take()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    if taken_again:
        with pytest.raises(StoreBusy):
            late.take()
        third.unlock()
        late.take()
    else:
        late.take()
    with pytest.raises(StoreBusy):
        first.take()
    late.unlock()
