"""A host behind a connection keeps every promise of the port."""

from __future__ import annotations

from pathlib import Path

import pytest

from interlock.testing.check_hypervisor import CHECKS, Check, run
from interlock.testing.remote_host import RemoteUnderTest
from interlock.testing.simulated_host import SimulatedUnderTest


def name_of(promise: Check) -> str:
    return promise.__name__


@pytest.mark.parametrize("promise", CHECKS, ids=name_of)
async def test_simulated_behind_a_connection(promise: Check, tmp_path: Path) -> None:
    host = RemoteUnderTest(SimulatedUnderTest(), tmp_path)
    await host.begin()
    try:
        await run(promise, host)
    finally:
        await host.end()
