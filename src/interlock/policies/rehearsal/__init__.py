"""Rehearsal: scripted events played against a policy."""

from interlock.policies.rehearsal.runner import rehearse
from interlock.policies.rehearsal.scenarios import Failed, Played, Scenario, ScenarioResults, read_scenarios, run

__all__ = ["Failed", "Played", "Scenario", "ScenarioResults", "read_scenarios", "rehearse", "run"]
