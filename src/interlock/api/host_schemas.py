"""What `/v1/host` answers, as it goes over the wire."""

from __future__ import annotations

from typing import Literal

from interlock.api.inventory_schemas import Wire


class HostAmounts(Wire, frozen=True, kw_only=True):
    """So much of a host; null: without limit."""

    memory_mib: int | None
    vcpus: int | None
    """Virtual processors."""
    disk_mib: int | None


class HostStands(Wire, frozen=True, kw_only=True):
    """How the server's own host stands. What is promised is so whether or not it is used."""

    name: str
    hypervisor: Literal["qemu", "simulated"]
    accelerator: str | None
    """`tcg` or `kvm`; null where the hypervisor has none."""
    guests: int
    """How many instances it holds, running or not."""
    total: HostAmounts
    """What may be promised in all."""
    promised: HostAmounts
    free: HostAmounts
    """What may still be promised."""
    disk_free_mib: int | None
    """What the file system of its data folder has free for real; null where that is not known."""
