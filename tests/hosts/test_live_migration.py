"""A guest goes to another host as it runs, and at every moment at most one copy of it does."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from qemu.qmp import QMPClient

from benchmarks.nano_guest import GREETING
from hosts.loopback_capture import LoopbackCapture, can_capture, is_tls
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder
from processes.real_fleet import Fleet
from processes.real_server import guests_in
from soak.report import Book
from soak.split_brain_monitor import Doubles, moves
from tiers import only_long
from waiting import until

pytestmark = pytest.mark.qemu


def test_a_guest_goes_from_host_to_host_as_it_runs(fleet: Fleet) -> None:
    north = fleet.add("north")
    fleet.create("one", "here")
    (before,) = guests_in(fleet.server.folder)
    fleet.carry_out("one", "live_migrate", host="north")
    assert guests_in(fleet.server.folder) == []
    (after,) = north.guests()
    assert after != before
    for host in ("/v1/host", "/v1/hosts/north"):
        protections = {one["name"]: one["on"] for one in fleet.server.get(host)["protections"]}
        assert protections["no_privileges"]
        assert protections["own_user"] == (os.geteuid() == 0)
    one = fleet.server.get("/v1/instances/one")
    assert (one["host"], one["vm_state"], one["power_state"]) == ("north", "active", "running")
    fleet.carry_out("one", "live_migrate", host="here")
    assert north.guests() == []
    assert len(guests_in(fleet.server.folder)) == 1
    fleet.carry_out("one", "stop")


def test_one_whose_root_disk_stands_by_itself_stays_and_is_told_the_way_that_it_can_go(fleet: Fleet) -> None:
    """Nobody is told to rebuild a guest that only cannot go this way."""
    fleet.add("north")
    instance = fleet.create("one", "here", root_gib=1)
    fleet.carry_out("one", "shelve")
    fleet.carry_out("one", "shelve_offload")
    fleet.carry_out("one", "unshelve")
    (before,) = guests_in(fleet.server.folder)
    answer = fleet.server.submit("one", "live_migrate", host="north")
    assert (answer.status_code, answer.json()["reason"]) == (409, "root_disk_stands_alone")
    assert "its root disk on host here has no backing image" in answer.json()["because"]
    assert answer.json()["remedy"] == (
        "Use cold migration: the guest is powered off, and started again on the target host."
    )
    assert guests_in(fleet.server.folder) == [before]
    assert fleet.holds("north", instance) == []
    fleet.carry_out("one", "migrate", host="north")


def test_a_paused_guest_stays_paused(fleet: Fleet) -> None:
    north = fleet.add("north")
    fleet.create("one", "here")
    fleet.carry_out("one", "pause")
    fleet.carry_out("one", "live_migrate", host="north")
    one = fleet.server.get("/v1/instances/one")
    assert (one["host"], one["vm_state"], one["power_state"]) == ("north", "paused", "paused")
    assert len(north.guests()) == 1
    fleet.carry_out("one", "unpause")
    fleet.carry_out("one", "stop")


def test_the_root_disk_comes_along(fleet: Fleet) -> None:
    north = fleet.add("north")
    instance = fleet.create("one", "here", root_gib=1)
    fleet.carry_out("one", "live_migrate", host="north")
    assert len(north.guests()) == 1
    assert not (fleet.server.folder / "guests" / "vms" / instance).exists()
    fleet.carry_out("one", "stop")
    fleet.carry_out("one", "start")
    assert len(north.guests()) == 1


SOUTH = "127.0.0.77"
"""The address at which the host south receives guests."""


@pytest.mark.skipif(not can_capture(), reason="only root may record packets")
def test_a_capture_of_a_migration_between_two_agents_shows_tls_records_only(fleet: Fleet) -> None:
    fleet.add("north")
    south = fleet.add("south", settings={"INTERLOCK_QEMU_MIGRATION_ADDRESS": SOUTH})
    fleet.create("one", "north", root_gib=1)
    with LoopbackCapture(SOUTH) as capture:
        fleet.carry_out("one", "live_migrate", host="south")
    assert len(south.guests()) == 1
    streams = capture.streams()
    assert len(streams) == 4, "memory and disk are a connection each"
    assert max(map(len, streams)) > 10_000
    assert not any(GREETING.encode() in stream for stream in streams), "the guest's memory was sent unencrypted"
    assert all(map(is_tls, streams))


@pytest.mark.parametrize("after_s", [0.1, 0.35, *only_long(0.02, 0.2)])
def test_a_server_that_is_killed_leaves_one_running_copy(fleet: Fleet, after_s: float) -> None:
    north = fleet.add("north")
    fleet.create("one", "here", root_gib=1)
    request = fleet.server.submit("one", "live_migrate", host="north").json()["request"]["id"]
    time.sleep(after_s)  # how far it has come is what is tried
    fleet.server.kill()
    fleet.server.start()
    north.kill()
    north.start()
    fleet.until_linked("north")
    ended = fleet.server.ended(request)
    host = fleet.server.get("/v1/instances/one")["host"]
    assert (host, ended["status"]) in {("north", "succeeded"), ("here", "failed")}, ended
    until_there_are(fleet, "north", 1 if host == "north" else 0)
    until_there_are(fleet, "here", 1 if host == "here" else 0)
    fleet.carry_out("one", "pause")
    fleet.carry_out("one", "unpause")


@pytest.mark.parametrize("after_s", [0.1, 0.35, *only_long(0.02, 0.2)])
@pytest.mark.parametrize("whose", ["source", "target"])
def test_a_machine_that_is_killed_leaves_at_most_one_copy_that_can_be_started(
    fleet: Fleet, whose: str, after_s: float
) -> None:
    north = fleet.add("north")
    fleet.create("one", "here", root_gib=1)
    request = fleet.server.submit("one", "live_migrate", host="north").json()["request"]["id"]
    time.sleep(after_s)  # how far it has come is what is tried
    folder: Path = fleet.server.folder if whose == "source" else north.folder
    for process_id in guests_in(folder):
        os.kill(process_id, signal.SIGKILL)
    ended = fleet.server.ended(request)
    assert ended["status"] in {"succeeded", "failed"}, ended
    assert len(guests_in(fleet.server.folder)) + len(north.guests()) <= 1
    until(lambda: fleet.server.get("/v1/instances/one")["vm_state"] in {"active", "error"})
    fleet.carry_out("one", "reboot", hard=True)
    assert len(guests_in(fleet.server.folder)) + len(north.guests()) == 1


async def test_a_guest_that_nobody_could_tell_to_go_on_does_so_when_its_host_is_back(fleet: Fleet) -> None:
    """Its migration was broken off while its agent was away: it was sent, stands still, and is nowhere else."""
    north = fleet.add("north")
    instance = fleet.create("one", "north")
    folder = InstanceFolder(fleet.guest_folder("north", instance))
    north.kill()
    client = QMPClient("one")
    await client.connect(folder.connect_monitor())
    await client.execute("stop")
    await client.disconnect()
    (folder.path / "sent").write_text("ran")
    (holder,) = Doubles({"north": folder.path.parent}, Book()).holders()[instance]
    assert not moves(holder)
    await asyncio.to_thread(north.start)
    until(lambda: moves(holder), "it is said to be active, and stands still")
    assert fleet.server.get("/v1/instances/one")["vm_state"] == "active"


def test_an_abort_leaves_the_guest_where_it_is_or_tells_that_it_has_come(fleet: Fleet) -> None:
    north = fleet.add("north")
    fleet.create("one", "here", root_gib=1)
    request = fleet.server.submit("one", "live_migrate", host="north").json()["request"]["id"]
    assert fleet.server.submit("one", "live_migrate_abort").status_code in {200, 202}
    ended = fleet.server.ended(request)
    assert len(guests_in(fleet.server.folder)) + len(north.guests()) == 1
    one = fleet.server.get("/v1/instances/one")
    assert one["power_state"] == "running"
    assert (one["host"] == "here") == (ended["status"] == "cancelled"), (one, ended)


def until_there_are(fleet: Fleet, host: str, count: int) -> None:
    """Return when so many guests are on the host: what is left of others is removed when its agent is back."""
    folder = fleet.server.folder if host == "here" else fleet.agents[host].folder
    until(lambda: len(guests_in(folder)) == count, lambda: f"{len(guests_in(folder))} guests on {host}")


@pytest.mark.parametrize("after_s", [0.15, *only_long(0.05)])
@pytest.mark.parametrize("whose", ["north", "south"])
def test_an_agent_that_is_killed_leaves_one_running_copy(fleet: Fleet, whose: str, after_s: float) -> None:
    """The guest goes from north to south."""
    agents = {name: fleet.add(name) for name in ("north", "south")}
    fleet.create("one", "north", root_gib=1)
    request = fleet.server.submit("one", "live_migrate", host="south").json()["request"]["id"]
    time.sleep(after_s)  # how far it has come is what is tried
    agents[whose].kill()
    agents[whose].start()
    fleet.until_linked(whose)
    ended = fleet.server.ended(request)
    host = fleet.server.get("/v1/instances/one")["host"]
    assert (host, ended["status"]) in {("south", "succeeded"), ("north", "failed")}, ended
    for name in agents:
        until_there_are(fleet, name, 1 if host == name else 0)
    fleet.carry_out("one", "pause")
    fleet.carry_out("one", "unpause")
