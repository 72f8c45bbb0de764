"""A whole server without its door, in this process, on a host that outlives it.

For tests and experiments that look at everything at once: store, gate, drivers and host. It can be crashed, in the
sense that matters: whatever its workers were doing stops between two awaits and is never reported.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from in_process.trusting_verifier import TrustingProver
from in_process.virtual_time import LoopClock, VirtualTimeLoop
from interlock.config import Config, DriverConfig, QemuConfig
from interlock.core.operations import Operation
from interlock.core.records import Admitted, Denied, Event, Image, Instance, Request
from interlock.core.roles import Role
from interlock.hypervisors.simulated import SimulatedHost, SimulatedHypervisor
from interlock.ports import Volume
from interlock.server import Server
from interlock.service.auth import Caller
from interlock.service.request_models import NewInstance, NewRequest
from interlock.service.submission_results import SubmissionResult
from waiting import PATIENCE_S

IMAGE = Image(id="nothing", name="nothing", kind="kernel", path="/nowhere", size_bytes=0, sha256="0" * 64)
QUICK = DriverConfig(
    guest_shutdown_timeout_ms=300, guest_shutdown_retry_ms=100, heartbeat_ms=50, inspect_retry_ms=10, drain_ms=1
)
"""Time-outs for tests: short enough to be waited for, long enough not to be met by accident."""

WAIT_MS = round(PATIENCE_S * 1000)


class Embedded:
    """One server after the other on one folder and one simulated host, and the verbs of one caller."""

    def __init__(
        self,
        folder: Path,
        host: SimulatedHost,
        policy: str = "standard",
        settings: Mapping[str, Any] | None = None,
        *,
        kind: Callable[..., SimulatedHypervisor] = SimulatedHypervisor,
        **simulated: Any,
    ) -> None:
        """`settings` are of `Config`; `kind` makes what drives the host of each server, and `simulated` goes to it."""
        self.host = host
        self.caller = Caller(token_id="tester", name="tester", role=Role.ADMIN, project="default")
        self._config = Config(
            data_dir=str(folder),
            hypervisor="simulated",
            host="here",
            policy=policy,
            **{"driver": QUICK, "qemu": QemuConfig(migration_unencrypted=True), **(settings or {})},
        )
        self._kind = kind
        self._simulated = simulated
        self.server: Server

    async def start(self) -> None:
        """Start a server; the one before it must have been closed or crashed."""
        loop = asyncio.get_running_loop()
        clock = LoopClock(loop) if isinstance(loop, VirtualTimeLoop) else None
        self.server = Server(self._config, self._kind(self.host, **self._simulated), clock, prover=TrustingProver())
        await self.server.open()
        if not await self.server.store.images.all():
            await self.put_image(IMAGE)

    async def crash(self) -> None:
        """End the server between two awaits of whatever it is doing. Nothing in flight is reported."""
        await self.server.close()

    async def put_image(self, image: Image) -> Image:
        """Keep an image in the record, with a file where its files are looked for; the image as it is kept."""
        path = self.server.folder / "images" / f"{image.id}.{image.kind}"
        path.touch()
        kept = msgspec.structs.replace(image, path=str(path))
        await self.server.store.images.put(kept)
        return kept

    async def create(self, name: str, *, start: bool = True, image: str = IMAGE.name) -> str:
        """Create an instance, wait until it has come up, and give its id."""
        answer = await self.server.instances.create(self.caller, NewInstance(name=name, image=image, start=start))
        if start:
            await self.ended(admitted(answer))
        return answer.instance.id

    async def submit(self, reference: str, operation: Operation, **parameters: Any) -> SubmissionResult:
        wish = NewRequest(operation=operation, parameters=parameters)
        return await self.server.instances.submit(self.caller, reference, wish)

    async def carry_out(self, reference: str, operation: Operation, **parameters: Any) -> Request:
        """Submit, which must be admitted, and wait for the end."""
        return await self.ended(admitted(await self.submit(reference, operation, **parameters)))

    async def ended(self, request: Request) -> Request:
        """The request as it is when it has ended, or when more time has passed than that should take."""
        return await self.server.instances.request(self.caller, request.id, WAIT_MS)

    async def until(self, instance_id: str, **fields: Any) -> Instance:
        """The instance as soon as it has these values, such as `vm_state=VmState.STOPPED` or `task_state="none"`.

        Raises:
            TimeoutError: it does not come to have them; says what it has.
        """

        async def so() -> Instance | None:
            instance = await self.server.store.instance(instance_id)
            assert instance is not None
            return instance if all(getattr(instance, name) == value for name, value in fields.items()) else None

        instance = await self.server.instances.watch.until(instance_id, so, WAIT_MS)
        if instance is None:
            raise TimeoutError(f"expected {fields}, found {await self.server.store.instance(instance_id)}")
        return instance

    async def events(self, instance_id: str) -> tuple[Event, ...]:
        return await self.server.store.events(0, 100_000, instance_id=instance_id)

    async def until_event(self, instance_id: str, kind: str) -> Event:
        """The first event of that kind, as soon as there is one. Raises `TimeoutError`."""

        async def there() -> Event | None:
            return next((event for event in await self.events(instance_id) if event.kind == kind), None)

        event = await self.server.instances.watch.until(instance_id, there, WAIT_MS)
        if event is None:
            raise TimeoutError(f"no {kind} of {instance_id}")
        return event

    async def make_volume(self, name: str) -> Volume:
        """Keep a volume in the record; a simulated guest needs no file of it."""
        volume = Volume(
            id=name,
            name=name,
            project=self.caller.project,
            path=f"simulated:/{name}",
            size_bytes=1 << 20,
            created_at_ms=0,
        )
        await self.server.store.volumes.put(volume)
        return volume


def admitted(answer: SubmissionResult) -> Request:
    """The request of an answer that must be an admission."""
    if not isinstance(answer.disposition, Admitted):
        raise TypeError(f"not admitted: {msgspec.to_builtins(answer.disposition)}")
    return answer.disposition.request


def refused(answer: SubmissionResult) -> str:
    """The reason of an answer that must be a refusal."""
    if not isinstance(answer.disposition, Denied):
        raise TypeError(f"not refused: {msgspec.to_builtins(answer.disposition)}")
    return answer.disposition.reason
