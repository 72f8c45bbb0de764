"""How the database's layout is made and brought up."""

from __future__ import annotations

from pathlib import Path

import apsw
import pytest
from msgspec.structs import replace

from conformance.store.harness import IMAGE, creating
from interlock.core.admission import admit
from interlock.core.errors import StoreBusy, StoreCorrupt, StoreError
from interlock.core.operations import Operation
from interlock.core.quotas import Quota
from interlock.core.records import Submission
from interlock.core.roles import Role
from interlock.core.states import VmState
from interlock.policies.language.loader import compile_named
from interlock.ports import Token, Volume
from interlock.stores import schema
from interlock.stores.sqlite import SqliteStore

NETWORKS = "DROP TABLE networks; DROP TABLE leases; DROP TABLE security_groups"
"""Removes what the newest version has."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def test_a_fresh_database_has_the_newest_layout(path: Path) -> None:
    made = schema.upgrade(path)
    assert (made.before, made.after, made.copy) == (None, schema.HEAD, None)
    assert schema.look(path) == (schema.Age.CURRENT, schema.HEAD)
    assert schema.upgrade(path).before == schema.HEAD


async def test_a_layout_is_not_changed_beside_a_live_server(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    with pytest.raises(StoreBusy):
        schema.upgrade(path)
    assert (await store.create(creating("a"))).id == "a"
    await store.close()
    assert schema.upgrade(path).before == schema.HEAD


async def test_what_an_older_interlock_remembered_is_read(path: Path) -> None:
    """A record that says nothing of what is remembered beyond `prior_vm_state`, or still says it where it is over."""
    store = SqliteStore(path)
    await store.open()
    for name in ("deleted", "started"):
        await store.create(creating(name))
    await store.close()
    database = apsw.Connection(str(path))
    for name, state, prior in (("deleted", "soft_deleted", "rescued"), ("started", "active", "stopped")):
        database.execute(
            "UPDATE instances SET vm_state = ?, body = json_remove(json_set("
            "body, '$.vm_state', ?, '$.prior_vm_state', ?), '$.further_vm_states') WHERE id = ?",
            (state, state, prior, name),
        )
    database.close()
    store = SqliteStore(path)
    await store.open()
    deleted, started = await store.instance("deleted"), await store.instance("started")
    await store.close()
    assert deleted is not None
    assert started is not None
    assert (deleted.vm_state, deleted.state_stack) == (VmState.SOFT_DELETED, (VmState.RESCUED,))
    assert (started.vm_state, started.state_stack) == (VmState.ACTIVE, ())


async def test_a_lock_of_an_older_interlock_has_the_role_of_its_request(path: Path) -> None:
    """An admin's where the request is not kept: only an admin can then remove it."""
    policy = compile_named("take2")
    store = SqliteStore(path)
    await store.open()
    for name, roles in (("ann", (Role.MEMBER,)), ("root", (Role.MEMBER, Role.ADMIN)), ("free", ())):
        await store.create(creating(name))
        for role in roles:
            lock = Submission(request_id=f"{name}-{role}", operation=Operation.LOCK, requested_by=name, role=role)
            await store.change(name, lambda vm, now_ms, lock=lock: admit(vm, lock, policy, now_ms))  # type: ignore[misc]
    await store.create(creating("lost", locked_by="ann"))
    await store.close()
    with apsw.Connection(str(path)) as database:
        database.execute("UPDATE instances SET body = json_remove(body, '$.lock_role')")
        database.execute("ALTER TABLE policy_switches DROP COLUMN walk; DROP TABLE projects; DROP TABLE audit")
        database.execute(NETWORKS)
        database.execute("UPDATE alembic_version SET version_num = '0006'")
    database.close()
    assert schema.upgrade(path).before == "0006"
    store = SqliteStore(path)
    await store.open()
    kept = [await store.instance(name) for name in ("ann", "root", "free", "lost")]
    await store.close()
    found = [(vm.locked_by, vm.lock_role) for vm in kept if vm is not None]
    assert found == [("ann", Role.MEMBER), ("root", Role.ADMIN), (None, Role.MEMBER), ("ann", Role.ADMIN)]


