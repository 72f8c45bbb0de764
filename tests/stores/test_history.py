"""Reading recorded history: beside a server, from a copy, in any part, and never changing anything."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest

from benchmarks.recorded_history import START_MS, Plan, record_history
from conformance.store.harness import creating
from interlock.core.admission import admit
from interlock.core.errors import Invalid, StoreError, StoreNewer
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Change, Disposition, Instance, Submission
from interlock.policies.language.loader import compile_named
from interlock.stores import history as history_module
from interlock.stores import schema
from interlock.stores.history import History
from interlock.stores.sqlite import SqliteStore

STANDARD = compile_named("standard")
PLAN = Plan(submissions=400, instances=20, seed=5)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("history") / "interlock.db"
    record_history(path, STANDARD, PLAN)
    return path


def asking(operation: Operation, request_id: str) -> Callable[[Instance, int], Change[Disposition]]:
    def decide(instance: Instance, now_ms: int, policy: CompiledPolicy = STANDARD) -> Change[Disposition]:
        submission = Submission(request_id=request_id, operation=operation, requested_by="me")
        return admit(instance, submission, policy, now_ms)

    return decide


def all_rows(path: Path, sql: str = "SELECT sequence, at_ms, kind, project FROM events ORDER BY sequence") -> list[Any]:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


async def test_it_is_read_while_a_server_writes(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "interlock.db")
    await store.open()
    try:
        await store.create(creating("a"))
        await store.change("a", asking(Operation.STOP, "r1"))
        with History(tmp_path / "interlock.db") as history:
            reading = history.submissions()
            await store.change("a", asking(Operation.STOP, "r2"))
            rows = list(reading)
        assert [row[3] for row in rows] == ["request.admitted"]
        with History(tmp_path / "interlock.db") as history:
            assert [row[3] for row in history.submissions()] == ["request.admitted", "request.redundant"]
            assert history.instance_id(rows[0][1]) == "a"
            assert history.instance_id(99) == "#99"
    finally:
        await store.close()
    again = SqliteStore(tmp_path / "interlock.db")
    await again.open()
    await again.close()


async def test_a_lock_of_a_server_is_neither_needed_nor_broken(tmp_path: Path) -> None:
    path = tmp_path / "interlock.db"
    store = SqliteStore(path)
    await store.open()
    History(path).close()
    assert path.with_name("interlock.db.lock").exists()
    with pytest.raises(StoreError):
        schema.upgrade(path)
    await store.close()


def test_nothing_is_changed_by_reading(recorded: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    shutil.copy(recorded, copy)
    before = copy.read_bytes()
    with History(copy) as history:
        assert sum(1 for _ in history.submissions()) == 400
        with pytest.raises(apsw.ReadOnlyError):
            history._connection.execute("DELETE FROM events")
    assert copy.read_bytes() == before


def test_a_copy_in_a_folder_that_may_not_be_written_is_read(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is for somebody who may not make the files that SQLite wants beside the database."""
    copy = tmp_path / "copy.db"
    shutil.copy(recorded, copy)
    connect = history_module._connect

    def refused(uri: str) -> apsw.Connection:
        if "immutable" not in uri:
            raise apsw.CantOpenError("unable to open database file")
        return connect(uri)

    monkeypatch.setattr(history_module, "_connect", refused)
    with History(copy) as history:
        assert sum(1 for _ in history.submissions()) == 400
    copy.with_name("copy.db-wal").write_bytes(b"changes")
    with pytest.raises(StoreError, match=r"copy\.db-wal"):
        History(copy)


def test_submissions_are_every_one_in_order_and_nothing_else(recorded: Path) -> None:
    with History(recorded) as history:
        found = [(row[0], row[4], row[3], row[2]) for row in history.submissions()]
    kinds = {"request.admitted", "request.redundant", "request.denied", "request.held"}
    assert found == [row for row in all_rows(recorded) if row[2] in kinds]
    assert len(found) == 400


