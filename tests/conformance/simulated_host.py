"""The simulated hypervisor as a host that the conformance suite can be run against, and what it does to its guests."""

from __future__ import annotations

from pathlib import Path

from interlock.core.records import Disk, Image, Spec
from interlock.core.states import PowerState
from interlock.hypervisors.simulated import SimulatedHost, SimulatedHypervisor
from interlock.ports import Hypervisor
from waiting import PATIENCE_S

IMAGE = Image(id="image", name="image", kind="disk", path="simulated:image", size_bytes=1 << 20, sha256="0" * 64)
"""An image that a simulated guest boots; there is no file of it."""


class SimulatedUnderTest:
    """Satisfies `conformance.hypervisor.HypervisorUnderTest`.

    Args:
        folder: where the host keeps its guests. With a folder each adapter gets a host of its own that reads them
            from there, as a restarted process does; without one all share the host in memory.
        answer_timeout_s: how long the adapters wait for an answer, in seconds.
    """

    patience_s = PATIENCE_S
    notice_s = 10.0

    def __init__(self, folder: Path | None = None, answer_timeout_s: float = 0.01) -> None:
        self._folder = folder
        self._answer_timeout_s = answer_timeout_s
        self.host = SimulatedHost(folder=folder)

    def make(self) -> Hypervisor:
        if self._folder is not None:
            self.host = SimulatedHost(folder=self._folder)
        return SimulatedHypervisor(self.host, answer_timeout_s=self._answer_timeout_s, liveness_timeout_ms=100)

    async def abandon(self, hypervisor: Hypervisor) -> None:
        assert isinstance(hypervisor, SimulatedHypervisor)
        hypervisor.crash()

    def spec(self) -> Spec:
        return Spec(image=IMAGE)

    def disk(self, disk_id: str) -> Disk:
        return Disk(id=disk_id, path=f"simulated:volumes/{disk_id}")

    async def mark_root(self, spec: Spec, instance_id: str, mark: int) -> None:
        roots = self.host.guests[instance_id].roots
        roots[spec.root] = roots[spec.root].plus(f"mark {mark}")

    async def root_mark(self, spec: Spec, instance_id: str) -> int | None:
        content = self.host.guests[instance_id].roots.get(spec.root)
        if content is None:
            return None
        return max([0, *(int(word.removeprefix("mark ")) for word in content.written[-1:])])

    async def until_up(self, instance_id: str) -> None:
        assert self.host.guests[instance_id].power is PowerState.RUNNING

    async def incarnation(self, instance_id: str) -> object:
        guest = self.host.guests.get(instance_id)
        return None if guest is None else guest.starts

    async def remains(self, instance_id: str) -> list[str]:
        files = [] if self._folder is None else [path.name for path in self._folder.iterdir()]
        return [*files, *(["a guest"] if instance_id in self.host.guests else [])]

    async def guest_power_off(self, instance_id: str) -> None:
        assert self.host.guest_powers_off(instance_id)

    async def guest_reset(self, instance_id: str) -> None:
        assert self.host.guest_resets(instance_id)

    async def guest_panic(self, instance_id: str) -> None:
        assert self.host.guest_panics(instance_id)

    async def guest_ignores(self, instance_id: str) -> None:
        self.host.ignore_power_button(instance_id)

    async def kill(self, instance_id: str) -> None:
        assert self.host.vanish(instance_id)

    async def freeze(self, instance_id: str) -> None:
        assert self.host.freeze(instance_id)

    async def thaw(self, instance_id: str) -> None:
        assert self.host.thaw(instance_id)
