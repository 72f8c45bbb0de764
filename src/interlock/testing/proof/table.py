"""The table of all operations, drawn from what a run of the proofs saw: docs/reference/operations.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.testing.dying_server import MOMENTS
from interlock.testing.proof.run import SCENARIOS, Outcome, clear, prove
from interlock.testing.proof.scenario import Scenario
from interlock.testing.proof.stage import Stage

_HEAD: Final = """# Every operation, on a real guest

<!-- Drawn by `python -m interlock.testing.proof`; a test compares its rows with the catalogue. -->

Each operation was carried out on a real guest (the small guest, on QEMU), and again with a server that killed itself
(`kill -9`) in each of its phases: once before anything of the phase was done, once between two of its effects where it
has more than one, and once when all of it was done and nothing of that was kept. Each time the next server took the
request up and the same proof was held to. The time is from admission to the end, as the server measured it, without a
crash; the guest may take longer until it answers.

"""


class Proved(msgspec.Struct, kw_only=True):
    """What was seen of one scenario."""

    scenario: Scenario
    seconds: list[float] = []
    crashes: dict[str, list[Outcome]] = {}
    """By phase: how each crash in it came out."""


def run_all(stage: Stage, repeat: int, tell: Callable[[str], None]) -> list[Proved]:
    """Go through every scenario: `repeat` times to measure it, and once for each phase and moment to die in.

    Raises:
        AssertionError: something is not as a scenario says.
    """
    found = []
    for scenario in SCENARIOS:
        tell(scenario.operation.value)
        proved = Proved(scenario=scenario)
        for _ in range(repeat):
            proved.seconds.append(prove(stage, scenario).seconds)
            clear(stage)
        for phase in scenario.phases:
            outcomes = proved.crashes.setdefault(phase, [])
            for moment in MOMENTS:
                outcome = prove(stage, scenario, f"{phase}:{moment}")
                clear(stage)
                if outcome.died:
                    outcomes.append(outcome)
        found.append(proved)
    return found


def draw(proved: list[Proved], repeat: int, elsewhere: Mapping[Operation, str]) -> str:
    """The page. `elsewhere` says of operations without a scenario here where they are proved."""
    lines = ["| operation | phases, and what a crash in each led to | what proves it | median |", "|---|---|---|---|"]
    lines += [_row(one) for one in proved]
    for operation, words in elsewhere.items():
        phases = "<br>".join(f"`{phase}`" for phase in CATALOGUE[operation].phases)
        lines.append(f"| `{operation.value}` | {phases} | {words} | |")
    records = ", ".join(f"`{one.operation.value}`" for one in CATALOGUE.values() if one.lane is Lane.RECORD)
    words = (
        f"\nMedians of {repeat}, with QEMU's software emulation on a machine of two processors.\n"
        f"\nThese change only what is recorded, and are done when they are admitted: {records}.\n"
    )
    return _HEAD + "\n".join(lines) + "\n" + words


def _row(one: Proved) -> str:
    scenario = one.scenario
    name = f"`{scenario.operation.value}`" + (", hard" if scenario.parameters.get("hard") else "")
    crashes = "<br>".join(f"`{phase}`: {_came_out(outcomes)}" for phase, outcomes in one.crashes.items())
    return f"| {name} | {crashes} | {scenario.proof} | {statistics.median(one.seconds):.2f} s |"


def _came_out(outcomes: list[Outcome]) -> str:
    """Such as `finished, active (3 crashes)`."""
    if not outcomes:
        return "not met"
    ends = sorted({f"{one.status}, {one.vm_state}" for one in outcomes})
    return f"{' or '.join(ends)} ({len(outcomes)} crashes)"
