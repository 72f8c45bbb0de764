"""Creates the hypervisor of a configuration, and logs what confines its guests."""

from __future__ import annotations

import msgspec
import structlog

from interlock.config import Config
from interlock.hypervisors.certificates.host_certificate import HostCertificate
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.hypervisors.simulated.adapter import SimulatedHypervisor
from interlock.hypervisors.simulated.host import SimulatedHost
from interlock.ports import Hypervisor
from interlock.ports.hosts import NetworkAbility, Protection

_LOG = structlog.get_logger(__name__)


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
        ),
        HostCertificate(config.certificates),
    )


def protections_of(hypervisor: Hypervisor) -> tuple[Protection, ...]:
    """Return what confines the guests of an open hypervisor; empty for simulated ones."""
    return hypervisor.protections if isinstance(hypervisor, QemuHypervisor) else ()


def networks_of(hypervisor: Hypervisor) -> tuple[NetworkAbility, ...]:
    """Return the kinds of network that an open hypervisor has for its guests."""
    return hypervisor.networks if isinstance(hypervisor, QemuHypervisor | SimulatedHypervisor) else ()


def log_protections(hypervisor: Hypervisor) -> None:
    """Log which protections of guests are on and which are off, as a warning if some are off."""
    found = protections_of(hypervisor)
    off = {one.name: one.detail for one in found if not one.on}
    if found:
        log = _LOG.warning if off else _LOG.info
        log("protections selected", on=[one.name for one in found if one.on], off=off)
