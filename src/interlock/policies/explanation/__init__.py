"""Explanations of one answer of a policy."""

from interlock.policies.explanation.counterfactuals import Turn, Way, ways
from interlock.policies.explanation.explainer import Explanation, Tried, explain

__all__ = ["Explanation", "Tried", "Turn", "Way", "explain", "ways"]
