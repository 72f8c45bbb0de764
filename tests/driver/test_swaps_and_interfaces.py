"""Volumes swapped and interfaces plugged, beside state changes and alone, on simulated guests."""

from __future__ import annotations

import pytest

from in_process.embedded import Embedded, admitted, refused
from instance_disks import now
from interlock.core.errors import InterlockError, InUse, Invalid, NotFound
from interlock.core.networks import mac_of
from interlock.core.operations import Operation
from interlock.core.records import Denied, Disk, Status
from interlock.core.specs import INTERFACES_MAX
from interlock.core.states import PowerState, VmState
from interlock.hypervisors.simulated import SimulatedHost
from interlock.hypervisors.simulated.faults import Hangs, Method, Refuses, Slow

O = Operation  # noqa: E741


async def with_volumes(fleet: Embedded, host: SimulatedHost) -> str:
    """A VM with the volume `old`, on which it wrote something, and a free volume `new`."""
    vm = await fleet.create("web")
    for name in ("old", "new"):
        await fleet.make_volume(name)
    await fleet.carry_out(vm, O.ATTACH_VOLUME, volume="old")
    assert host.guest_writes(vm, "precious", "old")
    return vm


async def holders(fleet: Embedded) -> dict[str, str | None]:
    return {one.id: one.attached_to for one in await fleet.server.store.volumes.all()}


async def recorded(fleet: Embedded, vm: str) -> list[str]:
    spec = (await now(fleet, vm)).spec
    assert spec is not None
    return [disk.id for disk in spec.disks]


def written(host: SimulatedHost, volume: str) -> tuple[str, ...]:
    return host.storage.volume(Disk(id=volume, path=f"simulated:/{volume}")).written


