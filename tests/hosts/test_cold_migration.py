"""An instance goes to another host with its guest powered off; at every moment it is in one place."""

from __future__ import annotations

import asyncio
import socket

import pytest

from conformance.disk_patterns import has_pattern, write_pattern
from processes.real_fleet import Fleet
from processes.real_server import guests_in
from waiting import PATIENCE_S

pytestmark = pytest.mark.qemu


def test_a_running_instance_runs_on_the_other_host(fleet: Fleet) -> None:
    north, south = fleet.add("north"), fleet.add("south")
    instance = fleet.create("one", "here", root_gib=1)
    (before,) = guests_in(fleet.server.folder)
    fleet.carry_out("one", "migrate", host="north")
    one = fleet.server.get("/v1/instances/one")
    assert (one["host"], one["vm_state"], one["power_state"]) == ("north", "active", "running")
    assert guests_in(fleet.server.folder) == []
    (after,) = north.guests()
    assert after != before
    assert fleet.holds("here", instance) == []
    fleet.carry_out("one", "migrate", host="south")
    assert fleet.holds("north", instance) == []
    assert len(south.guests()) == 1
    assert fleet.left_over() == []


def test_what_is_on_a_stopped_instance_s_disk_comes_along(fleet: Fleet) -> None:
    fleet.add("north")
    instance = fleet.create("one", "here", root_gib=1)
    fleet.carry_out("one", "stop")
    write_pattern(fleet.guest_folder("here", instance) / fleet.holds("here", instance)[0], 7, 3, at_mib=500)
    for host in ("north", "here"):
        fleet.carry_out("one", "migrate", host=host)
        one = fleet.server.get("/v1/instances/one")
        assert (one["host"], one["vm_state"], one["power_state"]) == (host, "stopped", "none")
        (disk,) = fleet.holds(host, instance)
        assert has_pattern(fleet.guest_folder(host, instance) / disk, 7, 3, at_mib=500)
    assert fleet.holds("north", instance) == []
    fleet.carry_out("one", "start")


def test_one_that_was_stopped_before_its_disk_was_made_goes_and_starts_there(fleet: Fleet) -> None:
    north = fleet.add("north")
    body = {"name": "one", "image": "nano", "root_gib": 1, "start": False}
    fleet.server.client.post("/v1/instances", json=body).raise_for_status()
    fleet.carry_out("one", "migrate", host="north")
    fleet.carry_out("one", "start")
    assert len(north.guests()) == 1


def test_an_instance_without_a_disk_goes_too(fleet: Fleet) -> None:
    north = fleet.add("north")
    fleet.create("one", "here")
    fleet.carry_out("one", "migrate", host="north")
    assert len(north.guests()) == 1
    assert guests_in(fleet.server.folder) == []


@pytest.mark.parametrize(
    "fleet", [{"INTERLOCK_DRIVER_GUEST_SHUTDOWN_TIMEOUT_MS": "20000"}], indirect=True, ids=["patient"]
)
def test_a_cancelled_migration_leaves_the_instance_as_it_was(fleet: Fleet) -> None:
    """It is cancelled while its guest, which ignores that, was asked to power off."""
    north = fleet.add("north")
    instance = fleet.create("one", "here", root_gib=1)
    request = fleet.server.submit("one", "migrate", host="north").json()["request"]["id"]
    fleet.server.client.delete(f"/v1/requests/{request}").raise_for_status()
    ended = fleet.server.ended(request)
    one = fleet.server.get("/v1/instances/one")
    assert (one["host"], one["vm_state"], one["power_state"], ended["status"]) == (
        *("here", "active", "running"),
        "cancelled",
    )
    assert len(guests_in(fleet.server.folder)) == 1
    assert north.guests() == []
    assert fleet.holds("north", instance) == []
    assert len(fleet.holds("here", instance)) == 1
    assert fleet.left_over() == []


def test_one_with_a_volume_that_the_host_cannot_reach_stays_and_runs(fleet: Fleet) -> None:
    fleet.add("north")
    fleet.create("one", "here", root_gib=1)
    fleet.server.client.post("/v1/volumes", json={"name": "data", "size_mib": 8}).raise_for_status()
    fleet.carry_out("one", "attach_volume", volume="data")
    (before,) = guests_in(fleet.server.folder)
    refusal = fleet.server.submit("one", "migrate", host="north")
    assert (refusal.status_code, refusal.json()["reason"]) == (409, "host_lacks_volumes")
    one = fleet.server.get("/v1/instances/one")
    assert (one["host"], one["vm_state"]) == ("here", "active")
    assert guests_in(fleet.server.folder) == [before]


async def test_one_that_cannot_be_started_there_is_there_and_says_why(fleet: Fleet) -> None:
    """Somebody else has its port by then: both hosts are one machine here."""
    north = fleet.add("north")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    instance = fleet.create("one", "here", root_gib=1, forwards=[{"host_port": port, "guest_port": 80}])
    request = fleet.server.submit("one", "migrate", host="north").json()["request"]["id"]
    with await asyncio.to_thread(taken, port):
        ended = fleet.server.ended(request)
        assert ended["status"] == "failed"
        assert "was migrated to host north, but failed to start there" in ended["message"]
        one = fleet.server.get("/v1/instances/one")
        while one["vm_state"] == "active":  # its host is looked at next
            one = fleet.server.get("/v1/instances/one", wait=f"{PATIENCE_S:.0f}s", after_generation=one["generation"])
        assert (one["host"], one["vm_state"]) == ("north", "error")
        assert fleet.holds("here", instance) == []
    fleet.carry_out("one", "start")
    assert len(north.guests()) == 1


def taken(port: int) -> socket.socket:
    """The port, as soon as its guest has let go of it."""
    while True:
        holder = socket.socket()
        try:
            holder.bind(("127.0.0.1", port))
        except OSError:
            holder.close()
        else:
            holder.listen()
            return holder
