"""The hypervisor port on QEMU: one process per guest, composed of parts.

Each method of the port is that of a part; only `open` and `close` involve several. There is no thread, timer or polling
per guest: pidfds, pipes and sockets wake the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, final

from interlock.hypervisors.certificates.host_certificate import HostCertificate
from interlock.hypervisors.qemu.consoles import Consoles
from interlock.hypervisors.qemu.disks.host_disks import HostDisks
from interlock.hypervisors.qemu.files.instance_folder import NetworkProcess
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.guest_agent import GuestAgents, thaw_forgotten
from interlock.hypervisors.qemu.hotplug import Hotplug
from interlock.hypervisors.qemu.launch import Launcher
from interlock.hypervisors.qemu.lifecycle import Lifecycle
from interlock.hypervisors.qemu.liveness import LivenessCheck
from interlock.hypervisors.qemu.memory.guest_memory import GuestMemory
from interlock.hypervisors.qemu.migration.live_migration import LiveMigration
from interlock.hypervisors.qemu.network.taps import Taps
from interlock.hypervisors.qemu.network.user_networks import UserNetworks
from interlock.hypervisors.qemu.process_registry import ProcessRegistry
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.ports import HypervisorEvent
from interlock.ports.hosts import NetworkAbility, Protection


@final
class QemuHypervisor:
    """Runs guests as QEMU processes that outlive it. See `ports.Hypervisor` and `ports.MigrationPort`.

    `certificate` is this host's, for migrations.

    It cannot be extended by inheritance: a part calls the methods of other parts, not those of this object.
    """

    def __init__(self, settings: QemuSettings, certificate: HostCertificate | None = None) -> None:  # noqa: PLR0915 - a line for each method
        self.registry = registry = ProcessRegistry(settings, self._adopted, self._disconnected, self._ended)
        self._networks, self._taps = networks, taps = UserNetworks(registry), Taps(registry)
        self._consoles = consoles = Consoles(registry)
        self.open_console = consoles.open_console
        self.open_display = consoles.open_display
        self.screenshot = consoles.screenshot
        self.console_tail = consoles.console_tail
        self._launcher = launcher = Launcher(registry, consoles, networks, taps)
        self._migration = migration = LiveMigration(registry, launcher, certificate)
        self.machine_kind = migration.machine_kind
        self.receive_guest = migration.receive_guest
        self.send_guest = migration.send_guest
        self.receive_guest_tls = migration.receive_guest_tls
        self.send_guest_tls = migration.send_guest_tls
        self.force_converge = migration.force_converge
        self.arrival = migration.arrival
        self.await_guest = migration.await_guest
        self.complete_incoming = migration.complete_incoming
        self.resume_source = migration.resume_source

        lifecycle = Lifecycle(registry, launcher, migration, taps)
        self.inspect = lifecycle.inspect
        self.wait_powered_off = lifecycle.wait_powered_off
        self.define = lifecycle.define
        self.undefine = lifecycle.undefine
        self.power_on = lifecycle.power_on
        self.power_off = lifecycle.power_off
        self.press_power_button = lifecycle.press_power_button
        self.reset = lifecycle.reset
        self.pause = lifecycle.pause
        self.unpause = lifecycle.unpause

        memory = GuestMemory(registry, launcher)
        self.save_memory = memory.save_memory
        self.restore_memory = memory.restore_memory
        self.forget_memory = memory.forget_memory
        self.dump_memory = memory.dump_memory

        hotplug = Hotplug(registry, networks, taps)
        self.attach_disk = hotplug.attach_disk
        self.detach_disk = hotplug.detach_disk
        self.swap_disk = hotplug.swap_disk
        self.attach_interface = hotplug.attach_interface
        self.update_interface = hotplug.update_interface
        self.detach_interface = hotplug.detach_interface

        disks = HostDisks(registry)
        self.copy_disk = disks.copy_disk
        self.copy_root_disk = disks.copy_root_disk
        self.root_disk_from = disks.root_disk_from
        self.drop_root_disks = disks.drop_root_disks
        self.export_root_disk = disks.export_root_disk

        agents = GuestAgents(registry)
        self.agent_answers = agents.agent_answers
        self.agent_interfaces = agents.agent_interfaces
        self.ask_shutdown = agents.ask_shutdown
        self.set_password = agents.set_password
        self._liveness = LivenessCheck(registry)

    @property
    def accelerator(self) -> str:
        """What executes guest code: `kvm` or `tcg`; `auto` before `open`."""
        return self.registry.settings.accelerator

    @property
    def why_not_kvm(self) -> str:
        """Why guests do not run with KVM, for people; empty if they do, and before `open`."""
        return self.registry.why_not_kvm

    @property
    def protections(self) -> tuple[Protection, ...]:
        """What confines the guests on this host; empty before `open`."""
        return self.registry.protections

    @property
    def networks(self) -> tuple[NetworkAbility, ...]:
        """The kinds of network that guests on this host can have; empty before `open`."""
        return self._taps.abilities

    async def open(self, listener: Callable[[HypervisorEvent], None]) -> None:
        await self.registry.open(listener)
        await self._networks.open()
        await self._taps.open()
        if len(self.registry):
            self._consoles.limit_log_sizes()
        self._liveness.start()

    def _disconnected(self, guest: Guest, network: str) -> None:
        self._networks.lost(guest, network)

    def _ended(self, guest: Guest) -> Coroutine[Any, Any, None]:
        # Read at once: whoever waits for this end may delete the folder next.
        return self._end_networks(guest.instance_id, guest.folder.network_processes())

    async def _end_networks(self, instance_id: str, processes: Sequence[NetworkProcess]) -> None:
        try:
            await self._networks.ended(instance_id, processes)
        finally:
            await self._taps.ended(instance_id)

    async def _adopted(self, guest: Guest) -> None:
        await self._networks.adopt(guest)
        await thaw_forgotten(guest)

    async def known(self) -> frozenset[str]:
        return await self.registry.known()

    def guest(self, instance_id: str) -> Guest | None:
        """Return the guest of an instance, for tests and measurements: commands to it bypass the fence."""
        return self.registry.find(instance_id)

    async def close(self) -> None:
        self._liveness.stop()
        await self._migration.close()
        await self._networks.close()
        await self.registry.close()
        await self._taps.close()
        self._launcher.close()