async def test_a_running_guest_goes_on_with_the_new_volume(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await with_volumes(fleet, host)
    starts = host.guests[vm].starts
    assert (await fleet.carry_out(vm, O.SWAP_VOLUME, old="old", new="new")).status is Status.SUCCEEDED
    assert (set(host.guests[vm].disks), host.guests[vm].starts) == ({"new"}, starts)
    assert written(host, "new") == ("precious",)
    assert await recorded(fleet, vm) == ["new"]
    assert await holders(fleet) == {"old": None, "new": vm}


async def test_the_volume_of_a_stopped_instance_is_copied_and_is_there_after_its_start(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await with_volumes(fleet, host)
    await fleet.carry_out(vm, O.STOP)
    assert (await fleet.carry_out(vm, O.SWAP_VOLUME, old="old", new="new")).status is Status.SUCCEEDED
    assert written(host, "new") == ("precious",)
    await fleet.carry_out(vm, O.START)
    assert set(host.guests[vm].disks) == {"new"}
    assert await holders(fleet) == {"old": None, "new": vm}


async def test_a_start_while_the_volume_is_copied_gets_the_new_one_with_all_that_was_written(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await with_volumes(fleet, host)
    await fleet.carry_out(vm, O.STOP)
    host.faults.script(vm, Method.COPY_DISK, Slow(400))
    swap = admitted(await fleet.submit(vm, O.SWAP_VOLUME, old="old", new="new"))
    start = admitted(await fleet.submit(vm, O.START))
    assert (await fleet.ended(start)).status is Status.SUCCEEDED
    ended = await fleet.ended(swap)
    guest, record = set(host.guests[vm].disks), await recorded(fleet, vm)
    assert guest == set(record), ended
    held = [volume for volume, holder in (await holders(fleet)).items() if holder == vm]
    assert held == record


async def test_a_swap_that_is_refused_leaves_the_old_volume_and_gives_the_new_one_back(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await with_volumes(fleet, host)
    host.faults.script(vm, Method.SWAP_DISK, Refuses("no room"))
    assert (await fleet.carry_out(vm, O.SWAP_VOLUME, old="old", new="new")).status is Status.FAILED
    assert set(host.guests[vm].disks) == {"old"}
    assert await holders(fleet) == {"old": vm, "new": None}


async def test_a_start_that_cannot_end_because_of_a_volume_is_completed_by_a_swap(
    fleet: Embedded, host: SimulatedHost
) -> None:
    """The parent design: what serves the volume is gone, and the start waits for it."""
    vm = await with_volumes(fleet, host)
    await fleet.carry_out(vm, O.STOP)
    host.faults.script(vm, Method.POWER_ON, Hangs())
    start = admitted(await fleet.submit(vm, O.START))
    await fleet.until_event(vm, "request.unknown")
    swap = admitted(await fleet.submit(vm, O.SWAP_VOLUME, old="old", new="new", copy=False))
    assert (await fleet.ended(start)).status is Status.SUCCEEDED
    assert (await fleet.ended(swap)).status is Status.SUCCEEDED
    assert (host.guests[vm].power, set(host.guests[vm].disks)) == (PowerState.RUNNING, {"new"})
    assert (await now(fleet, vm)).vm_state is VmState.ACTIVE
    assert await holders(fleet) == {"old": None, "new": vm}


async def test_a_running_guest_never_loses_what_is_on_its_volume(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await with_volumes(fleet, host)
    assert refused(await fleet.submit(vm, O.SWAP_VOLUME, old="old", new="new", copy=False)) == "guest_uses_volume"
    assert set(host.guests[vm].disks) == {"old"}
    assert await holders(fleet) == {"old": vm, "new": None}


async def test_a_swap_is_finished_by_the_next_server(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await with_volumes(fleet, host)
    host.faults.script(vm, Method.SWAP_DISK, Slow(5_000))
    swap = admitted(await fleet.submit(vm, O.SWAP_VOLUME, old="old", new="new"))
    await fleet.until_event(vm, "request.taken")
    await fleet.crash()
    await fleet.start()
    assert (await fleet.ended(swap)).status is Status.SUCCEEDED
    assert set(host.guests[vm].disks) == {"new"}
    assert await holders(fleet) == {"old": None, "new": vm}


async def test_a_stop_beside_a_swap_does_not_give_the_new_volume_away(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await with_volumes(fleet, host)
    host.faults.script(vm, Method.SWAP_DISK, Slow(200))
    swap = admitted(await fleet.submit(vm, O.SWAP_VOLUME, old="old", new="new"))
    stop = admitted(await fleet.submit(vm, O.STOP))
    assert (await fleet.ended(stop)).status is Status.SUCCEEDED
    await fleet.ended(swap)
    held = [volume for volume, holder in (await holders(fleet)).items() if holder == vm]
    assert held == await recorded(fleet, vm)


async def test_a_swap_that_makes_no_sense_is_told_at_once(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await with_volumes(fleet, host)
    other = await fleet.create("two")
    await fleet.make_volume("theirs")
    await fleet.carry_out(other, O.ATTACH_VOLUME, volume="theirs")
    for old, new, reason in (("old", "old", "same_volume"), ("new", "old", "already_attached")):
        assert refused(await fleet.submit(vm, O.SWAP_VOLUME, old=old, new=new)) == reason
    wrong: tuple[tuple[str, type[InterlockError]], ...] = (("theirs", InUse), ("nothing", NotFound))
    for new, error in wrong:
        with pytest.raises(error):
            await fleet.submit(vm, O.SWAP_VOLUME, old="old", new=new)


async def test_interfaces_come_and_go_with_the_guest_and_the_record(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    made_up = await fleet.carry_out(vm, O.ATTACH_INTERFACE)
    given = await fleet.carry_out(vm, O.ATTACH_INTERFACE, mac="52:54:00:AA:BB:CC")
    assert (made_up.status, given.status) == (Status.SUCCEEDED, Status.SUCCEEDED)
    spec = (await now(fleet, vm)).spec
    assert spec is not None
    assert [(one.id, one.mac) for one in spec.interfaces] == [
        (made_up.id, mac_of(made_up.id)),
        (given.id, "52:54:00:aa:bb:cc"),
    ]
    assert set(host.guests[vm].interfaces) == {made_up.id, given.id}
    assert refused(await fleet.submit(vm, O.ATTACH_INTERFACE, mac="52:54:00:aa:bb:cc")) == "address_taken"
    assert (await fleet.carry_out(vm, O.DETACH_INTERFACE, interface=given.id)).status is Status.SUCCEEDED
    assert set(host.guests[vm].interfaces) == {made_up.id}
    await fleet.carry_out(vm, O.STOP)
    stopped = await fleet.carry_out(vm, O.ATTACH_INTERFACE)
    await fleet.carry_out(vm, O.START)
    assert set(host.guests[vm].interfaces) == {made_up.id, stopped.id}


async def test_an_instance_has_so_many_interfaces_and_no_more(fleet: Embedded) -> None:
    vm = await fleet.create("web")
    await fleet.carry_out(vm, O.STOP)
    for _ in range(INTERFACES_MAX):
        assert (await fleet.carry_out(vm, O.ATTACH_INTERFACE)).status is Status.SUCCEEDED
    answer = await fleet.submit(vm, O.ATTACH_INTERFACE)
    assert refused(answer) == "too_many_interfaces"
    assert isinstance(answer.disposition, Denied)
    assert "web has the maximum of 8 interfaces" in (answer.disposition.because or "")


async def test_an_interface_that_is_not_there_or_no_address_is_told_at_once(fleet: Embedded) -> None:
    vm = await fleet.create("web")
    assert refused(await fleet.submit(vm, O.DETACH_INTERFACE, interface="nobody")) == "no_such_interface"
    for mac in ("01:00:5e:00:00:01", "52:54:00:12:34", "00:00:00:00:00:00", "x"):
        with pytest.raises(Invalid):
            await fleet.submit(vm, O.ATTACH_INTERFACE, mac=mac)
