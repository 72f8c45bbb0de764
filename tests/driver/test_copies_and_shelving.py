"""Snapshots, backups and shelving, on simulated guests: nothing is lost, and no file is left over."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from in_process.embedded import Embedded, admitted, refused
from instance_disks import image_files, now, put_images, root
from interlock.core.errors import Fenced, Forbidden, InUse, NameTaken, NotFound
from interlock.core.operations import Operation
from interlock.core.records import Denied, Image, Status
from interlock.core.roles import Role
from interlock.core.states import PowerState, VmState
from interlock.driver.operation_context import OperationContext
from interlock.driver.operations import HANDLERS
from interlock.hypervisors.simulated import SimulatedHost
from interlock.hypervisors.simulated.faults import Method, Refuses, Slow
from interlock.service.auth import Caller

O = Operation  # noqa: E741


async def made(fleet: Embedded) -> str:
    await put_images(fleet)
    return await fleet.create("web", image="disk")


async def image_named(fleet: Embedded, name: str) -> Image:
    return await fleet.server.inventory.find_image(fleet.caller, name)


async def backups(fleet: Embedded, vm: str, backup_type: str) -> list[Image]:
    kept = await fleet.server.store.images.all()
    return [one for one in kept if (one.source_instance, one.backup_type) == (vm, backup_type)]


async def test_a_snapshot_is_an_image_that_another_instance_boots(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await made(fleet)
    host.guest_writes(vm, "precious")
    starts = host.guests[vm].starts
    ended = await fleet.carry_out(vm, O.SNAPSHOT, name="golden")
    assert ended.status is Status.SUCCEEDED, ended.message
    image = await image_named(fleet, "golden")
    assert (image.kind, image.project, image.source_instance) == ("disk", "default", vm)
    assert (host.guests[vm].power, host.guests[vm].starts) == (PowerState.RUNNING, starts)
    host.guest_writes(vm, "later")
    copy = await fleet.create("copy", image="golden")
    assert root(host, copy).written == ("precious",)


async def test_an_image_of_a_project_exists_for_it_and_for_admins_only(fleet: Embedded) -> None:
    vm = await made(fleet)
    await fleet.carry_out(vm, O.SNAPSHOT, name="golden")
    inventory = fleet.server.inventory
    mine = Caller(token_id="m", name="m", role=Role.MEMBER, project="default")
    theirs = Caller(token_id="t", name="t", role=Role.MEMBER, project="other")
    admin = Caller(token_id="a", name="a", role=Role.ADMIN, project="other")
    golden = await inventory.find_image(mine, "golden")
    assert [one.name for one in await inventory.images(theirs)] == ["nothing", "disk", "other"]
    for reference in ("golden", golden.id):
        with pytest.raises(NotFound):
            await inventory.find_image(theirs, reference)
        with pytest.raises(NotFound):
            await inventory.delete_image(theirs, reference)
    assert golden in await inventory.images(admin)
    assert await inventory.find_image(admin, golden.id) == golden
    with pytest.raises(Forbidden):
        await inventory.delete_image(mine, "disk")
    await inventory.delete_image(mine, "golden")
    assert image_files(fleet) == set()


async def test_the_name_of_a_snapshot_is_taken_from_the_moment_it_is_asked_for(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await made(fleet)
    other = await fleet.create("two", image="disk")
    host.faults.script(vm, Method.EXPORT_ROOT_DISK, Slow(300))
    first = admitted(await fleet.submit(vm, O.SNAPSHOT, name="golden"))
    with pytest.raises(NameTaken, match="is being created"):
        await fleet.submit(other, O.SNAPSHOT, name="golden")
    await fleet.ended(first)
    with pytest.raises(NameTaken, match="already"):
        await fleet.submit(other, O.SNAPSHOT, name="golden")
    with pytest.raises(NameTaken):
        await fleet.submit(other, O.SNAPSHOT, name="disk")


async def test_a_snapshot_that_finds_no_room_fails_with_the_cause_and_leaves_no_file(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await made(fleet)
    host.faults.script(vm, Method.EXPORT_ROOT_DISK, Refuses("no space left on device"))
    ended = await fleet.carry_out(vm, O.SNAPSHOT, name="golden")
    assert (ended.status, ended.message) == (Status.FAILED, "no space left on device")
    assert image_files(fleet) == set()
    assert (await now(fleet, vm)).vm_state is VmState.ACTIVE
    assert host.guests[vm].power is PowerState.RUNNING
    assert (await fleet.carry_out(vm, O.SNAPSHOT, name="golden")).status is Status.SUCCEEDED


async def test_an_export_that_is_no_disk_image_never_becomes_one(
    fleet: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What wrote it had a guest inside."""
    vm = await made(fleet)

    async def tricked(_permit: object, _id: str, _spec: object, target: Path, _report: object) -> None:
        await asyncio.to_thread(target.write_bytes, b"no disk at all" * 100)

    monkeypatch.setattr(fleet.server.hypervisor, "export_root_disk", tricked)
    assert (await fleet.carry_out(vm, O.SNAPSHOT, name="golden")).status is Status.FAILED
    assert image_files(fleet) == set()


