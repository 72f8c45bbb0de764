"""Benchmarks of single parts, which compare one version of Interlock with another; `interlock bench` has the others."""

from __future__ import annotations

from typing import Final

from benchmarks import fleet_decisions, model_checker, network_throughput, pause, policy_lengths, replay, start_stop
from interlock import bench

MEASURES: Final[dict[str, bench.Measure]] = {
    "policy_lengths": policy_lengths.measure,
    "fleet_decisions": fleet_decisions.measure,
    "exploring": model_checker.measure,
    "replaying": replay.measure,
    "pause_over_qmp": pause.measure,
    "start_and_stop": start_stop.measure,
    "network_throughput": network_throughput.measure,
}
"""What can be measured besides `bench.MEASURES`."""
