"""The parts of the QEMU adapter one by one, without a QEMU."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from conformance.hypervisor import GivenPermit
from interlock.core.errors import GuestNotFound, NotResponding, OperationRejected
from interlock.core.records import Disk, GuestEvent, Image, Interface, Spec
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.consoles import Consoles
from interlock.hypervisors.qemu.disks.host_disks import HostDisks
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.hotplug import _replaced
from interlock.hypervisors.qemu.launch import Launcher
from interlock.hypervisors.qemu.lifecycle import Lifecycle
from interlock.hypervisors.qemu.liveness import LivenessCheck
from interlock.hypervisors.qemu.memory.guest_memory import GuestMemory
from interlock.hypervisors.qemu.memory.saved_memory import SavedMemory
from interlock.hypervisors.qemu.migration.live_migration import LiveMigration
from interlock.hypervisors.qemu.network.taps import Taps
from interlock.hypervisors.qemu.network.user_networks import UserNetworks
from interlock.hypervisors.qemu.process_registry import ProcessRegistry
from interlock.hypervisors.qemu.qmp.qmp_events import LivenessProbe, QemuEvent
from interlock.hypervisors.qemu.qmp.waiters import EventSubscriptions, UnplugWaiters
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.hypervisors.qemu.stall_timeout import StallTimeout
from interlock.ports import Hypervisor
from interlock.ports.migration import IncomingState, MigrationPort

PERMIT = GivenPermit()


def nothing_lost(_guest: Guest, _name: str) -> None:
    """Leave the networks alone."""


async def ignore(_guest: Guest) -> None:
    """Adopt nothing."""


@pytest.fixture
def registry(tmp_path: Path) -> ProcessRegistry:
    registry = ProcessRegistry(
        QemuSettings(folder=tmp_path, processes_max=1, go_on_free_mib=1),
        on_adopted=ignore,
        on_disconnected=nothing_lost,
        on_ended=ignore,
    )
    (tmp_path / "vms").mkdir()
    return registry


def test_the_adapter_has_every_method_of_both_ports(tmp_path: Path) -> None:
    adapter = QemuHypervisor(QemuSettings(folder=tmp_path))
    names = {name for port in (Hypervisor, MigrationPort) for name in vars(port) if not name.startswith("_")}
    assert [name for name in sorted(names) if not callable(getattr(adapter, name, None))] == []


def test_a_process_that_answers_no_probe_is_reported_once_and_so_is_its_answer() -> None:
    sent: list[str] = []
    reported: list[GuestEvent] = []
    probe = LivenessProbe(lambda: sent.append("probe"), reported.append)
    for _ in range(3):
        probe.start_round(2)
    assert (sent, reported) == (["probe"], [GuestEvent.NOT_RESPONDING])
    probe.start_round(2)
    probe.responded()
    assert reported == [GuestEvent.NOT_RESPONDING, GuestEvent.RESPONDING]
    probe.start_round(2)
    probe.responded()
    assert (len(sent), len(reported)) == (2, 2)


async def test_who_waits_for_a_device_gets_the_answer_and_an_answer_for_nobody_is_noticed() -> None:
    waiters = UnplugWaiters()
    assert not waiters.resolve("disk-a", released=True)
    first, second, other = waiters.expect("disk-a"), waiters.expect("disk-a"), waiters.expect("disk-b")
    assert waiters.resolve("disk-a", released=True)
    assert (await first, await second, other.done()) == (True, True, False)
    waiters.resolve_all()
    assert await other is False
    given_up = waiters.expect("disk-c")
    given_up.cancel()
    await asyncio.sleep(0)
    assert not waiters.resolve("disk-c", released=True)


async def test_events_go_to_who_subscribed_and_the_end_of_the_process_to_all() -> None:
    def event(kind: str) -> QemuEvent:
        return QemuEvent(event=kind, timestamp=QemuEvent.Timestamp(seconds=1, microseconds=0))

    subscriptions = EventSubscriptions("one")
    assert not subscriptions
    with subscriptions.subscribe("STOP") as stops, subscriptions.subscribe("RESUME") as resumes:
        assert subscriptions
        subscriptions.publish(event("STOP"))
        assert (await stops.next()).event == "STOP"
        assert await resumes.next_within(1) is None
        subscriptions.end()
        for _ in range(2):
            with pytest.raises(GuestNotFound, match="has ended"):
                await stops.next()
        with pytest.raises(GuestNotFound):
            await resumes.next_within(1000)
    assert not subscriptions
    with subscriptions.subscribe("STOP") as late, pytest.raises(GuestNotFound):
        await late.next()


async def test_what_makes_progress_may_take_any_time_and_what_stalls_ends_with_its_error() -> None:
    stall = StallTimeout(0, NotResponding("It stalled."))
    for progress in range(3):
        stall.note(progress)
        await asyncio.sleep(0)
    with pytest.raises(NotResponding, match="It stalled"):
        stall.note(2)


def test_a_device_on_record_is_added_replaced_and_removed_in_its_place() -> None:
    first, second, new = (Disk(id=name, path=f"/{name}") for name in ("a", "b", "c"))
    assert _replaced((first,), "b", second) == (first, second)
    assert _replaced((first, second), "a", new) == (new, second)
    assert _replaced((first, second), "a", None) == (second,)
    assert _replaced((first,), "b", None) == (first,)
    interface = Interface(id="i", mac="52:54:00:00:00:01")
    assert _replaced((), "i", interface) == (interface,)


async def test_an_id_that_is_no_name_of_a_folder_is_refused_or_unknown(registry: ProcessRegistry) -> None:
    with pytest.raises(OperationRejected, match="Invalid instance id"):
        registry.folder("../other")
    consoles = Consoles(registry)
    taps = Taps(registry)
    launcher = Launcher(registry, consoles, UserNetworks(registry), taps)
    lifecycle = Lifecycle(registry, launcher, LiveMigration(registry, launcher, None), taps)
    assert await consoles.console_tail("../other", 10) is None
    assert not (await lifecycle.inspect("../other")).defined


async def test_a_guest_is_started_only_where_it_is_defined(registry: ProcessRegistry) -> None:
    spec = Spec(image=Image(id="i", name="i", path="/absent", kind="kernel", size_bytes=1, sha256="0"))
    with pytest.raises(GuestNotFound, match="is not defined"):
        await Launcher(registry, Consoles(registry), UserNetworks(registry), Taps(registry)).start(PERMIT, "one", spec)


async def test_what_is_received_is_marked_until_it_is_discarded(registry: ProcessRegistry) -> None:
    migration = LiveMigration(
        registry, Launcher(registry, Consoles(registry), UserNetworks(registry), Taps(registry)), None
    )
    folder = registry.folder("one")
    folder.make(PERMIT)
    assert await migration.arrival("one") is IncomingState.NONE
    (folder.path / "awaited").touch()
    assert await migration.arrival("one") is IncomingState.LOST
    assert migration.is_awaited("one")
    (folder.path / "sent").write_text("ran")
    with pytest.raises(GuestNotFound):
        await migration.resume_source(PERMIT, "one")
    migration.discard(PERMIT, "one")
    assert not migration.is_awaited("one")
    await migration.resume_source(PERMIT, "one")


async def test_memory_is_saved_and_forgotten_without_a_process(registry: ProcessRegistry) -> None:
    memory = GuestMemory(registry, Launcher(registry, Consoles(registry), UserNetworks(registry), Taps(registry)))
    folder = registry.folder("one")
    folder.make(PERMIT)
    spec = Spec(image=Image(id="i", name="i", path="/absent", kind="kernel", size_bytes=1, sha256="0"))
    with pytest.raises(GuestNotFound, match="does not run"):
        await memory.save_memory(PERMIT, "one", lambda *_: None)
    with pytest.raises(GuestNotFound, match="was not found"):
        await memory.restore_memory(PERMIT, "one", spec, lambda *_: None)
    files = SavedMemory(folder)
    files.saved.touch()
    await memory.save_memory(PERMIT, "one", lambda *_: None)
    with pytest.raises(OperationRejected, match="cannot be read"):
        await memory.restore_memory(PERMIT, "one", spec, lambda *_: None)
    assert files.saved.exists()
    await memory.forget_memory(PERMIT, "one")
    assert not files.any()


async def test_root_disks_of_other_numbers_are_dropped_and_no_others(registry: ProcessRegistry) -> None:
    folder = registry.folder("one")
    folder.make(PERMIT)
    spec = Spec(image=Image(id="i", name="i", path="/absent", kind="disk", size_bytes=1, sha256="0"), root=2)
    roots = folder.roots(spec)
    for number in range(3):
        roots.disk(number).touch()
    await HostDisks(registry).drop_root_disks(PERMIT, "one", spec, frozenset({2}))
    assert set(roots.disks()) == {2}
    with pytest.raises(OperationRejected, match="root-2"):
        await HostDisks(registry).export_root_disk(PERMIT, "one", spec, registry.path / "export", lambda *_: None)


class HaltedGuest:
    """What of a guest the liveness check needs, with a folder that has space."""

    def __init__(self, registry: ProcessRegistry, halted: GuestEvent) -> None:
        self.folder = registry.folder("one")
        self.folder.make(PERMIT)
        self.halted = halted
        self.limits: tuple[int, int] | None = None
        self.resumed = asyncio.Event()

    def check_liveness(self, rounds_max: int, rounds_max_busy: int) -> None:
        self.limits = (rounds_max, rounds_max_busy)

    async def resume_halted(self) -> None:
        self.resumed.set()


@pytest.mark.parametrize("halted", [GuestEvent.NO_SPACE, GuestEvent.IO_ERROR])
async def test_a_round_probes_guests_and_resumes_those_that_have_space_again(
    registry: ProcessRegistry, halted: GuestEvent
) -> None:
    guest: Any = HaltedGuest(registry, halted)
    registry._guests["one"] = guest
    check = LivenessCheck(registry)
    check.start()
    check.stop()
    settings = registry.settings
    assert guest.limits is not None
    assert guest.limits[0] * settings.liveness_interval_ms >= settings.liveness_timeout_ms
    assert guest.limits[1] >= guest.limits[0]
    await asyncio.gather(*registry._background)
    assert guest.resumed.is_set() is (halted is GuestEvent.NO_SPACE)
