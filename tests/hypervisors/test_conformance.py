"""Every hypervisor keeps every promise of the port."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.hypervisor import CHECKS, Check, run
from conformance.simulated_host import SimulatedUnderTest
from in_process.virtual_time import run_in_virtual_time


def name_of(promise: Check) -> str:
    return promise.__name__


@pytest.mark.parametrize("promise", CHECKS, ids=name_of)
async def test_simulated_in_memory(promise: Check) -> None:
    await run(promise, SimulatedUnderTest())


@pytest.mark.parametrize("promise", CHECKS, ids=name_of)
async def test_simulated_in_a_folder(promise: Check, tmp_path: Path) -> None:
    await run(promise, SimulatedUnderTest(tmp_path))


@pytest.mark.parametrize("promise", CHECKS, ids=name_of)
def test_simulated_in_virtual_time(promise: Check) -> None:
    run_in_virtual_time(run(promise, SimulatedUnderTest(answer_timeout_s=5.0)))
