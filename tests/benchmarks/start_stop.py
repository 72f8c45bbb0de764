"""Starting and stopping a VM: what each layer of its confinement costs.

The same guest is started and powered off with one more layer each time, in turn, so that a busy machine slows all.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.nano_guest import MEMORY_MIB, nano_guest
from interlock.bench import run
from interlock.confinement.sandbox import Namespaces
from interlock.core.records import Spec
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.process.qemu_process import shared_account
from interlock.hypervisors.qemu.process_registry import ProcessRegistry
from interlock.hypervisors.qemu.settings import QemuSettings

_ROUNDS: Final = 20
_MS: Final = 1000
_VM: Final = "bench"
Layer = Callable[[ProcessRegistry], None]


def measure(folder: Path, scale: float) -> dict[str, float]:
    """Return the median times in milliseconds, by layer: `bare`, `own_user`, `namespaces`, `cgroup`.

    Each layer includes those before it; `cgroup` is how VMs are started. A layer that this host lacks costs nothing.
    """
    figures: dict[str, float] = run(_measure(folder, max(2, int(_ROUNDS * scale))))
    return figures


class _Always:
    fence = 0

    def check(self) -> None:
        """Return: nothing else works on this VM."""


async def _measure(folder: Path, rounds: int) -> dict[str, float]:
    hypervisor = QemuHypervisor(QemuSettings(folder=folder / "guests", accelerator="tcg", display=False))
    spec = Spec(image=nano_guest(folder), memory_mib=MEMORY_MIB)
    permit, times = _Always(), defaultdict[str, list[float]](list)
    await hypervisor.open(lambda _: None)
    try:
        layers = _layers(hypervisor.registry)
        await hypervisor.define(permit, _VM, spec)
        for _ in range(rounds):
            for name, select in layers.items():
                select(hypervisor.registry)
                began = time.perf_counter()
                await hypervisor.power_on(permit, _VM, spec)
                started = time.perf_counter()
                await hypervisor.power_off(permit, _VM)
                times[f"start_{name}_ms"].append((started - began) * _MS)
                times[f"stop_{name}_ms"].append((time.perf_counter() - started) * _MS)
    finally:
        await hypervisor.undefine(permit, _VM)
        await hypervisor.close()
    figures = {name: statistics.median(values) for name, values in times.items()}
    for what in ("start", "stop"):
        figures[f"extra_{what}_ms"] = figures[f"{what}_cgroup_ms"] - figures[f"{what}_bare_ms"]
    return figures


def _layers(registry: ProcessRegistry) -> dict[str, Layer]:
    own, users, namespaces, groups = registry.account, registry.users, registry.namespaces, registry.groups
    shared = shared_account(registry.settings)

    def confine(*, by_user: bool, in_namespaces: bool, in_groups: bool) -> Layer:
        def select(chosen: ProcessRegistry) -> None:
            chosen.users, chosen.account = (users, own) if by_user else (None, shared)
            chosen.namespaces = namespaces if in_namespaces else Namespaces.NONE
            chosen.groups = groups if in_groups else None

        return select

    return {
        "bare": confine(by_user=False, in_namespaces=False, in_groups=False),
        "own_user": confine(by_user=True, in_namespaces=False, in_groups=False),
        "namespaces": confine(by_user=True, in_namespaces=True, in_groups=False),
        "cgroup": confine(by_user=True, in_namespaces=True, in_groups=True),
    }
