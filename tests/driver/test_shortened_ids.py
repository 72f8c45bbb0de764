"""What is printed of an id is taken for the id; what could mean several is refused with their names."""

from __future__ import annotations

import pytest

from in_process.embedded import Embedded, admitted
from interlock.core.errors import Invalid, NotFound
from interlock.core.operations import Operation
from interlock.core.records import Cancellation
from interlock.core.roles import Role
from interlock.hypervisors.simulated import SimulatedHost
from interlock.service.auth import Caller

STRANGER = Caller(token_id="stranger", name="stranger", role=Role.ADMIN, project="other")


async def test_a_request_is_cancelled_by_what_is_shown_of_its_id(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("one")
    host.freeze(vm)
    await fleet.submit(vm, Operation.PAUSE)
    waiting = admitted(await fleet.submit(vm, Operation.UNPAUSE))
    instances = fleet.server.instances
    assert (await instances.request(fleet.caller, waiting.id[-8:])).id == waiting.id
    assert (await instances.request(fleet.caller, waiting.id[:-4])).id == waiting.id
    with pytest.raises(NotFound):
        await instances.request(STRANGER, waiting.id[-8:])
    with pytest.raises(NotFound):
        await instances.request(fleet.caller, waiting.id[-7:])
    outcome, request = await instances.cancel(fleet.caller, waiting.id[-8:].upper())
    assert (outcome, request.id) == (Cancellation.CANCELLED, waiting.id)
    host.thaw(vm)


async def test_an_instance_is_found_by_a_part_of_its_id_and_rather_by_its_name(fleet: Embedded) -> None:
    vm = await fleet.create("one", start=False)
    instances = fleet.server.instances
    part = vm[-12:]
    assert (await instances.describe(fleet.caller, part)).id == vm
    with pytest.raises(NotFound):
        await instances.describe(STRANGER, part)
    named = await fleet.create(part, start=False)
    assert (await instances.describe(fleet.caller, part)).id == named


async def test_what_several_ids_begin_with_is_refused_with_their_names(fleet: Embedded) -> None:
    vms = [await fleet.create(f"vm{number}", start=False) for number in range(2)]
    assert vms[0][:8] == vms[1][:8], "ids begin with the time"
    with pytest.raises(Invalid) as refusal:
        await fleet.server.instances.describe(fleet.caller, vms[0][:8])
    assert all(vm in refusal.value.message for vm in vms)
