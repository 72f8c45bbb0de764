"""A database of the first layout is brought to the one that keeps policies, with everything that was in it."""

from __future__ import annotations

from pathlib import Path

import apsw
import pytest

from conformance.store.harness import IMAGE, START_MS, admitting, creating
from conformance.store.inventory import TOKEN, VOLUME
from conformance.store.policies import BUNDLE, SWITCH
from interlock.ports import InstanceFilter
from interlock.stores import row_codec, schema
from interlock.stores.migrations import STEPS
from interlock.stores.sqlite import SqliteStore


def make_first_layout(path: Path) -> None:
    """What a server of the first layout had made: an instance with a request and its events, a token, a volume."""
    created = creating("a")(START_MS)
    admitted = admitting("r1")(created.instance, START_MS)
    instance, request = admitted.instance, admitted.requests[0]
    database = apsw.Connection(str(path))
    database.pragma("journal_mode", "wal")
    with database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        database.execute("INSERT INTO alembic_version VALUES ('0001')")
        for statement in STEPS["0001"]:
            database.execute(statement)
        database.execute(
            "INSERT INTO instances (seq, id, project, name, vm_state, host, task_state, unsettled, generation, fence, "
            "updated_at_ms, last_request, body) VALUES (1, 'a', 'one', 'a', 'active', 'h1', 'none', 1, ?, ?, ?, 1, ?)",
            (instance.generation, instance.fence, instance.updated_at_ms, row_codec.body(instance)),
        )
        database.execute(
            "INSERT INTO requests (seq, id, instance_seq, previous, operation, status, admitted_at_ms, body) "
            "VALUES (1, 'r1', 1, NULL, 'reboot', 'queued', ?, ?)",
            (START_MS, row_codec.body(request)),
        )
        for sequence, event in enumerate((*created.events, *admitted.events), start=1):
            database.execute(
                "INSERT INTO events (sequence, instance_seq, project, request_id, kind, at_ms, generation, data) "
                "VALUES (?, 1, 'one', ?, ?, ?, ?, ?)",
                (sequence, event.request_id, event.kind, event.at_ms, event.generation, row_codec.body(event.data)),
            )
        database.execute("INSERT INTO tokens (id, body) VALUES (?, ?)", (TOKEN.id, row_codec.body(TOKEN)))
        database.execute("INSERT INTO images (id, name, body) VALUES ('image', 'image', ?)", (row_codec.body(IMAGE),))
        database.execute(
            f"INSERT INTO volumes ({row_codec.VOLUME_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (VOLUME.id, VOLUME.name, VOLUME.project, VOLUME.path, VOLUME.size_bytes, "a", VOLUME.created_at_ms),
        )
        database.execute("UPDATE clock SET seen_ms = ?", (START_MS,))
    database.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "store.db"
    make_first_layout(made)
    return made


async def test_a_database_of_the_first_layout_keeps_everything_and_takes_policies(path: Path) -> None:
    assert schema.look(path) == (schema.Age.OLDER, "0001")
    store = SqliteStore(path)
    await store.open()
    assert schema.look(path) == (schema.Age.CURRENT, schema.HEAD)
    instance = await store.instance("a")
    assert instance is not None
    assert [request.id for request in instance.outstanding] == ["r1"]
    assert instance.launched_at_ms == START_MS
    assert await store.unsettled() == (instance,)
    assert [one.id for one in (await store.instances(InstanceFilter(), 10)).items] == ["a"]
    assert [one.id for one in (await store.requests("a", 10)).items] == ["r1"]
    assert [event.kind for event in await store.events(0, 10)] == ["instance.created", "request.admitted"]
    assert await store.tokens.all() == (TOKEN,)
    assert await store.images.all() == (IMAGE,)
    assert [one.attached_to for one in await store.volumes.all()] == ["a"]
    assert store.now_ms() >= START_MS
    assert await store.policies.switches(10) == ()
    number = await store.policies.switch(SWITCH, BUNDLE)
    await store.close()

    again = SqliteStore(path)
    await again.open()
    assert await again.policies.bundle(number) == BUNDLE
    assert await again.instance("a") == instance
    await again.close()


def test_the_database_as_it_was_is_put_aside_before_its_layout_changes(path: Path) -> None:
    done = schema.upgrade(path)
    assert (done.before, done.after) == ("0001", schema.HEAD)
    assert done.copy is not None
    assert schema.look(done.copy) == (schema.Age.OLDER, "0001")
    with apsw.Connection(str(done.copy)) as database:
        assert database.execute("SELECT count(*) FROM requests").get == 1
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    database.close()
    assert not tables & {"policies", "policy_switches"}


async def test_a_text_that_comes_into_force_again_is_kept_once(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.db")
    await store.open()
    for _ in range(3):
        await store.policies.switch(SWITCH, BUNDLE)
    await store.close()
    with apsw.Connection(str(tmp_path / "store.db")) as database:
        assert database.execute("SELECT count(*) FROM policies").get == 1
        assert database.execute("SELECT count(*) FROM policy_switches").get == 3
    database.close()
