"""A guest's memory on real QEMU: it goes on and does not reboot, whatever fails and whoever is killed half-way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import small_guests
from benchmarks.nano_guest import GREETING
from conformance.hypervisor import GivenPermit, Told
from conformance.qemu_workbench import QemuWorkbench, opened
from interlock.core.errors import GuestNotFound, HypervisorError, NotResponding, OperationRejected
from interlock.core.records import Forward, GuestEvent, Spec
from interlock.core.states import PowerState
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.files.instance_folder import Phase, Saving
from interlock.hypervisors.qemu.memory.saved_memory import SavedMemory
from processes.preloaded import exit_code
from small_file_systems import small_file_system
from tiers import tier
from waiting import PATIENCE_S

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]

PERMIT = GivenPermit()
ASK_AGAIN_S = 3.0
TICKS = 0x180000
"""Where the nano guest counts, in its memory."""


def nobody_reads(done: int, total: int | None = None) -> None:
    """A report to nobody."""
    del done, total


@pytest.fixture
def host(tmp_path: Path) -> Iterator[QemuWorkbench]:
    host = QemuWorkbench(tmp_path)
    host.settings = msgspec.structs.replace(host.settings, display=True)
    yield host
    host.end_everything()


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
async def hypervisor(host: QemuWorkbench, told: Told) -> AsyncIterator[QemuHypervisor]:
    hypervisor = await opened(host, told)
    yield hypervisor
    for instance_id in await hypervisor.known():
        await hypervisor.undefine(PERMIT, instance_id)
    await hypervisor.close()


async def started(hypervisor: QemuHypervisor, host: QemuWorkbench, spec: Spec | None = None) -> None:
    await hypervisor.define(PERMIT, "one", spec or host.spec())
    await hypervisor.power_on(PERMIT, "one", spec or host.spec())
    await host.until_up("one")


def runs(process_id: int) -> bool:
    return Path(f"/proc/{process_id}/exe").exists()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def ticks(hypervisor: QemuHypervisor) -> int:
    """How often the guest's timer has ticked since it booted."""
    guest = hypervisor.guest("one")
    assert guest is not None
    answer = await guest.query("human-monitor-command", **{"command-line": f"xp /1wx {TICKS:#x}"})
    return int(answer.split(":")[1], 16)


