"""Network interfaces plugged into real QEMU and out of it, and the seed that a guest finds beside its disks."""

from __future__ import annotations

import shutil
from typing import Any

import msgspec
import pytest

from conformance.hypervisor import GivenPermit
from conformance.qemu_workbench import QemuWorkbench
from interlock.core.errors import GuestNotFound, NotResponding, OperationRejected
from interlock.core.networks import mac_of
from interlock.core.records import Interface, Seed
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.guest import Guest
from interlock.images import cloud_init

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]

PERMIT = GivenPermit()
FIRST = Interface(id="n1", mac="52:54:00:00:00:01")
SECOND = Interface(id="n2", mac="52:54:00:00:00:02")


async def start(hypervisor: QemuHypervisor, host: QemuWorkbench, instance_id: str = "one", **more: Any) -> Guest:
    spec = msgspec.structs.replace(host.spec(), **more)
    await hypervisor.define(PERMIT, instance_id, spec)
    await hypervisor.power_on(PERMIT, instance_id, spec)
    await host.until_up(instance_id)
    guest = hypervisor.guest(instance_id)
    assert guest is not None
    return guest


async def networks(guest: Guest) -> str:
    return str(await guest.execute(PERMIT, "human-monitor-command", {"command-line": "info network"}))


async def test_an_interface_is_seen_by_its_address_and_leaves_nothing(
    hypervisor: QemuHypervisor, host: QemuWorkbench
) -> None:
    guest = await start(hypervisor, host)
    before = await networks(guest)
    for _ in range(2):
        await hypervisor.attach_interface(PERMIT, "one", FIRST)
    await hypervisor.attach_interface(PERMIT, "one", SECOND)
    assert (await hypervisor.inspect("one")).interfaces == ("n1", "n2")
    there = await networks(guest)
    assert FIRST.mac in there
    assert "network-n1" in there
    spec = host.instance_folder("one").spec()
    assert spec is not None
    assert spec.interfaces == (FIRST, SECOND)
    for interface_id in ("n1", "n1", "n2"):
        await hypervisor.detach_interface(PERMIT, "one", interface_id)
    assert (await hypervisor.inspect("one")).interfaces == ()
    assert await networks(guest) == before
    await hypervisor.attach_interface(PERMIT, "one", FIRST)
    assert (await hypervisor.inspect("one")).interfaces == ("n1",)


async def test_an_attachment_that_was_cut_short_is_completed(hypervisor: QemuHypervisor, host: QemuWorkbench) -> None:
    guest = await start(hypervisor, host)
    await guest.execute(PERMIT, "netdev_add", {"type": "user", "id": "network-n1"})
    await hypervisor.attach_interface(PERMIT, "one", FIRST)
    assert (await hypervisor.inspect("one")).interfaces == ("n1",)


async def test_a_guest_that_holds_on_to_an_interface_can_be_asked_again(
    hypervisor: QemuHypervisor, host: QemuWorkbench
) -> None:
    await start(hypervisor, host)
    await hypervisor.attach_interface(PERMIT, "one", FIRST)
    await host.guest_ignores("one")
    with pytest.raises(NotResponding, match="did not release the interface n1"):
        await hypervisor.detach_interface(PERMIT, "one", "n1")
    assert (await hypervisor.inspect("one")).interfaces == ("n1",)
    await host.guest_cooperates("one")
    await hypervisor.detach_interface(PERMIT, "one", "n1")
    assert (await hypervisor.inspect("one")).interfaces == ()


async def test_a_guest_is_started_with_its_interfaces_and_an_address_of_its_own(
    hypervisor: QemuHypervisor, host: QemuWorkbench
) -> None:
    one = await start(hypervisor, host, interfaces=(FIRST,), disks=(host.disk("v1"),))
    two = await start(hypervisor, host, "two")
    assert (await hypervisor.inspect("one")).interfaces == ("n1",)
    assert mac_of("one") != mac_of("two")
    for guest, instance_id in ((one, "one"), (two, "two")):
        assert mac_of(instance_id) in await networks(guest)
        assert mac_of(instance_id).startswith("52:54:00:")
    await hypervisor.detach_interface(PERMIT, "one", "n1")
    assert (await hypervisor.inspect("one")).disks == ("v1",)


async def test_what_cannot_be_plugged_in_is_refused(hypervisor: QemuHypervisor, host: QemuWorkbench) -> None:
    with pytest.raises(GuestNotFound):
        await hypervisor.attach_interface(PERMIT, "one", FIRST)
    await start(hypervisor, host)
    for bad in (Interface(id="n1", mac="52:54:00,netdev=x"), Interface(id="a,b", mac=FIRST.mac)):
        with pytest.raises(OperationRejected, match="cannot be used"):
            await hypervisor.attach_interface(PERMIT, "one", bad)
    await hypervisor.attach_interface(PERMIT, "one", FIRST)
    for number in range(host.settings.hotplug_ports - 1):
        await hypervisor.attach_disk(PERMIT, "one", host.disk(f"v{number}"))
    with pytest.raises(OperationRejected, match="no free port"):
        await hypervisor.attach_interface(PERMIT, "one", SECOND)
    assert (await hypervisor.inspect("one")).interfaces == ("n1",)


async def test_the_seed_is_a_disk_of_its_own_that_goes_with_the_spec(
    hypervisor: QemuHypervisor, host: QemuWorkbench
) -> None:
    seed = Seed(hostname="web1")
    guest = await start(hypervisor, host, seed=seed, disks=(host.disk("v1"),))
    assert (await hypervisor.inspect("one")).disks == ("v1",), "it is none of the guest's disks"
    (block,) = [one for one in await guest.query("query-block") if "/seed/" in one.get("qdev", "")]
    assert block["inserted"]["ro"] is True
    disk = host.instance_folder("one").seed_disk
    assert disk.read_bytes() == cloud_init.build(seed, "one")
    inode = disk.stat().st_ino
    await hypervisor.define(PERMIT, "one", msgspec.structs.replace(host.spec(), seed=seed))
    assert disk.stat().st_ino == inode
    await hypervisor.define(PERMIT, "one", msgspec.structs.replace(host.spec(), seed=Seed(hostname="web2")))
    assert disk.read_bytes() == cloud_init.build(Seed(hostname="web2"), "one")
    await hypervisor.define(PERMIT, "one", host.spec())
    assert not disk.exists()
    huge = Seed(hostname="web1", user_data="#" * (2 << 20))
    with pytest.raises(OperationRejected, match="limit"):
        await hypervisor.define(PERMIT, "one", msgspec.structs.replace(host.spec(), seed=huge))
