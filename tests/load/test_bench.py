"""The benchmarks measure what they say, here in tiny sizes: that they run is tested, and not how fast."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from benchmarks import MEASURES, network_throughput, start_stop
from interlock import bench

ALL = {**bench.MEASURES, **MEASURES}
FIGURES = {
    "decisions": {"decide_us", "admit_us", "refuse_us", "decisions_per_s"},
    "policy_lengths": {"decide_short_policy_us", "decide_long_policy_us", "decide_piled_policy_us"},
    "fleet_decisions": {
        *("instances", "situations", "decisions_per_s"),
        *("short_policy_decisions_per_s", "long_policy_decisions_per_s"),
    },
    "exploring": {"states", "transitions", "states_per_s", "explore_s"},
    "replaying": {"submissions", "rows_per_s", "replay_s"},
    "durable_admissions": {"callers", "admissions_per_s", "raw_sqlite_per_s", "of_raw_sqlite"},
    "http_admissions": {
        *("connections", "admissions_per_s", "median_ms", "p99_ms"),
        *("bare_server_per_s", "of_bare_server"),
    },
    "whole_operations": {"callers", "operations_per_s"},
}


@pytest.mark.qemu
@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed")
def test_the_cost_of_each_layer_of_confinement_is_measured(tmp_path: Path) -> None:
    figures = start_stop.measure(tmp_path, 0.01)
    layers = ("bare", "own_user", "namespaces", "cgroup")
    measured = {f"{what}_{layer}_ms" for what in ("start", "stop") for layer in layers}
    assert set(figures) == measured | {"extra_start_ms", "extra_stop_ms"}
    assert all(figures[name] > 0 for name in measured)


@pytest.mark.long
@pytest.mark.qemu
@pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces")
@pytest.mark.skipif(not all(map(shutil.which, ("qemu-system-x86_64", "apt-get"))), reason="QEMU or apt is missing")
def test_the_throughput_of_each_kind_of_network_is_measured(tmp_path: Path) -> None:
    figures = network_throughput.measure(tmp_path, 0.01)
    assert set(figures) == {f"{name}_mbit_per_s" for name in ("slirp", "passt", "tap")}
    assert all(figures.values())


@pytest.mark.parametrize("name", FIGURES)
def test_a_measure_prints_its_figures(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = bench.main(["--only", name, "--repeat", "1", "--scale", "0.02"], ALL)
    report = json.loads(capsys.readouterr().out)
    assert code == 0, report
    assert set(report) == {name}
    assert set(report[name]) == FIGURES[name] | {"runs"}
    assert all(value > 0 for figure, value in report[name].items() if figure != "runs")


def test_every_measure_is_tested() -> None:
    of_guests = {"pause_over_qmp", "start_and_stop", "network_throughput"}
    assert set(ALL) == set(FIGURES) | of_guests, "the last three need QEMU"
