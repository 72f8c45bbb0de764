"""How many admissions a second the SQLite store keeps durably, with 64 callers at once, and how many SQLite alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw

from interlock.bench.fleet import fill, scaled
from interlock.core.admission import admit
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Change, Disposition, Instance, Submission
from interlock.core.states import VmState
from interlock.policies.language.loader import load
from interlock.stores.database_file import DatabaseFile
from interlock.stores.sqlite import SqliteStore

CALLERS = 64
_ADMISSIONS = 20_000
_BEFORE, _AFTER = "before.db", "after.db"
_CHANGED = "generation, fence, updated_at_ms, last_request, body, unsettled"
"""The columns of an instance that an admission changes."""


def measure(folder: Path, scale: float = 1.0) -> dict[str, float]:
    from interlock.bench import run

    rate: float = run(_measure(folder, scale))
    floor = _write_raw(folder)
    return {
        "callers": CALLERS,
        "admissions_per_s": round(rate),
        "raw_sqlite_per_s": round(floor),
        "of_raw_sqlite": round(rate / floor, 3),
    }


async def _measure(folder: Path, scale: float) -> float:
    policy = CompiledPolicy(load("standard"))
    store = SqliteStore(folder / _AFTER)
    await store.open()
    try:
        ids = await fill(store, scaled(_ADMISSIONS, scale), VmState.ACTIVE)
        _copy(folder / _AFTER, folder / _BEFORE)
        numbered = iter(enumerate(ids))
        started = time.perf_counter()
        await asyncio.gather(*(_call(store, policy, numbered) for _ in range(CALLERS)))
        return len(ids) / (time.perf_counter() - started)
    finally:
        await store.close()


def _copy(source: Path, target: Path) -> None:
    """Copy an open database. The store goes on with its cache, as it is in use."""
    with closing(apsw.Connection(str(source))) as open_one, closing(apsw.Connection(str(target))) as copy:
        with copy.backup("main", open_one, "main") as backup:
            backup.step()
        copy.pragma("journal_mode", "wal")


def _write_raw(folder: Path) -> float:
    """Write the same rows once more, with nothing but SQLite: how many admissions a second, `CALLERS` to a commit."""
    with closing(apsw.Connection(str(folder / _AFTER))) as after:
        instances = after.execute(f"SELECT {_CHANGED}, seq FROM instances ORDER BY seq").get  # noqa: S608
        requests = after.execute("SELECT * FROM requests ORDER BY seq").get
        events = after.execute("SELECT * FROM events ORDER BY sequence").get
    update = f"UPDATE instances SET {_CHANGED.replace(',', ' = ?,')} = ? WHERE seq = ?"  # noqa: S608
    raw = DatabaseFile(folder / _BEFORE).writer()
    try:
        started = time.perf_counter()
        for first in range(0, len(requests), CALLERS):
            chunk = slice(first, first + CALLERS)
            raw.execute("BEGIN IMMEDIATE")
            raw.executemany(update, instances[chunk])
            raw.executemany(_insert_into("requests", requests), requests[chunk])
            raw.executemany(_insert_into("events", events), events[chunk])
            raw.execute("COMMIT")
        return len(requests) / (time.perf_counter() - started)
    finally:
        raw.close()


def _insert_into(table: str, rows: list[tuple[Any, ...]]) -> str:
    return f"INSERT INTO {table} VALUES ({','.join('?' * len(rows[0]))})"  # noqa: S608


async def _call(store: SqliteStore, policy: CompiledPolicy, numbered: Iterator[tuple[int, str]]) -> None:
    for number, instance_id in numbered:
        submission = Submission(request_id=f"r{number}", operation=Operation.REBOOT, requested_by="bench")

        def decide(instance: Instance, now_ms: int, submission: Submission = submission) -> Change[Disposition]:
            return admit(instance, submission, policy, now_ms)

        await store.change(instance_id, decide)
