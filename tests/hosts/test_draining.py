"""Hosts that become empty: real agents, real guests, and a server that is killed in between."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest

from processes.real_fleet import Fleet
from processes.real_server import guests_in
from waiting import until

pytestmark = pytest.mark.qemu


def cli(fleet: Fleet, *words: str) -> subprocess.CompletedProcess[str]:
    """What the command line says."""
    command = [sys.executable, "-m", "interlock", "--url", str(fleet.server.client.base_url)]
    token = (fleet.server.folder / "admin.token").read_text().strip()
    return subprocess.run(
        [*command, *words], capture_output=True, text=True, check=False, env={"INTERLOCK_TOKEN": token, "PATH": ""}
    )


def host(fleet: Fleet, name: str) -> dict[str, Any]:
    found: dict[str, Any] = fleet.server.get(f"/v1/hosts/{name}")
    return found


def test_a_host_is_drained_as_its_guests_run_and_used_again(fleet: Fleet) -> None:
    north, south = fleet.add("north"), fleet.add("south")
    for number in range(3):
        fleet.create(f"vm{number}", "north")
    fleet.create("stopped", "north")
    fleet.carry_out("stopped", "stop")
    planned = cli(fleet, "host", "drain", "north", "--dry-run")
    assert planned.returncode == 0, planned
    assert planned.stdout.count("live migrate") == 3
    assert len(north.guests()) == 3
    done = cli(fleet, "host", "drain", "north")
    assert "1 VM stays on north for now" in done.stderr, done
    assert "stopped: It is stopped, and is moved only by a drain with --cold." in done.stdout
    assert north.guests() == []
    assert len(guests_in(fleet.server.folder)) + len(south.guests()) == 3
    assert host(fleet, "north")["drain"]["left"] == 1
    assert "up, draining (1 left)" in cli(fleet, "host", "list").stdout
    assert cli(fleet, "host", "drain", "north", "--cold").returncode == 0
    assert "up, drained" in cli(fleet, "host", "list").stdout
    refused = fleet.server.client.post("/v1/instances", json={"name": "new", "image": "nano", "host": "north"})
    assert (refused.status_code, "being drained" in refused.text) == (422, True)
    assert cli(fleet, "host", "undrain", "north").returncode == 0
    fleet.create("new", "north")
    plan = json.loads(cli(fleet, "host", "rebalance", "--json").stdout)
    assert plan["dry_run"] is True
    assert {move["operation"] for move in plan["items"]} <= {"live_migrate"}
    assert len(north.guests()) == 1


@pytest.mark.parametrize("after_s", [0.3])
def test_a_drain_goes_on_when_the_server_was_killed(fleet: Fleet, after_s: float) -> None:
    north = fleet.add("north")
    names = [f"vm{number}" for number in range(4)]
    for name in names:
        fleet.create(name, "north")
    assert cli(fleet, "host", "drain", "north", "--no-wait").returncode == 0
    time.sleep(after_s)  # how far it has come is what is tried
    fleet.server.kill()
    fleet.server.start()
    north.kill()
    north.start()
    fleet.until_linked("north")
    until(lambda: host(fleet, "north")["drain"]["left"] == 0, "it is not drained")
    until(lambda: north.guests() == [], "something is left there")
    until(lambda: not any(fleet.server.get(f"/v1/instances/{name}")["outstanding"] for name in names), "it goes on")
    assert len(guests_in(fleet.server.folder)) == len(names)


def test_the_guests_of_a_killed_host_come_up_elsewhere_by_themselves(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("fleet")
    for path in (folder, *folder.parents[:3]):
        path.chmod(0o711)
    lease = {"INTERLOCK_HOSTS_LEASE_MS": "3000", "INTERLOCK_HOSTS_EVACUATE": "auto"}
    fleet = Fleet(folder, lease)
    try:
        fleet.start()
        north = fleet.add("north")
        names = [f"vm{number}" for number in range(3)]
        for name in names:
            fleet.create(name, "north")
        fleet.create("never", "north", evacuate="never")
        north.kill()
        until(lambda: host(fleet, "north")["state"] == "fenced", "it is not fenced")
        fleet.server.kill()
        fleet.server.start()
        until(lambda: len(guests_in(fleet.server.folder)) == len(names), "they are not up")
        until(lambda: north.guests() == [], "what was there runs on")
        for name in names:
            one = fleet.server.get(f"/v1/instances/{name}")
            assert (one["host"] != "north", one["vm_state"]) == (True, "active"), one
            asked = fleet.server.get(f"/v1/instances/{name}/requests")["items"]
            assert [one["operation"] for one in asked].count("evacuate") == 1
        assert fleet.server.get("/v1/instances/never")["host"] == "north"
        done = cli(fleet, "host", "evacuate", "north")
        assert done.returncode == 0, done
        assert "Moved: never" in done.stdout
    finally:
        fleet.clear()


def test_a_host_is_renamed_while_its_guests_run_and_its_agent_goes_on(fleet: Fleet) -> None:
    """Also after the connection breaks, and once the agent is started with the new name."""
    north = fleet.add("north")
    fleet.create("one", "north")
    (before,) = north.guests()
    assert "Host here already exists" in cli(fleet, "host", "rename", "north", "here").stderr
    done = cli(fleet, "host", "rename", "north", "berlin-1")
    assert done.returncode == 0, done
    assert "Start its agent with --name berlin-1" in done.stdout
    assert fleet.server.get("/v1/instances/one")["host"] == "berlin-1"
    assert [one["name"] for one in fleet.server.get("/v1/hosts")["items"]] == ["berlin-1"]
    assert host(fleet, "berlin-1")["former"] == "north"
    fleet.carry_out("one", "pause")
    fleet.carry_out("one", "unpause")
    north.kill()
    north.start()
    fleet.until_linked("berlin-1")
    fleet.carry_out("one", "pause")
    assert cli(fleet, "host", "rename", "berlin-1", "bonn").returncode == 0
    assert "connected, as north: start it with --name bonn" in cli(fleet, "host", "show", "bonn").stdout
    refused = cli(fleet, "token", "create", "more", "--role", "agent", "--host", "north").stderr
    assert "host: north is a former name of the host bonn." in refused
    fleet.server.kill()
    fleet.server.start()
    north.kill()
    north.start()  # the server has another port now
    fleet.until_linked("bonn")
    assert (north.guests(), host(fleet, "bonn")["former"]) == ([before], "north")
    assert cli(fleet, "host", "rename", "bonn", "north").returncode == 0
    assert host(fleet, "north")["former"] is None
    assert cli(fleet, "host", "rename", "north", "berlin-1").returncode == 0
    fleet.server.kill()
    fleet.server.start()
    north.kill()
    north.start()
    fleet.until_linked("berlin-1")
    fleet.carry_out("one", "unpause")
    north.kill()
    north.name = "berlin-1"
    north.start()
    until(lambda: host(fleet, "berlin-1")["former"] is None, "its agent is not known by its new name")
    fleet.carry_out("one", "stop")
    fleet.carry_out("one", "start")
    assert north.guests() != [before]
    assert len(north.guests()) == 1
