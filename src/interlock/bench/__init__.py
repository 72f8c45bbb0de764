"""`interlock bench`: how fast this build is on this machine, as JSON.

Every figure is measured by doing the real thing: decisions with the built-in policy, durable commits into a SQLite file
on the disk that is named, HTTP over loopback from another process. Each is repeated, and the report has the median and
the single runs, since shared machines are noisy.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import uvloop

from interlock.bench import decisions, durability, http, whole

Measure = Callable[[Path, float], dict[str, float]]

MEASURES: dict[str, Measure] = {
    "decisions": decisions.measure,
    "durable_admissions": durability.measure,
    "http_admissions": http.measure,
    "whole_operations": whole.measure,
}
"""What can be measured; each gets an empty folder and the share of its full size that is wanted, and answers figures
with their units in their names."""


def main(
    arguments: Sequence[str] | None = None,
    measures: Mapping[str, Measure] = MEASURES,
    program: str = "interlock bench",
) -> int:
    """Measure and print one JSON document; the exit code is 0, or 1 if something could not be measured."""
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    parser.add_argument("--only", action="append", choices=sorted(measures), help="measure only this; may be repeated")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="how often each is measured (default 3)")
    parser.add_argument("--folder", type=Path, help="where the files are made (default: the system's temporary folder)")
    parser.add_argument("--scale", type=float, default=1.0, metavar="S", help="how much of its full size (default 1)")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {}
    for name in options.only or measures:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        try:
            # A server that is measured may write something, and standard output is the document's.
            with contextlib.redirect_stdout(sys.stderr):
                report[name] = _repeat(measures[name], max(1, options.repeat), options.folder, options.scale)
        except Exception as error:  # noqa: BLE001 - one that cannot be measured must not hide the others
            report[name] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(report, indent=2))
    return 1 if any("error" in figures for figures in report.values()) else 0


def _repeat(measure: Measure, times: int, folder: Path | None, scale: float) -> dict[str, Any]:
    runs: list[dict[str, float]] = []
    for _ in range(times):
        with tempfile.TemporaryDirectory(prefix="interlock-bench-", dir=folder) as scratch:
            runs.append(measure(Path(scratch), scale))
    medians = {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}
    return {**medians, "runs": runs}


def run(coroutine: Any) -> Any:
    """Run a coroutine on the event loop that a server runs on."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coroutine)
