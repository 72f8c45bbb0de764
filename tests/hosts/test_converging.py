"""Live migration of guests that write to their memory faster than it can be sent."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from benchmarks.nano_guest import GREETING, Act, nano_guest
from conformance.hypervisor import GivenPermit
from conformance.qemu_workbench import QemuWorkbench, opened, two_benches
from interlock.core.errors import OperationRejected
from interlock.core.records import Spec
from interlock.core.states import PowerState
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from processes.real_fleet import Fleet
from processes.real_server import guests_in
from waiting import PATIENCE_S, until

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]
PERMIT = GivenPermit()
MIB = 1024**2


@pytest.fixture
def benches(tmp_path: Path) -> Iterator[tuple[QemuWorkbench, QemuWorkbench]]:
    with two_benches(tmp_path) as pair:
        yield pair


class Heard:
    """Keeps what is said of a migration."""

    def __init__(self) -> None:
        self.details: list[str] = []
        self.warnings: set[str | None] = set()

    def __call__(
        self, done: int, total: int | None = None, *, detail: str | None = None, warning: str | None = None
    ) -> None:
        if detail is not None:
            self.details.append(detail)
        self.warnings.add(warning)


@asynccontextmanager
async def sending(
    benches: tuple[QemuWorkbench, QemuWorkbench], act: Act, per_s: int
) -> AsyncIterator[tuple[QemuHypervisor, QemuHypervisor, Any]]:
    """A guest that writes, awaited on another host, and the link over which so much is sent in a second."""
    benches[0].settings = replace(benches[0].settings, migration_bytes_per_s=per_s)
    here, there = await opened(benches[0]), await opened(benches[1])
    spec = Spec(image=nano_guest(benches[0].folder, act), memory_mib=16)
    await here.define(PERMIT, "one", spec)
    await here.power_on(PERMIT, "one", spec)
    await benches[0].until_up("one")
    await there.define(PERMIT, "one", spec)
    try:
        yield here, there, await there.receive_guest(PERMIT, "one", spec, await here.machine_kind("one"))
    finally:
        for hypervisor in (here, there):
            await hypervisor.undefine(PERMIT, "one")
            await hypervisor.close()


async def test_a_guest_that_writes_faster_than_can_be_sent_is_slowed_until_it_arrives(
    benches: tuple[QemuWorkbench, QemuWorkbench],
) -> None:
    heard = Heard()
    async with sending(benches, Act.DIRTY_SLOWLY, 8 * MIB) as (here, there, passage):
        await here.send_guest(PERMIT, "one", passage, int(PATIENCE_S * 1000), heard)
        await there.await_guest("one")
        await there.complete_incoming(PERMIT, "one")
        assert (await there.inspect("one")).power_state is PowerState.RUNNING
    assert any("throttled by" in detail for detail in heard.details), heard.details[-3:]


async def test_one_that_does_not_converge_is_given_up_and_runs_on_at_its_full_speed(
    benches: tuple[QemuWorkbench, QemuWorkbench],
) -> None:
    heard = Heard()
    async with sending(benches, Act.DIRTY, 4 * MIB) as (here, _there, passage):
        with pytest.raises(OperationRejected, match=r"does not converge: after 3 s .* MiB are left after \d+ passes"):
            await here.send_guest(PERMIT, "one", passage, 3_000, heard)
        assert (await here.inspect("one")).power_state is PowerState.RUNNING
        guest = here.guest("one")
        assert guest is not None
        assert "cpu-throttle-percentage" not in await guest.query("query-migrate")
        await benches[0].until_up("one")
    assert "does not converge" in heard.warnings
    assert any("does not converge: pass" in detail and "throttled by" in detail for detail in heard.details)


def test_it_is_told_wherever_somebody_looks_and_does_not_fill_the_history(fleet: Fleet) -> None:
    """On the VM, in `stuck`, in the events, and in how the request ends."""
    north = fleet.add("north", settings={"INTERLOCK_QEMU_MIGRATION_BYTES_PER_S": str(4 * MIB)})
    fleet.add("south")
    create_dirty(fleet)
    (process_id,) = north.guests()
    asked = {"host": "south", "converge_timeout": "6s"}
    request = fleet.server.submit("one", "live_migrate", **asked).json()["request"]["id"]
    stuck = until_stuck(fleet)
    assert (stuck["name"], stuck["takes_over"]) == ("one", [])
    assert stuck["why"] == "live_migrate does not converge."
    (shown,) = fleet.server.get("/v1/instances/one")["outstanding"]
    assert shown["warning"] == "does not converge"
    assert "the VM writes" in shown["detail"]
    ended = fleet.server.ended(request)
    assert ended["status"] == "failed"
    assert "does not converge: after 6 s" in ended["message"]
    one = fleet.server.get("/v1/instances/one")
    assert (one["host"], one["vm_state"], one["power_state"]) == ("north", "active", "running")
    assert north.guests() == [process_id]
    assert guests_in(fleet.agents["south"].folder) == []
    assert fleet.server.get("/v1/stuck")["items"] == []
    events = fleet.server.get("/v1/instances/one/events?limit=500")["items"]
    told = [event for event in events if event["kind"] == "request.progress" and event["request"] == request]
    assert any(event["data"].get("warning") == "does not converge" for event in told)
    assert len(told) <= 10, [event["data"] for event in told]
    fleet.carry_out("one", "pause")
    fleet.carry_out("one", "unpause")


def test_a_migration_that_would_go_on_for_ever_ends_as_it_is_told_to(fleet: Fleet) -> None:
    """First with the guest where it was, then with it on the other host."""
    agents = {"north": fleet.add("north", settings={"INTERLOCK_QEMU_MIGRATION_BYTES_PER_S": str(8 * MIB)})}
    agents["south"] = fleet.add("south")
    create_dirty(fleet)
    ways = {"live_migrate_abort": ("cancelled", "north"), "live_migrate_force_complete": ("succeeded", "south")}
    for word, (status, host) in ways.items():
        request = fleet.server.submit("one", "live_migrate", host="south").json()["request"]["id"]
        until_moving(fleet, request)
        assert fleet.server.submit("one", word).status_code in {200, 202}
        assert fleet.server.ended(request)["status"] == status
        one = fleet.server.get("/v1/instances/one")
        assert (one["host"], one["vm_state"], one["power_state"]) == (host, "active", "running")
        assert [name for name, agent in agents.items() for _ in agent.guests()] == [host]
    fleet.carry_out("one", "pause")
    fleet.carry_out("one", "unpause")


def until_moving(fleet: Fleet, request: str) -> None:
    """Return when the guest is on its way: some of it was sent."""

    def moving() -> bool:
        seen = fleet.server.get(f"/v1/requests/{request}")
        assert seen["status"] in {"queued", "in_flight"}, seen
        return bool(seen["bytes_done"])

    until(moving, "nothing moves")


def create_dirty(fleet: Fleet) -> None:
    """Create a VM on `north` whose guest writes to its memory all the time, and return once it has begun to."""
    kernel = nano_guest(fleet.folder, Act.DIRTY)
    with Path(kernel.path).open("rb") as file:
        form = {"name": "dirty", "kind": "kernel", "cmdline": "nano"}
        fleet.server.client.post("/v1/images", data=form, files={"kernel": file}).raise_for_status()
    fleet.create("one", "north", image="dirty", memory_mib=64)
    until(lambda: GREETING in fleet.server.client.get("/v1/instances/one/console").text, "the guest does not boot")


def until_stuck(fleet: Fleet) -> dict[str, Any]:
    until(lambda: fleet.server.get("/v1/stuck")["items"], "it is not said to be stuck")
    found: dict[str, Any] = fleet.server.get("/v1/stuck")["items"][0]
    return found


def test_post_copy_is_refused_with_the_reason(fleet: Fleet) -> None:
    fleet.add("north")
    fleet.create("one", "here")
    answer = fleet.server.submit("one", "live_migrate", host="north", post_copy=True)
    assert answer.status_code == 422
    assert "post_copy is not supported: QEMU runs without privileges" in answer.json()["detail"]
    assert fleet.server.get("/v1/instances/one")["outstanding"] == []
