"""What the SQLite store does on bad days: kills, full disks, and files that are not its own."""

# ruff: noqa: ASYNC240 - a test may wait for its own files

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import apsw
import pytest

from interlock.core.errors import StoreBusy, StoreCorrupt, StoreError, StoreFull, StoreNewer
from interlock.core.records import Change, Instance
from interlock.ports import IdempotencyKey, InstanceFilter
from interlock.stores import sqlite as sqlite_store
from interlock.stores.file_lock import FileLock
from interlock.stores.sqlite import KEY_KEPT_MS, SqliteStore
from interlock.testing.check_store import GivenClock
from interlock.testing.check_store.bench import admitting, creating, growing, putting

ACKNOWLEDGING = Path(__file__).with_name("acknowledging.py")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


async def made(path: Path, count: int = 1) -> None:
    """A database with some instances, closed again."""
    store = SqliteStore(path)
    await store.open()
    await asyncio.gather(*(store.create(creating(f"i{number}")) for number in range(count)))
    await store.close()


async def refused(path: Path) -> StoreError:
    """Why the database is not opened."""
    with pytest.raises(StoreError) as refusal:
        await SqliteStore(path).open()
    assert refusal.value.remedy
    return refusal.value


# ---------------------------------------------------------------------------------------------------------- kill -9


