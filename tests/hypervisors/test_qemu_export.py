"""Root disks exported, copied and made from images: live and at rest, cancelled, killed, out of room, on real QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.nano_guest import MEMORY_MIB
from boot_sector import bootable_image
from conformance.disk_patterns import (
    MIB,
    SLOW_BYTES_PER_S,
    Progress,
    full_speed,
    has_pattern,
    info,
    is_whole,
    same_content,
    write_as_guest,
    write_pattern,
)
from conformance.hypervisor import GivenPermit
from conformance.qemu_workbench import QemuWorkbench, opened
from interlock.core.errors import Fenced, HypervisorError, NotResponding, OperationRejected
from interlock.core.records import Image, Spec
from interlock.core.states import PowerState
from interlock.hypervisors.qemu.adapter import QemuHypervisor
from interlock.hypervisors.qemu.guest import Guest
from processes.preloaded import exit_code
from small_file_systems import small_file_system
from waiting import PATIENCE_S

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]

PERMIT = GivenPermit()
ROOT_MIB = 64
WRITTEN_MIB = 32


@pytest.fixture
def host(tmp_path: Path) -> Iterator[QemuWorkbench]:
    host = QemuWorkbench(tmp_path)
    host.settings = msgspec.structs.replace(host.settings, copy_look_interval_ms=10)
    yield host
    host.end_everything()


@pytest.fixture
def slow(host: QemuWorkbench) -> None:
    host.settings = msgspec.structs.replace(host.settings, copy_bytes_per_s=SLOW_BYTES_PER_S)


@pytest.fixture
async def hypervisor(host: QemuWorkbench) -> AsyncIterator[QemuHypervisor]:
    hypervisor = await opened(host)
    yield hypervisor
    for instance_id in await hypervisor.known():
        await hypervisor.undefine(PERMIT, instance_id)
    await hypervisor.close()


@pytest.fixture
def image(host: QemuWorkbench) -> Image:
    return bootable_image(host.folder, "base", ROOT_MIB * MIB)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "small", "4m") as folder:
        yield folder


def spec_of(image: Image, **more: Any) -> Spec:
    return Spec(image=image, memory_mib=MEMORY_MIB, **more)


def guest_of(hypervisor: QemuHypervisor) -> Guest:
    guest = hypervisor.guest("one")
    assert guest is not None
    return guest


async def written(hypervisor: QemuHypervisor, host: QemuWorkbench, spec: Spec) -> Path:
    """Define the instance, and write to its root disk; the answer is that disk."""
    await hypervisor.define(PERMIT, "one", spec)
    root = host.instance_folder("one").roots(host.spec()).disk(spec.root)
    write_pattern(root, 1, WRITTEN_MIB, at_mib=1)
    return root


async def booted(hypervisor: QemuHypervisor, host: QemuWorkbench, spec: Spec) -> Guest:
    await hypervisor.power_on(PERMIT, "one", spec)
    await host.until_said("one", "booted base")
    return guest_of(hypervisor)


async def nodes(guest: Guest) -> set[str]:
    return {node["node-name"] for node in await guest.query("query-named-block-nodes", flat=True)}


def stands_alone(path: Path) -> bool:
    return "backing-filename" not in info(path) and is_whole(path)


def lose(path: Path) -> None:
    path.unlink()


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "half-made" in path.name or path.suffix in {".new", ".kept"}]


# ----------------------------------------------------------------------------------------------------------- exports


@pytest.mark.parametrize("state", ["running", "paused", "ended", "off"])
async def test_an_export_stands_by_itself_whatever_the_guest_does(
    hypervisor: QemuHypervisor, host: QemuWorkbench, image: Image, state: str
) -> None:
    spec, target, seen = spec_of(image), host.folder / "export.qcow2", Progress()
    root = await written(hypervisor, host, spec)
    if state != "off":
        guest = await booted(hypervisor, host, spec)
        before = await nodes(guest)
    if state == "paused":
        await hypervisor.pause(PERMIT, "one")
    if state == "ended":
        await host.kill("one")
        await hypervisor.wait_powered_off("one")
    expected = await hypervisor.inspect("one")
    await hypervisor.export_root_disk(PERMIT, "one", spec, target, seen)
    assert await hypervisor.inspect("one") == expected
    if state in {"running", "paused"}:
        assert await nodes(guest) == before
    assert seen.told[-1] == (ROOT_MIB * MIB, ROOT_MIB * MIB)
    assert leftovers(host.folder) == []
    await hypervisor.power_off(PERMIT, "one")
    assert same_content(root, target)
    lose(Path(image.path))
    assert stands_alone(target)
    assert has_pattern(target, 1, WRITTEN_MIB, at_mib=1)
    assert target.stat().st_size < 2 * MIB, "it is compressed, and what holds nothing takes no room"


@pytest.mark.usefixtures("slow")
async def test_an_export_is_the_disk_as_it_was_at_one_moment(
    hypervisor: QemuHypervisor, host: QemuWorkbench, image: Image
) -> None:
    spec, target, seen = spec_of(image), host.folder / "export.qcow2", Progress()
    root = await written(hypervisor, host, spec)
    guest = await booted(hypervisor, host, spec)
    export = asyncio.create_task(hypervisor.export_root_disk(PERMIT, "one", spec, target, seen))
    await seen.until_under_way()
    await write_as_guest(PERMIT, guest, "root", f"write -P 7 1M {WRITTEN_MIB}M")
    assert not target.exists()
    assert (await hypervisor.inspect("one")).disks == ("root",)
    await full_speed(PERMIT, guest)
    await export
    await write_as_guest(PERMIT, guest, "root", "write -P 8 40M 1M")
    await hypervisor.power_off(PERMIT, "one")
    assert has_pattern(target, 1, WRITTEN_MIB, at_mib=1)
    assert has_pattern(root, 7, WRITTEN_MIB, at_mib=1)
    assert has_pattern(root, 8, 1, at_mib=40)
    assert is_whole(root)


@pytest.mark.usefixtures("slow")
async def test_a_cancelled_export_leaves_nothing(hypervisor: QemuHypervisor, host: QemuWorkbench, image: Image) -> None:
    spec, target, seen = spec_of(image), host.folder / "export.qcow2", Progress()
    root = await written(hypervisor, host, spec)
    guest = await booted(hypervisor, host, spec)
    before = await nodes(guest)
    export = asyncio.create_task(hypervisor.export_root_disk(PERMIT, "one", spec, target, seen))
    await seen.until_under_way()
    export.cancel()
    with pytest.raises(asyncio.CancelledError):
        await export
    assert await guest.query("query-jobs") == []
    assert await nodes(guest) == before
    assert leftovers(host.folder) == []
    assert not target.exists()
    assert await hypervisor.inspect("one") == await hypervisor.inspect("one")
    await hypervisor.power_off(PERMIT, "one")
    assert is_whole(root)


async def test_a_full_disk_fails_the_export_and_not_the_guest(
    hypervisor: QemuHypervisor, host: QemuWorkbench, image: Image, small: Path
) -> None:
    spec = spec_of(image)
    root = await written(hypervisor, host, spec)
    scatter(root)
    guest = await booted(hypervisor, host, spec)
    with pytest.raises(OperationRejected, match="No space left on device") as refusal:
        await hypervisor.export_root_disk(PERMIT, "one", spec, small / "export.qcow2", Progress())
    assert "Make room" in str(refusal.value.remedy)
    assert names_in(small) == []
    await write_as_guest(PERMIT, guest, "root", "write -P 7 1M 1M")
    assert (await hypervisor.inspect("one")).power_state is PowerState.RUNNING
    await hypervisor.power_off(PERMIT, "one")
    with pytest.raises(OperationRejected, match="No space left on device"):
        await hypervisor.export_root_disk(PERMIT, "one", spec, small / "export.qcow2", Progress())
    assert names_in(small) == []
    assert is_whole(root)


def scatter(root: Path) -> None:
    """Fill 8 MiB of the disk with what cannot be compressed."""
    noise = root.with_name("noise")
    noise.write_bytes(os.urandom(8 * MIB))
    words = ["qemu-io", "-f", "qcow2", "-c", f"write -s {noise} 40M 8M", str(root)]
    subprocess.check_output(words)
    noise.unlink()


@pytest.mark.usefixtures("slow")
async def test_no_room_for_what_the_guest_overwrites_fails_the_export_and_not_the_guest(
    hypervisor: QemuHypervisor, host: QemuWorkbench, image: Image, small: Path
) -> None:
    spec, seen = spec_of(image), Progress()
    root = await written(hypervisor, host, spec)
    guest = await booted(hypervisor, host, spec)
    export = asyncio.create_task(hypervisor.export_root_disk(PERMIT, "one", spec, small / "export.qcow2", seen))
    await seen.until_under_way()
    await write_as_guest(PERMIT, guest, "root", f"write -P 7 {1 + WRITTEN_MIB // 2}M {WRITTEN_MIB // 2}M")
    with pytest.raises(OperationRejected, match="could not be preserved"):
        await export
    assert (await hypervisor.inspect("one")).power_state is PowerState.RUNNING
    assert names_in(small) == []
    await hypervisor.power_off(PERMIT, "one")
    assert has_pattern(root, 7, WRITTEN_MIB // 2, at_mib=1 + WRITTEN_MIB // 2)


@pytest.mark.usefixtures("slow")
async def test_an_export_can_be_made_again_whoever_was_killed_in_the_middle(
    hypervisor: QemuHypervisor, host: QemuWorkbench, image: Image
) -> None:
    spec, target, seen = spec_of(image), host.folder / "export.qcow2", Progress()
    root = await written(hypervisor, host, spec)
    guest = await booted(hypervisor, host, spec)
    permit = GivenPermit()
    export = asyncio.create_task(hypervisor.export_root_disk(permit, "one", spec, target, seen))
    await seen.until_under_way()
    permit.revoke()  # from here on it can do no more than a killed server could
    export.cancel()
    with contextlib.suppress(asyncio.CancelledError, Fenced):
        await export
    assert len(await guest.query("query-jobs")) == 1
    host.settings = msgspec.structs.replace(host.settings, copy_bytes_per_s=0)
    await host.abandon(hypervisor)
    hypervisor = await opened(host)
    await hypervisor.export_root_disk(PERMIT, "one", spec, target, Progress())
    guest = guest_of(hypervisor)
    assert await guest.query("query-jobs") == []
    assert not any(name.startswith("export") for name in await nodes(guest))
    await hypervisor.power_off(PERMIT, "one")
    assert same_content(root, target)
    await hypervisor.close()


@pytest.mark.usefixtures("slow")
async def test_qemu_killed_in_mid_export_leaves_the_root_disk_whole(
    hypervisor: QemuHypervisor, host: QemuWorkbench, image: Image
) -> None:
    spec, target, seen = spec_of(image), host.folder / "export.qcow2", Progress()
    root = await written(hypervisor, host, spec)
    guest = await booted(hypervisor, host, spec)
    export = asyncio.create_task(hypervisor.export_root_disk(PERMIT, "one", spec, target, seen))
    await seen.until_under_way()
    await write_as_guest(PERMIT, guest, "root", "write -P 7 1M 1M")
    await host.kill("one")
    with pytest.raises(HypervisorError):
        await export
    assert leftovers(host.folder) == []
    assert is_whole(root)
    await hypervisor.export_root_disk(PERMIT, "one", spec, target, Progress())
    assert has_pattern(target, 7, 1, at_mib=1)


async def test_what_cannot_be_exported_is_refused_with_the_cause(
    hypervisor: QemuHypervisor, host: QemuWorkbench, image: Image
) -> None:
    target = host.folder / "export.qcow2"
    with pytest.raises(OperationRejected, match="no root disk"):
        await hypervisor.export_root_disk(PERMIT, "one", host.spec(), target, Progress())
    spec = spec_of(image)
    await written(hypervisor, host, spec)
    lose(Path(image.path))
    with pytest.raises(OperationRejected, match=r"base\.raw"):
        await hypervisor.export_root_disk(PERMIT, "one", spec, target, Progress())
    with pytest.raises(OperationRejected, match="root-5"):
        await hypervisor.export_root_disk(PERMIT, "one", spec_of(image, root=5), target, Progress())
    assert leftovers(host.folder) == []


# ------------------------------------------------------------------------------------------------- the image tool

STUCK = """#!/bin/sh
case "$*" in
    *convert*) printf '    (25.00/100%%)\\r'; exec sleep {nap};;
    *) exec qemu-img "$@";;
