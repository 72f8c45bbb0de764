"""Generated policies with thousands of rules that overlap, for tests and measurements of the checks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

from interlock.core.operations import CATALOGUE, TASK_STATES, Lane, Operation
from interlock.core.policy import Policy, Rule, Verdict
from interlock.core.states import NO_TASK, VmState

_STATES: Final = [state for state in VmState if state is not VmState.DELETED]
_TASKS: Final = [NO_TASK, *TASK_STATES]
_KINDS: Final = [each for each in Operation if CATALOGUE[each].lane is not Lane.RECORD]
_ROLES: Final = ["reader", "member", "admin"]
_TIMES_MS: Final = [15_000, 60_000, 180_000, 300_000, 600_000]

Draw = Callable[[random.Random], dict[str, Any]]


def _some(draw: random.Random, items: list[Any], most: int) -> frozenset[Any]:
    return frozenset(draw.sample(items, draw.randint(1, min(most, len(items)))))


def _maybe(draw: random.Random, chance: float, fields: dict[str, Any]) -> dict[str, Any]:
    return fields if draw.random() < chance else {}


def _states_and_tasks(draw: random.Random) -> dict[str, Any]:
    return {"vm_states": _some(draw, _STATES, 4), **_maybe(draw, 0.7, {"task_states": _some(draw, _TASKS, 6)})}


def _queue(draw: random.Random) -> dict[str, Any]:
    """Every rule about sets of outstanding operations that overlap, in most states."""
    return {
        "outstanding": _some(draw, _KINDS, 3),
        **_maybe(draw, 0.5, {"vm_states": _some(draw, _STATES, 6)}),
        **_maybe(draw, 0.3, {"roles": _some(draw, _ROLES, 2)}),
    }


def _tags(draw: random.Random) -> dict[str, Any]:
    """Every rule about some of forty tags, and a role."""
    return {
        "tags": _some(draw, [f"t{number}" for number in range(40)], 3),
        **_maybe(draw, 0.6, {"roles": _some(draw, _ROLES, 2)}),
        **_maybe(draw, 0.3, {"vm_states": _some(draw, _STATES, 4)}),
    }


def _mixed(draw: random.Random) -> dict[str, Any]:
    return {
        **_maybe(draw, 0.7, {"vm_states": _some(draw, _STATES, 5)}),
        **_maybe(draw, 0.5, {"task_states": _some(draw, _TASKS, 8)}),
        **_maybe(draw, 0.4, {"outstanding": frozenset() if draw.random() < 0.2 else _some(draw, _KINDS, 3)}),
        **_maybe(draw, 0.4, {"roles": _some(draw, _ROLES, 2)}),
        **_maybe(draw, 0.3, {"tags": _some(draw, [f"t{number}" for number in range(12)], 2)}),
        **_maybe(draw, 0.2, {"held": _some(draw, _KINDS, 2)}),
        **_maybe(draw, 0.2, {"locked": draw.random() < 0.5}),
        **_maybe(draw, 0.3, {"silent_ms_min": draw.choice(_TIMES_MS)}),
    }


def _timed(draw: random.Random) -> dict[str, Any]:
    """Every rule with a silence, a third of them with a threshold of their own."""
    return {**_mixed(draw), "silent_ms_min": draw.choice(_TIMES_MS) + 1_000 * draw.randint(0, 60)}


SHAPES: Final[dict[str, Draw]] = {
    "states": _states_and_tasks,
    "queue": _queue,
    "tags": _tags,
    "mixed": _mixed,
    "timed": _timed,
}
"""How the conditions of a rule are drawn."""


def large_policy(shape: str, rules: int, seed: int = 1, *, thresholds: bool = True) -> Policy:
    """Return a policy of so many rules; the last one admits everything."""
    draw = random.Random(seed)
    made = [_rule(draw, number, SHAPES[shape](draw), thresholds=thresholds) for number in range(rules - 1)]
    last = Rule(id="rest", source=f"large.toml:{rules}", operations=frozenset(Operation), verdict=Verdict.ADMIT)
    return Policy(name=f"large-{shape}", rules=(*made, last), outstanding_max=16)


def _rule(draw: random.Random, number: int, conditions: dict[str, Any], *, thresholds: bool) -> Rule:
    verdict = draw.choice([*Verdict, Verdict.DENY, Verdict.DENY]) if thresholds else Verdict.DENY
    return Rule(
        id=f"r{number}",
        source=f"large.toml:{number + 1}",
        operations=_some(draw, list(Operation), 4),
        verdict=verdict,
        threshold_ms=draw.choice(_TIMES_MS) if verdict is Verdict.AFTER else None,
        reason="busy" if verdict is Verdict.DENY else None,
        **conditions,
    )
