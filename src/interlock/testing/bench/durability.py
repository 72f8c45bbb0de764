"""How many admissions a second the SQLite store keeps durably, with 64 callers at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

from interlock.core.admission import admit
from interlock.core.operations import Operation
from interlock.core.policy import CompiledPolicy
from interlock.core.records import Change, Disposition, Instance, Submission
from interlock.core.states import VmState
from interlock.policies.reading import load
from interlock.stores.sqlite import SqliteStore
from interlock.testing.bench.fleet import fill, scaled

CALLERS = 64
_ADMISSIONS = 20_000


def measure(folder: Path, scale: float = 1.0) -> dict[str, float]:
    from interlock.testing.bench import run

    rate: float = run(_measure(folder, scale))
    return {"callers": CALLERS, "admissions_per_s": round(rate)}


async def _measure(folder: Path, scale: float) -> float:
    policy = CompiledPolicy(load("standard"))
    store = SqliteStore(folder / "bench.db")
    await store.open()
    try:
        ids = await fill(store, scaled(_ADMISSIONS, scale), VmState.ACTIVE)
        numbered = iter(enumerate(ids))
        started = time.perf_counter()
        await asyncio.gather(*(_call(store, policy, numbered) for _ in range(CALLERS)))
        return len(ids) / (time.perf_counter() - started)
    finally:
        await store.close()


async def _call(store: SqliteStore, policy: CompiledPolicy, numbered: Iterator[tuple[int, str]]) -> None:
    for number, instance_id in numbered:
        submission = Submission(request_id=f"r{number}", operation=Operation.REBOOT, requested_by="bench")

        def decide(instance: Instance, now_ms: int, submission: Submission = submission) -> Change[Disposition]:
            return admit(instance, submission, policy, now_ms)

        await store.change(instance_id, decide)
