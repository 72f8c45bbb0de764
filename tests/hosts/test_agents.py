"""Agents of other hosts, in processes of their own: guests are held there, and outlive who is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from websockets.sync.client import connect

from benchmarks.nano_guest import GREETING
from boot_sector import bootable_image
from interlock.hypervisors.qemu.disks.images_in_use import images_in_use
from processes.real_fleet import Fleet
from waiting import PATIENCE_S, until

pytestmark = pytest.mark.qemu


def test_a_guest_is_made_and_served_on_another_host(fleet: Fleet) -> None:
    north = fleet.add("north")
    instance = fleet.create("one", "north")
    assert fleet.server.get(f"/v1/instances/{instance}")["host"] == "north"
    assert len(north.guests()) == 1
    assert not (fleet.server.folder / "guests" / "vms" / instance).exists()
    fleet.carry_out("one", "pause")
    fleet.carry_out("one", "unpause")
    fleet.carry_out("one", "stop")
    assert north.guests() == []
    fleet.carry_out("one", "delete")
    assert list((north.folder / "guests" / "vms").iterdir()) == []
    (host,) = fleet.server.get("/v1/hosts")["items"]
    assert (host["name"], host["state"], host["linked"], host["instances"]) == ("north", "up", True, 0)


def test_an_agent_tells_what_may_be_promised_on_its_host_and_more_is_refused(fleet: Fleet) -> None:
    fleet.add("north", settings={"INTERLOCK_HOST_MEMORY_MIB": "200"})
    fleet.create("one", "north", memory_mib=128)
    (host,) = fleet.server.get("/v1/hosts")["items"]
    assert (host["total"]["memory_mib"], host["promised"]["memory_mib"], host["free"]["memory_mib"]) == (200, 128, 72)
    assert host["total"]["vcpus"] > 0
    assert host["disk_free_mib"] > 0
    fleet.create("two", "here", memory_mib=128)
    for operation in ("migrate", "live_migrate"):
        refused = fleet.server.submit("two", operation, host="north")
        assert refused.status_code == 409
        problem = refused.json()
        assert problem["type"] == "urn:interlock:problem:no-room"
        assert (problem["needed"], problem["free"]) == ({"memory_mib": 128}, {"memory_mib": 72})
        assert "two does not fit on the host north" in problem["detail"]
    fleet.carry_out("one", "delete")
    fleet.carry_out("two", "live_migrate", host="any")
    assert fleet.server.get("/v1/instances/two")["host"] == "north"


def test_the_copy_of_an_image_goes_with_the_image(fleet: Fleet) -> None:
    north = fleet.add("north")
    fleet.create("one", "north", root_gib=1)
    copies = north.folder / "images"
    (copy,) = copies.iterdir()
    assert images_in_use(north.folder / "guests" / "vms") == {str(copy)}
    fleet.carry_out("one", "delete")
    fleet.server.client.delete("/v1/images/nano").raise_for_status()
    until(lambda: not list(copies.iterdir()))


def test_what_comes_back_from_another_host_may_be_of_any_size(fleet: Fleet) -> None:
    disk = bootable_image(fleet.folder, "noise", 4 << 20)
    with Path(disk.path).open("r+b") as content:
        content.seek(1 << 20)
        content.write(Random(1).randbytes(3 << 20))  # which no copy can make smaller
    with Path(disk.path).open("rb") as content:
        form = {"name": "noise", "kind": "disk"}
        fleet.server.client.post("/v1/images", data=form, files={"disk": content}).raise_for_status()
    north = fleet.add("north")
    fleet.create("one", "north", image="noise")
    fleet.carry_out("one", "snapshot", name="copy")
    fleet.carry_out("one", "crash_dump")
    assert '"not connected"' not in north.log.read_text()
    (copy,) = (one for one in fleet.server.get("/v1/images")["items"] if one["name"] == "copy")
    assert copy["stored_bytes"] > 3 << 20


def test_what_a_guest_on_another_host_has_written_on_its_console_can_be_read(fleet: Fleet) -> None:
    north = fleet.add("north")
    fleet.create("one", "north")
    said = "/v1/instances/one/console"
    until(lambda: GREETING in fleet.server.client.get(said).text)
    url = str(fleet.server.client.base_url.join(said + "/live?history=100")).replace("http", "ws", 1)
    headers = {"Authorization": fleet.server.client.headers["Authorization"]}
    with connect(url, additional_headers=headers) as console:
        assert GREETING.encode() in bytes(console.recv(timeout=PATIENCE_S))  # type: ignore[arg-type]
    assert len(fleet.server.client.get(said, params={"tail_bytes": 3}).content) == 3
    north.kill()
    fleet.until_gone("north")
    away = fleet.server.client.get(said)
    assert (away.status_code, away.json()["detail"]) == (503, "The host north is not connected.")


def test_a_guest_outlives_its_agent_and_its_server(fleet: Fleet) -> None:
    north = fleet.add("north")
    fleet.create("one", "north")
    (process,) = north.guests()
    north.kill()
    north.start()
    fleet.carry_out("one", "pause")
    fleet.server.kill()
    fleet.server.start()
    north.kill()
    north.start()  # the server has another port now
    fleet.carry_out("one", "unpause")
    assert north.guests() == [process]


def test_a_second_agent_on_the_same_folder_refuses_to_start(fleet: Fleet) -> None:
    north = fleet.add("north")
    command = [sys.executable, "-m", "interlock", "agent", "--server", str(fleet.server.client.base_url)]
    command += ["--token-file", str(north.token_file()), "--name", "north"]
    second = subprocess.run(
        [*command, "--data-dir", str(north.folder)], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert second.returncode != 0
    assert "is locked by another server or agent" in second.stderr


def test_what_is_asked_while_the_agent_is_away_is_done_when_it_is_back(fleet: Fleet) -> None:
    north = fleet.add("north")
    fleet.create("one", "north")
    north.kill()
    request = fleet.server.submit("one", "pause").json()["request"]["id"]
    north.start()
    assert fleet.server.ended(request)["status"] == "succeeded"
    assert fleet.server.get("/v1/instances/one")["vm_state"] == "paused"


def test_a_token_of_the_role_agent_speaks_for_a_host_and_does_nothing_else(fleet: Fleet) -> None:
    wish = {"name": "north", "role": "agent", "project": "default", "host": "north"}
    made = fleet.server.client.post("/v1/tokens", json=wish)
    secret = made.json()["secret"]
    token = fleet.folder / "agent.token"
    token.write_text(secret)
    agent = fleet.add("north", "--token-file", str(token))
    assert agent.name == "north"
    headers = {"Authorization": f"Bearer {secret}"}
    assert fleet.server.client.get("/v1/instances", headers=headers).status_code == 403
    assert fleet.server.client.get("/v1/hosts", headers=headers).status_code == 403
