"""A real guest of the QEMU adapter finds its seed and does what it says."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from conformance.hypervisor import GivenPermit, Told
from conformance.qemu_workbench import QemuWorkbench
from interlock.core.records import Seed, Spec
from interlock.guests.small_guest import build
from interlock.images.image_folder import ImageFolder
from small_guests import packages_folder

NEEDED = ("qemu-system-x86_64", "apt-get", "apt-cache", "dpkg-deb")
pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not all(map(shutil.which, NEEDED)), reason="QEMU or apt is not on this system"),
]
PERMIT = GivenPermit()


async def test_a_small_guest_takes_its_seed_to_heart(host: QemuWorkbench, tmp_path: Path) -> None:
    image = await ImageFolder(tmp_path / "images", small_guest=partial(build, packages_folder())).build_small(
        "small", "small"
    )
    seed = Seed(hostname="web-1", user_data="#!/bin/sh\necho told to $(hostname)\n")
    spec = Spec(image=image, memory_mib=128, seed=seed)
    hypervisor = host.make()
    await hypervisor.open(Told())
    await hypervisor.define(PERMIT, "one", spec)
    await hypervisor.power_on(PERMIT, "one", spec)
    await host.until_said("one", "interlock-guest: seed web-1")
    await host.until_said("one", "told to web-1")
    await host.until_said("one", "interlock-guest: agent listens")
    assert await hypervisor.agent_answers("one")
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()
