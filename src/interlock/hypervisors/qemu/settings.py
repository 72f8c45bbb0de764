"""What can be set of the QEMU adapter: the operator's numbers, and what the server adds. Nothing happens here."""

from __future__ import annotations

from pathlib import Path

from interlock.config import QemuConfig


class QemuSettings(QemuConfig, frozen=True, kw_only=True):
    """How QEMU is found, started, limited and waited for.

    A number that an operator may want to change is a field of `QemuConfig`, so that it can be: a test sees to that.
    """

    folder: Path
    """Where everything of the instances on this host is kept. One process at a time has it."""
    qemu_binary: str = "qemu-system-x86_64"
    """A name to be found on the PATH, or a path."""
    image_tool_binary: str = "qemu-img"
    accelerator: str = "auto"
    """`kvm`, `tcg`, or `auto`: see `accelerator`, which settles it."""
    user: str = "nobody"
    """As whom QEMU runs if we are root; otherwise it runs as we do."""
    group: str = "nogroup"
    qmp_timeout_ms: int = 3_000
    """How long QEMU may take to answer a command before it counts as not responding."""
