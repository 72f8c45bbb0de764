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


def _tasks(draw: random.Random) -> dict[str, Any]:
    return {"task_states": _some(draw, _TASKS, 8), **_maybe(draw, 0.5, {"roles": _some(draw, _ROLES, 2)})}


def _tags_of_all(draw: random.Random) -> dict[str, Any]:
    """Every rule about tags that an instance has, lacks, or has together, for most of them all operations."""
    tags = [f"t{number}" for number in range(60)]
    return {
        **_maybe(draw, 0.7, {"operations": frozenset(Operation)}),
        "tags": _some(draw, tags, 2) | {f"!{tag}" for tag in draw.sample(tags, draw.randint(0, 2))},
        **_maybe(draw, 0.5, {"tags_all": _some(draw, tags, 3)}),
        **_maybe(draw, 0.3, {"vm_states": _some(draw, _STATES, 4)}),
    }


def _roles(draw: random.Random) -> dict[str, Any]:
    return {"roles": _some(draw, _ROLES, 2), **_states_and_tasks(draw)}


def _callers(draw: random.Random) -> dict[str, Any]:
    """Every rule about a project, some of them also about groups and names."""
    return {
        "projects": _some(draw, [f"p{number}" for number in range(100)] + [f"p{number}*" for number in range(10)], 2),
        **_maybe(draw, 0.3, {"groups": _some(draw, ["ops", "!ops", "dev", "!trainees", "night"], 2)}),
        **_maybe(draw, 0.2, {"requested_by": _some(draw, ["alice", "bob", "ci-*"], 2)}),
        **_maybe(draw, 0.3, {"vm_states": _some(draw, _STATES, 4)}),
    }


def _ages(draw: random.Random) -> dict[str, Any]:
    return {
        "age_ms_min": draw.randint(1, 500) * 60_000,
        **_maybe(draw, 0.4, {"age_ms_max": draw.randint(1, 500) * 60_000}),
        **_maybe(draw, 0.5, {"in_state_ms_min": draw.choice(_TIMES_MS)}),
        **_maybe(draw, 0.5, {"vm_states": _some(draw, _STATES, 4)}),
    }


def _windows(draw: random.Random) -> dict[str, Any]:
    days = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]
    windows = [f"{day} {hour:02}:00-{hour + 6:02}:00 UTC" for day in days for hour in (2, 8, 14)]
    return {
        "within": _some(draw, [*windows, *(f"!{window}" for window in windows)], 2),
        **_maybe(draw, 0.4, {"roles": _some(draw, _ROLES, 2)}),
        **_maybe(draw, 0.5, {"vm_states": _some(draw, _STATES, 4)}),
    }


def _parameters(draw: random.Random) -> dict[str, Any]:
    return {
        "vcpus_min": draw.randint(1, 64),
        **_maybe(draw, 0.3, {"vcpus_max": draw.randint(1, 64)}),
        **_maybe(draw, 0.4, {"memory_mib_min": draw.randint(1, 64) * 1024}),
        **_maybe(draw, 0.3, {"target_hosts": _some(draw, [f"rack{number}-*" for number in range(20)], 3)}),
        **_maybe(draw, 0.2, {"images": _some(draw, [f"image-{number}" for number in range(30)], 3)}),
        **_maybe(draw, 0.4, {"vm_states": _some(draw, _STATES, 4)}),
    }


def _flags(draw: random.Random) -> dict[str, Any]:
    """Every rule about what is recorded of the instance, and how much is outstanding elsewhere."""
    flags = ["locked", "locked_above", "blocked", "host_reachable", "launched", "hard"]
    return {
        **{flag: draw.random() < 0.5 for flag in draw.sample(flags, draw.randint(1, 3))},
        **_maybe(draw, 0.3, {"power_state": _some(draw, ["running", "paused", "shutdown", "crashed", "none"], 2)}),
        **_maybe(draw, 0.2, {"failures_min": draw.randint(1, 9)}),
        **_maybe(draw, 0.2, {"project_outstanding_min": draw.randint(1, 200)}),
        **_maybe(draw, 0.2, {"host_outstanding_min": draw.randint(1, 200)}),
        **_maybe(draw, 0.4, {"vm_states": _some(draw, _STATES, 4)}),
    }


def _limited(draw: random.Random) -> dict[str, Any]:
    """Every rule out of turn or with a limit of its own, for all operations in some states."""
    return {
        "operations": frozenset(Operation) if draw.random() < 0.5 else _some(draw, list(Operation), 12),
        **(
            {"verdict": Verdict.ADMIT, "in_turn": False}
            if draw.random() < 0.5
            else {"verdict": Verdict.PREEMPT, "served_at_most_ms": draw.choice(_TIMES_MS)}
        ),
        "vm_states": _some(draw, _STATES, 3),
        "roles": _some(draw, _ROLES, 2),
        **_maybe(draw, 0.5, {"tags": _some(draw, [f"t{number}" for number in range(40)], 2)}),
        **_maybe(draw, 0.3, {"held": _some(draw, _KINDS, 2)}),
    }


def _fixed(draw: random.Random) -> dict[str, Any]:
    """A quarter of the rules, fixed and of a base, some of them with exceptions."""
    base: dict[str, Any] = {"fixed": True, "source": "base.toml:1", "verdict": Verdict.DENY, "reason": "fixed"}
    return {
        **_maybe(draw, 0.25, {**base, **_maybe(draw, 0.3, {"exceptions": _some(draw, list(Operation), 2)})}),
        **_mixed(draw),
    }


def _sets(draw: random.Random) -> dict[str, Any]:
    """Rules with several sets of conditions."""
    return {"id": f"r{draw.randint(0, 700)}#{draw.randint(1, 60)}", **_mixed(draw)}


SHAPES: Final[dict[str, Draw]] = {
    "states": _states_and_tasks,
    "queue": _queue,
    "tags": _tags,
    "mixed": _mixed,
    "timed": _timed,
    "tasks": _tasks,
    "all": _tags_of_all,
    "roles": _roles,
    "callers": _callers,
    "ages": _ages,
    "windows": _windows,
    "parameters": _parameters,
    "flags": _flags,
    "limited": _limited,
    "fixed": _fixed,
    "sets": _sets,
}
"""How the conditions of a rule are drawn."""


def large_policy(shape: str, rules: int, seed: int = 1, *, thresholds: bool = True) -> Policy:
    """Return a policy of so many rules; the last one admits everything."""
    draw = random.Random(seed)
    made = [_rule(draw, number, SHAPES[shape](draw), thresholds=thresholds) for number in range(rules - 1)]
    last = Rule(id="rest", source=f"large.toml:{rules}", operations=frozenset(Operation), verdict=Verdict.ADMIT)
    return Policy(name=f"large-{shape}", rules=(*made, last), outstanding_max=16)


def _rule(draw: random.Random, number: int, own: dict[str, Any], *, thresholds: bool) -> Rule:
    verdict = own.get("verdict") or (
        draw.choice([*Verdict, Verdict.DENY, Verdict.DENY]) if thresholds else Verdict.DENY
    )
    fields = {
        "id": f"r{number}",
        "source": f"large.toml:{number + 1}",
        "operations": _some(draw, list(Operation), 4),
        "verdict": verdict,
        "threshold_ms": draw.choice(_TIMES_MS) if verdict is Verdict.AFTER else None,
        "reason": "busy" if verdict is Verdict.DENY else None,
        **own,
    }
    return Rule(**fields)