async def until_ticks(hypervisor: QemuHypervisor, more_than: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await ticks(hypervisor) <= more_than:
            pass


def files_of(host: QemuWorkbench) -> SavedMemory:
    return SavedMemory(host.instance_folder("one"))


def memory_files(host: QemuWorkbench) -> set[str]:
    return {path.name for path in host.instance_folder("one").path.glob("memory.*")}


def boots(host: QemuWorkbench) -> int:
    return host.instance_folder("one").console.read_text().count(GREETING)


# ------------------------------------------------------------------------------------------------------ it goes on


async def test_a_guest_goes_on_counting_and_does_not_boot_again(
    hypervisor: QemuHypervisor, host: QemuWorkbench, told: Told
) -> None:
    await started(hypervisor, host)
    await until_ticks(hypervisor, 20)
    await hypervisor.pause(PERMIT, "one")
    before = await ticks(hypervisor)
    process_id = host.process_id("one")
    await hypervisor.save_memory(PERMIT, "one", nobody_reads)
    assert not runs(process_id), "its process must have ended, and its memory be free"
    assert memory_files(host) == {"memory.saved", "memory.json"}
    assert files_of(host).saved.stat().st_mode & 0o777 == 0o600
    await hypervisor.restore_memory(PERMIT, "one", host.spec(), nobody_reads)
    assert memory_files(host) == set()
    assert before <= await ticks(hypervisor) < before + 500
    await until_ticks(hypervisor, before + 10)
    await host.until_up("one")
    assert boots(host) == 1
    assert told.kinds() == []


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt is not on this system")
async def test_a_linux_goes_on_in_its_own_time(hypervisor: QemuHypervisor, host: QemuWorkbench) -> None:
    """Same boot id, a counter and an uptime that go on, its disk and its network; one boot line on the console."""
    port = free_port()
    forwards = (Forward(host_port=port, guest_port=80),)
    spec = msgspec.structs.replace(small_guests.small_spec(), disks=(host.disk("v1"),), forwards=forwards)
    await hypervisor.define(PERMIT, "one", spec)
    await hypervisor.power_on(PERMIT, "one", spec)
    before = await status(port)
    for _ in range(3):
        await hypervisor.save_memory(PERMIT, "one", nobody_reads)
        await hypervisor.restore_memory(PERMIT, "one", spec, nobody_reads)
    after = await status(port)
    assert after["boot_id"] == before["boot_id"]
    assert before["uptime_s"] <= after["uptime_s"] < before["uptime_s"] + 60
    async with asyncio.timeout(PATIENCE_S):
        while (await status(port))["counter"] <= before["counter"]:
            pass
    assert host.instance_folder("one").console.read_text().count("interlock-guest: up") == 1


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


async def status(port: int) -> dict[str, Any]:
    """What the small guest says of itself, as soon as it does."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(TimeoutError):
                # What is asked before it listens may never be answered.
                async with asyncio.timeout(ASK_AGAIN_S):
                    return await ask_status(port)


async def ask_status(port: int) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"GET /cgi-bin/status HTTP/1.0\r\n\r\n")
        found: dict[str, Any] = json.loads((await reader.read()).decode().partition("\r\n\r\n")[2] or "{}")
    finally:
        writer.close()
    if not found:
        raise TimeoutError
    return found


# ----------------------------------------------------------------------------------------- what is not restored


async def test_memory_is_not_put_beside_other_disks(hypervisor: QemuHypervisor, host: QemuWorkbench) -> None:
    await started(hypervisor, host)
    await hypervisor.save_memory(PERMIT, "one", nobody_reads)
    other = msgspec.structs.replace(host.spec(), disks=(host.disk("v1"),), vcpus=2)
    with pytest.raises(OperationRejected, match="vcpus, disks changed"):
        await hypervisor.restore_memory(PERMIT, "one", other, nobody_reads)
    assert (await hypervisor.inspect("one")).memory_saved
    await hypervisor.restore_memory(PERMIT, "one", host.spec(), nobody_reads)
    assert boots(host) == 1


async def test_memory_that_cannot_be_read_is_still_saved(
    hypervisor: QemuHypervisor, host: QemuWorkbench, told: Told
) -> None:
    await started(hypervisor, host)
    await hypervisor.save_memory(PERMIT, "one", nobody_reads)
    saved = files_of(host).saved
    whole = saved.read_bytes()
    for damaged in (b"nothing of the kind", whole[: len(whole) // 2], whole[:100] + b"\xff" * 64 + whole[164:]):
        saved.write_bytes(damaged)
        with pytest.raises(OperationRejected, match="could not be read"):
            await hypervisor.restore_memory(PERMIT, "one", host.spec(), nobody_reads)
        seen = await hypervisor.inspect("one")
        assert (seen.power_state, seen.memory_saved) == (PowerState.NONE, True)
    saved.write_bytes(whole)
    await hypervisor.restore_memory(PERMIT, "one", host.spec(), nobody_reads)
    assert boots(host) == 1
    assert told.kinds() == []


async def test_a_machine_is_restored_as_it_was_made_whatever_is_set_since(host: QemuWorkbench) -> None:
    hypervisor = await opened(host, Told())
    await started(hypervisor, host)
    await hypervisor.save_memory(PERMIT, "one", nobody_reads)
    await hypervisor.close()
    host.settings = msgspec.structs.replace(host.settings, hotplug_ports=3, display=False, cpu_model="qemu64")
    hypervisor = await opened(host, Told())
    try:
        await hypervisor.restore_memory(PERMIT, "one", host.spec(), nobody_reads)
        await host.until_up("one")
        assert boots(host) == 1
    finally:
        await hypervisor.undefine(PERMIT, "one")
        await hypervisor.close()


async def test_a_guest_starts_with_all_it_has_and_its_memory_belongs_to_a_machine_with_as_many_places(
    host: QemuWorkbench,
) -> None:
    """Also where `hotplug_ports` has come to be fewer: only what is plugged in anew is refused."""
    host.settings = msgspec.structs.replace(host.settings, hotplug_ports=2)
    hypervisor = await opened(host, Told())
    spec = msgspec.structs.replace(host.spec(), disks=tuple(host.disk(f"v{number}") for number in range(4)))
    try:
        await started(hypervisor, host, spec)
        assert len((await hypervisor.inspect("one")).disks) == 4
        with pytest.raises(OperationRejected, match="no free port"):
            await hypervisor.attach_disk(PERMIT, "one", host.disk("v4"))
        await hypervisor.detach_disk(PERMIT, "one", "v3")
        fewer = msgspec.structs.replace(spec, disks=spec.disks[:3])
        await hypervisor.save_memory(PERMIT, "one", nobody_reads)
        await hypervisor.restore_memory(PERMIT, "one", fewer, nobody_reads)
        assert len((await hypervisor.inspect("one")).disks) == 3
        assert boots(host) == 1
    finally:
        await hypervisor.undefine(PERMIT, "one")
        await hypervisor.close()


# --------------------------------------------------------------------------------------------------- bad luck


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for nothing as large as a guest's memory."""
    with small_file_system(tmp_path / "small", "640k") as place:
        yield place


@pytest.mark.parametrize("state", [PowerState.RUNNING, PowerState.PAUSED])
async def test_a_full_disk_leaves_the_guest_as_it_was(tmp_path: Path, small_disk: Path, state: PowerState) -> None:
    host = QemuWorkbench(tmp_path)
    host.settings = msgspec.structs.replace(host.settings, folder=small_disk / "qemu", display=True)
    told = Told()
    hypervisor = await opened(host, told)
    try:
        await started(hypervisor, host)
        if state is PowerState.PAUSED:
            await hypervisor.pause(PERMIT, "one")
        before = await ticks(hypervisor)
        for _ in range(2):
            with pytest.raises(OperationRejected, match="No space left") as refusal:
                await hypervisor.save_memory(PERMIT, "one", nobody_reads)
            assert "room" in str(refusal.value.remedy)
            seen = await hypervisor.inspect("one")
            assert (seen.power_state, seen.memory_saved, memory_files(host)) == (state, False, set())
        with pytest.raises(OperationRejected, match="could not be dumped"):
            await hypervisor.dump_memory(PERMIT, "one", small_disk / "dump", nobody_reads)
        assert names_in(small_disk) == {"qemu"}
        assert (await hypervisor.inspect("one")).power_state is state
        await hypervisor.unpause(PERMIT, "one")
        await until_ticks(hypervisor, before)
        assert boots(host) == 1
        assert told.kinds() == []
    finally:
        await hypervisor.undefine(PERMIT, "one")
        await hypervisor.close()
        host.end_everything()


class Slowly:
    """Lets a test act when QEMU has begun to write: it is held up by a file that takes nothing in."""

    def __init__(self, files: SavedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drain, self._full = os.pipe()
        monkeypatch.setattr(SavedMemory, "new_part", self._new_part)
        self._files = files

    def close(self) -> None:
        """Let QEMU find that nobody reads any more."""
        asyncio.get_event_loop().remove_reader(self.drain)
        os.close(self.drain)
        os.close(self._full)

    def let_through(self) -> None:
        """From now on take in what QEMU writes: it ends only between two pieces."""
        os.set_blocking(self.drain, False)
        asyncio.get_running_loop().add_reader(self.drain, self._read)

    def _read(self) -> None:
        if not os.read(self.drain, 1 << 16):
            asyncio.get_running_loop().remove_reader(self.drain)

    def _new_part(self, permit: GivenPermit) -> int:
        permit.check()
        self._files.part.touch(mode=0o600)
        return os.dup(self._full)


@pytest.fixture
async def stalls(
    hypervisor: QemuHypervisor, host: QemuWorkbench, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Slowly]:
    """QEMU writes into a pipe that nobody reads: what it writes stands still after 64 KiB."""
    monkeypatch.setattr("interlock.hypervisors.qemu.memory.guest_memory.os.lseek", lambda *_: 0)
    slowly = Slowly(files_of(host), monkeypatch)
    yield slowly
    slowly.close()


async def until_writing(hypervisor: QemuHypervisor) -> None:
    guest = hypervisor.guest("one")
    assert guest is not None
    async with asyncio.timeout(PATIENCE_S):
        while (await guest.query("query-migrate")).get("status") != "active":
            pass


@pytest.mark.parametrize("state", [PowerState.RUNNING, PowerState.PAUSED])
async def test_a_cancelled_worker_leaves_the_guest_as_it_was(
    hypervisor: QemuHypervisor, host: QemuWorkbench, stalls: Slowly, state: PowerState
) -> None:
    await started(hypervisor, host)
    if state is PowerState.PAUSED:
        await hypervisor.pause(PERMIT, "one")
    before = await ticks(hypervisor)
    saving = asyncio.ensure_future(hypervisor.save_memory(PERMIT, "one", nobody_reads))
    await until_writing(hypervisor)
    saving.cancel()
    stalls.let_through()
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.wait({saving})
    assert saving.cancelled()
    seen = await hypervisor.inspect("one")
    assert (seen.power_state, seen.memory_saved, memory_files(host)) == (state, False, set())
    await hypervisor.unpause(PERMIT, "one")
    await until_ticks(hypervisor, before)


async def test_qemu_killed_while_it_writes_is_a_guest_that_vanished(
    hypervisor: QemuHypervisor, host: QemuWorkbench, stalls: Slowly, told: Told
) -> None:
    await started(hypervisor, host)
    saving = asyncio.ensure_future(hypervisor.save_memory(PERMIT, "one", nobody_reads))
    await until_writing(hypervisor)
    await host.kill("one")
    with pytest.raises(GuestNotFound):
        await saving
    await told.until(GuestEvent.VANISHED, PATIENCE_S)
    seen = await hypervisor.inspect("one")
    assert (seen.power_state, seen.memory_saved, memory_files(host)) == (PowerState.NONE, False, set())


async def test_writing_that_stands_still_comes_to_an_end(host: QemuWorkbench, monkeypatch: pytest.MonkeyPatch) -> None:
    host.settings = msgspec.structs.replace(host.settings, memory_stall_timeout_ms=200, memory_look_interval_ms=20)
    monkeypatch.setattr("interlock.hypervisors.qemu.memory.guest_memory.os.lseek", lambda *_: 0)
    slowly = Slowly(files_of(host), monkeypatch)
    hypervisor = await opened(host, Told())
    try:
        await started(hypervisor, host)
        with pytest.raises(NotResponding, match="not moved the memory"):
            await hypervisor.save_memory(PERMIT, "one", nobody_reads)
        assert not (await hypervisor.inspect("one")).memory_saved
    finally:
        slowly.close()
        await hypervisor.undefine(PERMIT, "one")
        await hypervisor.close()


async def test_a_guest_whose_memory_was_being_written_can_be_let_run(
    hypervisor: QemuHypervisor, host: QemuWorkbench, stalls: Slowly
) -> None:
    """By an operation that took over: what QEMU still writes is ended first, so that it does not stop the guest."""
    await started(hypervisor, host)
    superseded = GivenPermit()
    saving = asyncio.ensure_future(hypervisor.save_memory(superseded, "one", nobody_reads))
    await until_writing(hypervisor)
    superseded.revoke()
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    before = await ticks(hypervisor)
    stalls.let_through()
    async with asyncio.timeout(PATIENCE_S):
        await hypervisor.unpause(PERMIT, "one")
    await until_ticks(hypervisor, before)
    record = host.instance_folder("one").process_record()
    assert record is not None
    assert (record.phase, record.saving, memory_files(host)) == (Phase.RUNNING, None, set())


# ------------------------------------------------------------------------------------- a server killed at each point

# A server that kills itself at its Nth step: a step is an effect that a permit is asked for, and each end of a call
# that changes a file or that QEMU is asked for.
DOOMED = """
import asyncio, os, signal, sys
from pathlib import Path
from interlock.hypervisors.qemu import launch
from interlock.hypervisors.qemu.memory import guest_memory, saved_memory
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder
from conformance.hypervisor import GivenPermit
from conformance.qemu_workbench import QemuWorkbench, opened

steps = int(sys.argv[2])

def step():
    global steps
    steps -= 1
    if steps == 0:
        os.kill(os.getpid(), signal.SIGKILL)

class Permit:
    fence = 0
    check = staticmethod(step)

def stepping(function):
    def stepped(*args, **kwargs):
        answer = function(*args, **kwargs)
        step()
        return answer
    return stepped

def waiting(function):
    async def stepped(*args, **kwargs):
        answer = await function(*args, **kwargs)
        step()
        return answer
    return stepped

async def serve():
    host = QemuWorkbench(Path(sys.argv[1]))
    hypervisor = host.make()
    await hypervisor.open(print)
    InstanceFolder.write_process_record = stepping(InstanceFolder.write_process_record)
    launch.spawn = stepping(launch.spawn)
    saved_memory.SavedMemory.new_part = stepping(saved_memory.SavedMemory.new_part)
    saved_memory.SavedMemory.commit = waiting(saved_memory.SavedMemory.commit)
    saved_memory.SavedMemory.mark_used = waiting(saved_memory.SavedMemory.mark_used)
    saved_memory.SavedMemory.remove = waiting(saved_memory.SavedMemory.remove)
    Guest.execute = waiting(Guest.execute)
    guest_memory._follow = waiting(guest_memory._follow)
    if sys.argv[3] == "save":
        await hypervisor.save_memory(Permit, "one", lambda *_: None)
    else:
        await hypervisor.restore_memory(Permit, "one", host.spec(), lambda *_: None)
    await hypervisor.close()

asyncio.run(serve())
"""


async def doomed(host: QemuWorkbench, steps: int, act: str) -> int:
    """Run a server that kills itself at that step, and return its exit status."""
    return await asyncio.to_thread(exit_code, "-c", DOOMED, str(host.folder), str(steps), act)


async def save_again(hypervisor: QemuHypervisor) -> None:
    await hypervisor.save_memory(PERMIT, "one", nobody_reads)
    assert (await hypervisor.inspect("one")).memory_saved


async def run_again(hypervisor: QemuHypervisor) -> None:
    if hypervisor.guest("one") is None:
        return
    await hypervisor.unpause(PERMIT, "one")
    assert not (await hypervisor.inspect("one")).memory_saved, "a guest that runs must leave no memory behind"
    await save_again(hypervisor)


async def restore_from_there(hypervisor: QemuHypervisor) -> None:
    if not (await hypervisor.inspect("one")).memory_saved:
        await save_again(hypervisor)


AFTER_SAVING = (save_again, run_again, restore_from_there)


@pytest.mark.parametrize("then", AFTER_SAVING)
async def test_saving_can_be_completed_whatever_step_a_server_is_killed_at(
    host: QemuWorkbench, then: Callable[[QemuHypervisor], Any]
) -> None:
    """In the quick tier each step is gone on from in one of the ways; in the long one, in all of them."""
    told = Told()
    hypervisor = await opened(host, told)
    await started(hypervisor, host)
    first, every = tier((AFTER_SAVING.index(then), len(AFTER_SAVING)), (0, 1))
    before, steps, status = 0, first, -signal.SIGKILL
    while status == -signal.SIGKILL:
        steps += every
        before = await ticks(hypervisor)
        await hypervisor.close()
        status = await doomed(host, steps, "save")
        hypervisor = await opened(host, told)
        await then(hypervisor)
        await hypervisor.restore_memory(PERMIT, "one", host.spec(), nobody_reads)
        await until_ticks(hypervisor, before)
        assert boots(host) == 1, f"killed at step {steps}"
        assert told.kinds() == [], f"killed at step {steps}"
        assert memory_files(host) == set(), f"killed at step {steps}"
    assert status == 0
    assert steps > 15
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()


async def restore_again(hypervisor: QemuHypervisor, host: QemuWorkbench) -> None:
    await hypervisor.restore_memory(PERMIT, "one", host.spec(), nobody_reads)


async def power_off_and_restore(hypervisor: QemuHypervisor, host: QemuWorkbench) -> None:
    """Undone as a driver would undo it: unless the guest has run, its memory is saved as before."""
    guest = hypervisor.guest("one")
    has_run = guest is not None and guest.has_run
    if has_run:
        return
    await hypervisor.power_off(PERMIT, "one")
    assert (await hypervisor.inspect("one")).memory_saved
    await restore_again(hypervisor, host)


AFTER_RESTORING = (restore_again, power_off_and_restore)


@pytest.mark.parametrize("then", AFTER_RESTORING)
async def test_restoring_can_be_completed_whatever_step_a_server_is_killed_at(
    host: QemuWorkbench, then: Callable[[QemuHypervisor, QemuWorkbench], Any]
) -> None:
    """In the quick tier each step is gone on from in one of the ways; in the long one, in both."""
    told = Told()
    hypervisor = await opened(host, told)
    await started(hypervisor, host)
    first, every = tier((AFTER_RESTORING.index(then), len(AFTER_RESTORING)), (0, 1))
    steps, status = first, -signal.SIGKILL
    while status == -signal.SIGKILL:
        steps += every
        before = await ticks(hypervisor)
        await hypervisor.save_memory(PERMIT, "one", nobody_reads)
        await hypervisor.close()
        status = await doomed(host, steps, "restore")
        hypervisor = await opened(host, told)
        await then(hypervisor, host)
        await hypervisor.restore_memory(PERMIT, "one", host.spec(), nobody_reads)
        await until_ticks(hypervisor, before)
        assert boots(host) == 1, f"killed at step {steps}"
        assert told.kinds() == [], f"killed at step {steps}"
        assert memory_files(host) == set(), f"killed at step {steps}"
    assert status == 0
    assert steps > 10
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()


async def test_memory_from_which_a_guest_may_have_run_is_not_run_from_again(
    hypervisor: QemuHypervisor, host: QemuWorkbench
) -> None:
    """Both the server and QEMU died right after the file was renamed: nobody can know."""
    await started(hypervisor, host)
    await hypervisor.save_memory(PERMIT, "one", nobody_reads)
    files = files_of(host)
    files.saved.rename(files.used)
    assert not (await hypervisor.inspect("one")).memory_saved
    with pytest.raises(GuestNotFound, match="begun to run"):
        await hypervisor.restore_memory(PERMIT, "one", host.spec(), nobody_reads)
    await hypervisor.power_on(PERMIT, "one", host.spec())
    assert memory_files(host) == set()


async def test_saving_left_half_way_is_known_to_whoever_comes_next(
    hypervisor: QemuHypervisor, host: QemuWorkbench, stalls: Slowly
) -> None:
    await started(hypervisor, host)
    saving = asyncio.ensure_future(hypervisor.save_memory(PERMIT, "one", nobody_reads))
    await until_writing(hypervisor)
    record = host.instance_folder("one").process_record()
    assert record is not None
    assert record.saving is Saving.RAN
    await host.kill("one")
    with pytest.raises(HypervisorError):
        await saving


# ----------------------------------------------------------------------------------------------------------- dumps


async def test_a_dump_is_one_that_a_debugger_reads(
    hypervisor: QemuHypervisor, host: QemuWorkbench, tmp_path: Path
) -> None:
    await started(hypervisor, host)
    before = await ticks(hypervisor)
    target = tmp_path / "dump"
    await hypervisor.dump_memory(PERMIT, "one", target, nobody_reads)
    # The flattened form of kdump, in which it is written to something that is not sought in.
    assert re.match(rb"makedumpfile\0", target.read_bytes()[:16])
    assert b"KDUMP   " in target.read_bytes()[:8192]
    assert target.stat().st_mode & 0o777 == 0o600
    await until_ticks(hypervisor, before)


async def test_a_dump_that_another_left_behind_is_waited_for(
    hypervisor: QemuHypervisor, host: QemuWorkbench, tmp_path: Path
) -> None:
    await started(hypervisor, host)
    first = asyncio.ensure_future(hypervisor.dump_memory(PERMIT, "one", tmp_path / "a", nobody_reads))
    guest = hypervisor.guest("one")
    assert guest is not None
    async with asyncio.timeout(PATIENCE_S):
        while (await guest.query("query-dump"))["status"] == "none":
            pass
    first.cancel()
    await asyncio.wait({first})
    await hypervisor.dump_memory(PERMIT, "one", tmp_path / "b", nobody_reads)
    assert names_in(tmp_path) >= {"b"}
    assert names_in(tmp_path) & {"a", "a.part", "b.part"} == set()
    assert (tmp_path / "b").stat().st_size > 0


async def test_a_dump_is_not_over_before_its_guest_goes_on(
    hypervisor: QemuHypervisor, host: QemuWorkbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await started(hypervisor, host)
    guest = hypervisor.guest("one")
    assert guest is not None
    ask, held = guest.query, asyncio.Event()

    async def late(command: str, *more: Any) -> Any:
        """As QEMU answers for a moment after it has told that the dump is complete."""
        if command != "query-status" or not (tmp_path / "dump.part").exists():
            return await ask(command, *more)
        held.set()
        return {"status": "save-vm"}

    monkeypatch.setattr(guest, "query", late)
    dumping = asyncio.ensure_future(hypervisor.dump_memory(PERMIT, "one", tmp_path / "dump", nobody_reads))
    await asyncio.wait_for(held.wait(), PATIENCE_S)
    async with asyncio.timeout(PATIENCE_S):
        while (await ask("query-status"))["status"] != "running":
            pass  # what is paused before QEMU itself has let it go on would be undone
    monkeypatch.setattr(guest, "query", ask)
    assert not dumping.done()
    await hypervisor.pause(PERMIT, "one")
    await hypervisor.unpause(PERMIT, "one")
    await asyncio.wait_for(dumping, PATIENCE_S)
    assert (tmp_path / "dump").exists()
