"""Guests are found by their processes, whatever becomes of their folder, and never run on beside a new one."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.hypervisor import GivenPermit
from conformance.qemu_workbench import QemuWorkbench, opened
from interlock.core.errors import Unavailable
from interlock.core.states import PowerState
from interlock.hypervisors.host_identity import FILE, host_id
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder, Phase, ProcessRecord
from interlock.hypervisors.qemu.network import passt
from interlock.hypervisors.qemu.process.process_scan import FoundGuest, GuestFolder, find_guests
from interlock.hypervisors.qemu.process.qemu_process import has_ended, is_stopped, spawn, started_ticks
from interlock.hypervisors.remote.lease import ENDLESS_NS, Lease, now_ns
from interlock.hypervisors.remote.watchdog import LEASE, LOCK, Watchdog
from waiting import PATIENCE_S, eventually, until

PERMIT = GivenPermit()
pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[QemuWorkbench]:
    """A host of which every guest is killed at the end, wherever its files have gone."""
    yield QemuWorkbench(tmp_path)
    for guest in started_below(tmp_path):
        guest.kill()


def started_below(folder: Path) -> list[FoundGuest]:
    return [guest for guest in find_guests() if Path(guest.folder.path).is_relative_to(folder.resolve())]


def lives(bench: QemuWorkbench) -> list[str]:
    return sorted(guest.instance_id for guest in started_below(bench.folder) if guest.lives())


async def abandoned(bench: QemuWorkbench, instance_id: str = "one") -> QemuWorkbench:
    """Start a guest, and let go of it as a server does that is killed."""
    hypervisor = await opened(bench)
    await hypervisor.define(PERMIT, instance_id, bench.spec())
    await hypervisor.power_on(PERMIT, instance_id, bench.spec())
    await hypervisor.close()
    return bench


async def test_a_guest_is_found_by_its_process_after_its_folder_was_moved_and_deleted(bench: QemuWorkbench) -> None:
    await abandoned(bench)
    home = GuestFolder.of(bench.settings.folder, host_id(bench.settings.folder))
    (guest,) = started_below(bench.folder)
    assert (guest.instance_id, guest.folder) == ("one", home)
    assert guest.place() == bench.settings.folder / "vms" / "one" / "inside"
    moved = bench.settings.folder.rename(bench.folder / "moved")
    assert next(iter(started_below(bench.folder))).place() == moved / "vms" / "one" / "inside"
    shutil.rmtree(moved)
    (found,) = started_below(bench.folder)
    assert found == guest
    assert found.place() is None
    assert found.kill(10_000)
    assert started_below(bench.folder) == []


async def test_guests_whose_folder_was_emptied_are_ended_by_who_takes_charge_of_it(bench: QemuWorkbench) -> None:
    await abandoned(bench)
    before = host_id(bench.settings.folder)
    shutil.rmtree(bench.settings.folder)
    hypervisor = await opened(bench)
    assert lives(bench) == []
    assert host_id(bench.settings.folder) != before
    assert (await hypervisor.inspect("one")).power_state is PowerState.NONE
    await hypervisor.close()


async def test_guests_alone_that_were_emptied_are_ended_too(bench: QemuWorkbench) -> None:
    await abandoned(bench)
    before = host_id(bench.settings.folder)
    shutil.rmtree(bench.settings.folder / "vms")
    hypervisor = await opened(bench)
    assert lives(bench) == []
    assert host_id(bench.settings.folder) == before
    await hypervisor.close()


async def test_a_new_folder_is_not_served_beside_guests_of_the_one_that_was_moved_away(bench: QemuWorkbench) -> None:
    await abandoned(bench)
    moved = bench.settings.folder.rename(bench.folder / "moved")
    with pytest.raises(Unavailable) as refused:
        await opened(bench)
    (guest,) = started_below(bench.folder)
    assert guest.lives()
    assert f"one (process {guest.process_id}, in {moved}/vms/one/inside)" in refused.value.message
    shutil.rmtree(bench.settings.folder)
    moved.rename(bench.settings.folder)
    hypervisor = await opened(bench)
    assert (await hypervisor.inspect("one")).power_state is PowerState.RUNNING
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()


async def test_guests_of_a_moved_folder_that_is_served_are_left_alone(bench: QemuWorkbench) -> None:
    await abandoned(bench)
    settings = bench.settings
    settings.folder.rename(bench.folder / "moved")
    (bench.folder / "link").symlink_to(bench.folder / "moved")
    elsewhere = QemuHypervisor(type(settings)(folder=bench.folder / "moved", display=False))
    await elsewhere.open(lambda _: None)
    hypervisor = await opened(bench)
    assert lives(bench) == ["one"]
    assert (await elsewhere.inspect("one")).power_state is PowerState.RUNNING
    await hypervisor.close()
    await elsewhere.undefine(PERMIT, "one")
    await elsewhere.close()


async def test_a_copy_of_a_folder_is_not_served_beside_guests_of_the_first(bench: QemuWorkbench) -> None:
    await abandoned(bench)
    copy = bench.folder / "copy"
    copy.mkdir()
    shutil.copy(bench.settings.folder / FILE, copy / FILE)
    second = QemuHypervisor(type(bench.settings)(folder=copy, display=False))
    with pytest.raises(Unavailable, match="one"):
        await second.open(lambda _: None)
    assert lives(bench) == ["one"]


async def test_guests_of_other_folders_are_none_of_its_business(bench: QemuWorkbench, tmp_path: Path) -> None:
    await abandoned(bench)
    (tmp_path / "other").mkdir()
    other = QemuWorkbench(tmp_path / "other")
    hypervisor = await opened(other)
    await hypervisor.close()
    assert lives(bench) == ["one"]


@pytest.mark.parametrize("fate", ["left", "moved", "deleted", "replaced"])
async def test_the_watchdog_ends_the_guests_of_its_folder_wherever_that_is_and_no_others(
    bench: QemuWorkbench, tmp_path: Path, fate: str
) -> None:
    folder = bench.folder / "agent"
    folder.mkdir()
    await abandoned(bench)
    serving = InstanceFolder(bench.settings.folder / "vms" / "one").network_processes()
    home = GuestFolder.of(bench.settings.folder, host_id(bench.settings.folder))
    (tmp_path / "other").mkdir()
    other = await abandoned(QemuWorkbench(tmp_path / "other"), "two")
    lease = Lease(folder / LEASE)
    lease.open()
    lease.extend(ENDLESS_NS)
    watchdog = Watchdog(folder, bench.settings.folder)
    await watchdog.ensure()
    match fate:
        case "moved":
            bench.settings.folder.rename(bench.folder / "moved")
        case "deleted":
            shutil.rmtree(bench.settings.folder)
        case "replaced":
            shutil.rmtree(bench.settings.folder)
            fresh = await opened(bench)
            await fresh.define(PERMIT, "three", bench.spec())
            await fresh.power_on(PERMIT, "three", bench.spec())
            await fresh.close()
        case _:
            pass
    spared = ["three", "two"] if fate == "replaced" else ["two"]
    if fate != "replaced":
        assert lives(bench) == ["one", "two"]
    assert len(serving) == passt.is_installed()
    lease.extend(now_ns())
    try:
        for _ in range(2):  # what ends the second has looked at everything that was there before the first had ended
            looking = bearing_marks_of(home)
            assert await asyncio.to_thread(looking.wait, PATIENCE_S) == -signal.SIGKILL
    finally:
        os.kill(int((folder / LOCK).read_text()), signal.SIGKILL)
    assert lives(bench) == spared
    assert lives(other) == ["two"]
    await eventually(lambda: all(has_ended(one.process_id) for one in serving))


async def test_the_watchdog_starts_before_its_host_has_a_folder_of_guests(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, tmp_path / "guests")
    await watchdog.ensure()
    try:
        assert watchdog.alive
    finally:
        watchdog.close()
        os.kill(int((tmp_path / LOCK).read_text()), signal.SIGKILL)


async def test_a_guest_that_leaves_its_working_folder_keeps_no_server_from_starting(bench: QemuWorkbench) -> None:
    hypervisor = await opened(bench)
    await hypervisor.define(PERMIT, "one", bench.spec())
    home = GuestFolder.of(bench.settings.folder, host_id(bench.settings.folder))
    folder = bench.instance_folder("one")
    lock = folder.lock()
    assert lock is not None
    errors = os.open(os.devnull, os.O_WRONLY)
    process_id = spawn(["env", *home.marks("one"), "sh", "-c", "kill -STOP $$", "-uuid"], errors, [lock])
    for descriptor in (errors, lock):
        os.close(descriptor)
    until(lambda: is_stopped(process_id))
    ticks = started_ticks(process_id)
    assert ticks is not None
    folder.make_event_pipes()
    folder.write_process_record(ProcessRecord(phase=Phase.RUNNING, process_id=process_id, started_ticks=ticks))
    await hypervisor.close()
    hypervisor = await opened(bench)
    assert lives(bench) == ["one"]
    guest = hypervisor.guest("one")
    assert guest is not None
    assert guest.process.process_id == process_id
    await hypervisor.undefine(PERMIT, "one")
    assert lives(bench) == []
    await hypervisor.close()


def bearing_marks_of(home: GuestFolder) -> subprocess.Popen[bytes]:
    """A process that looks like a guest of the folder."""
    command = ["env", *home.marks("like-one"), "sh", "-c", "sleep 100; exit", "-uuid"]
    return subprocess.Popen(command)
