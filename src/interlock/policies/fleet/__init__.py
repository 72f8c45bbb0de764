"""The gate evaluated for many instances at once."""

from interlock.policies.fleet.comparison import FleetChange, compare
from interlock.policies.fleet.gate import Answered, FleetAnswer, FleetAnswers, judge_fleet

__all__ = ["Answered", "FleetAnswer", "FleetAnswers", "FleetChange", "compare", "judge_fleet"]
