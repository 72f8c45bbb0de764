"""A whole server with real guests on a full disk: the ways out work, also after a kill, and then everything does."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from processes.real_fleet import Fleet
from processes.real_server import guests_in
from small_file_systems import fill, small_file_system
from waiting import PATIENCE_S

pytestmark = pytest.mark.qemu

RESERVE_MIB = 1
WAYS_OUT = ("stop", "delete", "force_delete")


@pytest.fixture
def small() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="interlock-full-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o711)  # QEMU runs as another user if we are root
        with small_file_system(Path(name) / "small", "24m") as folder:
            folder.chmod(0o711)
            yield folder


@pytest.fixture
def fleet(small: Path) -> Iterator[Fleet]:
    settings = {"INTERLOCK_DISK_RESERVE_MIB": str(RESERVE_MIB), "INTERLOCK_DISK_LOW_MIB": "4"}
    one = Fleet(small, settings)
    try:
        one.start()
        yield one
    finally:
        one.clear()


def figure(fleet: Fleet, name: str) -> float:
    lines = fleet.server.client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"interlock_{name} ")).split(" ")[1])


def warning(fleet: Fleet) -> str:
    """What `/readyz` says of a server that is ready."""
    ready = fleet.server.client.get("/readyz")
    assert ready.status_code == 200, ready.text
    return " ".join(ready.json()["reasons"])


def use_up(fleet: Fleet, vm: str) -> str:
    """Have it asked for what is refused until there is no space to keep even that; what is said then."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        answer = fleet.server.submit(vm, "unpause")
        if answer.status_code == 507:
            return str(answer.json()["remedy"])
    raise AssertionError("the disk is not full")


def until_told(fleet: Fleet, *kinds: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while (told := [one["kind"] for one in fleet.server.get("/v1/hosts/here/events")["items"]]) != list(kinds):
        assert time.monotonic() < deadline, told
        time.sleep(0.02)


def test_on_a_full_disk_every_vm_can_be_stopped_and_deleted_also_after_a_kill(fleet: Fleet, small: Path) -> None:
    for number in range(2 * len(WAYS_OUT)):
        fleet.create(f"vm{number}", "here", memory_mib=64)
    assert warning(fleet) == ""
    fill(small / "ballast")
    assert "0 MiB free" in warning(fleet), "it warns before it is full for what it keeps itself"
    assert figure(fleet, "data_folder_low") == 1
    assert "Stopping and deleting VMs works meanwhile" in use_up(fleet, "vm0")
    assert "VMs can only be stopped and deleted" in warning(fleet)
    assert figure(fleet, "store_full") == 1
    until_told(fleet, "disk_full")
    for number, way_out in enumerate(WAYS_OUT):
        fill(small / f"ballast{number}")
        fleet.carry_out(f"vm{number}", way_out)

    fleet.server.kill()
    fill(small / "more")
    fleet.server.start()
    assert json.loads((fleet.server.folder / "server.json").read_text())["url"] == fleet.server.client.base_url
    assert use_up(fleet, "vm3")
    assert "VMs can only be stopped and deleted" in warning(fleet)
    for number, way_out in enumerate(WAYS_OUT, len(WAYS_OUT)):
        fill(small / f"ballast{number}")
        fleet.carry_out(f"vm{number}", way_out)
    assert guests_in(fleet.server.folder) == []

    for ballast in small.glob("ballast*"):
        ballast.unlink()
    until_told(fleet, "disk_full", "disk_full", "disk_has_space")
    assert figure(fleet, "store_full") == 0
    fleet.create("another", "here", memory_mib=64)
    fleet.server.stop()
    with apsw.Connection(str(fleet.server.folder / "interlock.db")) as database:
        assert database.execute("SELECT sum(length(content)) FROM reserve").get == RESERVE_MIB << 20
        assert database.pragma("integrity_check") == "ok"
