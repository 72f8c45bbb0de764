"""Whoever watches a soak sees an instance that runs on two hosts, and takes none for one that is on its way."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from conformance.disk_patterns import Progress
from conformance.hypervisor import GivenPermit
from conformance.qemu_workbench import QemuWorkbench, opened, two_benches
from interlock.core.records import Spec
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from soak.report import Book
from soak.split_brain_monitor import SWITCHES_MAX, Doubles, Holder, moves, vcpu_switches
from waiting import PATIENCE_S, eventually

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]
PERMIT = GivenPermit()


@pytest.fixture
def benches(tmp_path: Path) -> Iterator[tuple[QemuWorkbench, QemuWorkbench]]:
    with two_benches(tmp_path) as pair:
        yield pair


@pytest.fixture
async def hosts(benches: tuple[QemuWorkbench, QemuWorkbench]) -> AsyncIterator[tuple[QemuHypervisor, QemuHypervisor]]:
    """Two hosts, with a guest on the first that runs."""
    pair = await opened(benches[0]), await opened(benches[1])
    yield pair
    for one in pair:
        await one.undefine(PERMIT, "one")
        await one.close()


@pytest.fixture
def spec(benches: tuple[QemuWorkbench, QemuWorkbench]) -> Spec:
    return benches[0].spec()


class Watcher:
    def __init__(self, benches: tuple[QemuWorkbench, QemuWorkbench]) -> None:
        self.book = Book()
        folders = {name: bench.settings.folder / "vms" for name, bench in zip(("here", "there"), benches, strict=True)}
        self._doubles = Doubles(folders, self.book)

    def holder(self, instance_id: str) -> Holder:
        (found,) = self._doubles.holders()[instance_id]
        return found

    def sees(self) -> list[str]:
        self._doubles.look()
        return self.book.wrong


@pytest.fixture
def watcher(benches: tuple[QemuWorkbench, QemuWorkbench]) -> Watcher:
    return Watcher(benches)


async def test_one_guest_on_each_host_is_seen(
    hosts: tuple[QemuHypervisor, QemuHypervisor], watcher: Watcher, spec: Spec
) -> None:
    for number, host in enumerate(hosts):
        assert watcher.sees() == [], number
        await host.define(PERMIT, "one", spec)
        await host.power_on(PERMIT, "one", spec)
    (found,) = watcher.sees()
    assert "one runs twice" in found


async def test_a_guest_on_its_way_is_not_taken_for_two_until_it_goes_on_where_it_was_sent_from(
    benches: tuple[QemuWorkbench, QemuWorkbench],
    hosts: tuple[QemuHypervisor, QemuHypervisor],
    watcher: Watcher,
    spec: Spec,
) -> None:
    here, there = hosts
    await here.define(PERMIT, "one", spec)
    await here.power_on(PERMIT, "one", spec)
    await benches[0].until_up("one")
    await there.define(PERMIT, "one", spec)
    passage = await there.receive_guest(PERMIT, "one", spec, await here.machine_kind("one"))
    assert watcher.sees() == []
    await here.send_guest(PERMIT, "one", passage, 0, Progress())
    await there.await_guest("one")
    assert watcher.sees() == []
    await there.complete_incoming(PERMIT, "one")
    assert watcher.sees() == []
    assert watcher.book.counts["seen on both hosts, awaited"] == 2
    assert watcher.book.counts["seen on both hosts, taken up"] == 1
    sent = here.guest("one")
    assert sent is not None
    await sent.execute(PERMIT, "cont")
    await eventually(watcher.sees)  # on a busy machine it is seldom given a processor
    (found,) = watcher.book.wrong
    assert "that on here goes on although it was sent" in found


async def test_a_paused_guest_stands_still_while_its_qemu_answers(
    hosts: tuple[QemuHypervisor, QemuHypervisor], watcher: Watcher, spec: Spec
) -> None:
    """Only vCPUs are looked at: QEMU's other threads work on after a guest is paused, for its monitor among others."""
    here, _ = hosts
    await here.define(PERMIT, "one", spec)
    await here.power_on(PERMIT, "one", spec)
    holder = watcher.holder("one")
    assert await asyncio.to_thread(moves, holder, PATIENCE_S)
    await here.pause(PERMIT, "one")
    before = sum(vcpu_switches(holder).values())
    for _ in range(4 * SWITCHES_MAX):
        await here.inspect("one")
    assert sum(vcpu_switches(holder).values()) - before <= SWITCHES_MAX
    assert not moves(holder)