def lines_until_killed(path: Path, life: int, lines: int) -> list[str]:
    command = [sys.executable, str(ACKNOWLEDGING), str(path), str(life)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        said += process.stdout.read().splitlines(keepends=True)
    return [line.rstrip("\n") for line in said if line.endswith("\n")]


async def test_whatever_was_acknowledged_survives_kill_9(path: Path) -> None:
    said: list[str] = []
    for life, lines in enumerate((60, 300, 700, 1500)):
        new = await asyncio.to_thread(lines_until_killed, path, life, lines)
        assert len(new) >= lines
        said += new
        store = SqliteStore(path)
        await store.open()
        try:
            await check_acknowledged(store, said)
        finally:
            await store.close()


async def check_acknowledged(store: SqliteStore, said: list[str]) -> None:
    latest: dict[str, str] = {}
    for line in said:
        word, id_ = line.split(" ")
        latest[id_] = word
    for id_, word in latest.items():
        if word == "instance":
            assert await store.instance(id_) is not None, id_
            continue
        request = await store.request(id_)
        assert request is not None, id_
        # What was on its way when the process was killed may be there too, one step further at most.
        assert request.status.value in {word, "succeeded"}, id_
    events = await store.events(0, 10**6)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    told = {event.request_id for event in events if event.kind == "request.ended"}
    assert {id_ for id_, word in latest.items() if word == "succeeded"} <= told


async def test_a_key_answers_after_kill_9(path: Path) -> None:
    said = await asyncio.to_thread(lines_until_killed, path, 0, 200)
    request_id = next(line.split(" ")[1] for line in said if line.startswith("queued"))
    store = SqliteStore(path)
    await store.open()
    key = IdempotencyKey(scope="t", key=request_id, fingerprint="f")
    answer = await store.change(request_id.rsplit("-", 1)[0], admitting("another"), key)
    assert answer.request.id == request_id
    await store.close()


# -------------------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting needs privileges that this user does not have")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(ballast: Path) -> None:
    """Write to a file until there is no room."""
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


async def test_a_full_disk_keeps_nothing_and_works_again_when_there_is_room(small_disk: Path) -> None:
    store = SqliteStore(small_disk / "store.db")
    await store.open()
    await store.create(creating("a"))
    ballast = small_disk / "ballast"
    fill(ballast)
    await check_full(store)
    ballast.unlink()
    assert await store.change("a", growing) == 1
    assert (await store.create(creating("b"))).id == "b"
    assert [event.sequence for event in await store.events(0, 10)] == [1, 2, 3]
    await store.close()
    await store_opens_with(small_disk / "store.db", {"a": 1, "b": 0})


async def test_a_database_that_may_not_grow_keeps_nothing(path: Path) -> None:
    """The same by SQLite's own limit, where nothing can be mounted."""
    store = SqliteStore(path)
    await store.open()
    await store.create(creating("a"))

    def limit(pages: int) -> None:
        store._writer.submit(lambda c: c.execute(f"PRAGMA max_page_count = {pages}").fetchall(), lambda *_: None)

    limit(1)  # SQLite makes it as many pages as there are
    await check_full(store)
    limit(10**6)
    assert await store.change("a", growing) == 1
    await store.close()
    await store_opens_with(path, {"a": 1})


async def check_full(store: SqliteStore) -> None:
    """Fill what is left, and see that everybody hears of it and nothing stays."""
    told: list[object] = []
    take_away = store.listen(told.extend)
    key = IdempotencyKey(scope="t", key="k", fingerprint="f")

    def grow_large(instance: Instance, now_ms: int) -> Change[int]:
        change = growing(instance, now_ms)
        event = change.events[0]
        event.data["ballast"] = "x" * 4_000_000
        return change

    answers = await asyncio.gather(
        store.change("a", growing),
        store.change("a", grow_large),
        store.change("a", admitting("r1"), key),
        store.change("a", admitting("r2"), key),
        store.create(creating("b")),
        store.change("a", lambda instance, _: Change(instance=instance, answer="nothing")),
        return_exceptions=True,
    )
    assert [type(answer) for answer in answers] == [StoreFull] * 6, answers
    assert all(isinstance(answer, StoreFull) and answer.remedy for answer in answers)
    instance = await store.instance("a")
    assert instance is not None
    assert (instance.generation, instance.outstanding, told) == (0, (), [])
    assert await store.instance("b") is None
    assert await store.request("r1") is None
    assert await store.last_event() == 1
    take_away()


async def store_opens_with(path: Path, generations: dict[str, int]) -> None:
    store = SqliteStore(path)
    await store.open()
    page = await store.instances(InstanceFilter(), 100)
    assert {instance.id: instance.generation for instance in page.items} == generations
    await store.close()


# ---------------------------------------------------------------------------------------- files that are not ours


async def test_a_file_that_is_no_database_is_left_alone(path: Path) -> None:
    path.write_bytes(b"Dear diary, " * 500)
    error = await refused(path)
    assert isinstance(error, StoreCorrupt)
    assert str(path) in error.message
    assert path.read_bytes() == b"Dear diary, " * 500
    assert sorted(path.parent.iterdir()) == [path]


async def test_another_programs_database_is_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()
    before = path.read_bytes()
    assert "another program" in (await refused(path)).message
    assert path.read_bytes() == before
    assert sorted(path.parent.iterdir()) == [path]


async def test_a_newer_layout_is_left_alone(path: Path) -> None:
    await made(path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    error = await refused(path)
    assert isinstance(error, StoreNewer)
    assert "9999" in error.message


async def test_damaged_pages_are_noticed_when_opening(path: Path) -> None:
    await made(path, 200)
    size = path.stat().st_size
    with path.open("r+b") as file:
        for offset in range(8192, size, 4096):
            file.seek(offset + 100)
            file.write(os.urandom(2000))
    assert isinstance(await refused(path), StoreCorrupt)


async def test_half_a_database_is_noticed_when_opening(path: Path) -> None:
    await made(path, 200)
    os.truncate(path, path.stat().st_size // 2)
    assert isinstance(await refused(path), StoreCorrupt)


async def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    error = await refused(tmp_path / "nowhere" / "store.db")
    assert str(tmp_path / "nowhere") in error.message
    assert "mkdir" in str(error.remedy)


async def test_a_folder_in_the_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "store.db").mkdir()
    assert "not a file" in (await refused(tmp_path / "store.db")).message


async def test_nobody_else_can_read_the_files(path: Path) -> None:
    before = os.umask(0)
    try:
        store = SqliteStore(path)
        await store.open()
        await store.create(creating("a"))
        modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
        await store.close()
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("store.db", "store.db-wal", "store.db-shm", "store.db.lock"), 0o600)


# ------------------------------------------------------------------------------------------------------- second openers


async def test_a_second_server_is_told_who_has_the_database(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    script = (
        "import asyncio, pathlib, sys\nfrom interlock.stores.sqlite import SqliteStore\n"
        "asyncio.run(SqliteStore(pathlib.Path(sys.argv[1])).open())"
    )
    command = [sys.executable, "-c", script, str(path)]
    other = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    assert f"Process {os.getpid()} holds" in other.stderr
    error = await refused(path)
    assert isinstance(error, StoreBusy)
    assert str(os.getpid()) in error.message
    assert (await store.create(creating("a"))).id == "a"
    await store.close()
    await store_opens_with(path, {"a": 0})


async def test_nothing_but_the_database_is_left_after_closing(path: Path) -> None:
    await made(path)
    assert sorted(path.parent.iterdir()) == [path]


def test_the_lock_is_held_by_one_at_a_time(path: Path) -> None:
    """Also while its file is removed and made again by those who take and leave it."""
    inside: list[int] = []
    overlaps: list[int] = []

    def take_and_leave() -> None:
        for _ in range(300):
            lock = FileLock(path)
            try:
                lock.take()
            except StoreBusy:
                continue
            inside.append(1)
            if len(inside) > 1:
                overlaps.append(1)
            inside.pop()
            lock.let_go()

    threads = [threading.Thread(target=take_and_leave) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not overlaps


# --------------------------------------------------------------------------------------------- keys and batches


async def test_a_key_is_forgotten_after_its_time(path: Path) -> None:
    clock = GivenClock()
    store = SqliteStore(path, clock)
    await store.open()
    await store.create(creating("a"))
    key = IdempotencyKey(scope="t", key="k", fingerprint="f")
    await store.change("a", admitting("r1"), key)
    clock.shows_ms += KEY_KEPT_MS
    assert (await store.change("a", admitting("r2"), key)).request.id == "r1"
    clock.shows_ms += 1
    assert (await store.change("a", admitting("r3"), key)).request.id == "r3"
    assert (await store.change("a", admitting("r4"), key)).request.id == "r3"
    await store.close()


async def test_more_callers_than_a_transaction_takes_are_all_served(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "DECISIONS_PER_TRANSACTION", 7)
    store = SqliteStore(path)
    await store.open()
    await store.create(creating("a"))
    answers = await asyncio.gather(*(store.change("a", growing) for _ in range(100)))
    assert sorted(answers) == list(range(1, 101))
    await store.close()
    with pytest.raises(StoreError, match="closed"):
        await store.change("a", growing)


async def test_what_is_not_in_memory_is_found_on_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_store, "INSTANCES_IN_MEMORY", 20)
    await made(path, 100)
    store = SqliteStore(path)
    await store.open()
    for _ in range(2):
        await asyncio.gather(*(store.change(f"i{number}", growing) for number in range(100)))
    for number in range(0, 100, 9):
        await store.change(f"i{number}", putting(host="h9"))
    assert len(store._kept) < 100
    await store.close()
    await store_opens_with(path, {f"i{number}": 2 for number in range(100)})
    with apsw.Connection(str(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").get == "ok"
