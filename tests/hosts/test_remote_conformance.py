"""A host behind a connection keeps every promise of the port."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.hypervisor import CHECKS, Check, run
from conformance.remote_host import RemoteUnderTest
from conformance.simulated_host import SimulatedUnderTest


def name_of(promise: Check) -> str:
    return promise.__name__


LATE = frozenset({"saving_needs_a_permit_at_every_moment"})
"""Promises for which somebody would have to be asked in the middle of a step. A host hears of a lost permit a little
later than it is lost, and what it did until then counts as done before; nothing of who comes next overtakes that."""


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "messages"])
@pytest.mark.parametrize("promise", [one for one in CHECKS if name_of(one) not in LATE], ids=name_of)
async def test_simulated_behind_a_connection(promise: Check, tmp_path: Path, *, ranges: bool) -> None:
    host = RemoteUnderTest(SimulatedUnderTest(), tmp_path, ranges=ranges)
    await host.begin()
    try:
        await run(promise, host)
    finally:
        await host.end()
