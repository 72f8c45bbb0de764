"""A host behind a connection keeps every promise of the port."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.hypervisor import CHECKS, Check, run
from conformance.remote_host import RemoteUnderTest
from conformance.simulated_host import SimulatedUnderTest
from interlock.core.errors import OperationRejected


def name_of(promise: Check) -> str:
    return promise.__name__


LATE = frozenset({"saving_needs_a_permit_at_every_moment"})
"""Promises for which somebody would have to be asked in the middle of a step. A host hears of a lost permit a little
later than it is lost, and what it did until then counts as done before; nothing of who comes next overtakes that."""


NEW = frozenset({"nobody_answers_where_no_guest_runs", "updating_interfaces_converges_and_keeps_them"})
"""Promises of methods that the version in which files travel as messages does not have."""


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "messages"])
@pytest.mark.parametrize("promise", [one for one in CHECKS if name_of(one) not in LATE], ids=name_of)
async def test_simulated_behind_a_connection(promise: Check, tmp_path: Path, *, ranges: bool) -> None:
    if not ranges and name_of(promise) in NEW:
        with pytest.raises(OperationRejected, match="speaks protocol version 4"):
            await _checked(promise, tmp_path, ranges=ranges)
        return
    await _checked(promise, tmp_path, ranges=ranges)


async def _checked(promise: Check, tmp_path: Path, *, ranges: bool) -> None:
    host = RemoteUnderTest(SimulatedUnderTest(), tmp_path, ranges=ranges)
    await host.begin()
    try:
        await run(promise, host)
    finally:
        await host.end()
