"""Differences between two policies."""

from interlock.policies.comparison.differences import Difference, Differences, Effect, Side, differ

__all__ = ["Difference", "Differences", "Effect", "Side", "differ"]
