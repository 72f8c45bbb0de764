"""A real guest that boots a disc, beside a disk of its own."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from pycdlib import PyCdlib

from benchmarks.nano_guest import MEMORY_MIB
from conformance.hypervisor import GivenPermit, Told
from conformance.qemu_workbench import QemuWorkbench
from interlock.core.records import Spec
from interlock.images.image_folder import ImageFolder

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]

PERMIT = GivenPermit()
GREETING = "booted from the disc"
WRITES_TO_THE_SERIAL_PORT = bytes.fromhex("31c0 8ed8 be157c baf803 ac 84c0 7403 ee ebf8 f4 ebfd") + GREETING.encode()
"""For a processor as it starts, loaded at 0x7c00: the text behind the code, byte by byte to port 0x3f8, then rest."""


def bootable(path: Path) -> Path:
    """A disc with a program that the firmware starts (El Torito, without emulation)."""
    content = WRITES_TO_THE_SERIAL_PORT.ljust(2048, b"\0")
    disc = PyCdlib()
    disc.new()
    disc.add_fp(io.BytesIO(content), len(content), "/BOOT.;1")
    disc.add_eltorito("/BOOT.;1", bootcatfile="/BOOT.CAT;1")
    disc.write(str(path))
    disc.close()
    return path


async def test_a_disc_is_booted_beside_an_empty_root_disk_which_is_tried_first(
    host: QemuWorkbench, tmp_path: Path
) -> None:
    images = ImageFolder(tmp_path / "images")
    image = await images.bring_disk("disc", "disc", bootable(tmp_path / "boot.iso"))
    spec = Spec(image=image, memory_mib=MEMORY_MIB * 4, root_gib=1)
    hypervisor = host.make()
    await hypervisor.open(Told())
    await hypervisor.define(PERMIT, "one", spec)
    await hypervisor.power_on(PERMIT, "one", spec)
    await host.until_said("one", GREETING)
    assert "root" in (await hypervisor.inspect("one")).disks
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()


async def test_an_instance_can_be_rescued_from_a_disc(host: QemuWorkbench, tmp_path: Path) -> None:
    images = ImageFolder(tmp_path / "images")
    disc = await images.bring_disk("disc", "disc", bootable(tmp_path / "boot.iso"))
    spec = Spec(image=host.spec().image, rescue_image=disc, memory_mib=MEMORY_MIB * 4, root_gib=1)
    hypervisor = host.make()
    await hypervisor.open(Told())
    await hypervisor.define(PERMIT, "one", spec)
    await hypervisor.power_on(PERMIT, "one", spec)
    await host.until_said("one", GREETING)
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()
