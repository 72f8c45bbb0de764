"""The small guest on a disk: the disk says truly what is on it, and boots under the BIOS of a real virtual machine."""

from __future__ import annotations

import shutil
import struct
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from conformance.hypervisor import GivenPermit, Told
from conformance.qemu_workbench import QemuWorkbench
from interlock.core.records import Image, Spec
from interlock.guests import small_disk
from interlock.guests.small_guest import build
from interlock.images.image_folder import ImageFolder
from interlock.images.kernel_payload import UnreadableKernel
from small_guests import packages_folder

NEEDED = ("qemu-system-x86_64", "apt-get", "apt-cache", "dpkg-deb")
REAL = [
    pytest.mark.qemu,
    pytest.mark.skipif(not all(map(shutil.which, NEEDED)), reason="QEMU or apt is not on this system"),
]
PERMIT = GivenPermit()
MIB = 1 << 20
INIT_SIZE = 40 * MIB


def bzimage(version: int = 0x20F, setup_sectors: int = 39) -> bytes:
    """The least that a kernel must say of itself to be laid out."""
    kernel = bytearray((setup_sectors + 1) * 512)
    kernel[0x1F1], kernel[0x1FE:0x200], kernel[0x202:0x206] = setup_sectors, b"\x55\xaa", b"HdrS"
    struct.pack_into("<H", kernel, 0x206, version)
    struct.pack_into("<QI", kernel, 0x258, 16 * MIB, INIT_SIZE)
    return bytes(kernel) + b"kernel" * 100_000


def test_the_only_partition_holds_all_and_the_second_mib_is_free() -> None:
    disk = small_disk.image(bzimage(), b"initrd" * 10_000, "quiet")
    assert len(disk) % MIB == 0
    assert disk[510:512] == b"\x55\xaa"
    status, kind, first, count = struct.unpack_from("<B3xB3xII", disk, 446)
    assert (status, kind, first * 512) == (0x80, 0xDA, 2 * MIB)
    assert (first + count) * 512 == len(disk)
    assert not any(disk[462:510]), "there is another partition"
    assert not any(disk[512 : 2 * MIB])
    assert disk[2 * MIB + 0x7000 :].startswith(b"quiet\0")
    assert disk.count(b"kernel" * 100_000) == disk.count(b"initrd" * 10_000) == 1


def test_the_kernel_is_told_of_an_initial_file_system_behind_all_that_it_unpacks() -> None:
    disk = small_disk.image(bzimage(), b"initrd" * 10_000, "")
    where, size = struct.unpack_from("<II", disk, 2 * MIB + 0x218)
    assert (where, size) == (16 * MIB + INIT_SIZE, 60_000)


def test_without_an_initial_file_system_there_is_still_a_part_to_count_down_from() -> None:
    disk = small_disk.image(bzimage(), b"", "")
    parts = [struct.unpack_from("<IIH", disk, 0x130 + 12 * index) for index in range(3)]
    assert all(count > 0 for _, _, count in parts)
    assert struct.unpack_from("<II", disk, 2 * MIB + 0x218)[1] == 0


@pytest.mark.parametrize(
    ("kernel", "cmdline"),
    [
        (b"\x7fELF" + bytes(2000), ""),
        (b"MZ" + bytes(2000), ""),
        (b"", ""),
        (bzimage(version=0x209), ""),
        (bzimage(setup_sectors=63), ""),
        (bzimage(), "x" * 4096),
    ],
)
def test_what_the_disk_could_not_boot_is_not_put_there(kernel: bytes, cmdline: str) -> None:
    with pytest.raises(UnreadableKernel):
        small_disk.image(kernel, b"", cmdline)


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[QemuWorkbench]:
    host = QemuWorkbench(tmp_path)
    yield host
    host.end_everything()


@pytest.fixture
async def image(tmp_path: Path) -> Image:
    images = ImageFolder(tmp_path / "images", small_guest=partial(build, packages_folder()))
    return await images.build_small("small", "small", "disk")


def cut(image: Image, path: Path) -> Image:
    """The first 8 MiB of it, which the kernel does not fit in."""
    path.write_bytes(Path(image.path).read_bytes()[: 8 * MIB])
    path.chmod(0o644)
    return msgspec.structs.replace(image, id="short", path=str(path), size_bytes=8 * MIB)


async def says(host: QemuWorkbench, spec: Spec, words: str) -> None:
    """Hold that a guest of these properties comes to say those words on its console."""
    hypervisor = host.make()
    await hypervisor.open(Told())
    await hypervisor.define(PERMIT, "one", spec)
    await hypervisor.power_on(PERMIT, "one", spec)
    await host.until_said("one", words)
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()


class TestBooted:
    """The disk as it is built from this system's packages, once it has come into an image folder."""

    pytestmark = REAL

    async def test_it_boots_to_the_small_guest_on_a_disk_of_its_own(self, host: QemuWorkbench, image: Image) -> None:
        assert (image.kind, image.format) == ("disk", "raw")
        await says(host, Spec(image=image, memory_mib=128, root_gib=1), "interlock-guest: up interlock")

    async def test_with_too_little_memory_it_says_so(self, host: QemuWorkbench, image: Image) -> None:
        await says(host, Spec(image=image, memory_mib=64), "interlock: too little memory to boot this disk")

    async def test_one_that_was_cut_short_says_so(self, host: QemuWorkbench, image: Image, tmp_path: Path) -> None:
        short = cut(image, tmp_path / "short.raw")
        await says(host, Spec(image=short, memory_mib=128), "interlock: the disk is unreadable")
