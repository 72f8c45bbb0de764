"""A guest that goes from one real QEMU to another and back goes on counting where it was, and its disk comes along."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from benchmarks import nano_guest
from conformance.hypervisor import GivenPermit
from conformance.qemu_workbench import QemuWorkbench, opened, two_benches
from interlock.core.errors import OperationRejected
from interlock.core.states import PowerState
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.ports.migration import IncomingState, MigrationEndpoint

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]
PERMIT = GivenPermit()


@pytest.fixture
def benches(tmp_path: Path) -> Iterator[tuple[QemuWorkbench, QemuWorkbench]]:
    with two_benches(tmp_path) as pair:
        yield pair


def nothing(done: int, total: int | None = None, *, detail: str | None = None, warning: str | None = None) -> None:
    return


async def ticks(hypervisor: QemuHypervisor) -> int:
    """How often the guest's timer has ticked since it booted, read from its memory."""
    guest = hypervisor.guest("one")
    assert guest is not None
    words = {"command-line": f"xp /1wd {nano_guest._TICKS:#x}"}
    answer = await guest.execute(PERMIT, "human-monitor-command", words)
    return int(str(answer).rpartition(":")[2])


async def test_five_times_to_and_fro_and_it_counts_on(benches: tuple[QemuWorkbench, QemuWorkbench]) -> None:
    here, there = [await opened(bench) for bench in benches]
    spec = replace(benches[0].spec(), root_gib=1)
    await here.define(PERMIT, "one", spec)
    await here.power_on(PERMIT, "one", spec)
    await benches[0].until_up("one")
    counted = await ticks(here)
    for _ in range(5):
        await there.define(PERMIT, "one", spec)
        passage = await there.receive_guest(PERMIT, "one", spec, await here.machine_kind("one"))
        await here.send_guest(PERMIT, "one", passage, 0, nothing)
        await there.await_guest("one")
        assert await there.arrival("one") is IncomingState.AWAITED
        assert (await here.inspect("one")).power_state is PowerState.PAUSED
        assert (await there.inspect("one")).power_state is PowerState.NONE
        await there.complete_incoming(PERMIT, "one")
        await here.undefine(PERMIT, "one")
        assert await there.arrival("one") is IncomingState.NONE
        now = await ticks(there)
        assert now >= counted
        counted = now
        here, there = there, here
    await here.undefine(PERMIT, "one")
    for hypervisor in (here, there):
        await hypervisor.close()


async def test_what_was_sent_goes_on_here_if_it_never_ran_there(
    benches: tuple[QemuWorkbench, QemuWorkbench],
) -> None:
    here, there = [await opened(bench) for bench in benches]
    spec = replace(benches[0].spec(), root_gib=1)
    await here.define(PERMIT, "one", spec)
    await here.power_on(PERMIT, "one", spec)
    await benches[0].until_up("one")
    await there.define(PERMIT, "one", spec)
    passage = await there.receive_guest(PERMIT, "one", spec, await here.machine_kind("one"))
    await here.send_guest(PERMIT, "one", passage, 0, nothing)
    await there.await_guest("one")
    counted = await ticks(here)
    await benches[1].kill("one")
    assert await there.arrival("one") is IncomingState.LOST
    await here.resume_source(PERMIT, "one")
    assert (await here.inspect("one")).power_state is PowerState.RUNNING
    await benches[0].until_up("one")
    assert await ticks(here) >= counted
    for hypervisor in (here, there):
        await hypervisor.undefine(PERMIT, "one")
        await hypervisor.close()


async def test_who_does_not_know_the_secret_brings_nothing(benches: tuple[QemuWorkbench, QemuWorkbench]) -> None:
    here, there = [await opened(bench) for bench in benches]
    spec = benches[0].spec()
    await here.define(PERMIT, "one", spec)
    await here.power_on(PERMIT, "one", spec)
    await benches[0].until_up("one")
    await there.define(PERMIT, "one", spec)
    passage = await there.receive_guest(PERMIT, "one", spec, await here.machine_kind("one"))
    wrong = MigrationEndpoint(host=passage.host, port=passage.port, secret="guessed")
    with pytest.raises(OperationRejected):
        await here.send_guest(PERMIT, "one", wrong, 0, nothing)
    assert (await here.inspect("one")).power_state is PowerState.RUNNING
    for hypervisor in (here, there):
        await hypervisor.undefine(PERMIT, "one")
        await hypervisor.close()
