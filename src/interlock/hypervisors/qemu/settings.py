"""What can be set of the QEMU adapter: one value with a default and a unit for each number. Nothing happens here."""

from __future__ import annotations

from pathlib import Path

import msgspec


class QemuSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How QEMU is found, started, limited and waited for."""

    folder: Path
    """Where everything of the instances on this host is kept. One process at a time has it."""
    qemu_binary: str = "qemu-system-x86_64"
    """A name to be found on the PATH, or a path."""
    image_tool_binary: str = "qemu-img"
    accelerator: str = "tcg"
    """`tcg` runs anywhere; `kvm` needs /dev/kvm, readable and writable for `user`."""
    cpu_model: str = "kvm64"
    """With the accelerator `kvm`, `host` is the usual choice."""
    translation_cache_mib: int = 32
    """How much translated guest code `tcg` keeps per VM; counts on top of the guest's memory."""
    user: str = "nobody"
    """As whom QEMU runs if we are root; otherwise it runs as we do."""
    group: str = "nogroup"
    processes_max: int = 500
    """How many guests this host holds at most."""
    open_files_max: int = 512
    """Per VM: its disks, and one for each forwarded connection."""
    address_space_extra_mib: int = 2048
    """Address space that a VM's process may have beyond its guest's memory and translation cache."""
    hotplug_ports: int = 8
    """How many disks a guest can have, the root disk included."""
    console_bytes_max: int = 4 * 1024 * 1024
    """Where a serial console's log is cut: what is older is moved to `console.log.1`, replacing what was there."""
    console_check_interval_ms: int = 5_000
    """How often the size of the console logs is looked at while somebody is in charge of the guests."""
    qmp_timeout_ms: int = 3_000
    """How long QEMU may take to answer a command before it counts as not responding."""
    start_timeout_ms: int = 15_000
    """How long a new process may take until it answers."""
    detach_timeout_ms: int = 10_000
    """How long a guest may take to let go of a disk."""
    kill_timeout_ms: int = 10_000
    """How long the kernel may take to end a killed process (it may wait for a disk)."""
    image_tool_timeout_ms: int = 60_000
    """How long making a root disk may take."""
    reset_settle_ms: int = 2_000
    """Resets that follow one another within this time count as one: the firmware resets the machine itself as it
    starts, and cannot be told from the guest."""