async def test_a_snapshot_that_is_cancelled_leaves_no_file(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await made(fleet)
    host.faults.script(vm, Method.EXPORT_ROOT_DISK, Slow(5_000))
    request = admitted(await fleet.submit(vm, O.SNAPSHOT, name="golden"))
    await fleet.until(vm, task_state="image_snapshot_pending")
    await fleet.server.instances.cancel(fleet.caller, request.id)
    assert (await fleet.ended(request)).status is Status.CANCELLED
    assert image_files(fleet) == set()
    await fleet.carry_out(vm, O.SNAPSHOT, name="golden")


async def test_a_snapshot_is_finished_by_the_next_server(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await made(fleet)
    host.guest_writes(vm, "precious")
    host.faults.script(vm, Method.EXPORT_ROOT_DISK, Slow(5_000))
    request = admitted(await fleet.submit(vm, O.SNAPSHOT, name="golden"))
    await fleet.until(vm, task_state="image_snapshot_pending")
    await fleet.crash()
    await fleet.start()
    assert (await fleet.ended(request)).status is Status.SUCCEEDED
    assert image_files(fleet) == {f"{request.id}.qcow2"}


async def test_what_a_killed_server_left_of_a_snapshot_is_swept_at_the_next_start(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await made(fleet)
    ended = await fleet.carry_out(vm, O.STOP)
    folder = fleet.server.folder / "images"
    (folder / f"{ended.id}.export").write_bytes(b"half")
    (folder / "stranger.qcow2").write_bytes(b"of a younger database")
    await fleet.crash()
    await fleet.start()
    assert image_files(fleet) == {"stranger.qcow2"}


async def test_an_instance_that_boots_a_kernel_is_not_copied(fleet: Embedded) -> None:
    vm = await fleet.create("web")
    answer = await fleet.submit(vm, O.SNAPSHOT, name="golden")
    assert refused(answer) == "no_bootable_disk"
    assert isinstance(answer.disposition, Denied)
    assert answer.disposition.because is not None
    assert "boots a kernel" in answer.disposition.because
    assert refused(await fleet.submit(vm, O.BACKUP, backup_type="daily", rotation=1)) == "no_bootable_disk"


async def test_backups_rotate_by_type_and_those_in_use_stay(fleet: Embedded) -> None:
    vm = await made(fleet)
    await fleet.carry_out(vm, O.BACKUP, backup_type="weekly", rotation=1)
    for _ in range(3):
        assert (await fleet.carry_out(vm, O.BACKUP, backup_type="daily", rotation=2)).status is Status.SUCCEEDED
    kept = await backups(fleet, vm, "daily")
    assert len(kept) == 2
    assert len(await backups(fleet, vm, "weekly")) == 1
    assert kept[0].name.startswith("web-daily-")
    await fleet.create("user", image=kept[0].name)
    with pytest.raises(InUse):
        await fleet.server.inventory.delete_image(fleet.caller, kept[0].id)
    ended = await fleet.carry_out(vm, O.BACKUP, backup_type="daily", rotation=1)
    assert ended.message is not None
    assert "1 older daily backups are in use" in ended.message
    left = await backups(fleet, vm, "daily")
    assert kept[0] in left
    assert len(left) == 2
    assert len(image_files(fleet)) == 3


async def test_a_worker_that_may_not_act_any_more_removes_no_backup(fleet: Embedded) -> None:
    vm = await made(fleet)
    for _ in range(2):
        request = await fleet.carry_out(vm, O.BACKUP, backup_type="daily", rotation=2)
    kept = await backups(fleet, vm, "daily")
    request = msgspec.structs.replace(request, parameters={"backup_type": "daily", "rotation": 1})
    work = OperationContext(fleet.server.means, await now(fleet, vm), request)
    work.permit.end()
    with pytest.raises(Fenced):
        await HANDLERS[O.BACKUP].perform(work)
    assert await backups(fleet, vm, "daily") == kept
    assert len(image_files(fleet)) == 2


async def test_a_vm_is_shelved_offloaded_and_comes_back_with_what_was_on_its_disk(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await made(fleet)
    await fleet.make_volume("data")
    await fleet.carry_out(vm, O.ATTACH_VOLUME, volume="data")
    host.guest_writes(vm, "precious")
    assert (await fleet.carry_out(vm, O.SHELVE)).status is Status.SUCCEEDED
    shelved = await now(fleet, vm)
    assert (shelved.vm_state, host.guests[vm].power) == (VmState.SHELVED, PowerState.NONE)
    assert shelved.shelved_image is not None
    assert shelved.shelved_image not in await fleet.server.store.images.all()
    assert (await fleet.carry_out(vm, O.SHELVE_OFFLOAD)).status is Status.SUCCEEDED
    assert vm not in host.guests
    kept = await fleet.server.store.volumes.get("data")
    assert kept is not None
    assert kept.attached_to == vm
    await fleet.crash()
    await fleet.start()
    assert image_files(fleet) == {f"{shelved.shelved_image.id}.qcow2"}, "it is still needed"
    ended = await fleet.carry_out(vm, O.UNSHELVE)
    assert ended.status is Status.SUCCEEDED, ended.message
    back = await now(fleet, vm)
    assert (back.vm_state, back.shelved_image) == (VmState.ACTIVE, None)
    assert root(host, vm).written == ("precious",)
    assert set(host.guests[vm].disks) == {"root", "data"}
    assert image_files(fleet) == set()


async def test_a_shelved_vm_that_was_not_offloaded_comes_back_with_its_own_disk(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await made(fleet)
    host.guest_writes(vm, "precious")
    await fleet.carry_out(vm, O.SHELVE)
    await fleet.carry_out(vm, O.UNSHELVE)
    assert (await now(fleet, vm)).vm_state is VmState.ACTIVE
    assert root(host, vm).written == ("precious",)
    assert image_files(fleet) == set()


async def test_a_vm_that_was_stopped_or_paused_comes_back_so(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await made(fleet)
    for operation, state, power in (
        (O.PAUSE, VmState.PAUSED, PowerState.PAUSED),
        (O.STOP, VmState.STOPPED, PowerState.NONE),
    ):
        await fleet.carry_out(vm, operation)
        await fleet.carry_out(vm, O.SHELVE)
        await fleet.carry_out(vm, O.SHELVE_OFFLOAD)
        await fleet.carry_out(vm, O.UNSHELVE)
        assert ((await now(fleet, vm)).vm_state, host.guests[vm].power) == (state, power)


async def test_a_kernel_without_a_disk_is_shelved_too(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await fleet.create("web")
    for operation in (O.SHELVE, O.SHELVE_OFFLOAD, O.UNSHELVE):
        assert (await fleet.carry_out(vm, operation)).status is Status.SUCCEEDED
    assert host.guests[vm].power is PowerState.RUNNING


async def test_nothing_is_removed_while_the_image_is_not_there(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await made(fleet)
    host.guest_writes(vm, "precious")
    await fleet.carry_out(vm, O.SHELVE)
    (lost,) = image_files(fleet)
    (fleet.server.folder / "images" / lost).unlink()
    ended = await fleet.carry_out(vm, O.SHELVE_OFFLOAD)
    assert ended.status is Status.FAILED
    assert root(host, vm).written == ("precious",)
    await fleet.carry_out(vm, O.UNSHELVE)
    assert (await now(fleet, vm)).vm_state is VmState.ACTIVE


async def test_a_shelve_that_is_cancelled_has_the_guest_run_again(fleet: Embedded, host: SimulatedHost) -> None:
    vm = await made(fleet)
    host.faults.script(vm, Method.EXPORT_ROOT_DISK, Slow(5_000))
    request = admitted(await fleet.submit(vm, O.SHELVE))
    await fleet.until(vm, task_state="shelving_image_pending_upload")
    assert host.guests[vm].power is PowerState.NONE
    await fleet.server.instances.cancel(fleet.caller, request.id)
    assert (await fleet.ended(request)).status is Status.CANCELLED
    assert (await now(fleet, vm)).vm_state is VmState.ACTIVE
    assert host.guests[vm].power is PowerState.RUNNING
    assert image_files(fleet) == set()
    paused = await fleet.carry_out(vm, O.PAUSE)  # what the guest was told to do is no news after it was brought back
    assert paused.status is Status.SUCCEEDED, paused.message


@pytest.mark.parametrize(
    ("operation", "method", "phase"),
    [
        (O.SHELVE, Method.POWER_OFF, "shelving"),
        (O.SHELVE, Method.EXPORT_ROOT_DISK, "shelving_image_pending_upload"),
        (O.SHELVE_OFFLOAD, Method.UNDEFINE, "shelving_offloading"),
        (O.UNSHELVE, Method.ROOT_DISK_FROM, "unshelving"),
        (O.UNSHELVE, Method.POWER_ON, "unshelving"),
    ],
)
async def test_shelving_is_finished_by_the_next_server_wherever_the_last_one_died(
    fleet: Embedded, host: SimulatedHost, operation: Operation, method: Method, phase: str
) -> None:
    vm = await made(fleet)
    host.guest_writes(vm, "precious")
    for step in (O.SHELVE, O.SHELVE_OFFLOAD, O.UNSHELVE):
        if step is not operation:
            await fleet.carry_out(vm, step)
            continue
        host.faults.script(vm, method, Slow(5_000))
        request = admitted(await fleet.submit(vm, step))
        await fleet.until(vm, task_state=phase)
        await fleet.crash()
        await fleet.start()
        assert (await fleet.ended(request)).status is Status.SUCCEEDED
    assert root(host, vm).written == ("precious",)
    assert (await now(fleet, vm)).vm_state is VmState.ACTIVE
    assert image_files(fleet) == set()


async def test_an_unshelve_that_is_stopped_after_its_disk_was_made_goes_on_with_that_disk(
    fleet: Embedded, host: SimulatedHost
) -> None:
    vm = await made(fleet)
    host.guest_writes(vm, "precious")
    await fleet.carry_out(vm, O.SHELVE)
    await fleet.carry_out(vm, O.SHELVE_OFFLOAD)
    host.faults.script(vm, Method.POWER_ON, Refuses("no memory"))
    assert (await fleet.carry_out(vm, O.UNSHELVE)).status is Status.FAILED
    assert (await now(fleet, vm)).vm_state is VmState.SHELVED_OFFLOADED
    assert (await fleet.carry_out(vm, O.UNSHELVE)).status is Status.SUCCEEDED
    assert root(host, vm).written == ("precious",)


async def test_deleting_a_shelved_vm_removes_its_image(fleet: Embedded) -> None:
    vm = await made(fleet)
    await fleet.carry_out(vm, O.SHELVE)
    assert len(image_files(fleet)) == 1
    assert (await fleet.carry_out(vm, O.DELETE)).status is Status.SUCCEEDED
    assert image_files(fleet) == set()


async def test_what_was_suspended_is_stopped_once_its_memory_was_given_up(fleet: Embedded) -> None:
    vm = await made(fleet)
    store = fleet.server.store
    await fleet.carry_out(vm, O.SHELVE)

    def as_if_suspended(instance, _now_ms):  # type: ignore[no-untyped-def]
        from interlock.core.records import Change

        return Change(instance=msgspec.structs.replace(instance, prior_vm_state=VmState.SUSPENDED), answer=None)

    await store.change(vm, as_if_suspended)
    await fleet.carry_out(vm, O.SHELVE_OFFLOAD)
    await fleet.carry_out(vm, O.UNSHELVE)
    assert (await now(fleet, vm)).vm_state is VmState.STOPPED


@pytest.mark.parametrize(
    ("operation", "parameters", "state"),
    [
        (O.SNAPSHOT, {"name": "golden"}, VmState.STOPPED),
        (O.BACKUP, {"backup_type": "daily", "rotation": 1}, VmState.STOPPED),
        (O.SHELVE, {}, VmState.SHELVED),
        (O.RESIZE, {"memory_mib": 256}, VmState.RESIZED),
    ],
)
async def test_what_was_stopped_before_its_disk_was_made_has_one_to_copy(
    fleet: Embedded, operation: Operation, parameters: dict[str, object], state: VmState
) -> None:
    await put_images(fleet)
    vm = await fleet.create("web", image="disk", start=False)
    assert (await now(fleet, vm)).vm_state is VmState.STOPPED
    ended = await fleet.carry_out(vm, operation, **parameters)
    assert ended.status is Status.SUCCEEDED, ended.message
    assert (await now(fleet, vm)).vm_state is state
