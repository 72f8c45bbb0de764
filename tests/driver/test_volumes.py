"""Component changes, beside state changes and alone, on simulated guests."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from in_process.embedded import Embedded, admitted, refused
from interlock.core.operations import Operation
from interlock.core.records import Request, Status
from interlock.core.states import VmState
from interlock.driver.operation_context import OperationContext
from interlock.driver.worker import Worker
from interlock.hypervisors.simulated import SimulatedHost
from interlock.hypervisors.simulated.faults import GuestIgnores, Hangs, Method, Refuses, Slow
from waiting import PATIENCE_S, eventually

O = Operation  # noqa: E741


def disks(host: SimulatedHost, instance_id: str) -> set[str]:
    return set(host.guests[instance_id].disks)


async def test_a_volume_is_plugged_into_a_running_guest_and_out_again(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    volume = await fleet.make_volume("data")
    assert (await fleet.carry_out(vm, O.ATTACH_VOLUME, volume="data")).status is Status.SUCCEEDED
    assert volume.id in disks(host, vm)
    kept = await fleet.server.store.volumes.get(volume.id)
    assert kept is not None
    assert kept.attached_to == vm
    assert (await fleet.carry_out(vm, O.DETACH_VOLUME, volume="data")).status is Status.SUCCEEDED
    assert volume.id not in disks(host, vm)
    kept = await fleet.server.store.volumes.get(volume.id)
    assert kept is not None
    assert kept.attached_to is None


async def test_a_volume_attached_to_a_stopped_instance_is_there_after_its_start(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await fleet.create("web")
    await fleet.carry_out(vm, O.STOP)
    volume = await fleet.make_volume("data")
    assert (await fleet.carry_out(vm, O.ATTACH_VOLUME, volume="data")).status is Status.SUCCEEDED
    await fleet.carry_out(vm, O.START)
    assert volume.id in disks(host, vm)


async def test_a_volume_is_attached_beside_a_start_without_disturbing_it(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    await fleet.carry_out(vm, O.STOP)
    volume = await fleet.make_volume("data")
    host.faults.script(vm, Method.POWER_ON, Slow(300))
    start = admitted(await fleet.submit(vm, O.START))
    await fleet.until(vm, task_state="powering_on")
    attach = admitted(await fleet.submit(vm, O.ATTACH_VOLUME, volume="data"))

    async def both_served() -> bool | None:
        instance = await fleet.server.store.instance(vm)
        assert instance is not None
        return len([one for one in instance.outstanding if one.status is Status.IN_FLIGHT]) == 2 or None

    assert await fleet.server.instances.watch.until(vm, both_served, 5_000)
    assert (await fleet.ended(start)).status is Status.SUCCEEDED
    assert (await fleet.ended(attach)).status is Status.SUCCEEDED
    assert volume.id in disks(host, vm)
    instance = await fleet.until(vm, vm_state=VmState.ACTIVE)
    assert instance.spec is not None
    assert [disk.id for disk in instance.spec.disks] == [volume.id]


async def test_a_start_that_begins_while_a_volume_is_recorded_does_not_lose_it(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await fleet.create("web")
    await fleet.carry_out(vm, O.STOP)
    volume = await fleet.make_volume("data")
    host.faults.script(vm, Method.ATTACH_DISK, Slow(100))
    attach = admitted(await fleet.submit(vm, O.ATTACH_VOLUME, volume="data"))
    start = admitted(await fleet.submit(vm, O.START))
    assert (await fleet.ended(start)).status is Status.SUCCEEDED
    assert (await fleet.ended(attach)).status is Status.SUCCEEDED
    assert volume.id in disks(host, vm)


@pytest.mark.parametrize("kind", ["volume", "interface"])
@pytest.mark.parametrize("attaches", [True, False])
async def test_a_guest_that_is_started_with_the_devices_from_before_gets_or_releases_the_one_that_changes(
    fleet: Embedded, host: SimulatedHost, monkeypatch: pytest.MonkeyPatch, kind: str, *, attaches: bool
) -> None:
    """Its start has read them before the change is recorded, when no guest ran yet."""
    attach, detach = Operation(f"attach_{kind}"), Operation(f"detach_{kind}")
    vm, volume = await fleet.create("web"), await fleet.make_volume("data")
    await fleet.carry_out(vm, O.STOP)
    given = {"volume": volume.id} if kind == "volume" else {}
    if not attaches:
        attached = await fleet.carry_out(vm, attach, **given)
        given = given or {"interface": attached.id}
    host.faults.script(vm, Method.POWER_ON, Slow(5_000))
    keep_spec, starts = OperationContext.keep_spec, list[Request]()

    async def keep_behind_a_start(work: OperationContext, *seen: Any, **more: Any) -> bool:
        if not starts:
            starts.append(admitted(await fleet.submit(vm, O.START)))
            await eventually(lambda: host.guests[vm].starting)
        return await keep_spec(work, *seen, **more)

    monkeypatch.setattr(OperationContext, "keep_spec", keep_behind_a_start)
    changed = await fleet.carry_out(vm, attach if attaches else detach, **given)
    assert (changed.status, (await fleet.ended(starts[0])).status) == (Status.SUCCEEDED, Status.SUCCEEDED)
    devices = host.guests[vm].disks if kind == "volume" else host.guests[vm].interfaces
    assert set(devices) == ({volume.id if kind == "volume" else changed.id} if attaches else set())


async def test_a_volume_is_never_attached_to_two_instances(fleet: Embedded, host: SimulatedHost) -> None:
    one, two = await fleet.create("one"), await fleet.create("two")
    volume = await fleet.make_volume("data")
    first = admitted(await fleet.submit(one, O.ATTACH_VOLUME, volume="data"))
    second = admitted(await fleet.submit(two, O.ATTACH_VOLUME, volume="data"))
    ends = sorted([(await fleet.ended(first)).status, (await fleet.ended(second)).status])
    assert ends == [Status.FAILED, Status.SUCCEEDED]
    assert (volume.id in disks(host, one)) != (volume.id in disks(host, two))


async def test_a_volume_that_the_host_refuses_is_given_back(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    volume = await fleet.make_volume("data")
    host.faults.script(vm, Method.ATTACH_DISK, Refuses("no free port"))
    request = await fleet.carry_out(vm, O.ATTACH_VOLUME, volume="data")
    assert request.status is Status.FAILED
    kept = await fleet.server.store.volumes.get(volume.id)
    assert kept is not None
    assert kept.attached_to is None


async def test_a_guest_that_does_not_let_go_makes_the_detach_fail_and_keeps_the_volume(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await fleet.create("web")
    volume = await fleet.make_volume("data")
    await fleet.carry_out(vm, O.ATTACH_VOLUME, volume="data")
    host.faults.script(vm, Method.DETACH_DISK, GuestIgnores(), GuestIgnores())
    assert (await fleet.carry_out(vm, O.DETACH_VOLUME, volume="data")).status is Status.FAILED
    kept = await fleet.server.store.volumes.get(volume.id)
    assert kept is not None
    assert kept.attached_to == vm


async def test_deleting_an_instance_gives_its_volumes_back(fleet: Embedded) -> None:
    vm = await fleet.create("web")
    volume = await fleet.make_volume("data")
    await fleet.carry_out(vm, O.ATTACH_VOLUME, volume="data")
    await fleet.carry_out(vm, O.DELETE)
    kept = await fleet.server.store.volumes.get(volume.id)
    assert kept is not None
    assert kept.attached_to is None


async def test_a_volume_is_not_let_go_while_a_crashed_machine_holds_it(fleet: Embedded, host: SimulatedHost) -> None:
    """A hard reboot would bring the guest back with the disk, which another could have by then."""
    vm = await fleet.create("web")
    volume = await fleet.make_volume("data")
    await fleet.carry_out(vm, O.ATTACH_VOLUME, volume="data")
    host.faults.script(vm, Method.DETACH_DISK, Slow(200))
    detach = admitted(await fleet.submit(vm, O.DETACH_VOLUME, volume="data"))
    assert host.guest_panics(vm)
    assert (await fleet.ended(detach)).status is Status.FAILED
    assert volume.id in host.guests[vm].disks
    kept = await fleet.server.store.volumes.get(volume.id)
    assert kept is not None
    assert kept.attached_to == vm


async def test_what_a_superseded_attach_had_claimed_is_let_go_when_the_machine_is_off(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await fleet.create("web")
    volume = await fleet.make_volume("data")
    host.faults.script(vm, Method.ATTACH_DISK, Hangs())
    attach = admitted(await fleet.submit(vm, O.ATTACH_VOLUME, volume="data"))
    await fleet.until_event(vm, "request.unknown")
    reset = await fleet.submit(vm, O.RESET_STATE, vm_state="active", reason="test")
    assert attach.id in reset.disposition.supersedes  # type: ignore[union-attr]
    assert (await fleet.carry_out(vm, O.STOP, hard=True)).status is Status.SUCCEEDED
    kept = await fleet.server.store.volumes.get(volume.id)
    assert kept is not None
    assert kept.attached_to is None
    host.thaw(vm)
    assert volume.id not in disks(host, vm)


@pytest.mark.parametrize("operation", [O.DETACH_VOLUME, O.DETACH_INTERFACE])
async def test_a_detach_that_was_done_and_not_reported_is_no_failure_for_the_next_server(
    fleet: Embedded, monkeypatch: pytest.MonkeyPatch, operation: Operation
) -> None:
    vm = await fleet.create("web")
    await fleet.make_volume("data")
    await fleet.carry_out(vm, O.ATTACH_VOLUME, volume="data")
    interface = await fleet.carry_out(vm, O.ATTACH_INTERFACE)
    wish = {"volume": "data"} if operation is O.DETACH_VOLUME else {"interface": interface.id}
    reached = asyncio.Event()

    async def never_reports(self: Worker, *arguments: object) -> None:
        reached.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as dying:
        dying.setattr(Worker, "_finish", never_reports)
        detach = admitted(await fleet.submit(vm, operation, **wish))
        await asyncio.wait_for(reached.wait(), PATIENCE_S)
        await fleet.crash()
    await fleet.start()
    assert (await fleet.ended(detach)).status is Status.SUCCEEDED


async def test_volumes_stay_with_a_memory_that_is_saved_also_while_it_is_shelved(
    tmp_path: Path, host: SimulatedHost
) -> None:
    fleet = Embedded(tmp_path / "data", host, "nova")
    await fleet.start()
    vm = await fleet.create("web")
    volume, other = await fleet.make_volume("data"), await fleet.make_volume("other")
    await fleet.carry_out(vm, O.ATTACH_VOLUME, volume="data")
    await fleet.carry_out(vm, O.SUSPEND)
    await fleet.carry_out(vm, O.SHELVE)
    for operation, name in ((O.DETACH_VOLUME, "data"), (O.ATTACH_VOLUME, "other")):
        assert refused(await fleet.submit(vm, operation, volume=name)) == "memory_saved"
    claims = {one.id: one.attached_to for one in await fleet.server.store.volumes.all()}
    assert claims == {volume.id: vm, other.id: None}
    await fleet.carry_out(vm, O.UNSHELVE)
    assert (await fleet.carry_out(vm, O.RESUME)).message is None, "it goes on from its memory"
    assert (await fleet.carry_out(vm, O.DETACH_VOLUME, volume="data")).status is Status.SUCCEEDED
    await fleet.crash()
