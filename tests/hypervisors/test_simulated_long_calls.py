"""What the simulated hypervisor adds to the long calls of the port: time, faults, and what a crash leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from conformance.hypervisor import GivenPermit, Told
from conformance.simulated_host import IMAGE, SimulatedUnderTest
from in_process.virtual_time import VirtualClock
from interlock.core.errors import Fenced, GuestNotFound, NotResponding, OperationRejected
from interlock.core.records import GuestEvent, Spec
from interlock.core.states import PowerState
from interlock.hypervisors.simulated import (
    AnswerLost,
    GuestVanishes,
    Hangs,
    Method,
    Refuses,
    SimulatedHost,
    SimulatedHypervisor,
)

SPEC = Spec(image=IMAGE)
PERMIT = GivenPermit()
OLD, NEW = (SimulatedUnderTest().disk(name) for name in ("old", "new"))
Call = Callable[[SimulatedHypervisor, GivenPermit, "Reports", Path], Awaitable[None]]


class Reports(list[tuple[int, int | None]]):
    """What was reported."""

    def __call__(self, done: int, total: int | None = None) -> None:
        self.append((done, total))


async def running(host: SimulatedHost | None = None, **options: object) -> SimulatedHypervisor:
    """An open hypervisor with one running guest, `one`, that has the disk `old`."""
    hypervisor = SimulatedHypervisor(host, **options)  # type: ignore[arg-type]
    await hypervisor.open(Told())
    await hypervisor.define(PERMIT, "one", SPEC)
    await hypervisor.power_on(PERMIT, "one", SPEC)
    await hypervisor.attach_disk(PERMIT, "one", OLD)
    return hypervisor


def numbered(root: int) -> Spec:
    return msgspec.structs.replace(SPEC, root=root, root_is_whole=True)


LONG: dict[Method, Call] = {
    Method.SAVE_MEMORY: lambda on, permit, report, _: on.save_memory(permit, "one", report),
    Method.DUMP_MEMORY: lambda on, permit, report, at: on.dump_memory(permit, "one", at, report),
    Method.SWAP_DISK: lambda on, permit, report, _: on.swap_disk(permit, "one", OLD, NEW, report),
    Method.COPY_ROOT_DISK: lambda on, permit, report, _: on.copy_root_disk(permit, "one", SPEC, numbered(1), report),
    Method.EXPORT_ROOT_DISK: lambda on, permit, report, at: on.export_root_disk(permit, "one", SPEC, at, report),
}


@pytest.mark.parametrize("method", LONG)
async def test_something_long_takes_its_time_and_reports_on_the_way(method: Method, tmp_path: Path) -> None:
    clock = VirtualClock()
    hypervisor = await running(delays_ms={method: 1_000}, sleep=clock.sleep)
    reports = Reports()
    worker = asyncio.ensure_future(LONG[method](hypervisor, PERMIT, reports, tmp_path / "target"))
    await clock.advance(0.9)
    assert not worker.done()
    assert len(set(reports)) >= 3
    await clock.advance(0.2)
    await worker
    assert reports[-1][0] == reports[-1][1]


@pytest.mark.parametrize("method", LONG)
@pytest.mark.parametrize("how", ["cancelled", "fenced", "refused"])
async def test_something_long_that_comes_to_no_end_leaves_what_was(method: Method, how: str, tmp_path: Path) -> None:
    clock = VirtualClock()
    hypervisor = await running(delays_ms={method: 1_000}, sleep=clock.sleep)
    if how == "refused":
        hypervisor.host.faults.script("one", method, Refuses("No room."))
    before, permit = await hypervisor.inspect("one"), GivenPermit()
    roots = set(hypervisor.host.guests["one"].roots)
    worker = asyncio.ensure_future(LONG[method](hypervisor, permit, Reports(), tmp_path / "target"))
    await clock.advance(0.5)
    if how == "cancelled":
        worker.cancel()
    elif how == "fenced":
        permit.revoke()
    await clock.advance(1)
    await asyncio.wait({worker})
    assert worker.cancelled() or isinstance(worker.exception(), Fenced | OperationRejected)
    seen = await hypervisor.inspect("one")
    if how == "fenced" and method in {Method.SAVE_MEMORY, Method.DUMP_MEMORY}:
        # Whoever took over finds the guest halted, and decides.
        assert seen.power_state is PowerState.PAUSED
        await hypervisor.unpause(PERMIT, "one")
        seen = await hypervisor.inspect("one")
    assert seen == before
    assert set(hypervisor.host.guests["one"].roots) == roots
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240


@pytest.mark.parametrize("method", [Method.SAVE_MEMORY, Method.DUMP_MEMORY, Method.SWAP_DISK])
async def test_a_guest_that_hangs_or_vanishes_ends_something_long(method: Method, tmp_path: Path) -> None:
    hypervisor = await running(answer_timeout_s=0)
    hypervisor.host.faults.script("one", method, Hangs())
    with pytest.raises(NotResponding):
        await LONG[method](hypervisor, PERMIT, Reports(), tmp_path / "target")
    hypervisor.host.thaw("one")
    hypervisor.host.faults.script("one", method, GuestVanishes())
    with pytest.raises(GuestNotFound):
        await LONG[method](hypervisor, PERMIT, Reports(), tmp_path / "target")
    assert not (await hypervisor.inspect("one")).memory_saved


async def test_a_lost_answer_of_something_long_is_found_done_when_it_is_asked_again(tmp_path: Path) -> None:
    hypervisor = await running(answer_timeout_s=0)
    for method, call in LONG.items():
        if method is Method.SAVE_MEMORY:
            continue
        hypervisor.host.faults.script("one", method, AnswerLost())
        with pytest.raises(NotResponding):
            await call(hypervisor, PERMIT, Reports(), tmp_path / method.value)
        await call(hypervisor, PERMIT, Reports(), tmp_path / method.value)


async def test_a_guest_that_a_crash_left_half_saved_is_saved_when_asked_again(tmp_path: Path) -> None:
    clock = VirtualClock()
    hypervisor = await running(SimulatedHost(folder=tmp_path), delays_ms={Method.SAVE_MEMORY: 1_000}, sleep=clock.sleep)
    worker = asyncio.ensure_future(hypervisor.save_memory(PERMIT, "one", Reports()))
    await clock.advance(0.5)
    hypervisor.crash()
    worker.cancel()
    after = SimulatedHypervisor(SimulatedHost(folder=tmp_path))
    told = Told()
    await after.open(told)
    assert told.kinds() == []
    assert (await after.inspect("one")).power_state is PowerState.PAUSED
    await after.save_memory(PERMIT, "one", Reports())
    await after.restore_memory(PERMIT, "one", SPEC, Reports())
    assert (await after.inspect("one")).power_state is PowerState.RUNNING


async def test_what_is_on_a_disk_follows_it(tmp_path: Path) -> None:
    """A rebuild makes a new disk, a copy and an export carry what was written, and the old one stays until dropped."""
    host = SimulatedHost()
    hypervisor = await running(host)
    guest = host.guests["one"]
    assert host.guest_writes("one", "letter")
    await hypervisor.export_root_disk(PERMIT, "one", SPEC, tmp_path / "export.qcow2", Reports())
    await hypervisor.power_off(PERMIT, "one")
    await hypervisor.copy_root_disk(PERMIT, "one", SPEC, numbered(1), Reports())
    await hypervisor.define(PERMIT, "one", msgspec.structs.replace(SPEC, root=2))
    await hypervisor.root_disk_from(PERMIT, "one", numbered(3), tmp_path / "export.qcow2", Reports())
    assert {number: content.written for number, content in guest.roots.items()} == {
        0: ("letter",),
        1: ("letter",),
        2: (),
        3: ("letter",),
    }
    await hypervisor.drop_root_disks(PERMIT, "one", SPEC, frozenset({1}))
    assert set(guest.roots) == {1}


async def test_what_is_on_a_volume_outlives_the_process_and_goes_over_in_a_swap(tmp_path: Path) -> None:
    hypervisor = await running(SimulatedHost(folder=tmp_path))
    assert hypervisor.host.guest_writes("one", "letter", "old")
    await hypervisor.swap_disk(PERMIT, "one", OLD, NEW, Reports())
    hypervisor.crash()
    host = SimulatedHost(folder=tmp_path)
    host.load()
    assert host.storage.volume(NEW).written == ("letter",)
    assert list(host.guests["one"].disks) == ["root", "new"]


async def test_a_rescue_has_a_disk_of_its_own_each_time() -> None:
    host = SimulatedHost()
    hypervisor = await running(host)
    await hypervisor.power_off(PERMIT, "one")
    rescue = msgspec.structs.replace(SPEC, rescue_image=IMAGE)
    for _ in range(2):
        await hypervisor.define(PERMIT, "one", rescue)
        await hypervisor.power_on(PERMIT, "one", rescue)
        content = host.storage.content(host.guests["one"], "rescue")
        assert content is not None
        assert content.written == ()
        assert host.guest_writes("one", "trace", "rescue")
        assert host.guest_writes("one", "letter", "root")
        await hypervisor.power_off(PERMIT, "one")
        await hypervisor.define(PERMIT, "one", SPEC)
    await hypervisor.power_on(PERMIT, "one", SPEC)
    assert (await hypervisor.inspect("one")).disks == ("root",)
    assert host.guests["one"].roots[0].written == ("letter", "letter")


async def test_a_guest_that_vanishes_right_after_its_memory_is_restored_is_told() -> None:
    hypervisor = SimulatedHypervisor()
    told = Told()
    await hypervisor.open(told)
    await hypervisor.define(PERMIT, "one", SPEC)
    await hypervisor.power_on(PERMIT, "one", SPEC)
    await hypervisor.save_memory(PERMIT, "one", Reports())
    hypervisor.host.faults.script("one", Method.RESTORE_MEMORY, GuestVanishes())
    await hypervisor.restore_memory(PERMIT, "one", SPEC, Reports())
    await told.until(GuestEvent.VANISHED, 5)
    assert not (await hypervisor.inspect("one")).memory_saved


async def test_an_exported_disk_is_one_that_qemu_takes_for_what_it_is(tmp_path: Path) -> None:
    import shutil
    import subprocess

    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    host = SimulatedHost()
    hypervisor = await running(host)
    assert host.guest_writes("one", "letter")
    await hypervisor.export_root_disk(PERMIT, "one", SPEC, tmp_path / "one.qcow2", Reports())
    subprocess.run(["qemu-img", "check", "-q", tmp_path / "one.qcow2"], check=True)  # noqa: ASYNC221
    packed = ["qemu-img", "convert", "-c", "-O", "qcow2", str(tmp_path / "one.qcow2"), str(tmp_path / "packed.qcow2")]
    subprocess.run(packed, check=True)  # noqa: ASYNC221
    await hypervisor.root_disk_from(PERMIT, "one", numbered(1), tmp_path / "packed.qcow2", Reports())
    assert host.guests["one"].roots[1].written == ("letter",)
