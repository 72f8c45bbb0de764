"""The gate evaluated for many instances at once."""

from interlock.policies.fleet.gate import Answered, FleetAnswer, FleetAnswers, FleetChange, compare, judge_fleet

__all__ = ["Answered", "FleetAnswer", "FleetAnswers", "FleetChange", "compare", "judge_fleet"]
