"""Creates the hypervisor of a configuration."""

from __future__ import annotations

import msgspec

from interlock.config import Config
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.hypervisors.simulated.adapter import SimulatedHypervisor
from interlock.hypervisors.simulated.host import SimulatedHost
from interlock.ports import Hypervisor


def hypervisor_of(config: Config) -> Hypervisor:
    """Return the hypervisor of this host."""
    if config.hypervisor == "simulated":
        return SimulatedHypervisor(SimulatedHost(folder=config.folder / "simulated"))
    return QemuHypervisor(
        QemuSettings(
            folder=config.folder / "guests",
            qemu_binary=config.qemu_binary,
            accelerator=config.accelerator,
            qmp_timeout_ms=config.qmp_timeout_ms,
            **msgspec.structs.asdict(config.qemu),
        )
    )
