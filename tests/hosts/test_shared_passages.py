"""A guest whose root disk both hosts have goes to and fro with its memory only, and one of them has the disk open."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from conformance.disk_patterns import Progress, has_pattern, is_whole, write_as_guest, write_pattern
from conformance.qemu_workbench import QemuWorkbench, opened, two_benches
from interlock.core.errors import OperationRejected
from interlock.core.records import SharedFolder, Spec
from interlock.core.states import PowerState
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.disks.root_disks import create, draft
from interlock.images.shared_folder import MARKER, MarkedFolder
from interlock.ports.migration import IncomingState
from small_file_systems import small_file_system

from .test_passages import PERMIT, ticks

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]
ROOT_MIB = 1024


class Pair:
    """Two hosts that share a folder, and a guest on the first."""

    def __init__(self, folder: Path, benches: tuple[QemuWorkbench, QemuWorkbench], shared: SharedFolder) -> None:
        self.benches = benches
        self.shared = shared
        self.spec: Spec = replace(benches[0].spec(), root_gib=1, shared=shared)
        self.disk = folder / "shared" / "instances" / "one" / "root.qcow2"

    async def start(self) -> tuple[QemuHypervisor, QemuHypervisor]:
        here, there = [await opened(bench) for bench in self.benches]
        await here.define(PERMIT, "one", self.spec)
        await here.power_on(PERMIT, "one", self.spec)
        await self.benches[0].until_up("one")
        return here, there


async def send(here: QemuHypervisor, there: QemuHypervisor, spec: Spec) -> Progress:
    """Send the guest; it stands still on both hosts when this returns."""
    seen = Progress()
    await there.define(PERMIT, "one", spec)
    passage = await there.receive_guest(PERMIT, "one", spec, await here.machine_kind("one"))
    await here.send_guest(PERMIT, "one", passage, 0, seen)
    await there.await_guest("one")
    return seen


async def write(hypervisor: QemuHypervisor, pattern: int, at_mib: int) -> None:
    guest = hypervisor.guest("one")
    assert guest is not None
    await write_as_guest(PERMIT, guest, "root", f"write -P {pattern} {at_mib}M 1M")


async def end(*hypervisors: QemuHypervisor) -> None:
    for hypervisor in hypervisors:
        await hypervisor.undefine(PERMIT, "one")
        await hypervisor.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    (tmp_path / "shared").mkdir(mode=0o711)
    marked = MarkedFolder(tmp_path / "shared", tmp_path / "kept.json", reserved_gib=0)
    marked.open()
    shared = asyncio.run(marked.folder())
    assert shared is not None
    with two_benches(tmp_path) as benches:
        yield Pair(tmp_path, benches, shared)


async def test_it_counts_on_and_only_its_memory_is_moved(pair: Pair) -> None:
    here, there = await pair.start()
    counted = await ticks(here)
    for turn in range(1, 4):
        await write(here, turn, turn)
        seen = await send(here, there, pair.spec)
        assert max(total or 0 for _, total in seen.told) < ROOT_MIB << 20, "the disk went along"
        assert await there.arrival("one") is IncomingState.AWAITED
        await there.complete_incoming(PERMIT, "one")
        await here.undefine(PERMIT, "one")
        now = await ticks(there)
        assert now >= counted
        counted = now
        here, there = there, here
    assert (pair.disk.parent / "root.qcow2").exists(), "who it left removed its disk"
    assert not list(pair.benches[0].instance_folder("one").path.glob("root*"))
    assert not list(pair.benches[1].instance_folder("one").path.glob("root*"))
    await end(here, there)
    assert is_whole(pair.disk)
    assert all(has_pattern(pair.disk, turn, 1, at_mib=turn) for turn in range(1, 4))


async def test_what_was_sent_goes_on_here_while_the_other_machine_still_waits(pair: Pair) -> None:
    """The other host cannot be asked, so that its machine cannot be ended: it must not have the disk."""
    here, there = await pair.start()
    await send(here, there, pair.spec)
    await here.resume_source(PERMIT, "one")
    assert (await here.inspect("one")).power_state is PowerState.RUNNING
    await write(here, 5, 5)
    with pytest.raises(OperationRejected, match="lock"):
        await there.complete_incoming(PERMIT, "one")
    await write(here, 6, 6)
    await end(there, here)
    assert is_whole(pair.disk)
    assert has_pattern(pair.disk, 5, 1, at_mib=5)
    assert has_pattern(pair.disk, 6, 1, at_mib=6)


async def test_a_guest_is_not_started_on_two_hosts(pair: Pair) -> None:
    here, there = await pair.start()
    await there.define(PERMIT, "one", pair.spec)
    with pytest.raises(OperationRejected, match="lock"):
        await there.power_on(PERMIT, "one", pair.spec)
    await write(here, 5, 5)
    await end(here, there)


async def test_a_host_goes_on_from_the_disk_of_one_that_is_lost(pair: Pair) -> None:
    here, there = await pair.start()
    await write(here, 5, 5)
    await pair.benches[0].kill("one")
    await there.define(PERMIT, "one", pair.spec)
    await there.power_on(PERMIT, "one", pair.spec)
    await pair.benches[1].until_up("one")
    await here.undefine(PERMIT, "one")
    await there.power_off(PERMIT, "one")
    assert has_pattern(pair.disk, 5, 1, at_mib=5)
    assert is_whole(pair.disk)
    await there.drop_root_disks(PERMIT, "one", pair.spec, frozenset())
    assert not pair.disk.parent.exists()
    await end(here, there)


def unmount(folder: Path, wrong: str) -> None:
    """Have something else, or nothing, where the folder was."""
    folder.rename(folder.with_name("elsewhere"))
    if wrong != "no folder":
        folder.mkdir()
    if wrong == "another":
        (folder / MARKER).write_text("another\n")


def remount(folder: Path) -> None:
    """Put the folder back. Fails where something was made while it was not there."""
    if folder.exists():
        assert [one.name for one in folder.iterdir()] in ([], [MARKER])
        shutil.rmtree(folder)
    folder.with_name("elsewhere").rename(folder)


@pytest.mark.parametrize("wrong", ["not there", "another", "no folder"])
async def test_nothing_is_made_in_a_folder_that_is_not_the_shared_one(pair: Pair, wrong: str) -> None:
    here, there = await pair.start()
    await here.power_off(PERMIT, "one")
    folder = Path(pair.shared.path)
    unmount(folder, wrong)
    found = "is not the one" if wrong == "another" else "is not there"
    for hypervisor in (here, there):
        with pytest.raises(OperationRejected, match=found):
            await hypervisor.define(PERMIT, "one", pair.spec)
        with pytest.raises(OperationRejected, match=found):
            await hypervisor.drop_root_disks(PERMIT, "one", pair.spec, frozenset())
    with pytest.raises(OperationRejected, match=found):
        await here.power_on(PERMIT, "one", pair.spec)
    remount(folder)
    await here.power_on(PERMIT, "one", pair.spec)
    await end(here, there)


async def test_a_folder_that_cannot_be_written_is_told_of_and_nothing_is_left_in_it(pair: Pair, tmp_path: Path) -> None:
    here, there = await pair.start()
    await here.power_off(PERMIT, "one")
    with small_file_system(tmp_path / "small", "4m") as small:
        marked = MarkedFolder(small, tmp_path / "small.json", reserved_gib=0)
        marked.open()
        shared = await marked.folder()
        await here.define(PERMIT, "two", replace(pair.spec, shared=shared))
        read_only(small)
        for spec in (replace(pair.spec, shared=shared), replace(pair.spec, shared=shared, root=1)):
            with pytest.raises(OperationRejected, match="Read-only file system"):
                await boot(there, spec)
        assert names_in(small / "instances" / "two") == ["root.qcow2"]
        await here.undefine(PERMIT, "two")
        await there.undefine(PERMIT, "two")
    await end(here, there)


async def boot(hypervisor: QemuHypervisor, spec: Spec) -> None:
    await hypervisor.define(PERMIT, "two", spec)
    await hypervisor.power_on(PERMIT, "two", spec)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read_only(folder: Path) -> None:
    subprocess.check_call(["mount", "-o", "remount,ro", str(folder)])


async def test_what_a_cancelled_worker_left_half_made_goes_with_the_last_disk(pair: Pair) -> None:
    """Its image tool may go on for a moment after it, and belongs to the process that removes the disk."""
    here, there = await pair.start()
    with draft(pair.disk) as mine:
        mine.touch()
        await here.define(PERMIT, "one", pair.spec)
        assert names_in(pair.disk.parent) == sorted([mine.name, pair.disk.name])
        await here.power_off(PERMIT, "one")
        await here.drop_root_disks(PERMIT, "one", pair.spec, frozenset())
        assert names_in(pair.disk.parent.parent) == []
    await end(here, there)


async def test_a_disk_that_another_host_has_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """As by one that stood still while it made the same."""
    disk, mine = tmp_path / "root.qcow2", tmp_path / "root.mine-0.new"
    disk.write_text("theirs")
    mine.write_text("mine")
    await create(PERMIT, mine, disk)
    assert disk.read_text() == "theirs"
    assert names_in(tmp_path) == [disk.name]


async def test_a_layer_is_read_over_the_image_where_this_host_has_it(pair: Pair, tmp_path: Path) -> None:
    """The file names the place where the host has the image that made it."""
    here, there = await pair.start()
    await end(here)
    image = tmp_path / "image.qcow2"
    shutil.copy(pair.disk, image)
    write_pattern(image, 3, 1, at_mib=1)
    base = replace(pair.spec.image, kind="disk", format="qcow2", path=str(image), size_bytes=1 << 30)
    spec = replace(pair.spec, image=base, root_gib=0, root=1)
    await there.define(PERMIT, "one", spec)
    moved = replace(spec, image=replace(base, path=str(image.rename(tmp_path / "image-there.qcow2"))))
    await there.export_root_disk(PERMIT, "one", moved, tmp_path / "export.qcow2", Progress())
    assert has_pattern(tmp_path / "export.qcow2", 3, 1, at_mib=1)
    larger = replace(moved, root=2, root_gib=2)
    await there.copy_root_disk(PERMIT, "one", moved, larger, Progress())
    await there.export_root_disk(PERMIT, "one", larger, tmp_path / "larger.qcow2", Progress())
    assert has_pattern(tmp_path / "larger.qcow2", 3, 1, at_mib=1)
    await end(there)
