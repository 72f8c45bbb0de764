"""Root disks by number, what an instance is rescued from, and what a guest boots: on real QEMU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.nano_guest import GREETING, MEMORY_MIB
from boot_sector import bootable_image
from conformance.hypervisor import GivenPermit
from conformance.qemu_workbench import QemuWorkbench
from interlock.core.errors import OperationRejected
from interlock.core.records import Image, Spec
from interlock.core.states import PowerState
from interlock.hypervisors.qemu.adapter import QemuHypervisor

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]

PERMIT = GivenPermit()
MIB = 1 << 20


@pytest.fixture
def image(host: QemuWorkbench) -> Image:
    return bootable_image(host.folder, "base")


def spec_of(image: Image, **more: Any) -> Spec:
    return Spec(image=image, memory_mib=MEMORY_MIB, **more)


async def start(hypervisor: QemuHypervisor, spec: Spec) -> None:
    await hypervisor.define(PERMIT, "one", spec)
    await hypervisor.power_on(PERMIT, "one", spec)


def lose(image: Image) -> None:
    Path(image.path).unlink()


def info(path: Path) -> dict[str, Any]:
    answer: dict[str, Any] = msgspec.json.decode(
        subprocess.check_output(["qemu-img", "info", "-U", "--output=json", str(path)])
    )
    return answer


def identity(path: Path) -> tuple[int, int, int]:
    """What a file has as long as it is neither replaced nor written; when it was read last does not belong to it."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


async def test_each_number_is_a_root_disk_of_its_own(
    hypervisor: QemuHypervisor, host: QemuWorkbench, image: Image
) -> None:
    roots = host.instance_folder("one").roots(spec_of(image))
    for number in (0, 1, 12):
        await hypervisor.define(PERMIT, "one", spec_of(image, root=number))
    assert sorted(path.name for path in roots.disks().values()) == ["root-1.qcow2", "root-12.qcow2", "root.qcow2"]
    before = identity(roots.disk(1))
    await hypervisor.define(PERMIT, "one", spec_of(image, root=1, root_gib=5))
    assert identity(roots.disk(1)) == before, "one that is there is never made again"
    await start(hypervisor, spec_of(image, root=12))
    await host.until_said("one", "booted base")
    assert (await hypervisor.inspect("one")).disks == ("root",)


async def test_a_kernel_has_an_empty_root_disk_if_it_is_given_a_size(
    hypervisor: QemuHypervisor, host: QemuWorkbench
) -> None:
    spec = msgspec.structs.replace(host.spec(), root_gib=1, disks=(host.disk("v1"),))
    await start(hypervisor, spec)
    await host.until_up("one")
    assert (await hypervisor.inspect("one")).disks == ("root", "v1")
    found = info(host.instance_folder("one").roots(host.spec()).disk(0))
    assert (found["virtual-size"], "backing-filename" in found) == (1 << 30, False)


async def test_an_image_that_is_gone_is_refused_before_anything_changes(
    hypervisor: QemuHypervisor, host: QemuWorkbench, image: Image
) -> None:
    rescue = bootable_image(host.folder, "rescue-system")
    lose(rescue)
    with pytest.raises(OperationRejected, match="rescue-system no longer exists"):
        await hypervisor.define(PERMIT, "one", spec_of(image, rescue_image=rescue))
    lose(image)
    with pytest.raises(OperationRejected, match="base no longer exists"):
        await hypervisor.define(PERMIT, "one", spec_of(image))
    assert await hypervisor.known() == frozenset()


async def test_a_rescued_guest_boots_the_rescue_disk_and_has_its_own_beside_it(
    hypervisor: QemuHypervisor, host: QemuWorkbench, image: Image
) -> None:
    spec = spec_of(image, disks=(host.disk("v1"),))
    await start(hypervisor, spec)
    await host.until_said("one", "booted base")
    await hypervisor.power_off(PERMIT, "one")
    rescued = msgspec.structs.replace(spec, rescue_image=bootable_image(host.folder, "rescue-system"))
    await start(hypervisor, rescued)
    await host.until_said("one", "booted rescue-system")
    seen = await hypervisor.inspect("one")
    assert (seen.power_state, set(seen.disks)) == (PowerState.RUNNING, {"rescue", "root", "v1"})
    guest = hypervisor.guest("one")
    assert guest is not None
    order = [block["qdev"].split("/")[3] for block in await guest.query("query-block")]
    assert order == ["disk-rescue", "disk-root", "disk-v1"]
    await hypervisor.define(PERMIT, "one", rescued)
    await hypervisor.power_off(PERMIT, "one")
    await start(hypervisor, spec)
    await host.until_said("one", "booted base", times=2)
    assert not host.instance_folder("one").rescue_disk.exists()


async def test_one_that_has_no_free_place_can_be_rescued(hypervisor: QemuHypervisor, host: QemuWorkbench) -> None:
    volumes = tuple(host.disk(f"v{number}") for number in range(host.settings.hotplug_ports - 1))
    spec = spec_of(bootable_image(host.folder, "own-system"), disks=volumes)
    rescued = msgspec.structs.replace(spec, rescue_image=bootable_image(host.folder, "rescue-system"))
    await start(hypervisor, rescued)
    await host.until_said("one", "booted rescue-system")
    seen = await hypervisor.inspect("one")
    assert set(seen.disks) == {"rescue", "root", *(volume.id for volume in volumes)}


async def test_each_rescue_begins_with_a_fresh_disk(
    hypervisor: QemuHypervisor, host: QemuWorkbench, image: Image
) -> None:
    first, second = (spec_of(image, rescue_image=bootable_image(host.folder, name)) for name in ("first", "second"))
    disk = host.instance_folder("one").rescue_disk
    await hypervisor.define(PERMIT, "one", first)
    inode = disk.stat().st_ino
    await hypervisor.define(PERMIT, "one", first)
    assert disk.stat().st_ino == inode, "the same rescue goes on"
    await hypervisor.define(PERMIT, "one", second)
    assert second.rescue_image is not None
    assert info(disk)["backing-filename"] == second.rescue_image.path
    await hypervisor.define(PERMIT, "one", spec_of(image))
    assert not disk.exists()


async def test_a_kernel_can_be_what_an_instance_is_rescued_from(
    hypervisor: QemuHypervisor, host: QemuWorkbench, image: Image
) -> None:
    await start(hypervisor, spec_of(image, rescue_image=host.spec().image))
    await host.until_said("one", GREETING)
    assert (await hypervisor.inspect("one")).disks == ("root",)
    assert not host.instance_folder("one").rescue_disk.exists()


async def test_what_a_killed_server_left_half_made_is_removed(
    hypervisor: QemuHypervisor, host: QemuWorkbench, image: Image
) -> None:
    await hypervisor.define(PERMIT, "one", spec_of(image))
    left = host.instance_folder("one").path / "root-1.1-0.new"
    left.touch()
    await hypervisor.define(PERMIT, "one", spec_of(image))
    assert not left.exists()
