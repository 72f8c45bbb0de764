"""What the SQLite store does on bad days: kills, full disks, and files that are not its own."""

# ruff: noqa: ASYNC240 - a test may wait for its own files

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import apsw
import pytest

from conformance.store import GivenClock
from conformance.store.harness import admitting, creating, ending, growing, putting
from in_process.trusting_verifier import TrustingProver
from interlock.config import Config
from interlock.core.errors import StoreBusy, StoreCorrupt, StoreError, StoreFull, StoreNewer
from interlock.core.operations import Operation
from interlock.core.records import Change, Instance
from interlock.core.states import VmState
from interlock.ports import IdempotencyKey, InstanceFilter, Tally, Volume
from interlock.server import DATABASE, Server
from interlock.stores import row_codec
from interlock.stores import sqlite as sqlite_store
from interlock.stores.file_lock import FileLock
from interlock.stores.idempotency_keys import KEY_KEPT_MS
from interlock.stores.reserve import LOG_PAGES, has_changes
from interlock.stores.sqlite import SqliteStore
from interlock.stores.writer import RESERVE_MIB
from small_file_systems import fill, small_file_system
from waiting import PATIENCE_S

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
    """A file system of sixteen megabytes."""
    with small_file_system(tmp_path / "small", "16m") as folder:
        yield folder


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


async def test_when_the_disk_is_full_guests_can_still_be_stopped_and_deleted(small_disk: Path) -> None:
    """Many in a row, with their bookkeeping, while everything else is refused before it takes anything from that."""
    store = SqliteStore(small_disk / "store.db")
    await store.open()
    names = [f"vm{number}" for number in range(60)]
    for name in names:
        await store.create(creating(name))
    fill(small_disk / "ballast")
    refused = 0
    for attempt in range(400):
        try:
            await store.change(names[attempt % 60], admitting(f"reboot{attempt}"))
        except StoreFull:
            refused += 1
    assert refused > 100
    assert store.full
    with pytest.raises(StoreFull):
        await store.create(creating("another"))
    with pytest.raises(StoreFull):
        await store.volumes.put(Volume(id="v", name="v", project="p", path="/v", size_bytes=1, created_at_ms=0))
    for name in names:
        fill(small_disk / "ballast")
        await store.change(name, admitting(f"stop-{name}", Operation.STOP))
        await store.change(name, ending(f"stop-{name}"))
        await store.change(name, admitting(f"delete-{name}", Operation.DELETE))
        await store.volumes.release("volume", name)
    answers = await asyncio.gather(
        *(store.change(name, admitting(f"again-{name}", Operation.FORCE_DELETE)) for name in names)
    )
    assert len(answers) == 60
    await store.close()
    fill(small_disk / "ballast")

    # Another process finds it as full, and as able.
    store = SqliteStore(small_disk / "store.db")
    await store.open()
    await store.change("vm1", ending("delete-vm1"))
    with pytest.raises(StoreFull):
        await store.create(creating("another"))
    assert store.full
    (small_disk / "ballast").unlink()
    assert (await store.create(creating("another"))).id == "another"
    assert not store.full
    await store.close()
    database = apsw.Connection(str(small_disk / "store.db"))
    assert database.execute("SELECT sum(length(content)) FROM reserve").get == RESERVE_MIB << 20
    assert database.pragma("integrity_check") == "ok"
    database.close()


async def test_a_log_that_has_outgrown_the_reserve_keeps_no_guest_from_being_stopped(small_disk: Path) -> None:
    """As a killed process leaves it: how long it is, the next one knows only after its first commit."""
    store = SqliteStore(small_disk / "store.db")
    await store.open()
    await store.create(creating("a"))
    log = small_disk / "store.db-wal"
    for number in count():
        await store.change("a", admitting(f"before{number}", Operation.STOP))
        await store.change("a", ending(f"before{number}"))
        if log.stat().st_size > LOG_PAGES * 5_000:
            break
    fill(small_disk / "ballast")
    store._database.writer._log_pages = 0
    for number in range(5):
        await store.change("a", admitting(f"stop{number}", Operation.STOP))
        await store.change("a", ending(f"stop{number}"))
    await store.close()


