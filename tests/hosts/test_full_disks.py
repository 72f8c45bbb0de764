"""An agent whose file system is full: what needs space fails whole and says why, and the ways out work."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from boot_sector import bootable_image, writing_image
from interlock.hypervisors.remote.event_log import EventLog
from interlock.hypervisors.remote.fence_table import FenceTable
from interlock.hypervisors.remote.file_cache import FileCache
from interlock.hypervisors.remote.protocol import CHUNK_BYTES
from processes.real_agent import RealAgent
from processes.real_fleet import Fleet
from small_file_systems import fill, small_file_system
from waiting import until

SMALL_MIB = 4


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "small", f"{SMALL_MIB}m") as folder:
        yield folder


async def test_a_copy_that_finds_no_space_is_told_of_by_its_name_and_leaves_nothing(small: Path) -> None:
    """Also where the disk takes a part of a piece, which is no error of the system yet."""
    shelf = FileCache(small, None)
    shelf.open()
    piece = bytes(CHUNK_BYTES - 1)

    async def copy() -> None:
        for number in range(2 * SMALL_MIB):
            await shelf.file_write("cache", "image", number * len(piece), piece)

    with pytest.raises(OSError, match="No space left") as failure:
        await copy()
    assert str(failure.value.filename).endswith("images/image.part")
    assert list((small / "images").iterdir()) == []


def test_books_that_cannot_be_kept_leave_no_drafts(small: Path) -> None:
    fences, log = FenceTable(small / "fences"), EventLog(small / "events.jsonl")
    fences.open()
    log.open()
    fill(small / "ballast")
    fences.see("web", 7)
    log._write()
    assert fences.highest("web") == 7
    assert sorted(path.name for path in small.rglob("*")) == ["ballast", "events.jsonl", "fences"]


@pytest.fixture
def north(fleet: Fleet) -> Iterator[RealAgent]:
    """An agent on a file system of its own, beside another on the server's."""
    with small_file_system(fleet.folder / "small", "64m") as folder:
        folder.chmod(0o711)
        (folder / "ballast").write_bytes(bytes(32 << 20))
        settings = {"INTERLOCK_QEMU_LIVENESS_INTERVAL_MS": "200", "INTERLOCK_HOST_DISK_OVERCOMMIT": "1000"}
        settings["INTERLOCK_HOST_DISK_RESERVED_GIB"] = "0"
        agent = RealAgent(fleet.server, "north", folder / "north", settings=settings)
        fleet.agents["north"] = agent
        agent.start()
        fleet.until_linked("north")
        fleet.add("south")
        yield agent
        fleet.clear()


def add_image(fleet: Fleet, raw: Path) -> None:
    disk = raw.with_suffix(".qcow2")
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(disk)], check=True)
    with disk.open("rb") as file:
        form = {"name": raw.stem, "kind": "disk"}
        fleet.server.client.post("/v1/images", data=form, files={"disk": file}).raise_for_status()


def until_trouble(fleet: Fleet, vm: str, trouble: str | None) -> None:
    def found() -> str | None:
        told: str | None = fleet.server.get(f"/v1/instances/{vm}")["guest_trouble"]
        return told

    until(lambda: found() == trouble, lambda: str(found()))


def failure(fleet: Fleet, vm: str, operation: str, **parameters: object) -> str:
    """What an operation fails with, which must be admitted."""
    asked = fleet.server.submit(vm, operation, **parameters)
    assert asked.status_code == 202, asked.text
    ended = fleet.server.ended(asked.json()["request"]["id"])
    assert ended["status"] == "failed", ended
    return str(ended["message"])


@pytest.mark.qemu
@pytest.mark.long
def test_on_an_agents_full_disk_nothing_is_half_made_and_vms_can_be_stopped_and_deleted(
    fleet: Fleet, north: RealAgent
) -> None:
    add_image(fleet, Path(writing_image(fleet.folder, "writer").path))
    add_image(fleet, Path(bootable_image(fleet.folder, "boots").path))
    for name in ("one", "two"):
        fleet.create(name, "north", memory_mib=64)
    stays = fleet.create("stays", "south", image="boots", memory_mib=64)
    fleet.create("writer", "north", image="writer", memory_mib=64)
    until_trouble(fleet, "writer", "no_space")
    copies = sorted((north.folder / "images").iterdir())
    fill(north.folder.parent / "more")

    for operation, parameters in (("live_migrate", {"host": "north"}), ("migrate", {"host": "north"})):
        message = failure(fleet, "stays", operation, **parameters)
        assert "No space left on device" in message
        assert "on the host north" in message
        seen = fleet.server.get("/v1/instances/stays")
        assert (seen["vm_state"], seen["power_state"], seen["host"]) == ("active", "running", "south")
    assert sorted((north.folder / "images").iterdir()) == copies
    assert not fleet.guest_folder("north", stays).exists()
    fill(north.folder.parent / "more")
    fleet.carry_out("one", "stop", hard=True)
    fill(north.folder.parent / "more")
    fleet.carry_out("one", "delete")
    north.kill()
    fill(north.folder.parent / "more")
    north.start()
    fleet.until_linked("north")
    fleet.carry_out("two", "delete")
    assert fleet.server.get("/v1/instances/writer")["guest_trouble"] == "no_space"

    for ballast in ("ballast", "more"):
        (north.folder.parent / ballast).unlink()
    until_trouble(fleet, "writer", None)
    fleet.carry_out("writer", "delete")
    fleet.carry_out("stays", "live_migrate", host="north")
    assert list(north.folder.rglob("*.new")) == []
