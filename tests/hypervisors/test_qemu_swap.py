"""Another disk in the place of one that a running guest uses: on real QEMU, interrupted everywhere."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conformance.disk_patterns import (
    MIB,
    SLOW_BYTES_PER_S,
    Progress,
    full_speed,
    has_open,
    has_pattern,
    is_whole,
    write_as_guest,
    write_pattern,
)
from conformance.hypervisor import GivenPermit
from conformance.qemu_workbench import QemuWorkbench, opened
from interlock.core.errors import GuestNotFound, HypervisorError, NotResponding, OperationRejected
from interlock.core.records import Disk
from interlock.core.states import PowerState
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.guest import Guest
from interlock.ports import Permit
from small_file_systems import small_file_system

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]

PERMIT = GivenPermit()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[QemuWorkbench]:
    host = QemuWorkbench(tmp_path)
    host.settings = msgspec.structs.replace(host.settings, copy_look_interval_ms=10)
    yield host
    host.end_everything()


def slow(host: QemuWorkbench) -> None:
    host.settings = msgspec.structs.replace(host.settings, copy_bytes_per_s=SLOW_BYTES_PER_S)


@pytest.fixture
async def hypervisor(host: QemuWorkbench) -> AsyncIterator[QemuHypervisor]:
    hypervisor = await opened(host)
    yield hypervisor
    for instance_id in await hypervisor.known():
        await hypervisor.undefine(PERMIT, instance_id)
    await hypervisor.close()


def volume(
    host: QemuWorkbench, name: str, mib: int = 32, pattern: int | None = None, folder: Path | None = None
) -> Disk:
    path = (folder or host.folder) / f"{name}.qcow2"
    subprocess.check_call(["qemu-img", "create", "-q", "-f", "qcow2", str(path), f"{mib}M"])
    if pattern is not None:
        write_pattern(path, pattern, mib)
    return Disk(id=name, path=str(path))


def has(disk: Disk, pattern: int, mib: int = 32) -> bool:
    """Whether the first so many MiB of the disk, which nobody uses, hold the pattern; its file has to be whole."""
    return is_whole(disk.path) and has_pattern(disk.path, pattern, mib)


def guest_of(hypervisor: QemuHypervisor) -> Guest:
    guest = hypervisor.guest("one")
    assert guest is not None
    return guest


async def start(hypervisor: QemuHypervisor, host: QemuWorkbench, *disks: Disk) -> None:
    spec = msgspec.structs.replace(host.spec(), disks=disks)
    await hypervisor.define(PERMIT, "one", spec)
    await hypervisor.power_on(PERMIT, "one", spec)
    await host.until_up("one")


async def nodes(guest: Guest) -> set[str]:
    return {node["node-name"] for node in await guest.query("query-named-block-nodes", flat=True)}


async def test_the_guest_goes_on_with_the_new_disk_and_what_it_wrote(
    hypervisor: QemuHypervisor, host: QemuWorkbench
) -> None:
    old, new = volume(host, "old", pattern=1), volume(host, "new", pattern=9)
    await start(hypervisor, host, old)
    process_id, guest, seen = host.process_id("one"), guest_of(hypervisor), Progress()
    await hypervisor.swap_disk(PERMIT, "one", old, new, seen)
    assert (await hypervisor.inspect("one")).disks == ("new",)
    assert host.process_id("one") == process_id
    assert seen.told[-1] == (32 * MIB, 32 * MIB)
    await write_as_guest(PERMIT, guest, "new", "write -P 5 0 1M")
    spec = host.instance_folder("one").spec()
    assert spec is not None
    assert spec.disks == (new,)
    await hypervisor.swap_disk(PERMIT, "one", old, new, Progress())
    assert not has_open(process_id, old.path)
    assert has(old, 1), "nobody uses the old one any more"
    await hypervisor.power_off(PERMIT, "one")
    assert has(new, 5, mib=1)
    assert not has(new, 9)


async def test_what_the_guest_writes_meanwhile_is_on_the_new_disk(
    hypervisor: QemuHypervisor, host: QemuWorkbench
) -> None:
    old, new = volume(host, "old", pattern=1), volume(host, "new")
    slow(host)
    await hypervisor.close()
    hypervisor = await opened(host)
    await start(hypervisor, host, old)
    seen = Progress()
    swap = asyncio.create_task(hypervisor.swap_disk(PERMIT, "one", old, new, seen))
    await seen.until_under_way()
    await write_as_guest(PERMIT, guest_of(hypervisor), "old", "write -P 7 0 8M")
    await full_speed(PERMIT, guest_of(hypervisor))
    await swap
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()
    assert has(new, 7, mib=8)
    assert not has(new, 7)


async def test_disks_can_be_attached_and_detached_after_a_swap(hypervisor: QemuHypervisor, host: QemuWorkbench) -> None:
    old, new, third = volume(host, "old", pattern=1), volume(host, "new"), volume(host, "third")
    await start(hypervisor, host, old)
    await hypervisor.swap_disk(PERMIT, "one", old, new, Progress())
    for _ in range(2):
        await hypervisor.attach_disk(PERMIT, "one", old)
    assert (await hypervisor.inspect("one")).disks == ("new", "old")
    await hypervisor.swap_disk(PERMIT, "one", new, third, Progress())
    assert (await hypervisor.inspect("one")).disks == ("old", "third")
    await host.abandon(hypervisor)
    hypervisor = await opened(host)
    assert (await hypervisor.inspect("one")).disks == ("old", "third")
    for disk_id in ("third", "old"):
        await hypervisor.detach_disk(PERMIT, "one", disk_id)
    assert (await hypervisor.inspect("one")).disks == ()
    await hypervisor.attach_disk(PERMIT, "one", new)
    assert (await hypervisor.inspect("one")).disks == ("new",)
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()
    assert has(third, 1)


async def test_a_larger_disk_is_seen_whole_and_a_smaller_one_refused(
    hypervisor: QemuHypervisor, host: QemuWorkbench
) -> None:
    old, larger, smaller = volume(host, "old", pattern=1), volume(host, "larger", 48), volume(host, "smaller", 31)
    await start(hypervisor, host, old)
    guest = guest_of(hypervisor)
    before = await nodes(guest)
    with pytest.raises(OperationRejected, match="has 32505856 bytes"):
        await hypervisor.swap_disk(PERMIT, "one", old, smaller, Progress())
    assert (await hypervisor.inspect("one")).disks == ("old",)
    assert await nodes(guest) >= before
    assert has(smaller, 0, 31), "it was let go of"
    await hypervisor.swap_disk(PERMIT, "one", old, larger, Progress())
    await write_as_guest(PERMIT, guest, "larger", "write -P 3 40M 1M")
    await hypervisor.undefine(PERMIT, "one")
    assert has(larger, 1)


async def test_what_cannot_be_swapped_is_refused(hypervisor: QemuHypervisor, host: QemuWorkbench) -> None:
    old, new = volume(host, "old"), volume(host, "new")
    with pytest.raises(GuestNotFound):
        await hypervisor.swap_disk(PERMIT, "one", old, new, Progress())
    await start(hypervisor, host)
    with pytest.raises(OperationRejected, match="has no disk old"):
        await hypervisor.swap_disk(PERMIT, "one", old, new, Progress())
    await hypervisor.attach_disk(PERMIT, "one", old)
    with pytest.raises(OperationRejected, match="cannot be opened"):
        await hypervisor.swap_disk(PERMIT, "one", old, Disk(id="absent", path="/absent"), Progress())
    await hypervisor.attach_disk(PERMIT, "one", new)
    with pytest.raises(OperationRejected, match="beside"):
        await hypervisor.swap_disk(PERMIT, "one", old, new, Progress())
    assert (await hypervisor.inspect("one")).disks == ("new", "old")


async def test_a_cancelled_worker_leaves_the_guest_with_the_old_disk(
    hypervisor: QemuHypervisor, host: QemuWorkbench
) -> None:
    old, new = volume(host, "old", pattern=1), volume(host, "new")
    slow(host)
    await hypervisor.close()
    hypervisor = await opened(host)
    await start(hypervisor, host, old)
    guest, seen = guest_of(hypervisor), Progress()
    swap = asyncio.create_task(hypervisor.swap_disk(PERMIT, "one", old, new, seen))
    await seen.until_under_way()
    swap.cancel()
    with pytest.raises(asyncio.CancelledError):
        await swap
    assert await guest.query("query-jobs") == []
    assert (await hypervisor.inspect("one")).disks == ("old",)
    assert is_whole(new.path)
    await write_as_guest(PERMIT, guest, "old", "write -P 2 0 1M")
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()
    assert has(old, 2, mib=1)


@pytest.mark.parametrize("ignored", ["job-cancel", "blockdev-del"])
async def test_a_swap_that_stalls_and_does_not_end_is_not_refused(
    host: QemuWorkbench, monkeypatch: pytest.MonkeyPatch, ignored: str
) -> None:
    """A refusal would have the new disk taken for one that nobody uses."""
    old, new = volume(host, "old", pattern=1), volume(host, "new")
    host.settings = msgspec.structs.replace(
        host.settings, copy_bytes_per_s=1, copy_silence_timeout_ms=100, detach_timeout_ms=100
    )
    hypervisor = await opened(host)
    await start(hypervisor, host, old)
    guest = guest_of(hypervisor)
    execute = guest.execute

    async def refuse(
        permit: Permit, command: str, arguments: dict[str, Any] | None = None, *, attach: int | None = None
    ) -> Any:
        if command == ignored:
            raise OperationRejected("It is busy.")
        return await execute(permit, command, arguments, attach=attach)

    with monkeypatch.context() as patched:
        patched.setattr(guest, "execute", refuse)
        with pytest.raises(NotResponding, match="does not"):
            await hypervisor.swap_disk(PERMIT, "one", old, new, Progress())
        assert has_open(host.process_id("one"), new.path)
    with pytest.raises(OperationRejected, match="made no progress"):
        await hypervisor.swap_disk(PERMIT, "one", old, new, Progress())
    assert not has_open(host.process_id("one"), new.path)
    assert (await hypervisor.inspect("one")).disks == ("old",)
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()


async def test_a_full_disk_leaves_the_guest_with_the_old_disk(
    hypervisor: QemuHypervisor, host: QemuWorkbench, small: Path
) -> None:
    old, new = volume(host, "old", pattern=1), volume(host, "new", folder=small)
    await start(hypervisor, host, old)
    with pytest.raises(OperationRejected, match="No space left on device") as refusal:
        await hypervisor.swap_disk(PERMIT, "one", old, new, Progress())
    assert "Make room" in str(refusal.value.remedy)
    seen = await hypervisor.inspect("one")
    assert (seen.disks, seen.power_state) == (("old",), PowerState.RUNNING)
    await write_as_guest(PERMIT, guest_of(hypervisor), "old", "write -P 2 0 1M")
    await hypervisor.undefine(PERMIT, "one")
    assert has(old, 2, mib=1)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "small", "4m") as folder:
        yield folder


@pytest.mark.parametrize("new_mib", [32, 48])
async def test_a_swap_goes_on_when_its_server_is_gone_and_is_taken_up(
    hypervisor: QemuHypervisor, host: QemuWorkbench, new_mib: int
) -> None:
    old, new = volume(host, "old", pattern=1), volume(host, "new", new_mib)
    slow(host)
    await hypervisor.close()
    hypervisor = await opened(host)
    await start(hypervisor, host, old)
    permit, seen = GivenPermit(), Progress()
    swap = asyncio.create_task(hypervisor.swap_disk(permit, "one", old, new, seen))
    await seen.until_under_way()
    permit.revoke()  # from here on it can do no more than a killed server could
    swap.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await swap
    await host.abandon(hypervisor)
    hypervisor = await opened(host)
    guest = guest_of(hypervisor)
    (job,) = await guest.query("query-jobs")
    assert job["current-progress"] > 0, "the copy goes on by itself"
    assert (await hypervisor.inspect("one")).disks == ("old",)
    await full_speed(PERMIT, guest)
    again = Progress()
    await hypervisor.swap_disk(PERMIT, "one", old, new, again)
    assert (await hypervisor.inspect("one")).disks == ("new",)
    assert await guest.query("query-jobs") == []
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()
    assert has(new, 1)


async def test_a_disk_that_is_being_swapped_can_be_swapped_for_another_or_detached(
    hypervisor: QemuHypervisor, host: QemuWorkbench
) -> None:
    old, first, second = volume(host, "old", pattern=1), volume(host, "first"), volume(host, "second")
    slow(host)
    await hypervisor.close()
    hypervisor = await opened(host)
    await start(hypervisor, host, old)
    guest = guest_of(hypervisor)
    for new in (first, second):
        permit, seen = GivenPermit(), Progress()
        swap = asyncio.create_task(hypervisor.swap_disk(permit, "one", old, new, seen))
        await seen.until_under_way()
        permit.revoke()
        swap.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await swap
    assert len(await guest.query("query-jobs")) == 1
    await hypervisor.detach_disk(PERMIT, "one", "old")
    assert await guest.query("query-jobs") == []
    assert (await hypervisor.inspect("one")).disks == ()
    assert has(old, 1), "it is free"
    for disk in (first, second):
        assert is_whole(disk.path)
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()


async def test_qemu_killed_in_mid_swap_leaves_the_old_disk_whole(
    hypervisor: QemuHypervisor, host: QemuWorkbench
) -> None:
    old, new = volume(host, "old", pattern=1), volume(host, "new")
    slow(host)
    await hypervisor.close()
    hypervisor = await opened(host)
    await start(hypervisor, host, old)
    seen = Progress()
    swap = asyncio.create_task(hypervisor.swap_disk(PERMIT, "one", old, new, seen))
    await seen.until_under_way()
    await host.kill("one")
    with pytest.raises(HypervisorError):
        await swap
    assert has(old, 1)
    assert is_whole(new.path)
    spec = host.instance_folder("one").spec()
    assert spec is not None
    assert spec.disks == (old,)
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()