async def test_projects_that_were_only_names_become_records(path: Path) -> None:
    """Each is as old as the oldest of what is in it; the first one is there even if nothing is."""
    store = SqliteStore(path)
    await store.open()
    token = Token(id="t", name="ann", role=Role.READER, project="a", secret_sha256="0", created_at_ms=5)
    await store.tokens.put(token)
    await store.create(creating("vm", project="b"))
    await store.create(creating("gone", project="c", vm_state=VmState.DELETED))
    volume = Volume(id="v", name="v", project="a", path="/v", size_bytes=1, created_at_ms=3)
    await store.volumes.put(volume)
    await store.images.put(replace(IMAGE, project="d", created_at_ms=9))
    await store.images.put(replace(IMAGE, id="public", name="public"))
    await store.close()
    with apsw.Connection(str(path)) as database:
        database.execute(f"DROP TABLE projects; {NETWORKS}; UPDATE alembic_version SET version_num = '0009'")
        database.execute("UPDATE instances SET body = json_set(body, '$.created_at_ms', 6 + seq)")
    database.close()
    assert schema.upgrade(path).before == "0009"
    store = SqliteStore(path)
    await store.open()
    found = await store.projects.all()
    assert [(one.name, one.created_at_ms) for one in found] == [
        ("a", 3),
        ("b", 7),
        ("c", 8),
        ("d", 9),
        ("default", None),
    ]
    assert all(one.quota == Quota() for one in found)
    assert await store.tokens.all() == (token,), "a token of an older Interlock does not expire"
    await store.close()


async def test_a_token_with_an_unknown_role_is_refused(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.tokens.put(Token(id="t", name="ann", role=Role.READER, project="p", secret_sha256="0", created_at_ms=1))
    await store.close()
    with apsw.Connection(str(path)) as database:
        database.execute("UPDATE tokens SET body = json_set(body, '$.role', 'guest')")
    database.close()
    store = SqliteStore(path)
    await store.open()
    with pytest.raises(StoreCorrupt, match="Invalid enum value 'guest'"):
        await store.tokens.all()
    await store.close()


def test_a_database_that_could_not_be_made_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_path: Path) -> None:
        raise StoreError("no room")

    monkeypatch.setattr(schema, "_migrate", fail)
    with pytest.raises(StoreError):
        schema.upgrade(path)
    assert list(path.parent.iterdir()) == []


def test_an_upgrade_that_fails_half_way_leaves_the_old_layout(path: Path) -> None:
    """A database of an older layout, on which the first statement of the next revision runs and a later one cannot."""
    with apsw.Connection(str(path)) as connection:
        connection.execute("CREATE TABLE tokens (id TEXT)")
        connection.execute("CREATE TABLE kept (id TEXT); INSERT INTO kept VALUES ('as it was')")
    connection.close()
    with pytest.raises(StoreError):
        schema._migrate(path)
    with apsw.Connection(str(path)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        assert tables == {"tokens", "kept"}
        assert connection.execute("SELECT id FROM kept").get == "as it was"
    connection.close()


def test_a_database_that_is_lost_is_not_hidden_by_a_new_one(path: Path) -> None:
    schema.upgrade(path)
    vm = path.parent / "guests" / "vms" / "one"
    vm.mkdir(parents=True)
    schema.upgrade(path)
    for loss in (path.unlink, lambda: path.write_bytes(b""), lambda: empty_database(path)):
        loss()
        with pytest.raises(StoreCorrupt, match=str(vm.parent)) as refused:
            schema.upgrade(path)
        assert "interlock db new" in (refused.value.remedy or "")
        assert not path.exists() or path.stat().st_size == 0 or schema.look(path)[0] is schema.Age.FRESH
    schema.make_new(path)
    assert schema.look(path)[0] is schema.Age.CURRENT
    assert vm.is_dir()
    with pytest.raises(StoreError, match="already exists"):
        schema.make_new(path)


def test_a_log_without_its_database_is_not_hidden_by_a_new_one(path: Path) -> None:
    log = path.with_name(f"{path.name}-wal")
    log.write_bytes(b"\x37\x7f\x06\x82" + bytes(60))
    with pytest.raises(StoreCorrupt, match=str(log)):
        schema.upgrade(path)
    schema.make_new(path)
    assert log.with_name(f"{log.name}.old").exists()
    assert schema.look(path)[0] is schema.Age.CURRENT


def empty_database(path: Path) -> None:
    """What a program leaves that opens a database that is not there."""
    path.unlink()
    with apsw.Connection(str(path)) as database:
        database.execute("CREATE TABLE t (x)")
        database.execute("DROP TABLE t")