async def test_what_may_use_the_reserve_does_not_fail_with_what_may_not(small_disk: Path) -> None:
    store = SqliteStore(small_disk / "store.db")
    await store.open()
    for name in ("a", "b"):
        await store.create(creating(name))
    fill(small_disk / "ballast")
    for attempt in count():
        answers = await asyncio.gather(
            store.change("a", growing),
            store.change("b", admitting(f"stop{attempt}", Operation.STOP)),
            return_exceptions=True,
        )
        assert not isinstance(answers[1], BaseException)
        await store.change("b", ending(f"stop{attempt}"))
        if isinstance(answers[0], StoreFull):
            break
    await store.close()


async def test_a_log_that_stays_beside_the_database_does_not_change_a_backup(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.create(creating("a"))
    await store.close()
    backup = path.read_bytes()
    store = SqliteStore(path)
    await store.open()
    await store.create(creating("b"))
    await store.close()
    assert path.with_name(f"{path.name}-wal").stat().st_size > 0
    path.write_bytes(backup)
    await store_opens_with(path, {"a": 0})


async def test_a_database_that_may_not_grow_keeps_nothing(path: Path) -> None:
    """The same by SQLite's own limit, where nothing can be mounted."""
    store = SqliteStore(path)
    await store.open()
    await store.create(creating("a"))

    def limit(pages: int) -> None:
        store._database.writer.submit(
            lambda c: c.execute(f"PRAGMA max_page_count = {pages}").fetchall(), lambda *_: None
        )

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
        store.change("a", putting(host="h9")),
        store.change("a", lambda instance, _: Change(instance=instance, answer="nothing")),
        return_exceptions=True,
    )
    assert [type(answer) for answer in answers] == [StoreFull] * 7, answers
    assert all(isinstance(answer, StoreFull) and answer.remedy for answer in answers)
    instance = await store.instance("a")
    assert instance is not None
    assert (instance.generation, instance.outstanding, told) == (0, (), [])
    assert store.tallies(Tally.RECORDED) == {"h1": 1}
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
    assert "not an Interlock database" in (await refused(path)).message
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


