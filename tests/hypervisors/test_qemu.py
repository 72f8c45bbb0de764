"""What only real QEMU can show: confinement, disks, limits, and the errors that people get to read."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from benchmarks.nano_guest import GREETING, MEMORY_MIB, Act, nano_guest
from conformance.disk_patterns import has_open
from conformance.hypervisor import GivenPermit, Told
from conformance.qemu_workbench import QemuWorkbench
from interlock.core.errors import NotResponding, OperationRejected, Unavailable
from interlock.core.records import Disk, Forward, GuestEvent, Image, Spec
from interlock.core.states import PowerState
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.command_line import node_name
from interlock.ports import Hypervisor
from waiting import PATIENCE_S

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]

PERMIT = GivenPermit()


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
async def hypervisor(host: QemuWorkbench, told: Told) -> AsyncIterator[Hypervisor]:
    hypervisor = host.make()
    await hypervisor.open(told)
    yield hypervisor
    for instance_id in await hypervisor.known():
        await hypervisor.undefine(PERMIT, instance_id)
    await hypervisor.close()


async def start(hypervisor: Hypervisor, spec: Spec) -> None:
    await hypervisor.define(PERMIT, "one", spec)
    await hypervisor.power_on(PERMIT, "one", spec)


def disk_image(folder: Path) -> Image:
    """An image with nothing to boot on it, which its owner alone may read."""
    path = folder / "image.raw"
    path.write_bytes(bytes(1 << 20))
    path.chmod(0o600)
    return Image(id="i", name="i", kind="disk", format="raw", path=str(path), size_bytes=1 << 20, sha256="")


def status_of(process_id: int) -> dict[str, str]:
    lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def limits_of(process_id: int) -> str:
    return Path(f"/proc/{process_id}/limits").read_text()


def image_tool(*words: str) -> bytes:
    return subprocess.check_output(["qemu-img", *words])


async def test_the_process_of_a_guest_has_no_privileges_and_nothing_of_ours(
    hypervisor: Hypervisor, host: QemuWorkbench
) -> None:
    ours, theirs = os.pipe()
    os.set_inheritable(theirs, True)
    try:
        await start(hypervisor, host.spec())
    finally:
        os.close(theirs)
    assert os.read(ours, 1) == b"", "a guest must not keep what was inheritable open"
    os.close(ours)
    process_id = host.process_id("one")
    status = status_of(process_id)
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert int(status["CapEff"], 16) == 0
    if os.geteuid() == 0:
        assert "0" not in status["Uid"].split()
        assert status["Groups"] == ""
    assert os.getsid(process_id) == process_id
    limits = limits_of(process_id)
    assert "Max core file size        0 " in limits
    assert f"Max open files            {host.settings.open_files_max} " in limits
    assert host.instance_folder("one").path.stat().st_mode & 0o777 == 0o700


async def test_a_guest_that_is_reset_as_it_begins_to_boot_comes_up(hypervisor: Hypervisor, host: QemuWorkbench) -> None:
    # Not every such reset did harm.
    for _ in range(4):
        await start(hypervisor, host.spec())
        await hypervisor.reset(PERMIT, "one")
        await hypervisor.reset(PERMIT, "one")
        await host.until_up("one")
        await hypervisor.power_off(PERMIT, "one")


async def test_a_root_disk_is_a_layer_over_its_image(hypervisor: Hypervisor, host: QemuWorkbench) -> None:
    image = disk_image(host.folder)
    spec = Spec(image=image, memory_mib=MEMORY_MIB, root_gib=1, disks=(host.disk("v1"),))
    await start(hypervisor, spec)
    seen = await hypervisor.inspect("one")
    assert (seen.power_state, seen.disks) == (PowerState.RUNNING, ("root", "v1"))
    root = host.instance_folder("one").roots(host.spec()).disk(0)
    info = msgspec.json.decode(image_tool("info", "-U", "--output=json", str(root)))
    assert (info["virtual-size"], info["backing-filename"]) == (1 << 30, image.path)
    assert info["backing-filename-format"] == "raw"
    with pytest.raises(OperationRejected, match="root disk"):
        await hypervisor.detach_disk(PERMIT, "one", "root")


async def test_a_volume_cannot_name_another_file_of_the_host(hypervisor: Hypervisor, host: QemuWorkbench) -> None:
    volume = host.folder / "evil.qcow2"
    image_tool("create", "-q", "-u", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", str(volume), "1M")
    await start(hypervisor, host.spec())
    await hypervisor.attach_disk(PERMIT, "one", Disk(id="evil", path=str(volume)))
    assert isinstance(hypervisor, QemuHypervisor)
    guest = hypervisor.guest("one")
    assert guest is not None
    nodes = {node["node-name"]: node for node in await guest.query("query-named-block-nodes", flat=True)}
    assert nodes[node_name("evil")]["backing_file_depth"] == 0
    assert not any("passwd" in str(node.get("file")) for node in nodes.values())


async def test_a_disk_that_a_guest_was_started_with_is_closed_when_it_is_detached(
    hypervisor: Hypervisor, host: QemuWorkbench
) -> None:
    disk, other = host.disk("v1"), host.disk("v2")
    await start(hypervisor, msgspec.structs.replace(host.spec(), disks=(disk, other)))
    await host.until_up("one")
    assert has_open(host.process_id("one"), disk.path)
    for _ in range(2):
        await hypervisor.detach_disk(PERMIT, "one", disk.id)
    assert not has_open(host.process_id("one"), disk.path)
    assert has_open(host.process_id("one"), other.path)
    await hypervisor.attach_disk(PERMIT, "one", disk)
    assert set((await hypervisor.inspect("one")).disks) == {disk.id, other.id}


async def test_a_guest_that_holds_on_to_a_disk_can_be_asked_again(hypervisor: Hypervisor, host: QemuWorkbench) -> None:
    await start(hypervisor, host.spec())
    await host.until_up("one")
    await hypervisor.attach_disk(PERMIT, "one", host.disk("v1"))
    await host.guest_ignores("one")
    for _ in range(2):
        with pytest.raises(NotResponding, match="did not release"):
            await hypervisor.detach_disk(PERMIT, "one", "v1")
    assert "v1" in (await hypervisor.inspect("one")).disks
    await host.guest_cooperates("one")
    await hypervisor.detach_disk(PERMIT, "one", "v1")
    assert (await hypervisor.inspect("one")).disks == ()
    await hypervisor.attach_disk(PERMIT, "one", host.disk("v1"))
    assert (await hypervisor.inspect("one")).disks == ("v1",)


async def test_more_disks_than_places_are_refused(hypervisor: Hypervisor, host: QemuWorkbench) -> None:
    await start(hypervisor, host.spec())
    for number in range(host.settings.hotplug_ports):
        await hypervisor.attach_disk(PERMIT, "one", host.disk(f"v{number}"))
    with pytest.raises(OperationRejected, match="no free port"):
        await hypervisor.attach_disk(PERMIT, "one", host.disk("one-too-many"))
    assert len((await hypervisor.inspect("one")).disks) == host.settings.hotplug_ports


async def test_a_disk_that_cannot_be_used_leaves_nothing_behind(hypervisor: Hypervisor, host: QemuWorkbench) -> None:
    await start(hypervisor, host.spec())
    with pytest.raises(OperationRejected, match="absent is missing"):
        await hypervisor.attach_disk(PERMIT, "one", Disk(id="v1", path=str(host.folder / "absent")))
    broken = host.folder / "broken"
    broken.write_bytes(b"no qcow2")
    with pytest.raises(OperationRejected, match="qcow2"):
        await hypervisor.attach_disk(PERMIT, "one", Disk(id="v1", path=str(broken)))
    await hypervisor.attach_disk(PERMIT, "one", host.disk("v1"))
    assert (await hypervisor.inspect("one")).disks == ("v1",)


async def test_a_disk_in_use_by_another_guest_is_refused(hypervisor: Hypervisor, host: QemuWorkbench) -> None:
    spec = msgspec.structs.replace(host.spec(), disks=(host.disk("v1"),))
    await start(hypervisor, spec)
    await hypervisor.define(PERMIT, "two", spec)
    with pytest.raises(OperationRejected, match="lock"):
        await hypervisor.power_on(PERMIT, "two", spec)
    await hypervisor.power_on(PERMIT, "two", host.spec())
    with pytest.raises(OperationRejected, match="lock"):
        await hypervisor.attach_disk(PERMIT, "two", host.disk("v1"))
    await hypervisor.power_off(PERMIT, "one")
    await hypervisor.attach_disk(PERMIT, "two", host.disk("v1"))


async def test_ports_are_forwarded_and_a_taken_one_is_refused(hypervisor: Hypervisor, host: QemuWorkbench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        spec = msgspec.structs.replace(host.spec(), forwards=(Forward(host_port=port, guest_port=22),))
        await hypervisor.define(PERMIT, "one", spec)
        with pytest.raises(OperationRejected, match=f"port {port}") as refusal:
            await hypervisor.power_on(PERMIT, "one", spec)
        assert "choose another port" in str(refusal.value.remedy)
        assert "hostfwd" not in refusal.value.message, "QEMU's own words are not for people"
        assert (await hypervisor.inspect("one")).power_state is PowerState.NONE
    await hypervisor.power_on(PERMIT, "one", spec)
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S):
        pass


@pytest.mark.parametrize(
    ("act", "news", "state"),
    [
        (Act.POWER_OFF, GuestEvent.STOPPED, PowerState.SHUTDOWN),
        (Act.PANIC, GuestEvent.CRASHED, PowerState.CRASHED),
        (Act.REBOOT, GuestEvent.RESET, PowerState.RUNNING),
    ],
)
async def test_what_a_guest_does_by_itself_is_told_once(
    hypervisor: Hypervisor, host: QemuWorkbench, told: Told, act: Act, news: GuestEvent, state: PowerState
) -> None:
    await start(hypervisor, Spec(image=nano_guest(host.folder, act, after_ms=40), memory_mib=MEMORY_MIB))
    await told.until(news, PATIENCE_S)
    if act is Act.REBOOT:
        await host.until_up("one")
    assert (await hypervisor.inspect("one")).power_state is state
    assert told.kinds() == [news]
    console = await hypervisor.console_tail("one", 1000)
    assert console is not None
    assert console.count(GREETING.encode()) == (2 if act is Act.REBOOT else 1)


async def test_a_console_that_grows_without_end_is_cut(tmp_path: Path) -> None:
    host = QemuWorkbench(tmp_path)
    host.settings = msgspec.structs.replace(host.settings, console_bytes_max=100, console_check_interval_ms=10)
    hypervisor = host.make()
    await hypervisor.open(Told())
    try:
        await start(hypervisor, host.spec())
        console = host.instance_folder("one").console
        older = console.with_name("console.log.1")
        async with asyncio.timeout(PATIENCE_S):
            while not older.exists():
                await host.until_up("one")
        await host.until_up("one")
        assert console.stat().st_size < 1000
        assert older.stat().st_size <= 100
    finally:
        await hypervisor.undefine(PERMIT, "one")
        await hypervisor.close()
        host.end_everything()


async def test_a_console_is_cut_also_while_no_server_runs(tmp_path: Path) -> None:
    """Found by a guest that wrote 267 KiB a second while its server was down."""
    host = QemuWorkbench(tmp_path)
    host.settings = msgspec.structs.replace(host.settings, console_bytes_max=2_000, console_check_interval_ms=10)
    hypervisor = host.make()
    await hypervisor.open(Told())
    try:
        await start(hypervisor, host.spec())
        await host.until_up("one")
        await hypervisor.close()
        console = host.instance_folder("one").console
        older = console.with_name("console.log.1")
        with console.open("ab") as log:  # as QEMU does: always at the end
            async with asyncio.timeout(PATIENCE_S):
                while not older.exists() or console.stat().st_size >= 2_000:
                    log.write(b"x" * 500)
                    log.flush()
                    await asyncio.sleep(0)
        assert older.stat().st_size <= 2_000
        hypervisor = host.make()
        await hypervisor.open(Told())
    finally:
        await hypervisor.undefine(PERMIT, "one")
        await hypervisor.close()
        host.end_everything()


async def test_a_folder_with_a_long_name_will_do(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 50)
    folder.mkdir()
    host = QemuWorkbench(folder)
    hypervisor = host.make()
    await hypervisor.open(Told())
    try:
        await start(hypervisor, host.spec())
        await host.until_up("one")
    finally:
        await hypervisor.undefine(PERMIT, "one")
        await hypervisor.close()
        host.end_everything()


async def test_a_second_server_is_told_so(hypervisor: Hypervisor, host: QemuWorkbench) -> None:
    with pytest.raises(Unavailable, match="another server"):
        await QemuHypervisor(host.settings).open(Told())


async def test_missing_qemu_is_unavailable_with_the_package_to_install(host: QemuWorkbench) -> None:
    settings = msgspec.structs.replace(host.settings, qemu_binary="qemu-system-none")
    with pytest.raises(Unavailable) as refusal:
        await QemuHypervisor(settings).open(Told())
    assert "apt-get install qemu-system-x86" in str(refusal.value.remedy)


async def test_what_is_not_there_to_boot_is_refused(hypervisor: Hypervisor, host: QemuWorkbench) -> None:
    image = msgspec.structs.replace(host.spec().image, path=str(host.folder / "absent.elf"))
    spec = msgspec.structs.replace(host.spec(), image=image)
    with pytest.raises(OperationRejected, match=r"absent\.elf is missing"):
        await hypervisor.define(PERMIT, "one", spec)
    assert await hypervisor.known() == frozenset(), "nothing was changed"
    await hypervisor.define(PERMIT, "one", host.spec())
    with pytest.raises(OperationRejected, match=r"absent\.elf is missing"):
        await hypervisor.power_on(PERMIT, "one", spec)
    await hypervisor.power_on(PERMIT, "one", host.spec())
    await host.until_up("one")


async def test_an_id_that_leaves_its_folder_is_refused(hypervisor: Hypervisor, host: QemuWorkbench) -> None:
    for bad in ("../one", "", ".", "a/b", "a\nb"):
        with pytest.raises(OperationRejected):
            await hypervisor.define(PERMIT, bad, host.spec())
        assert not (await hypervisor.inspect(bad)).defined
    assert await hypervisor.known() == frozenset()
