"""Under `propolis` a stop is queued also behind a migration out; what becomes of it on a server with two hosts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from in_process.embedded import Embedded, admitted
from in_process.in_memory_agent import Neighbour
from interlock.core.operations import Operation
from interlock.core.records import Status
from interlock.core.states import PowerState, VmState
from interlock.hypervisors.simulated import SimulatedHost

O = Operation  # noqa: E741


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Embedded]:
    embedded = Embedded(tmp_path / "data", SimulatedHost(), policy="propolis")
    await embedded.start()
    yield embedded
    await embedded.server.close()


async def test_the_stop_is_served_where_the_migration_brought_the_vm(house: Embedded, north: Neighbour) -> None:
    vm = await house.create("web")
    migrate = admitted(await house.submit(vm, O.MIGRATE, host=north.name))
    stop = admitted(await house.submit(vm, O.STOP))
    assert (await house.ended(migrate)).status is Status.SUCCEEDED
    assert (await house.ended(stop)).status is Status.SUCCEEDED
    instance = await house.until(vm, vm_state=VmState.STOPPED, task_state="none")
    assert instance.host == north.name
    for host in (house.server.hypervisor, house.server.hosts.of(north.name)):
        assert (await host.inspect(vm)).power_state is PowerState.NONE


async def test_the_stop_is_served_here_after_a_migration_that_was_cancelled(house: Embedded, north: Neighbour) -> None:
    vm = await house.create("web")
    migrate = admitted(await house.submit(vm, O.MIGRATE, host=north.name))
    stop = admitted(await house.submit(vm, O.STOP))
    await house.server.instances.cancel(house.caller, migrate.id)
    assert (await house.ended(stop)).status is Status.SUCCEEDED
    assert (await house.until(vm, task_state="none")).vm_state is VmState.STOPPED
    for host in (house.server.hypervisor, house.server.hosts.of(north.name)):
        assert (await host.inspect(vm)).power_state is PowerState.NONE
