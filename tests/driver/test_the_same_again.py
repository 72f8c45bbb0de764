"""What is asked for again is taken for the same only where it is."""

from __future__ import annotations

from typing import Any

import pytest

from in_process.embedded import Embedded, admitted
from interlock.core.errors import InUse
from interlock.core.operations import Operation
from interlock.core.records import Redundant
from interlock.hypervisors.simulated import SimulatedHost
from interlock.hypervisors.simulated.faults import Method, Slow

O = Operation  # noqa: E741
_SLOW = Slow(60_000)


@pytest.mark.parametrize(
    ("operation", "method", "first", "second"),
    [
        (O.RESIZE, Method.POWER_OFF, {"memory_mib": 256}, {"memory_mib": 512}),
        (O.SET_PASSWORD, Method.SET_PASSWORD, {"password": "one"}, {"password": "two"}),
    ],
)
async def test_another_wish_is_not_taken_for_the_one_that_is_being_served(
    fleet: Embedded,
    host: SimulatedHost,
    operation: Operation,
    method: Method,
    first: dict[str, Any],
    second: dict[str, Any],
) -> None:
    vm = await fleet.create("web")
    host.faults.script(vm, method, _SLOW)
    earlier = admitted(await fleet.submit(vm, operation, **first))
    with pytest.raises(InUse) as refused:
        await fleet.submit(vm, operation, **second)
    assert earlier.id in refused.value.message


async def test_the_same_wish_is_answered_with_the_request_that_is_being_served(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await fleet.create("web")
    host.faults.script(vm, Method.POWER_OFF, _SLOW)
    earlier = admitted(await fleet.submit(vm, O.RESIZE, memory_mib=256))
    again = (await fleet.submit(vm, O.RESIZE, memory_mib=256)).disposition
    assert isinstance(again, Redundant)
    assert again.request is not None
    assert again.request.id == earlier.id
