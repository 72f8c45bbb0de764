"""Files of an instance that are missing or damaged, on real QEMU: what is refused, and nothing takes their place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from benchmarks.nano_guest import MEMORY_MIB
from boot_sector import bootable_image
from conformance.hypervisor import GivenPermit
from conformance.qemu_workbench import QemuWorkbench
from interlock.core.errors import GuestNotFound, OperationRejected
from interlock.core.records import Image, Seed, Spec
from interlock.core.states import PowerState
from interlock.hypervisors.qemu.adapter import QemuHypervisor

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]

PERMIT = GivenPermit()


def removed(path: Path) -> None:
    path.unlink()


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def replaced(path: Path) -> None:
    path.write_bytes(b"Dear diary, " * 20_000)


def cut_short(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(70_000)


WAYS: list[tuple[Callable[[Path], None], str]] = [
    (removed, "is missing"),
    (emptied, "is empty"),
    (replaced, "is not a qcow2 disk"),
    (cut_short, "is truncated"),
]


@pytest.fixture
def image(host: QemuWorkbench) -> Image:
    return bootable_image(host.folder, "base")


async def stopped(hypervisor: QemuHypervisor, spec: Spec) -> None:
    await hypervisor.define(PERMIT, "one", msgspec.structs.replace(spec, root_made=False))
    await hypervisor.power_on(PERMIT, "one", spec)
    await hypervisor.power_off(PERMIT, "one")


@pytest.mark.parametrize(("harm", "words"), WAYS)
async def test_a_root_disk_that_is_missing_or_damaged_stays_so(
    hypervisor: QemuHypervisor, host: QemuWorkbench, image: Image, harm: Callable[[Path], None], words: str
) -> None:
    spec = Spec(image=image, memory_mib=MEMORY_MIB, root_made=True)
    await stopped(hypervisor, spec)
    root = host.instance_folder("one").roots(spec).disk(0)
    harm(root)
    before = root.read_bytes() if root.exists() else None
    for attempt in (hypervisor.define, hypervisor.power_on):
        with pytest.raises(OperationRejected) as refused:
            await attempt(PERMIT, "one", spec)
        assert f"{root} {words}" in refused.value.message
        assert "rebuild" in (refused.value.remedy or "")
    with pytest.raises(OperationRejected, match=words):
        await hypervisor.export_root_disk(PERMIT, "one", spec, host.folder / "export", nobody_reads)
    with pytest.raises(OperationRejected, match=words):
        await hypervisor.copy_root_disk(PERMIT, "one", spec, msgspec.structs.replace(spec, root=1), nobody_reads)
    assert (root.read_bytes() if root.exists() else None) == before
    # A new root disk of another number is what a rebuild makes.
    await stopped(hypervisor, msgspec.structs.replace(spec, root=1))


@pytest.mark.parametrize(("harm", "words"), WAYS)
async def test_a_volume_that_is_missing_or_damaged_is_named(
    hypervisor: QemuHypervisor, host: QemuWorkbench, harm: Callable[[Path], None], words: str
) -> None:
    disk = host.disk("data")
    spec = msgspec.structs.replace(host.spec(), disks=(disk,))
    await stopped(hypervisor, spec)
    harm(Path(disk.path))
    with pytest.raises(OperationRejected) as refused:
        await hypervisor.power_on(PERMIT, "one", spec)
    assert f"{disk.path} {words}" in refused.value.message
    await hypervisor.power_on(PERMIT, "one", host.spec())
    with pytest.raises(OperationRejected) as refused:
        await hypervisor.attach_disk(PERMIT, "one", disk)
    assert f"{disk.path} {words}" in refused.value.message


@pytest.mark.parametrize("harm", [removed, emptied])
async def test_an_image_that_is_missing_or_damaged_is_named(
    hypervisor: QemuHypervisor, image: Image, harm: Callable[[Path], None]
) -> None:
    spec = Spec(image=image, memory_mib=MEMORY_MIB, root_made=True)
    await stopped(hypervisor, spec)
    harm(Path(image.path))
    with pytest.raises(OperationRejected, match=image.path):
        await hypervisor.power_on(PERMIT, "one", spec)


async def test_a_saved_memory_that_is_missing_or_damaged_is_named(
    hypervisor: QemuHypervisor, host: QemuWorkbench
) -> None:
    spec = host.spec()
    await hypervisor.define(PERMIT, "one", spec)
    await hypervisor.power_on(PERMIT, "one", spec)
    await hypervisor.save_memory(PERMIT, "one", nobody_reads)
    saved = host.instance_folder("one").path / "memory.saved"
    emptied(saved)
    with pytest.raises(OperationRejected, match=str(saved)):
        await hypervisor.restore_memory(PERMIT, "one", spec, nobody_reads)
    removed(saved)
    with pytest.raises(GuestNotFound, match=str(saved)):
        await hypervisor.restore_memory(PERMIT, "one", spec, nobody_reads)
    assert (await hypervisor.inspect("one")).power_state is PowerState.NONE


async def test_a_seed_that_is_missing_is_written_again_as_it_was(
    hypervisor: QemuHypervisor, host: QemuWorkbench
) -> None:
    """It is nobody's data: everything in it is in the record."""
    spec = msgspec.structs.replace(host.spec(), seed=Seed(hostname="web"))
    await stopped(hypervisor, spec)
    seed = host.instance_folder("one").seed_disk
    before = seed.read_bytes()
    for harm in (removed, emptied):
        harm(seed)
        await hypervisor.power_on(PERMIT, "one", spec)
        assert seed.read_bytes() == before
        await hypervisor.power_off(PERMIT, "one")


def nobody_reads(done: int, total: int | None = None) -> None:
    """Take a report."""
