"""The frozen-QEMU story, on a real VM: what hangs is taken over at the moment that was named, and stays taken over.

The moment is one on the store's clock. It is waited for on that clock; nothing else here waits for time to pass.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.nano_guest import nano_guest
from in_process.trusting_verifier import TrustingProver
from in_process.virtual_time import OneClock
from interlock.config import Config, DriverConfig
from interlock.core import lifecycle
from interlock.core.errors import Fenced
from interlock.core.records import Change, Event, Instance, Outcome, Request, StaleFence
from interlock.driver.operation_context import FencePermit
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.process.qemu_process import find_in
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.ports import Clock
from interlock.server import Server
from interlock.stores.clock import SystemClock

pytestmark = pytest.mark.qemu

THRESHOLD_MS = 3_000
POLICY = f"""
[policy]
name = "impatient"
extends = "standard"
description = "standard, with a threshold of seconds."

[[rule]]
id = "silent-for-seconds"
operations = ["stop", "reboot"]
task_state = ["@pause", "@reboot"]
verdict = "after"
threshold = "{THRESHOLD_MS}ms"
reason = "no_sign_of_life"
because = "The operation in progress has stalled."
"""


class HeldClock(OneClock):
    """The system's clock, which a test can hold still at a moment."""

    def __init__(self) -> None:
        self._clock: Clock = SystemClock()
        self._held_at_ms: int | None = None

    def now_ms(self) -> int:
        return self._clock.wall_ms() if self._held_at_ms is None else self._held_at_ms

    async def hold_at(self, moment_ms: int) -> None:
        """Let the clock run up to that moment, and stop there."""
        self._held_at_ms = None
        if (left_ms := moment_ms - self._clock.wall_ms()) > 0:
            await asyncio.sleep(left_ms / 1000)
        self._held_at_ms = moment_ms


class Story:
    """A real server in this process, one real VM named vm, and a client of the HTTP door."""

    def __init__(self, folder: Path, shutdown_timeout_ms: int = 20_000) -> None:
        policy = folder / "impatient.toml"
        policy.write_text(POLICY)
        self.clock = HeldClock()
        self.folder = folder
        driver = DriverConfig(
            guest_shutdown_timeout_ms=shutdown_timeout_ms, inspect_retry_ms=50, heartbeat_ms=200, drain_ms=1
        )
        config = Config(data_dir=str(folder / "data"), policy=str(policy), driver=driver)
        self.hypervisor = QemuHypervisor(QemuSettings(folder=folder / "data" / "guests", qmp_timeout_ms=300))
        self.server = Server(config, self.hypervisor, self.clock, TrustingProver())

    async def open(self) -> None:
        await self.server.open()
        token = (self.server.folder / "admin.token").read_text().strip()
        transport = httpx.ASGITransport(self.server.app())
        headers = {"Authorization": f"Bearer {token}"}
        self.client = httpx.AsyncClient(transport=transport, base_url="http://interlock.test", headers=headers)
        await self.server.store.images.put(nano_guest(self.folder))
        wish = {"name": "vm", "image": "nano-nothing", "memory_mib": 64}
        made = await self.client.post("/v1/instances", json=wish, headers={"Prefer": "wait=60"})
        assert made.json()["request"]["status"] == "succeeded", made.text
        self.id: str = made.json()["instance"]["id"]

    async def close(self) -> None:
        await self.client.aclose()
        await self.server.close()
        process_id = self.process()
        if process_id is not None:
            os.kill(process_id, signal.SIGKILL)

    def process(self) -> int | None:
        """The process that holds the guest, by looking at the processes there are."""
        return find_in(self.folder / "data" / "guests" / "vms" / self.id / "inside")

    async def ask(self, operation: str) -> httpx.Response:
        return await self.client.post("/v1/instances/vm/requests", json={"operation": operation})

    async def ended(self, request_id: str) -> dict[str, Any]:
        ended: dict[str, Any] = (await self.client.get(f"/v1/requests/{request_id}", params={"wait": "60s"})).json()
        return ended

    async def until_unknown(self, request_id: str) -> Instance:
        """The instance when its worker has found that nothing answers: nothing after that is a sign of life."""

        async def unknown() -> Instance | None:
            instance = await self.server.store.instance(self.id)
            request = await self.server.store.request(request_id)
            silent = request is not None and (
                request.status.value == "unknown" or "does not respond" in (request.detail or "")
            )
            return instance if silent else None

        found = await self.server.instances.watch.until(self.id, unknown, 30_000)
        assert found is not None
        return found

    async def events(self, kind: str) -> list[dict[str, Any]]:
        found = (await self.client.get("/v1/instances/vm/events", params={"limit": 500})).json()["items"]
        return [one for one in found if one["kind"] == kind]


