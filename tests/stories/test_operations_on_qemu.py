"""Rebuild, resize, shelving, snapshots and swaps as one story each, over HTTP, on real QEMU.

The guest is a boot sector that says on its console which disk it came from; what is on the disks is read with QEMU's
own tool.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from boot_sector import bootable_image
from interlock.hypervisors.qemu.process.qemu_process import find_in
from processes.real_server import RealServer, end_guests
from waiting import PATIENCE_S

pytestmark = [pytest.mark.qemu, pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not here")]

VM = "vm"
_FAR = 768 * 1024
"""Where on a disk the tests write: behind what the boot sector needs."""


@pytest.fixture
def server() -> Iterator[RealServer]:
    with tempfile.TemporaryDirectory(prefix="interlock-story-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # QEMU runs as another user if we are root
        one = RealServer(folder / "data", {"INTERLOCK_DRIVER_GUEST_SHUTDOWN_TIMEOUT_MS": "200"})
        one.start()
        for image in ("first", "second"):
            with Path(bootable_image(folder, image).path).open("rb") as disk:
                form = {"name": image, "kind": "disk"}
                one.client.post("/v1/images", data=form, files={"disk": disk}).raise_for_status()
        try:
            yield one
        finally:
            one.kill()
            end_guests(one.folder)


def create(server: RealServer, name: str, image: str) -> str:
    made = server.client.post("/v1/instances", json={"name": name, "image": image, "memory_mib": 64})
    assert made.status_code == 202, made.text
    assert server.ended(made.json()["request"]["id"])["status"] == "succeeded"
    return str(made.json()["instance"]["id"])


def carry_out(server: RealServer, operation: str, **parameters: object) -> dict[str, Any]:
    asked = server.submit(VM, operation, **parameters)
    assert asked.status_code == 202, (operation, asked.text)
    ended = server.ended(asked.json()["request"]["id"])
    assert ended["status"] == "succeeded", ended
    return server.get(f"/v1/instances/{VM}")


def place_of(server: RealServer, instance_id: str) -> Path:
    return server.folder / "guests" / "vms" / instance_id


def root_disks(server: RealServer, instance_id: str) -> list[Path]:
    return sorted(place_of(server, instance_id).rglob("root*.qcow2"))


def until_says(server: RealServer, instance_id: str, words: str, times: int = 1) -> None:
    """Wait until the guest has said it so often on its console."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        said = b"".join(path.read_bytes() for path in place_of(server, instance_id).rglob("console*") if path.is_file())
        if said.count(words.encode()) >= times:
            return
        time.sleep(0.05)  # the console is a file, and nothing tells of it
    raise AssertionError(f"the guest never said {words!r}: {said[-500:]!r}")


def write_far(disk: Path, pattern: int) -> None:
    """Write to a disk that nothing has open."""
    _qemu_io(disk, f"write -P {pattern} {_FAR} 4096")


def reads_far(disk: Path, pattern: int) -> bool:
    said = _qemu_io(disk, f"read -P {pattern} {_FAR} 4096")
    assert "read 4096/4096" in said, said
    return "Pattern verification failed" not in said


