"""Hotplug against a guest that answers QMP from a script: which commands are sent, and what is on record afterwards."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from conformance.hypervisor import GivenPermit
from interlock.core.errors import GuestNotFound, NotResponding, OperationRejected
from interlock.core.records import Image, Interface, Spec
from interlock.hypervisors.qemu.command_line import is_port
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.hotplug import Hotplug
from interlock.hypervisors.qemu.network.taps import Taps
from interlock.hypervisors.qemu.network.user_networks import UserNetworks
from interlock.hypervisors.qemu.process_registry import ProcessRegistry
from interlock.hypervisors.qemu.qmp.waiters import UnplugWaiters
from interlock.hypervisors.qemu.settings import QemuSettings
from waiting import PATIENCE_S

PERMIT = GivenPermit()
INTERFACE = Interface(id="i1", mac="52:54:00:00:00:01")


class ScriptedGuest:
    """What hotplug needs of a guest: devices in ports, and commands that are executed or rejected."""

    def __init__(self, folder: InstanceFolder, settings: QemuSettings) -> None:
        self.instance_id = "one"
        self.folder = folder
        self.settings = settings
        self.unplugs = UnplugWaiters()
        self.ports: dict[str, str | None] = {"port-0": None}
        self.executed: list[str] = []
        self.rejects: set[str] = set()
        self.releases = True
        self.ended = False

    async def require_running(self) -> None:
        """It runs."""

    def require_process(self) -> None:
        if self.ended:
            raise GuestNotFound("It has ended.")

    async def devices(self) -> frozenset[str]:
        return frozenset({*self.ports, *filter(None, self.ports.values())})

    async def device_ports(self) -> dict[str, str]:
        return {device: port for port, device in self.ports.items() if device is not None}

    async def execute(self, permit: GivenPermit, command: str, arguments: dict[str, Any]) -> None:
        permit.check()
        self.executed.append(command)
        if command in self.rejects:
            raise OperationRejected(f"{command} is rejected.")
        match command:
            case "device_add":
                assert is_port(arguments["bus"])
                self.ports[arguments["bus"]] = arguments["id"]
            case "device_del" if self.releases:
                self.ports = {
                    port: None if device == arguments["id"] else device for port, device in self.ports.items()
                }
                self.unplugs.resolve(arguments["id"], released=True)
            case "device_del" if self.ended:
                self.unplugs.resolve_all()


def nothing_lost(_guest: Guest, _name: str) -> None:
    """Leave the networks alone."""


async def ignore(_guest: Guest) -> None:
    """Adopt nothing."""


@pytest.fixture
def registry(tmp_path: Path) -> ProcessRegistry:
    (tmp_path / "vms").mkdir()
    return ProcessRegistry(
        QemuSettings(folder=tmp_path, detach_timeout_ms=10),
        on_adopted=ignore,
        on_disconnected=nothing_lost,
        on_ended=ignore,
    )


@pytest.fixture
def guest(registry: ProcessRegistry) -> ScriptedGuest:
    folder = registry.folder("one")
    folder.make(PERMIT)
    folder.write_spec(Spec(image=Image(id="i", name="i", path="/absent", kind="kernel", size_bytes=1, sha256="0")))
    guest = ScriptedGuest(folder, registry.settings)
    registry._guests["one"] = cast("Guest", guest)
    return guest


def recorded(guest: ScriptedGuest) -> tuple[str, ...]:
    spec = guest.folder.spec()
    assert spec is not None
    return tuple(interface.id for interface in spec.interfaces)


async def test_an_interface_is_plugged_once_and_recorded(registry: ProcessRegistry, guest: ScriptedGuest) -> None:
    hotplug = Hotplug(registry, UserNetworks(registry, separate=False), Taps(registry))
    for _ in range(2):
        await hotplug.attach_interface(PERMIT, "one", INTERFACE)
    assert guest.executed == ["netdev_del", "netdev_add", "device_add"]
    assert recorded(guest) == ("i1",)


async def test_a_plug_that_qemu_rejects_leaves_no_network_and_no_record(
    registry: ProcessRegistry, guest: ScriptedGuest
) -> None:
    guest.rejects = {"device_add"}
    with pytest.raises(OperationRejected, match="device_add"):
        await Hotplug(registry, UserNetworks(registry, separate=False), Taps(registry)).attach_interface(
            PERMIT, "one", INTERFACE
        )
    assert guest.executed == ["netdev_del", "netdev_add", "device_add", "netdev_del"]
    assert recorded(guest) == ()


async def test_without_a_free_port_nothing_is_plugged(registry: ProcessRegistry, guest: ScriptedGuest) -> None:
    guest.ports = {"port-0": "disk-root"}
    with pytest.raises(OperationRejected, match="no free port"):
        await Hotplug(registry, UserNetworks(registry, separate=False), Taps(registry)).attach_interface(
            PERMIT, "one", INTERFACE
        )
    assert guest.executed == []


async def test_an_interface_that_the_guest_releases_is_off_the_record(
    registry: ProcessRegistry, guest: ScriptedGuest
) -> None:
    hotplug = Hotplug(registry, UserNetworks(registry, separate=False), Taps(registry))
    await hotplug.attach_interface(PERMIT, "one", INTERFACE)
    guest.executed.clear()
    await hotplug.detach_interface(PERMIT, "one", "i1")
    assert guest.executed == ["device_del", "netdev_del"]
    assert recorded(guest) == ()


@pytest.mark.parametrize("pending", [False, True])
async def test_an_interface_that_the_guest_does_not_release_stays_on_record(
    registry: ProcessRegistry, guest: ScriptedGuest, *, pending: bool
) -> None:
    """QEMU rejects a second unplug while the first is pending; the wait is the same."""
    hotplug = Hotplug(registry, UserNetworks(registry, separate=False), Taps(registry))
    await hotplug.attach_interface(PERMIT, "one", INTERFACE)
    guest.releases, guest.rejects = False, {"device_del"} if pending else set()
    with pytest.raises(NotResponding, match="did not release the interface i1"):
        await hotplug.detach_interface(PERMIT, "one", "i1")
    assert recorded(guest) == ("i1",)
    assert not guest.unplugs.resolve("interface-i1", released=True), "nobody waits any more"


async def test_the_end_of_the_guest_ends_the_wait(registry: ProcessRegistry, guest: ScriptedGuest) -> None:
    hotplug = Hotplug(registry, UserNetworks(registry, separate=False), Taps(registry))
    await hotplug.attach_interface(PERMIT, "one", INTERFACE)
    guest.releases, guest.ended = False, True
    with pytest.raises(GuestNotFound):
        async with asyncio.timeout(PATIENCE_S):
            await hotplug.detach_interface(PERMIT, "one", "i1")


async def test_the_root_disk_stays(registry: ProcessRegistry, guest: ScriptedGuest) -> None:
    with pytest.raises(OperationRejected, match="root disk cannot be detached"):
        await Hotplug(registry, UserNetworks(registry, separate=False), Taps(registry)).detach_disk(
            PERMIT, "one", "root"
        )
    assert guest.executed == []
