"""Two agents of one name, and a data folder that is replaced, as real processes with real QEMU."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from interlock.hypervisors.qemu.process.process_scan import FoundGuest, find_guests
from processes.real_agent import RealAgent
from processes.real_fleet import Fleet
from waiting import PATIENCE_S, until

pytestmark = pytest.mark.qemu

LEASE_MS = 5_000
LOOK_AGAIN_S = 0.05


@pytest.fixture
def short() -> Iterator[Fleet]:
    """A fleet with short leases, and a watcher who finds no instance in two processes."""
    with tempfile.TemporaryDirectory(prefix="interlock-two-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)
        settings = {"INTERLOCK_HOSTS_LEASE_MS": str(LEASE_MS), "INTERLOCK_HOSTS_LEASE_MARGIN_MS": "2000"}
        one, over = Fleet(folder, settings), threading.Event()
        doubles: list[str] = []

        def look() -> None:
            while not over.wait(LOOK_AGAIN_S):
                found = [guest.instance_id for guest in started_below(folder)]
                doubles.extend(instance_id for instance_id in set(found) if found.count(instance_id) > 1)

        looking = threading.Thread(target=look)
        try:
            one.start()
            looking.start()
            yield one
        finally:
            over.set()
            looking.join()
            one.clear()
            for guest in started_below(folder):
                guest.kill()
        assert doubles == [], "an instance ran twice"


def started_below(folder: Path) -> list[FoundGuest]:
    return [guest for guest in find_guests() if Path(guest.folder.path).is_relative_to(folder.resolve())]


def processes(fleet: Fleet, instance_id: str) -> list[int]:
    return [guest.process_id for guest in started_below(fleet.folder) if guest.instance_id == instance_id]


def hosts(fleet: Fleet) -> dict[str, str]:
    return {one["name"]: one["state"] for one in fleet.server.get("/v1/hosts")["items"]}


RESTART = {"on_crash": "restart"}


def test_a_second_agent_waits_for_the_lease_of_a_stopped_one_and_starts_nothing_that_it_had(short: Fleet) -> None:
    north = short.add("north")
    instance = short.create("one", "north", restart=RESTART)
    (before,) = processes(short, instance)
    second = RealAgent(short.server, "north", short.folder / "second")
    connected = second.begin()
    try:
        until(lambda: len(second.logged("refused by server")) == 1)
        short.carry_out("one", "pause")
        short.carry_out("one", "unpause")
        north.freeze()
        assert connected.wait(PATIENCE_S)
        assert processes(short, instance) == []
        until(lambda: hosts(short) == {"north": "up", "north-old": "fenced"})
        shown = short.server.get("/v1/instances/one")
        assert (shown["host"], shown["vm_state"]) == ("north-old", "active")
        short.until_linked("north")
        short.carry_out("one", "evacuate", host="north", from_image=True)
        (after,) = processes(short, instance)
        assert after != before
        assert second.guests() == [after]
        north.thaw()
        until(lambda: north.logged("refused by server"))
        assert "belongs to the host north-old" in north.logged("refused by server")[0]["why"]
        assert len(second.logged("refused by server")) <= 2, "it says so once for each reason"
        assert second.guests() == [after]
    finally:
        second.clear()


@pytest.mark.parametrize("fate", ["deleted", "moved"])
def test_what_ran_in_a_folder_that_was_replaced_ends_before_it_may_be_taken_up(short: Fleet, fate: str) -> None:
    north = short.add("north")
    instance = short.create("one", "north", restart=RESTART)
    north.kill()
    if fate == "moved":
        north.folder.rename(short.folder / "moved")
        until(lambda: not processes(short, instance))  # an agent does not start beside them until its lease is over
    else:
        shutil.rmtree(north.folder)
    connected = north.begin()
    until(lambda: not processes(short, instance))
    assert connected.wait(PATIENCE_S)
    until(lambda: hosts(short) == {"north": "up", "north-old": "fenced"})
    short.until_linked("north")
    short.carry_out("one", "evacuate", host="north", from_image=True)
    assert len(processes(short, instance)) == 1
    assert len(north.guests()) == 1


def test_an_agent_with_the_token_of_another_host_ends_and_says_why(short: Fleet) -> None:
    north = short.add("north")
    command = [*north.command("south"), "--data-dir", str(short.folder / "impostor")]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert refused.returncode != 0
    assert "this token is for the host north, not south." in refused.stderr
    north.stop()
    deleted = short.server.client.get("/v1/tokens").json()["items"]
    (token,) = [one for one in deleted if one["host"] == "north"]
    assert short.server.client.delete(f"/v1/tokens/{token['id']}").status_code == 204
    refused = subprocess.run(
        [*north.command(), "--data-dir", str(north.folder)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert refused.returncode != 0
    assert "interlock token create NAME --role agent --host north" in refused.stderr


def test_the_connection_of_an_agent_ends_as_soon_as_its_token_is_deleted(fleet: Fleet) -> None:
    north = fleet.add("north")
    (token,) = [one for one in fleet.server.client.get("/v1/tokens").json()["items"] if one["host"] == "north"]
    assert fleet.server.client.delete(f"/v1/tokens/{token['id']}").status_code == 204
    fleet.until_gone("north")
    assert fleet.server.get("/v1/hosts/north")["state"] == "up", "its lease runs on"
    until(lambda: len(north.logged("refused by server")) == 1)