esac
"""


def with_stuck_tool(host: QemuWorkbench, **more: Any) -> str:
    """Have an image tool that goes on for ever; return the argument by which its process is found."""
    tool, nap = host.folder / "stuck-tool", f"{1_000_000 + zlib.crc32(str(host.folder).encode())}"
    tool.write_text(STUCK.format(nap=nap))
    tool.chmod(0o755)
    programs = [shutil.which(program) or program for program in ("sh", "sleep", "qemu-img")]
    host.settings = msgspec.structs.replace(
        host.settings, image_tool_binary=str(tool), program_paths=("/bin/sh", *programs), **more
    )
    return nap


def is_stuck(nap: str) -> bool:
    """Whether the process of the tool that goes on for ever exists."""
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if place.name.isdigit() and (place / "cmdline").read_bytes() == f"sleep\0{nap}\0".encode():
                return True
    return False


async def test_an_image_tool_that_makes_no_progress_is_ended(host: QemuWorkbench, image: Image) -> None:
    nap = with_stuck_tool(host, copy_silence_timeout_ms=200)
    hypervisor = await opened(host)
    spec, seen = spec_of(image), Progress()
    await written(hypervisor, host, spec)
    with pytest.raises(OperationRejected, match="no progress for 200 ms"):
        await hypervisor.export_root_disk(PERMIT, "one", spec, host.folder / "export.qcow2", seen)
    assert not is_stuck(nap)
    assert seen.told == [(ROOT_MIB * MIB // 4, ROOT_MIB * MIB)]
    assert leftovers(host.folder) == []
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()


async def test_a_cancelled_worker_ends_its_image_tool(host: QemuWorkbench, image: Image) -> None:
    nap = with_stuck_tool(host)
    hypervisor = await opened(host)
    spec, seen = spec_of(image), Progress()
    await written(hypervisor, host, spec)
    target = host.folder / "export.qcow2"
    export = asyncio.create_task(hypervisor.export_root_disk(PERMIT, "one", spec, target, seen))
    await seen.until_under_way()
    export.cancel()
    with pytest.raises(asyncio.CancelledError):
        await export
    assert not is_stuck(nap)
    assert leftovers(host.folder) == []
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()


DOOMED = """
import asyncio, os, signal, sys
from pathlib import Path
import msgspec
from conformance.qemu_workbench import QemuWorkbench, opened
from interlock.core.records import Spec

