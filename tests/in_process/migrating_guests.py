"""Simulated guests that go from one host to another as they run, and are on their way for as long as a test wants."""

from __future__ import annotations

import asyncio
from typing import Any

from interlock.core.errors import GuestNotFound
from interlock.core.records import Spec
from interlock.core.states import PowerState
from interlock.hypervisors.simulated import SimulatedHypervisor
from interlock.ports import Permit, TransferReport
from interlock.ports.migration import IncomingState, MigrationEndpoint


class TravellingHypervisor(SimulatedHypervisor):
    """Implements `ports.migration.MigrationPort`: a guest arrives when `arrives` is set, or completion is forced."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.receiving = asyncio.Event()
        """Set once a guest is to be awaited here; it is as soon as `lets_in` is set, which it is from the beginning."""
        self.lets_in = asyncio.Event()
        self.lets_in.set()
        self.sending = asyncio.Event()
        """Set once a guest is on its way from here."""
        self.arrives = asyncio.Event()
        self.hurried = asyncio.Event()
        self._awaited: set[str] = set()

    async def machine_kind(self, instance_id: str) -> str:
        return f"simulated {self._calls.guest(instance_id).instance_id}"

    async def receive_guest(self, permit: Permit, instance_id: str, spec: Spec, machine: str) -> MigrationEndpoint:
        assert machine == f"simulated {instance_id}"
        self.receiving.set()
        await self.lets_in.wait()
        permit.check()
        self.host.start(self._calls.guest(instance_id), spec, PowerState.PAUSED)
        self._awaited.add(instance_id)
        return MigrationEndpoint(host="simulated", port=1, secret="x")

    async def send_guest(
        self, permit: Permit, instance_id: str, passage: MigrationEndpoint, converge_ms: int, report: TransferReport
    ) -> None:
        assert (passage.host, converge_ms > 0) == ("simulated", True)
        report(0, 2)
        self.sending.set()
        ways = [asyncio.create_task(event.wait()) for event in (self.arrives, self.hurried)]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
        permit.check()
        self.host.pause_for_memory(self._calls.guest(instance_id))

    async def receive_guest_tls(
        self, permit: Permit, instance_id: str, spec: Spec, machine: str, source: str
    ) -> MigrationEndpoint:
        raise AssertionError(f"{source}: agents in memory have no certificates")

    async def send_guest_tls(
        self,
        permit: Permit,
        instance_id: str,
        endpoint: MigrationEndpoint,
        target: str,
        converge_ms: int,
        report: TransferReport,
    ) -> None:
        raise AssertionError(f"{target}: agents in memory have no certificates")

    async def force_converge(self, permit: Permit, instance_id: str) -> None:
        permit.check()
        self._calls.guest(instance_id)
        self.hurried.set()

    async def arrival(self, instance_id: str) -> IncomingState:
        return IncomingState.AWAITED if instance_id in self._awaited else IncomingState.NONE

    async def await_guest(self, instance_id: str) -> None:
        if instance_id not in self._awaited:
            raise GuestNotFound(f"Nobody awaits {instance_id}.")

    async def complete_incoming(self, permit: Permit, instance_id: str) -> None:
        await self.unpause(permit, instance_id)
        self._awaited.discard(instance_id)

    async def resume_source(self, permit: Permit, instance_id: str) -> None:
        permit.check()
        self.host.resume_from_memory(self._calls.guest(instance_id))