def test_pieces_join_without_a_gap(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with History(recorded) as history:
        whole = list(history.submissions())
        served = list(history.service())
        for size in (1, 7, 1_000):
            monkeypatch.setattr(history_module, "_BATCH", size)
            assert list(history.submissions()) == whole
            assert list(history.service()) == served


@pytest.mark.parametrize("since_ms", [None, 0, START_MS + 1, START_MS + 300_000, START_MS + 10**9])
@pytest.mark.parametrize("until_ms", [None, START_MS + 300_000, START_MS + 10**9])
def test_a_part_begins_at_its_beginning_and_ends_before_its_end(
    recorded: Path, since_ms: int | None, until_ms: int | None
) -> None:
    with History(recorded) as history:
        every = list(history.submissions())
        found = list(history.submissions(since_ms, until_ms))
        assert found == [
            row for row in every if (since_ms is None or row[4] >= since_ms) and (until_ms is None or row[4] < until_ms)
        ]
        exact = every[len(every) // 2][4]
        assert list(history.submissions(exact, exact + 1)) == [row for row in every if row[4] == exact]


def test_one_project_is_read_alone(recorded: Path) -> None:
    with History(recorded) as history:
        every = list(history.submissions())
        blue = list(history.submissions(project="blue"))
        assert blue == [row for row in every if row[2] == "blue"]
        assert 0 < len(blue) < len(every)
        assert list(history.submissions(project="nobody's")) == []


def test_the_ends_of_a_history_are_told(recorded: Path) -> None:
    rows = all_rows(recorded)
    with History(recorded) as history:
        assert (history.first_at_ms, history.last_at_ms) == (rows[0][1], rows[-1][1])


def test_service_tells_how_requests_were_served(recorded: Path) -> None:
    with History(recorded) as history:
        rows = list(history.service())
    kinds = {row[1] for row in rows}
    assert {"request.taken", "request.progress", "request.succeeded"} <= kinds
    assert not kinds & {"request.admitted", "request.denied", "instance.state"}
    taken = next(row for row in rows if row[1] == "request.taken")
    assert taken[0] is not None
    assert "operation" in msgspec.json.decode(taken[3])


# ------------------------------------------------------------------------------------------- what cannot be read


def test_where_there_is_no_database_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="not found"):
        History(tmp_path / "nothing.db")
    with pytest.raises(Invalid, match="not found"):
        History(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_holds_no_history(tmp_path: Path) -> None:
    path = tmp_path / "empty.db"
    path.touch()
    with pytest.raises(Invalid, match="empty"):
        History(path)
    connection = apsw.Connection(str(path))
    connection.execute("PRAGMA user_version = 1")
    connection.close()
    with pytest.raises(Invalid, match="empty"):
        History(path)


def test_what_is_no_database_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database at all, but long enough to look like something" * 20)
    with pytest.raises(Invalid, match="not an SQLite database"):
        History(path)


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TABLE music (title TEXT)")
    connection.close()
    with pytest.raises(StoreError, match="not an Interlock database"):
        History(path)


def layout(path: Path, *statements: str) -> None:
    connection = apsw.Connection(str(path))
    for statement in statements:
        connection.execute(statement)
    connection.close()


def test_a_newer_layout_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "newer.db"
    schema.upgrade(path)
    layout(path, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreNewer, match="9999"):
        History(path)


def test_an_older_layout_is_read_as_long_as_it_has_what_is_read(recorded: Path, tmp_path: Path) -> None:
    path = tmp_path / "older.db"
    shutil.copy(recorded, path)
    layout(path, "UPDATE alembic_version SET version_num = '0001'", "DROP TABLE IF EXISTS policy_switches")
    with History(path) as history:
        assert sum(1 for _ in history.submissions()) == 400
    layout(path, "ALTER TABLE events RENAME COLUMN data TO body")
    with pytest.raises(StoreError, match="is older than this Interlock") as refused:
        History(path)
    assert "db upgrade" in (refused.value.remedy or "")


def test_a_database_in_which_nothing_happened_has_no_ends(tmp_path: Path) -> None:
    path = tmp_path / "fresh.db"
    schema.upgrade(path)
    with History(path) as history:
        assert (history.first_at_ms, history.last_at_ms) == (None, None)
        assert list(history.submissions()) == []
        assert list(history.submissions(1, 2)) == []


def test_a_name_with_signs_of_its_own_is_a_name(recorded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "100%25 a?b#c"
    folder.mkdir()
    shutil.copy(recorded, folder / "x.db")
    with History(folder / "x.db") as history:
        assert sum(1 for _ in history.submissions()) == 400
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]


# ------------------------------------------------------------------------------------------ recorded histories


def test_a_recorded_history_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name in ("a.db", "b.db"):
        record_history(tmp_path / name, STANDARD, PLAN)
    sql = "SELECT * FROM events ORDER BY sequence"
    assert all_rows(tmp_path / "a.db", sql) == all_rows(tmp_path / "b.db", sql)


async def test_a_recorded_history_is_one_that_the_store_takes_up(recorded: Path, tmp_path: Path) -> None:
    path = tmp_path / "taken-up.db"
    shutil.copy(recorded, path)
    store = SqliteStore(path)
    await store.open()
    try:
        instance = await store.instance("instance-1")
        assert instance is not None
        page = await store.requests("instance-1", 500, None)
        asked = {row[0] for row in all_rows(path, "SELECT id FROM requests WHERE instance_seq = 1")}
        assert {request.id for request in page.items} == asked
        assert await store.change("instance-1", asking(Operation.LOCK, "new")) is not None
    finally:
        await store.close()


def test_repeats_are_further_histories_after_the_first(tmp_path: Path) -> None:
    path = tmp_path / "repeated.db"
    plan = Plan(submissions=60, instances=3, repeat=3, seed=2)
    made = record_history(path, STANDARD, plan)
    with History(path) as history:
        assert sum(1 for _ in history.submissions()) == made >= 60
    rows = all_rows(path)
    assert [row[0] for row in rows] == list(range(1, len(rows) + 1))
    assert [row[1] for row in rows] == sorted(row[1] for row in rows)
    third = len(rows) // 3
    assert [row[2:] for row in rows[:third]] == [row[2:] for row in rows[third : 2 * third]]
    numbers = all_rows(path, "SELECT DISTINCT instance_seq FROM events")
    assert len(numbers) == 9