class Permit:
    def check(self):
        pass

def report(done, total=None):
    if done:
        os.kill(os.getpid(), signal.SIGKILL)

async def serve(folder, spec):
    host = QemuWorkbench(folder)
    host.settings = msgspec.structs.replace(
        host.settings,
        image_tool_binary=sys.argv[3],
        program_paths=tuple(sys.argv[5:]),
        copy_look_interval_ms=10,
        copy_bytes_per_s=4 << 20,
    )
    hypervisor = host.make()
    await hypervisor.open(print)
    if sys.argv[4] == "live":
        await hypervisor.power_on(Permit(), "one", spec)
    await hypervisor.export_root_disk(Permit(), "one", spec, folder / "export.qcow2", report)

asyncio.run(serve(Path(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=Spec)))
"""


async def doomed(host: QemuWorkbench, spec: Spec, how: str) -> None:
    """Run a server that kills itself as soon as something is exported."""
    words = [str(host.folder), msgspec.json.encode(spec).decode(), host.settings.image_tool_binary, how]
    words += host.settings.program_paths
    assert await asyncio.to_thread(exit_code, "-c", DOOMED, *words) == -signal.SIGKILL


async def test_the_image_tool_of_a_killed_server_is_gone_and_its_work_done_again(
    host: QemuWorkbench, image: Image
) -> None:
    nap, spec = with_stuck_tool(host), spec_of(image)
    hypervisor = await opened(host)
    root = await written(hypervisor, host, spec)
    await hypervisor.close()
    await doomed(host, spec, "at rest")
    async with asyncio.timeout(PATIENCE_S):
        await until_ended(nap)
    host.settings = msgspec.structs.replace(host.settings, image_tool_binary="qemu-img")
    hypervisor = await opened(host)
    await hypervisor.export_root_disk(PERMIT, "one", spec, host.folder / "export.qcow2", Progress())
    assert same_content(root, host.folder / "export.qcow2")
    await booted(hypervisor, host, spec)
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()


async def until_ended(nap: str) -> None:
    while True:
        if not is_stuck(nap):
            return
        await asyncio.sleep(0.01)


async def test_a_server_killed_in_a_live_export_is_followed_by_one_that_makes_it_again(
    host: QemuWorkbench, image: Image
) -> None:
    spec, target = spec_of(image), host.folder / "export.qcow2"
    hypervisor = await opened(host)
    root = await written(hypervisor, host, spec)
    await hypervisor.close()
    await doomed(host, spec, "live")
    hypervisor = await opened(host)
    guest = guest_of(hypervisor)
    (job,) = await guest.query("query-jobs")
    assert job["status"] == "running", "QEMU goes on with it"
    assert not target.exists()
    await hypervisor.export_root_disk(PERMIT, "one", spec, target, Progress())
    assert await guest.query("query-jobs") == []
    await hypervisor.power_off(PERMIT, "one")
    assert same_content(root, target)
    assert is_whole(root)
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()


# ------------------------------------------------------------------------------------------- copies and images


async def test_a_copy_of_a_root_disk_is_a_layer_over_the_same_image_and_may_be_larger(
    hypervisor: QemuHypervisor, host: QemuWorkbench, image: Image
) -> None:
    old, new = spec_of(image), spec_of(image, root=1, root_gib=1)
    root, seen = await written(hypervisor, host, old), Progress()
    for _ in range(2):
        await hypervisor.copy_root_disk(PERMIT, "one", old, new, seen)
    copy = host.instance_folder("one").roots(host.spec()).disk(1)
    assert (info(copy)["virtual-size"], info(copy)["backing-filename"]) == (1 << 30, image.path)
    assert has_pattern(copy, 1, WRITTEN_MIB, at_mib=1)
    assert seen.told[-1][0] == seen.told[-1][1] == root.stat().st_size
    assert copy.stat().st_blocks * 512 <= root.stat().st_blocks * 512 + MIB, "holes stay holes"
    assert is_whole(copy)
    await booted(hypervisor, host, new)
    with pytest.raises(OperationRejected, match="has the root disk 1"):
        await hypervisor.drop_root_disks(PERMIT, "one", host.spec(), frozenset({0}))
    await hypervisor.drop_root_disks(PERMIT, "one", host.spec(), frozenset({1}))
    assert set(host.instance_folder("one").roots(host.spec()).disks()) == {1}


async def test_a_copy_that_would_be_smaller_is_refused(
    hypervisor: QemuHypervisor, host: QemuWorkbench, image: Image
) -> None:
    old = spec_of(image, root_gib=2)
    await written(hypervisor, host, old)
    with pytest.raises(OperationRejected, match="would have 1073741824 bytes"):
        await hypervisor.copy_root_disk(PERMIT, "one", old, spec_of(image, root=1, root_gib=1), Progress())
    assert set(host.instance_folder("one").roots(host.spec()).disks()) == {0}
    bare, given = host.spec(), msgspec.structs.replace(host.spec(), root=1, root_gib=1)
    await hypervisor.copy_root_disk(PERMIT, "two", bare, bare, Progress())
    await hypervisor.define(PERMIT, "two", bare)
    await hypervisor.copy_root_disk(PERMIT, "two", bare, given, Progress())
    assert set(host.instance_folder("two").roots(host.spec()).disks()) == {1}, "one that had none gets an empty one"


async def test_a_root_disk_can_be_made_from_an_export(
    hypervisor: QemuHypervisor, host: QemuWorkbench, image: Image
) -> None:
    spec, export = spec_of(image), host.folder / "export.qcow2"
    root = await written(hypervisor, host, spec)
    await hypervisor.export_root_disk(PERMIT, "one", spec, export, Progress())
    whole = spec_of(image, root=1, root_is_whole=True)
    with pytest.raises(OperationRejected, match=r"root-1\.qcow2 is missing"):
        await hypervisor.define(PERMIT, "one", whole)
    for _ in range(2):
        await hypervisor.root_disk_from(PERMIT, "one", whole, export, Progress())
    await hypervisor.drop_root_disks(PERMIT, "one", host.spec(), frozenset({1}))
    assert not root.exists()
    lose(Path(image.path))
    export.unlink()
    await hypervisor.define(PERMIT, "one", whole)
    guest = await booted(hypervisor, host, whole)
    assert not any(name.startswith("backing") for name in await nodes(guest))
    await hypervisor.power_off(PERMIT, "one")
    disk = host.instance_folder("one").roots(host.spec()).disk(1)
    assert stands_alone(disk)
    assert has_pattern(disk, 1, WRITTEN_MIB, at_mib=1)
    larger = spec_of(image, root=2, root_is_whole=True, root_gib=1)
    await hypervisor.root_disk_from(PERMIT, "one", larger, disk, Progress())
    assert info(host.instance_folder("one").roots(host.spec()).disk(2))["virtual-size"] == 1 << 30


async def test_an_image_that_needs_another_file_is_no_root_disk(
    hypervisor: QemuHypervisor, host: QemuWorkbench, image: Image
) -> None:
    layer = await written(hypervisor, host, spec_of(image))
    whole = spec_of(image, root=1, root_is_whole=True)
    with pytest.raises(OperationRejected, match="has a backing file"):
        await hypervisor.root_disk_from(PERMIT, "one", whole, layer, Progress())
    with pytest.raises(OperationRejected, match="is missing"):
        await hypervisor.root_disk_from(PERMIT, "one", whole, host.folder / "absent", Progress())
    with pytest.raises(OperationRejected, match="is not a qcow2"):
        await hypervisor.root_disk_from(PERMIT, "one", whole, Path(image.path), Progress())


async def test_a_full_disk_leaves_no_half_copied_root_disk(host: QemuWorkbench, image: Image, small: Path) -> None:
    host.settings = msgspec.structs.replace(host.settings, folder=small / "qemu")
    hypervisor = await opened(host)
    old = spec_of(image)
    await hypervisor.define(PERMIT, "one", old)
    write_pattern(host.instance_folder("one").roots(host.spec()).disk(0), 1, 2)
    with pytest.raises(OperationRejected, match="No space left on device") as refusal:
        await hypervisor.copy_root_disk(PERMIT, "one", old, spec_of(image, root=1), Progress())
    assert "Make room" in str(refusal.value.remedy)
    assert set(host.instance_folder("one").roots(host.spec()).disks()) == {0}
    assert leftovers(host.instance_folder("one").path) == []
    await hypervisor.undefine(PERMIT, "one")
    await hypervisor.close()


async def test_the_disks_of_a_guest_that_runs_are_not_copied(
    hypervisor: QemuHypervisor, host: QemuWorkbench, image: Image
) -> None:
    spec = spec_of(image)
    await written(hypervisor, host, spec)
    await booted(hypervisor, host, spec)
    with pytest.raises(NotResponding, match="still holds"):
        await hypervisor.copy_root_disk(PERMIT, "one", spec, spec_of(image, root=1), Progress())