def _qemu_io(disk: Path, command: str) -> str:
    """What QEMU's tool says to a command; to read it does not mind who else has the disk open."""
    sharing = ("-r", "-U") if command.startswith("read") else ()
    ended = subprocess.run(
        ("qemu-io", *sharing, "-f", "qcow2", "-c", command, str(disk)),
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.stdout + ended.stderr


def marked(server: RealServer, pattern: int) -> str:
    """A VM that was stopped, and has the pattern on its root disk."""
    instance_id = create(server, VM, "first")
    until_says(server, instance_id, "booted first")
    carry_out(server, "stop", hard=True)
    (disk,) = root_disks(server, instance_id)
    write_far(disk, pattern)
    assert reads_far(disk, pattern)
    return instance_id


def test_a_rebuild_boots_another_image_and_keeps_the_identity(server: RealServer) -> None:
    instance_id = marked(server, 0xAB)
    carry_out(server, "start")
    after = carry_out(server, "rebuild", image="second")
    assert (after["id"], after["vm_state"], after["image"]["name"]) == (instance_id, "active", "second")
    until_says(server, instance_id, "booted second")
    (disk,) = root_disks(server, instance_id)
    assert not reads_far(disk, 0xAB)


def test_a_rescue_survives_a_soft_delete_and_ends_where_it_began(server: RealServer) -> None:
    instance_id = marked(server, 0xAB)
    rescued = carry_out(server, "rescue", image="second")
    assert (rescued["vm_state"], rescued["prior_vm_state"]) == ("rescued", "stopped")
    until_says(server, instance_id, "booted second")
    deleted = carry_out(server, "soft_delete")
    assert (deleted["vm_state"], deleted["power_state"]) == ("soft_deleted", "none")
    assert (deleted["prior_vm_state"], deleted["further_vm_states"]) == ("rescued", ["stopped"])
    restored = carry_out(server, "restore")
    assert (restored["vm_state"], restored["power_state"]) == ("rescued", "running")
    assert (restored["prior_vm_state"], restored["further_vm_states"]) == ("stopped", [])
    until_says(server, instance_id, "booted second", times=2)
    after = carry_out(server, "unrescue")
    assert (after["vm_state"], after["power_state"], after["prior_vm_state"]) == ("stopped", "none", None)
    (disk,) = root_disks(server, instance_id)
    assert reads_far(disk, 0xAB)
    carry_out(server, "start")
    until_says(server, instance_id, "booted first", times=2)
    carry_out(server, "rescue", image="second")
    carry_out(server, "soft_delete")
    asked = server.submit(VM, "delete")
    assert server.ended(asked.json()["request"]["id"])["status"] == "succeeded"
    assert not place_of(server, instance_id).exists()


def test_a_resize_whose_process_was_killed_is_reverted(server: RealServer) -> None:
    instance_id = marked(server, 0xAB)
    carry_out(server, "start")
    until_says(server, instance_id, "booted first", times=2)
    before = carry_out(server, "resize", vcpus=2)
    until_says(server, instance_id, "booted first", times=3)
    pid = find_in(place_of(server, instance_id) / "inside")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    ended = server.get(f"/v1/instances/{VM}", wait=f"{PATIENCE_S:.0f}s", after_generation=before["generation"])
    assert (ended["vm_state"], ended["power_state"], ended["prior_vm_state"]) == ("resized", "none", "active")
    reverted = carry_out(server, "revert_resize")
    assert (reverted["vm_state"], reverted["power_state"], reverted["vcpus"]) == ("active", "running", 1)
    until_says(server, instance_id, "booted first", times=4)
    (disk,) = root_disks(server, instance_id)
    assert reads_far(disk, 0xAB)


def test_a_resize_is_reverted_then_made_again_and_confirmed(server: RealServer) -> None:
    instance_id = marked(server, 0xAB)
    carry_out(server, "start")
    resized = carry_out(server, "resize", vcpus=2, root_gib=1)
    assert (resized["vm_state"], resized["prior_size"]["vcpus"], resized["vcpus"]) == ("resized", 1, 2)
    assert len(root_disks(server, instance_id)) == 2
    reverted = carry_out(server, "revert_resize")
    assert (reverted["vm_state"], reverted["vcpus"], reverted["prior_size"]) == ("active", 1, None)
    (disk,) = root_disks(server, instance_id)
    assert reads_far(disk, 0xAB)
    carry_out(server, "resize", root_gib=1)
    confirmed = carry_out(server, "confirm_resize")
    assert (confirmed["vm_state"], confirmed["root_gib"]) == ("active", 1)
    (disk,) = root_disks(server, instance_id)
    assert reads_far(disk, 0xAB)
    assert "1 GiB" in _info(disk)


def _info(disk: Path) -> str:
    command = ("qemu-img", "info", "-U", str(disk))
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_vm_is_shelved_offloaded_and_comes_back_with_its_disk(server: RealServer) -> None:
    instance_id = marked(server, 0xAB)
    carry_out(server, "start")
    carry_out(server, "shelve")
    offloaded = carry_out(server, "shelve_offload")
    assert offloaded["vm_state"] == "shelved_offloaded"
    assert not place_of(server, instance_id).exists()
    server.kill()
    server.start()
    back = carry_out(server, "unshelve")
    assert back["vm_state"] == "active"
    until_says(server, instance_id, "booted first")
    (disk,) = root_disks(server, instance_id)
    assert reads_far(disk, 0xAB)
    images = server.folder / "images"
    assert len([path for path in images.iterdir() if path.suffix == ".qcow2"]) == 0, "the image is needed no more"


def test_a_snapshot_of_a_running_vm_is_booted_by_another(server: RealServer) -> None:
    marked(server, 0xAB)
    carry_out(server, "start")
    carry_out(server, "snapshot", name="golden")
    copy = create(server, "copy", "golden")
    until_says(server, copy, "booted first")
    golden = next(one for one in server.get("/v1/images")["items"] if one["name"] == "golden")
    assert reads_far(server.folder / "images" / f"{golden['id']}.qcow2", 0xAB)
    (disk,) = root_disks(server, copy)
    assert reads_far(disk, 0xAB)


def test_a_volume_is_swapped_under_a_running_guest_and_at_rest(server: RealServer) -> None:
    instance_id = create(server, VM, "first")
    volumes = {}
    for name in ("one", "two", "three"):
        made = server.client.post("/v1/volumes", json={"name": name, "size_mib": 1}).json()
        volumes[name] = server.folder / "volumes" / f"{made['id']}.qcow2"
    write_far(volumes["one"], 0xCD)
    carry_out(server, "attach_volume", volume="one")
    carry_out(server, "swap_volume", old="one", new="two")
    assert find_in(place_of(server, instance_id) / "inside") is not None
    assert reads_far(volumes["two"], 0xCD)
    carry_out(server, "stop", hard=True)
    carry_out(server, "swap_volume", old="two", new="three")
    assert reads_far(volumes["three"], 0xCD)
    carry_out(server, "start")
    held = {one["name"]: one["attached_to"] for one in server.get("/v1/volumes")["items"]}
    assert held == {"one": None, "two": None, "three": instance_id}
