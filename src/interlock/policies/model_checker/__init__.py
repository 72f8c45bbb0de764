"""Explicit-state model checker: explore every reachable state of an instance under a policy, and check the laws.

It works on states encoded as 63-bit words: see docs/decisions/0006-the-packed-walk.md.
"""

from __future__ import annotations

from interlock.policies.model_checker.exploration import DEFAULT_STATES_MAX, explore
from interlock.policies.model_checker.results import (
    Exit,
    Exploration,
    RolePromise,
    SearchProgress,
    Violation,
    describe,
)

__all__ = [
    "DEFAULT_STATES_MAX",
    "Exit",
    "Exploration",
    "RolePromise",
    "SearchProgress",
    "Violation",
    "describe",
    "explore",
]
