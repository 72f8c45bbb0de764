"""The table of all operations, drawn from what a run of the proofs saw: docs/reference/operations.md."""

from __future__ import annotations

import statistics
from typing import Final

import httpx
import msgspec

from interlock.core.operations import CATALOGUE, Lane, Operation
from interlock.core.references import MIGRATIONS
from operation_tests.run import Outcome, clear, prove
from operation_tests.scenario import Scenario
from operation_tests.stage import Stage
from processes.crash_injection import MOMENTS

_HEAD: Final = """# Every operation, on a real guest

<!-- Drawn by `PYTHONPATH=tests python -m operation_tests`; a test compares its rows with the catalogue. -->

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


def prove_fully(stage: Stage, scenario: Scenario, repeat: int) -> Proved:
    """Go through a scenario `repeat` times to measure it, and once for each phase and moment to die in.

    Raises:
        AssertionError: something is not as the scenario says; names it.
    """
    proved = Proved(scenario=scenario, crashes={phase: [] for phase in scenario.phases})
    for _ in range(repeat):
        proved.seconds.append(_prove(stage, scenario, None).seconds)
    for phase, outcomes in proved.crashes.items():
        for moment in MOMENTS:
            outcome = _prove(stage, scenario, f"{phase}:{moment}")
            if outcome.died:
                outcomes.append(outcome)
    return proved


def _prove(stage: Stage, scenario: Scenario, dying_in: str | None) -> Outcome:
    try:
        outcome = prove(stage, scenario, dying_in)
    except (AssertionError, httpx.HTTPError) as wrong:
        raise AssertionError(f"{scenario.operation.value}, dying in {dying_in}: {wrong}") from wrong
    clear(stage)
    return outcome


ELSEWHERE: Final = {
    **dict.fromkeys(MIGRATIONS, "Between hosts; proved in tests/hosts, crashes included."),
    **dict.fromkeys(
        (Operation.MOVE_INTERFACE, Operation.SET_INTERFACE, Operation.ADD_FORWARD, Operation.REMOVE_FORWARD),
        "With simulated guests; proved in tests/driver, crashes included.",
    ),
}
"""The operations that are proved elsewhere, and where."""


def draw(proved: list[Proved], repeat: int, performs: frozenset[Operation]) -> str:
    """The page."""
    lines = ["| operation | phases, and what a crash in each led to | what proves it | median |", "|---|---|---|---|"]
    lines += [_row(one) for one in proved]
    for operation in sorted(ELSEWHERE.keys() & performs):
        phases = "<br>".join(f"`{phase}`" for phase in CATALOGUE[operation].phases)
        lines.append(f"| `{operation.value}` | {phases} | {ELSEWHERE[operation]} | |")
    records = ", ".join(f"`{one.operation.value}`" for one in CATALOGUE.values() if one.lane is Lane.RECORD)
    words = (
        f"\nMedians of {repeat}, with QEMU's software emulation, two at a time on a machine of two processors.\n"
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
        return "passed over: there is nothing to do in it"
    ends = sorted({f"{one.status}, {one.vm_state}" for one in outcomes})
    return f"{' or '.join(ends)} ({len(outcomes)} {'crash' if len(outcomes) == 1 else 'crashes'})"
