"""A machine whose firmware has not been round yet: what is plugged in where is known all the same."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from conformance.hypervisor import GivenPermit
from conformance.qemu_workbench import QemuWorkbench
from interlock.core.records import Interface
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.guest import Guest

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]

PERMIT = GivenPermit()


def nobody_reads(done: int, total: int | None = None) -> None:
    """A report to nobody."""
    del done, total


async def reset_and_standing_still(hypervisor: QemuHypervisor) -> Guest:
    """The guest, with nothing known behind any port until the firmware has been there again."""
    await hypervisor.pause(PERMIT, "one")
    guest = hypervisor.guest("one")
    assert guest is not None
    await guest.execute(PERMIT, "system_reset")
    found = await guest.query("query-pci")
    assert not any(device.get("pci_bridge", {}).get("devices") for bus in found for device in bus["devices"])
    return guest


async def test_memory_is_saved_with_every_device_in_its_place(hypervisor: QemuHypervisor, host: QemuWorkbench) -> None:
    first, second, interface = host.disk("v1"), host.disk("v2"), Interface(id="i1", mac="52:54:00:00:00:01")
    await hypervisor.define(PERMIT, "one", host.spec())
    await hypervisor.power_on(PERMIT, "one", host.spec())
    await host.until_up("one")
    guest = await reset_and_standing_still(hypervisor)
    await hypervisor.attach_disk(PERMIT, "one", first)
    await hypervisor.attach_interface(PERMIT, "one", interface)
    await hypervisor.attach_disk(PERMIT, "one", second)
    before = await guest.device_ports()
    assert len(set(before.values())) == len(before) == 3
    spec = guest.folder.spec()
    assert spec is not None
    await hypervisor.save_memory(PERMIT, "one", nobody_reads)
    await hypervisor.restore_memory(PERMIT, "one", spec, nobody_reads)
    restored = hypervisor.guest("one")
    assert restored is not None
    assert await restored.device_ports() == before


async def test_a_guest_is_not_reset_while_its_firmware_waits_for_a_processor(
    hypervisor: QemuHypervisor, host: QemuWorkbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await hypervisor.define(PERMIT, "one", host.spec())
    await hypervisor.power_on(PERMIT, "one", host.spec())
    guest, loop = hypervisor.guest("one"), asyncio.get_running_loop()
    assert guest is not None
    began, busy_s = loop.time(), 0.5
    monkeypatch.setattr(guest.process, "run_queue_wait_s", lambda: min(loop.time() - began, busy_s))
    guest.note_boot()
    await guest.wait_past_firmware()
    assert loop.time() - began >= busy_s + host.settings.firmware_ms / 1000 - 0.01
    before = loop.time()
    await guest.wait_past_firmware()
    assert loop.time() - before < host.settings.firmware_ms / 1000


async def test_the_wait_of_threads_for_a_processor_is_read(hypervisor: QemuHypervisor, host: QemuWorkbench) -> None:
    await hypervisor.define(PERMIT, "one", host.spec())
    await hypervisor.power_on(PERMIT, "one", host.spec())
    guest = hypervisor.guest("one")
    assert guest is not None
    assert guest.process.run_queue_wait_s() > 0
