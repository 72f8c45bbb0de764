"""The settings of the QEMU adapter: those of the configuration, and those that the server adds."""

from __future__ import annotations

from pathlib import Path

from interlock.config import QemuConfig


class QemuSettings(QemuConfig, frozen=True, kw_only=True):
    """Paths, limits and timeouts of QEMU. Numbers that an operator may want to change are fields of `QemuConfig`."""

    folder: Path
    """The VM folder of this host. One process at a time has it open."""
    qemu_binary: str = "qemu-system-x86_64"
    """A name that is found in PATH, or a path."""
    image_tool_binary: str = "qemu-img"
    accelerator: str = "auto"
    """`kvm`, `tcg`, or `auto`: see `process.accelerator`, which resolves it."""
    user: str = "nobody"
    """The user that QEMU runs as if this process is root; otherwise it runs as this process does."""
    group: str = "nogroup"
    qmp_timeout_ms: int = 3_000
    """Timeout of a QMP command, in milliseconds."""