async def test_everything_is_in_the_database_after_closing(path: Path) -> None:
    """Its log stays, since the blocks that it has are kept for a full disk, but is void."""
    await made(path)
    log = path.with_name(f"{path.name}-wal")
    assert sorted(path.parent.iterdir()) == [path, path.with_name(f"{path.name}-shm"), log]
    assert not has_changes(log)
    assert log.stat().st_blocks * 512 > 4_000_000


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
            time.sleep(0)  # for another thread that holds the lock too
            if len(inside) > 1:
                overlaps.append(1)
            inside.pop()
            lock.unlock()

    threads = [threading.Thread(target=take_and_leave) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not overlaps


# --------------------------------------------------------------------------------------------- keys and batches


async def test_an_instance_is_never_seen_older_than_its_requests_and_events(path: Path) -> None:
    """Also in the moment in which the transaction is on the disk, and the event loop has not been told."""
    store = SqliteStore(path)
    await store.open()
    await store.create(creating("a"))
    written, submit = threading.Event(), store._database.writer.submit

    def submit_and_notice(job: Any, done: Any, *space: Any) -> None:
        def noticed(connection: apsw.Connection) -> Any:
            try:
                return job(connection)
            finally:
                written.set()

        submit(noticed, done, *space)

    store._database.writer.submit = submit_and_notice  # type: ignore[assignment,method-assign]
    decisions: dict[str, Any] = {"queued": admitting("r1"), "succeeded": ending("r1")}
    for status, decide in decisions.items():
        written.clear()
        changing = asyncio.create_task(store.change("a", decide))
        while not store._writing:  # noqa: ASYNC110 - a few turns of the loop
            await asyncio.sleep(0)
        assert written.wait(PATIENCE_S)  # the loop stands still until it is there
        request, instance = await store.request("r1"), await store.instance("a")
        assert request is not None
        assert instance is not None
        assert not changing.done()
        assert request.status == status
        assert [one.id for one in instance.outstanding] == (["r1"] if status == "queued" else [])
        await changing
    await store.close()


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


async def test_a_beginning_finds_the_ids_of_what_is_there_and_of_every_request(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.create(creating("abc"))
    await store.change("abc", admitting("abd"))
    for state, instances in ((VmState.ACTIVE, ("abc",)), (VmState.DELETED, ())):
        await store.change("abc", putting(vm_state=state))
        assert await store.ids_like("instances", "one", "ab") == instances
        assert await store.ids_like("requests", "one", "ab") == ("abd",)
        assert await store.ids_like("requests", "two", "ab") == ()
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


# ------------------------------------------------------------------------------------------------------------- sums


async def test_sums_that_another_version_made_are_made_anew(path: Path) -> None:
    await made(path, 7)
    with apsw.Connection(str(path)) as connection:
        connection.execute("UPDATE tallies SET amount = 99; UPDATE tallies SET of = 'older' WHERE what = 'version'")
        connection.execute("INSERT INTO host_ports VALUES ('h1', 80, 'gone')")
    for _ in range(2):
        store = SqliteStore(path)
        await store.open()
        assert store.tallies(Tally.STATES) == {"active": 7}
        assert store.tallies(Tally.RECORDED) == {"h1": 7}
        assert store.port_user("h1", 80) is None
        await store.close()


async def test_opening_reads_no_instance_that_is_at_rest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: what is read of each of a million takes minutes."""
    await made(path, 500)
    store = SqliteStore(path)
    await store.open()
    await store.change("i7", admitting("r1"))
    await store.close()
    decoded: list[str] = []
    decode = row_codec.decode_instance

    def noted(text: str) -> Instance:
        decoded.append(text)
        return decode(text)

    monkeypatch.setattr(row_codec, "decode_instance", noted)
    folder = path.parent
    path.rename(folder / DATABASE)
    config = Config(data_dir=str(folder), hypervisor="simulated", host="here")
    server = Server(config, prover=TrustingProver())
    await server.open()
    await server.close()
    assert {decode(text).id for text in decoded} == {"i7"}


@pytest.mark.parametrize("host", [None, "h1"])
async def test_what_is_outstanding_is_found_by_its_index(path: Path, host: str | None) -> None:
    """In the order of its rows SQLite would rather read all of the table."""
    await made(path)
    store = SqliteStore(path)
    await store.open()
    plans: list[str] = []
    connection, ask = store._database.read._connection, store._database.read._all

    def explain(statement: str, *values: Any) -> list[tuple[Any, ...]]:
        plans.extend(row[-1] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", values))
        return ask(statement, *values)

    store._database.read._all = explain  # type: ignore[method-assign]
    await store.unsettled(host)
    await store.instances(InstanceFilter(upkeep=True), 10)
    await store.instances(InstanceFilter(host="h1", vm_state=VmState.ACTIVE), 10)
    await store.close()
    used = [re.search(r"INDEX (\w+)", plan) for plan in plans]
    indexes = [None if found is None else found[1] for found in used]
    assert indexes == ["instances_unsettled", "instances_upkeep", "instances_by_state"]


# ------------------------------------------------------------------------------------------------------------ locks


async def test_a_locked_database_is_noticed_and_so_is_that_it_is_free_again(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.writable()
    other = apsw.Connection(str(path))
    other.execute("BEGIN IMMEDIATE")
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(store.writable(), 0.1)
    other.execute("ROLLBACK")
    other.close()
    await asyncio.wait_for(store.writable(), PATIENCE_S)
    await store.close()


async def test_what_is_decided_on_the_hint_of_an_admission_shares_its_transaction(path: Path) -> None:
    """A driver takes a request in the commit that admits it, and the hint comes for an idle instance only."""
    store = SqliteStore(path)
    await store.open()
    await store.create(creating("a"))
    hinted: list[asyncio.Task[Any]] = []
    unlisten = store.on_admission(lambda id_: hinted.append(asyncio.create_task(store.change(id_, growing))))
    commits: list[list[str]] = []
    store.listen(lambda events: commits.append([event.kind for event in events]))
    await store.change("a", admitting("first"))
    assert [await task for task in hinted] == [2]
    assert commits == [["request.admitted", "instance.grown"]]
    await store.change("a", growing)
    await store.change("a", admitting("second"))
    assert len(hinted) == 1, "it was not idle"
    unlisten()
    await store.create(creating("b"))
    await store.change("b", admitting("third"))
    assert len(hinted) == 1
    await store.close()


async def test_a_request_is_read_as_it_was_committed_last(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From memory as from the disk, for its own project only."""
    monkeypatch.setattr(sqlite_store, "REQUESTS_IN_MEMORY", 3)
    store = SqliteStore(path)
    await store.open()
    for name in "abcdef":
        await store.create(creating(name))
        await store.change(name, admitting(f"of-{name}"))
    assert len(store._recent) == 3
    for name in "abcdef":
        request = await store.request(f"of-{name}", "one")
        assert request is not None
        assert (request.id, request.instance_id) == (f"of-{name}", name)
        assert await store.request(f"of-{name}", "two") is None
    await store.close()
