"""How many recorded submissions a second another policy judges, read from a database on the disk."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.recorded_history import Plan, record_history
from interlock.bench.fleet import scaled
from interlock.policies.history.replay import replay
from interlock.policies.language.loader import compile_named
from interlock.stores.history import History

_SUBMISSIONS = 1_000_000
_REPEAT = 50


def measure(folder: Path, scale: float = 1.0) -> dict[str, float]:
    path = folder / "history.db"
    plan = Plan(submissions=scaled(_SUBMISSIONS, scale), repeat=scaled(_REPEAT, scale))
    record_history(path, compile_named("standard"), plan)
    candidate = compile_named("take2")
    with History(path) as history:
        started = time.perf_counter()
        judged = replay(history.submissions(), candidate, history.instance_id).totals.submissions
        lasted_s = time.perf_counter() - started
    return {"submissions": judged, "rows_per_s": round(judged / lasted_s), "replay_s": round(lasted_s, 3)}
