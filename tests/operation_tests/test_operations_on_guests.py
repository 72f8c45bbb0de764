"""Every operation on a real guest, with a server that is killed in one of its phases and started again.

Simulated guests see the death of the server in every phase (tests/recovery); here it is one phase each, another moment
from operation to operation, and the proof is the guest's own word. docs/reference/operations.md has all of them.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from interlock.core.operations import CATALOGUE
from interlock.driver.operations import HANDLERS, PERFORMS
from operation_tests.run import SCENARIOS, prove, unproved
from operation_tests.scenario import Scenario
from operation_tests.stage import Stage
from operation_tests.table import ELSEWHERE
from processes.crash_injection import MOMENTS

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "operations.md"
PERFORMED = [scenario for scenario in SCENARIOS if scenario.operation in HANDLERS]
DEATHS = [
    (scenario, f"{scenario.phases[number % len(scenario.phases)]}:{moment}")
    for number, (scenario, moment) in enumerate(zip(PERFORMED, itertools.cycle(MOMENTS), strict=False))
]
QUICK = 5
"""One of so many is proved in the quick tier: `tests/recovery` kills a server in each phase of each operation, on
simulated guests, and `tests/stories` has every family of operations on real ones."""


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("scenario", "dying_in"),
    [
        pytest.param(
            *death,
            id=f"{death[0].operation.value}-{death[1]}",
            marks=pytest.mark.long if number % QUICK else (),
        )
        for number, death in enumerate(DEATHS)
    ],
)
def test_an_operation_is_finished_by_the_next_server_and_does_what_it_says(
    stage: Stage, scenario: Scenario, dying_in: str
) -> None:
    prove(stage, scenario, dying_in)


def test_everything_that_is_performed_is_proved() -> None:
    assert not unproved(PERFORMS - ELSEWHERE.keys()), "add a scenario to operation_tests"


def test_the_page_has_every_operation_and_each_of_its_phases() -> None:
    """It is drawn from a run of all of them: `PYTHONPATH=tests python -m operation_tests > PAGE`."""
    for operation in HANDLERS:
        row = "".join(re.findall(rf"^\| `{operation.value}`.*$", PAGE.read_text(), re.MULTILINE))
        phases = CATALOGUE[operation].phases + CATALOGUE[operation].hard_phases
        missing = [phase for phase in phases if f"`{phase}`" not in row]
        assert not missing, f"{operation.value}: the page lacks {missing}; draw it anew"
