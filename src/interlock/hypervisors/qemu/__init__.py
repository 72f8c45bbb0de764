"""Real VMs: one unprivileged QEMU process each, driven over QMP, which outlive the server."""

from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.settings import QemuSettings

__all__ = ["QemuHypervisor", "QemuSettings"]
