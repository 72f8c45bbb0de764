"""Guests that QEMU halts since their disks find no space: shown, and let go on by itself, on real QEMU."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from benchmarks.nano_guest import MEMORY_MIB
from boot_sector import writing_image
from conformance.hypervisor import GivenPermit, Told
from conformance.qemu_workbench import QemuWorkbench, opened
from interlock.core.records import GuestEvent, Image, Spec
from interlock.core.states import PowerState
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from small_file_systems import fill, small_file_system
from waiting import PATIENCE_S

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]

PERMIT = GivenPermit()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with some space, and a file on it that can be removed."""
    with small_file_system(tmp_path / "small", "64m") as folder:
        (folder / "ballast").write_bytes(bytes(32 << 20))
        yield folder


@pytest.fixture
async def host(tmp_path: Path, small: Path) -> AsyncIterator[QemuWorkbench]:
    host = QemuWorkbench(tmp_path)
    host.settings = msgspec.structs.replace(host.settings, folder=small / "qemu", liveness_interval_ms=200)
    yield host
    hypervisor = await opened(host, Told())
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return writing_image(tmp_path, "writer")


async def halted(hypervisor: QemuHypervisor, told: Told, image: Image) -> None:
    spec = Spec(image=image, memory_mib=MEMORY_MIB)
    await hypervisor.define(PERMIT, "one", spec)
    await hypervisor.power_on(PERMIT, "one", spec)
    await told.until(GuestEvent.NO_SPACE, PATIENCE_S)
    assert (await hypervisor.inspect("one")).power_state is PowerState.PAUSED


def written(host: QemuWorkbench) -> int:
    return host.instance_folder("one").console.read_bytes().count(b"w")


async def test_a_guest_without_space_is_told_of_and_goes_on_when_there_is_space(
    host: QemuWorkbench, small: Path, image: Image
) -> None:
    told = Told()
    hypervisor = await opened(host, told)
    await halted(hypervisor, told, image)
    before = written(host)
    (small / "ballast").unlink()
    await told.until(GuestEvent.WENT_ON, PATIENCE_S)
    await told.until(GuestEvent.NO_SPACE, PATIENCE_S, 2)
    assert written(host) > before + 300, "it wrote on where it was halted"
    await hypervisor.power_off(PERMIT, "one")
    await hypervisor.close()


async def test_one_that_was_paused_meanwhile_stays_paused(host: QemuWorkbench, small: Path, image: Image) -> None:
    told = Told()
    hypervisor = await opened(host, told)
    await halted(hypervisor, told, image)
    await hypervisor.pause(PERMIT, "one")
    await hypervisor.pause(PERMIT, "one")
    await hypervisor.close()

    # Whoever takes charge next finds both: why it was halted, and that it is not to go on.
    told = Told()
    hypervisor = await opened(host, told)
    await told.until(GuestEvent.NO_SPACE, PATIENCE_S)
    guest = hypervisor.guest("one")
    assert guest is not None
    (small / "ballast").unlink()
    before = written(host)
    await guest.resume_halted()
    assert (await hypervisor.inspect("one")).power_state is PowerState.PAUSED
    assert written(host) == before
    await hypervisor.unpause(PERMIT, "one")
    await told.until(GuestEvent.WENT_ON, PATIENCE_S)
    await told.until(GuestEvent.NO_SPACE, PATIENCE_S, 2)
    assert written(host) > before
    await hypervisor.close()


async def test_one_that_was_halted_while_nobody_was_there_goes_on_too(
    host: QemuWorkbench, small: Path, image: Image
) -> None:
    told = Told()
    hypervisor = await opened(host, told)
    await halted(hypervisor, told, image)
    await hypervisor.close()
    (small / "ballast").unlink()
    told = Told()
    hypervisor = await opened(host, told)
    await told.until(GuestEvent.WENT_ON, PATIENCE_S)
    assert [event.kind for event in told.events][:2] == [GuestEvent.NO_SPACE, GuestEvent.WENT_ON]
    await hypervisor.close()


async def test_on_a_disk_without_a_byte_left_guests_are_stopped_and_removed(
    host: QemuWorkbench, small: Path, image: Image
) -> None:
    told = Told()
    hypervisor = await opened(host, told)
    await halted(hypervisor, told, image)
    fill(small / "more")
    await hypervisor.power_off(PERMIT, "one")
    assert (await hypervisor.inspect("one")).power_state is PowerState.NONE
    fill(small / "more")
    await hypervisor.undefine(PERMIT, "one")
    assert await hypervisor.known() == frozenset()
    await hypervisor.close()
