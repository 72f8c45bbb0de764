"""How many states a second the walk through a policy looks at, the search for a way out of each of them included."""

from __future__ import annotations

from pathlib import Path

from interlock.policies.language.loader import compile_named
from interlock.policies.model_checker import explore

_STATES = 2_000_000
_OUTSTANDING_MAX = 4


def measure(_folder: Path, scale: float) -> dict[str, float]:
    """States a second on one core, of `standard` with all operations; tables are filled within the measured time."""
    found = explore(
        compile_named("standard"), outstanding_max=_OUTSTANDING_MAX, states_max=max(1, round(_STATES * scale))
    )
    return {
        "states": found.states,
        "transitions": found.transitions,
        "states_per_s": round(found.states / found.seconds),
        "explore_s": round(found.seconds, 3),
    }
