"""Walking through every state that an instance can get into under a policy, and checking the laws in each.

`by_objects` walks with the core itself, and is the reference. The rest walks on packed states, a hundred times as fast:
see docs/decisions/0006-the-packed-walk.md.
"""

from __future__ import annotations

from interlock.policies.exploring.by_objects import describe
from interlock.policies.exploring.exploration import DEFAULT_STATES_MAX, explore
from interlock.policies.exploring.explorations import Advance, Exit, Exploration, Violation

__all__ = ["DEFAULT_STATES_MAX", "Advance", "Exit", "Exploration", "Violation", "describe", "explore"]