@pytest.fixture
async def story(request: pytest.FixtureRequest) -> AsyncIterator[Story]:
    with tempfile.TemporaryDirectory(prefix="interlock-frozen-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # noqa: ASYNC240 - QEMU runs as another user if we are root
        one = Story(folder, *getattr(request, "param", ()))
        await one.open()
        try:
            yield one
        finally:
            await one.close()


def milliseconds(moment: str) -> int:
    return round(datetime.fromisoformat(moment).timestamp() * 1000)


async def freeze_and_be_refused(story: Story, begun: str, wanted: str) -> tuple[Request, int, int]:
    """Freeze QEMU, begin one operation, be refused another; what was begun, the process, and the moment named."""
    process = story.process()
    assert process is not None
    os.kill(process, signal.SIGSTOP)
    earlier = (await story.ask(begun)).json()["request"]
    instance = await story.until_unknown(earlier["id"])
    (doing,) = instance.outstanding
    refused = await story.ask(wanted)
    said = refused.json()
    assert (refused.status_code, said["reason"], said["rule"]) == (409, "no_sign_of_life", "silent-for-seconds")
    assert (said["blocked_by"]["request"], said["blocked_by"]["operation"]) == (earlier["id"], begun)
    allowed_at_ms = milliseconds(said["allowed_at"])
    assert allowed_at_ms == (doing.last_progress_at_ms or 0) + THRESHOLD_MS
    assert 1 <= int(refused.headers["retry-after"]) <= math.ceil(THRESHOLD_MS / 1000)
    return doing, process, allowed_at_ms


async def take_over_exactly_then(story: Story, wanted: str, doing: Request, allowed_at_ms: int) -> dict[str, Any]:
    """Ask one millisecond before the moment, and at it; what was admitted."""
    await story.clock.hold_at(allowed_at_ms - 1)
    too_early = await story.ask(wanted)
    assert (too_early.status_code, milliseconds(too_early.json()["allowed_at"])) == (409, allowed_at_ms)
    await story.clock.hold_at(allowed_at_ms)
    admitted = await story.ask(wanted)
    assert (admitted.status_code, admitted.json()["supersedes"]) == (202, [doing.id])
    request: dict[str, Any] = admitted.json()["request"]
    return request


async def the_late_worker_is_fenced(story: Story, doing: Request) -> None:
    """Whoever holds the old fence can do nothing, neither to the machine nor in the record; that it tried is told."""
    permit = FencePermit(story.server.store, story.id, doing.fence)
    instance = await story.server.store.instance(story.id)
    assert instance is not None
    assert instance.spec is not None
    process = story.process()
    if process is None:
        with pytest.raises(Fenced):
            await story.hypervisor.power_on(permit, story.id, instance.spec)
    else:
        for late_call in (story.hypervisor.pause, story.hypervisor.reset, story.hypervisor.power_off):
            with pytest.raises(Fenced):
                await late_call(permit, story.id)
    assert story.process() == process

    def late(instance: Instance, now_ms: int) -> Change[Request | StaleFence]:
        outcome = Outcome.SUCCEEDED
        return lifecycle.finish(instance, doing.id, doing.fence, outcome, story.server.policy, now_ms)

    before = await story.server.store.instance(story.id)
    assert isinstance(await story.server.store.change(story.id, late), StaleFence)
    assert await story.server.store.instance(story.id) == before
    fenced = await story.events("request.fenced")
    assert doing.id in {one["request"] for one in fenced}


async def test_a_pause_that_froze_is_taken_over_by_a_reboot(story: Story) -> None:
    doing, process, allowed_at_ms = await freeze_and_be_refused(story, "pause", "reboot")
    reboot = await take_over_exactly_then(story, "reboot", doing, allowed_at_ms)
    ended = await story.ended(reboot["id"])
    assert ended["status"] == "succeeded", ended
    assert (await story.ended(doing.id))["status"] == "superseded"
    instance = (await story.client.get("/v1/instances/vm")).json()
    assert (instance["vm_state"], instance["task_state"], instance["power_state"]) == ("active", "none", "running")
    assert story.process() not in {None, process}
    await the_late_worker_is_fenced(story, doing)
    seen = await story.hypervisor.inspect(story.id)
    assert seen.power_state.value == "running", "the pause took effect after all"


async def test_a_soft_reboot_that_froze_is_taken_over_by_a_stop(story: Story) -> None:
    doing, _, allowed_at_ms = await freeze_and_be_refused(story, "reboot", "stop")
    stop = await take_over_exactly_then(story, "stop", doing, allowed_at_ms)
    ended = await story.ended(stop["id"])
    assert ended["status"] == "succeeded", ended
    instance = (await story.client.get("/v1/instances/vm")).json()
    assert (instance["vm_state"], instance["task_state"]) == ("stopped", "none")
    assert story.process() is None
    await the_late_worker_is_fenced(story, doing)
    assert story.process() is None, "the reboot that was taken over started the VM"


async def test_what_thaws_as_it_is_taken_over_does_not_stay_as_the_old_worker_wanted(story: Story) -> None:
    """The old process lives on and reads the command that was sent to it; the reboot comes after that."""
    doing, process, allowed_at_ms = await freeze_and_be_refused(story, "pause", "reboot")

    # At the commit of the takeover, before the new worker has looked at the machine.
    def thaw(events: Sequence[Event]) -> None:
        if any(event.kind == "request.admitted" for event in events):
            os.kill(process, signal.SIGCONT)

    unlisten = story.server.store.listen(thaw)
    reboot = await take_over_exactly_then(story, "reboot", doing, allowed_at_ms)
    unlisten()
    assert (await story.ended(reboot["id"]))["status"] == "succeeded"
    assert (await story.ended(doing.id))["status"] == "superseded"
    await the_late_worker_is_fenced(story, doing)
    seen = await story.hypervisor.inspect(story.id)
    assert (seen.power_state.value, seen.responsive) == ("running", True)
    instance = (await story.client.get("/v1/instances/vm")).json()
    assert (instance["vm_state"], instance["power_state"]) == ("active", "running")


@pytest.mark.parametrize("story", [(1_500,)], indirect=True)
@pytest.mark.parametrize(("operation", "leads_to"), [("stop", "stopped"), ("reboot", "active")])
async def test_a_soft_stop_or_reboot_of_a_frozen_qemu_ends_its_process_at_the_deadline(
    story: Story, operation: str, leads_to: str
) -> None:
    """It waited for ever to be able to ask the guest."""
    process = story.process()
    assert process is not None
    os.kill(process, signal.SIGSTOP)
    ended = await story.ended((await story.ask(operation)).json()["request"]["id"])
    assert ended["status"] == "succeeded", ended
    assert ended["message"] == "QEMU did not respond within 1.5 s; its process was ended."
    assert story.process() != process
    assert (await story.client.get("/v1/instances/vm")).json()["vm_state"] == leads_to
