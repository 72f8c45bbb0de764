"""Explanations of one answer of a policy."""

from interlock.policies.explanation.explainer import Explanation, Tried, Turn, Way, explain, ways

__all__ = ["Explanation", "Tried", "Turn", "Way", "explain", "ways"]
