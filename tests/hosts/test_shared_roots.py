"""Hosts that keep root disks in a folder that they share: VMs go from one to another without their disks."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.disk_patterns import has_pattern, is_whole, write_pattern
from interlock.images.shared_folder import MARKER
from processes.real_fleet import Fleet
from processes.real_server import guests_in
from tiers import only_long
from waiting import until

from .test_dying_while_travelling import came_to, died, stands

pytestmark = pytest.mark.qemu
ROOT_BYTES = 1 << 30


class SharingFleet(Fleet):
    """One whose server, and whose agents unless they are told otherwise, share a folder."""

    @property
    def shared(self) -> Path:
        return self.folder / "shared"

    def share(self, name: str) -> None:
        self.add(name, "--shared", str(self.shared))

    def disk(self, instance: str) -> Path:
        """Its root disk: the only one that it has in the shared folder."""
        (found,) = (self.shared / "instances" / instance).iterdir()
        return found

    def instances(self) -> list[str]:
        """The ids of those that have anything in the shared folder."""
        return sorted(one.name for one in (self.shared / "instances").glob("*"))

    def hosts(self) -> dict[str, Path]:
        return {"here": self.server.folder} | {name: agent.folder for name, agent in self.agents.items()}

    def running(self) -> dict[str, int]:
        return {name: len(guests_in(folder)) for name, folder in self.hosts().items()}

    def lose(self, name: str) -> None:
        """Kill a host with everything on it, and have it fenced."""
        self.agents[name].clear()
        self.until_gone(name)
        word = {"guests_have_ended": True}
        self.server.client.post(f"/v1/hosts/{name}/fence", json=word).raise_for_status()

    def until_without(self, name: str, instance: str) -> None:
        """Return when a host has nothing of an instance any more."""
        until(lambda: not self.guest_folder(name, instance).exists())

    def written(self, host: str, pattern: int) -> str:
        """A VM on that host, stopped, with a pattern on its root disk; its id."""
        instance = self.create("one", host, root_gib=1)
        self.carry_out("one", "stop")
        write_pattern(self.disk(instance), pattern, 1, at_mib=500)
        return instance


@pytest.fixture
def fleet(request: pytest.FixtureRequest) -> Iterator[SharingFleet]:
    """`request.param` may be how long leases are, in ms."""
    lease = {"INTERLOCK_HOSTS_LEASE_MS": str(request.param)} if hasattr(request, "param") else {}
    with tempfile.TemporaryDirectory(prefix="interlock-shared-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)
        (folder / "shared").mkdir()
        one = SharingFleet(folder, {"INTERLOCK_HOSTS_SHARED_DIR": str(folder / "shared"), **lease})
        try:
            one.start()
            yield one
        finally:
            one.clear()


def test_one_that_was_stopped_before_its_disk_was_made_goes_and_starts_there(fleet: SharingFleet) -> None:
    fleet.share("north")
    body = {"name": "one", "image": "nano", "root_gib": 1, "start": False}
    fleet.server.client.post("/v1/instances", json=body).raise_for_status()
    fleet.carry_out("one", "migrate", host="north")
    fleet.carry_out("one", "start")
    assert fleet.running() == {"here": 0, "north": 1}


def test_a_guest_goes_from_host_to_host_without_its_disk(fleet: SharingFleet) -> None:
    for name in ("north", "south"):
        fleet.share(name)
    instance = fleet.create("one", "here", root_gib=1)
    disk = fleet.disk(instance)
    before = disk.stat().st_ino
    assert fleet.server.get("/v1/instances/one")["root_shared"]
    for host in ("north", "south", "here"):
        ended = fleet.carry_out("one", "live_migrate", host=host)
        assert (ended["bytes_total"] or 0) < ROOT_BYTES, "the disk went along"
        assert fleet.running() == {name: int(name == host) for name in fleet.hosts()}
        assert [name for name in fleet.hosts() if fleet.holds(name, instance)] == []
    fleet.carry_out("one", "stop")
    assert disk.stat().st_ino == before
    assert is_whole(disk)
    fleet.carry_out("one", "delete")
    assert fleet.instances() == []


@pytest.mark.parametrize("state", ["active", "stopped"])
def test_a_cold_migration_copies_nothing(fleet: SharingFleet, state: str) -> None:
    """It can be moved as it runs afterwards, and its disk is the layer that it was."""
    fleet.share("north")
    instance = fleet.written("here", 7)
    if state == "active":
        fleet.carry_out("one", "start")
    before = fleet.disk(instance).stat().st_ino
    for host in ("north", "here"):
        ended = fleet.carry_out("one", "migrate", host=host)
        assert ended["bytes_total"] is None
        one = fleet.server.get("/v1/instances/one")
        assert (one["host"], one["vm_state"]) == (host, state)
        assert fleet.running() == {name: int(name == host and state == "active") for name in fleet.hosts()}
        assert fleet.disk(instance).stat().st_ino == before
    if state == "stopped":
        fleet.carry_out("one", "start")
    fleet.carry_out("one", "live_migrate", host="north")
    fleet.carry_out("one", "stop")
    assert has_pattern(fleet.disk(instance), 7, 1, at_mib=500)


def test_an_evacuation_goes_on_with_what_was_on_the_disk(fleet: SharingFleet) -> None:
    fleet.share("north")
    instance = fleet.written("north", 7)
    fleet.carry_out("one", "start")
    before = fleet.disk(instance).stat().st_ino
    fleet.lose("north")
    fleet.carry_out("one", "evacuate")
    assert fleet.running() == {"here": 1, "north": 0}
    fleet.agents["north"].start()
    fleet.until_linked("north")
    fleet.until_without("north", instance)
    assert fleet.running() == {"here": 1, "north": 0}
    assert fleet.disk(instance).stat().st_ino == before, "the host that came back has removed it"
    fleet.carry_out("one", "stop")
    assert has_pattern(fleet.disk(instance), 7, 1, at_mib=500)
    assert is_whole(fleet.disk(instance))


@pytest.mark.parametrize("fleet", [6_000], indirect=True)
def test_a_host_whose_lease_runs_out_lets_go_of_the_disk_before_another_has_it(fleet: SharingFleet) -> None:
    fleet.share("north")
    instance = fleet.written("north", 7)
    fleet.carry_out("one", "start")
    north = fleet.agents["north"]
    north.kill()
    fleet.until_fenced("north")
    assert north.guests() == []
    fleet.carry_out("one", "evacuate")
    assert fleet.running() == {"here": 1, "north": 0}
    north.start()
    fleet.until_linked("north")
    fleet.until_without("north", instance)
    fleet.carry_out("one", "live_migrate", host="north")
    fleet.carry_out("one", "stop")
    assert has_pattern(fleet.disk(instance), 7, 1, at_mib=500)
    assert is_whole(fleet.disk(instance))


def test_an_evacuation_can_begin_with_the_image_again(fleet: SharingFleet) -> None:
    fleet.share("north")
    instance = fleet.written("north", 7)
    fleet.lose("north")
    fleet.carry_out("one", "evacuate", from_image=True)
    assert not has_pattern(fleet.disk(instance), 7, 1, at_mib=500)


def test_an_evacuation_does_not_begin_with_an_empty_disk_by_itself(fleet: SharingFleet) -> None:
    fleet.share("north")
    instance = fleet.written("north", 7)
    fleet.disk(instance).unlink()
    fleet.lose("north")
    ended = fleet.server.ended(fleet.server.submit("one", "evacuate").json()["request"]["id"])
    assert ended["status"] == "failed"
    assert "root.qcow2 is missing" in ended["message"]
    assert fleet.server.get("/v1/instances/one")["host"] == "north"


def test_a_guest_that_runs_on_a_host_which_was_called_fenced_keeps_its_disk(fleet: SharingFleet) -> None:
    """An admin was wrong: the guest runs on. It is not run twice, since its disk is locked."""
    fleet.share("north")
    instance = fleet.create("one", "north", root_gib=1)
    north = fleet.agents["north"]
    north.stop()
    fleet.until_gone("north")
    word = {"guests_have_ended": True}
    fleet.server.client.post("/v1/hosts/north/fence", json=word).raise_for_status()
    ended = fleet.server.ended(fleet.server.submit("one", "evacuate").json()["request"]["id"])
    assert ended["status"] == "failed"
    assert "lock" in ended["message"], ended
    one = fleet.server.get("/v1/instances/one")
    assert (one["host"], one["vm_state"]) == ("here", "error")
    assert fleet.running() == {"here": 0, "north": 1}
    for process in north.guests():
        os.kill(process, signal.SIGKILL)
    fleet.carry_out("one", "start")
    fleet.carry_out("one", "stop")
    assert is_whole(fleet.disk(instance))


def test_a_host_that_does_not_share_has_disks_of_its_own(fleet: SharingFleet) -> None:
    fleet.add("north")
    instance = fleet.create("one", "north", root_gib=1)
    assert fleet.holds("north", instance) == ["root.qcow2"]
    assert not fleet.server.get("/v1/instances/one")["root_shared"]
    assert not (fleet.shared / "instances" / instance).exists()
    shared = fleet.create("two", "here", root_gib=1)
    for operation in ("live_migrate", "migrate"):
        answer = fleet.server.submit("two", operation, host="north")
        assert (answer.status_code, answer.json()["reason"]) == (409, "host_lacks_root_disk")
        assert "does not have the shared folder" in answer.json()["because"]
        assert fleet.running()["here"] == 1
    assert fleet.disk(shared).exists()


def test_a_folder_that_is_not_really_shared_is_noticed(fleet: SharingFleet) -> None:
    fleet.share("north")
    instance = fleet.create("one", "here", root_gib=1)
    fleet.carry_out("one", "stop")
    fleet.shared.rename(fleet.folder / "mounted")
    fleet.shared.mkdir()
    answer = fleet.server.client.post("/v1/instances", json={"name": "two", "image": "nano", "root_gib": 1})
    assert answer.status_code == 503
    assert "is not there" in answer.text
    ended = fleet.server.ended(fleet.server.submit("one", "start").json()["request"]["id"])
    assert ended["status"] == "failed"
    assert "is not there" in ended["message"]
    (fleet.shared / MARKER).write_text("another\n")
    answer = fleet.server.client.post("/v1/instances", json={"name": "two", "image": "nano", "root_gib": 1})
    assert "Another folder" in answer.text
    ended = fleet.server.ended(fleet.server.submit("one", "start").json()["request"]["id"])
    assert "is not the one" in ended["message"]
    assert [one.name for one in fleet.shared.iterdir()] == [MARKER]
    shutil.rmtree(fleet.shared)
    (fleet.folder / "mounted").rename(fleet.shared)
    fleet.carry_out("one", "start")
    assert fleet.disk(instance).exists()


def test_what_is_deleted_by_force_needs_no_folder(fleet: SharingFleet) -> None:
    instance = fleet.create("one", "here", root_gib=1)
    fleet.carry_out("one", "stop")
    fleet.shared.rename(fleet.folder / "mounted")
    assert fleet.server.ended(fleet.server.submit("one", "delete").json()["request"]["id"])["status"] == "failed"
    ended = fleet.carry_out("one", "force_delete")
    assert "was not removed" in ended["message"]
    assert (fleet.folder / "mounted" / "instances" / instance).exists()


def test_the_server_removes_the_disk_for_a_host_that_shares_no_more(fleet: SharingFleet) -> None:
    fleet.share("north")
    instance = fleet.create("one", "north", root_gib=1)
    fleet.agents["north"].stop()
    fleet.add("north")
    assert fleet.disk(instance).exists()
    fleet.carry_out("one", "delete")
    fleet.until_without("north", instance)
    assert fleet.instances() == []
    assert fleet.agents["north"].guests() == []


def test_servers_that_share_a_folder_leave_each_other_s_instances_alone(fleet: SharingFleet) -> None:
    other = Fleet(fleet.folder / "other", {"INTERLOCK_HOSTS_SHARED_DIR": str(fleet.shared)})
    other.folder.mkdir(mode=0o711)
    try:
        other.start()
        mine = fleet.create("one", "here", root_gib=1)
        theirs = other.create("one", "here", root_gib=1)
        marker = (fleet.shared / MARKER).read_text()
        for server in (fleet.server, other.server):
            server.stop()
            server.start()
        fleet.carry_out("one", "delete")
        assert fleet.instances() == [theirs]
        assert mine != theirs
        assert (fleet.shared / MARKER).read_text() == marker
        other.carry_out("one", "reboot", hard=True)
    finally:
        other.clear()


@pytest.mark.parametrize("moment", ["begin", "amid", "end"])
def test_a_create_that_is_killed_leaves_nothing_once_it_is_deleted(fleet: SharingFleet, moment: str) -> None:
    fleet.share("north")
    for process in guests_in(fleet.server.folder):
        os.kill(process, signal.SIGKILL)
    body = {"name": "one", "image": "nano", "host": "north", "root_gib": 1}
    fleet.server.client.post("/v1/instances", json=body).raise_for_status()
    time.sleep({"begin": 0.0, "amid": 0.05, "end": 0.15}[moment])  # how far it has come is what is tried
    fleet.agents["north"].kill()
    fleet.agents["north"].start()
    fleet.until_linked("north")
    fleet.carry_out("one", "delete")
    assert fleet.instances() == []


# --------------------------------------------------------------------------------------------- killed on the way


@pytest.mark.parametrize(
    ("operation", "moment"),
    [
        ("live_migrate", "amid:2"),
        ("migrate", "amid:4"),
        *only_long(*(("live_migrate", moment) for moment in ("begun", "amid:4", "done"))),
        *only_long(*(("migrate", moment) for moment in ("begun", "amid:2", "done"))),
    ],
)
def test_a_killed_server_leaves_one_guest_with_the_disk(fleet: SharingFleet, operation: str, moment: str) -> None:
    fleet.share("north")
    instance = fleet.create("one", "here", root_gib=1)
    phase = "migrating" if operation == "live_migrate" else "migrating_out"
    request = died(fleet, f"{phase}:{moment}", operation, host="north")
    stands(fleet, came_to(request), "active")
    fleet.carry_out("one", "stop")
    assert is_whole(fleet.disk(instance))


@pytest.mark.parametrize("moment", ["amid:1", *only_long("begun", "amid:3", "done")])
def test_an_evacuation_whose_server_is_killed_keeps_the_disk(fleet: SharingFleet, moment: str) -> None:
    fleet.share("north")
    instance = fleet.written("north", 7)
    fleet.carry_out("one", "start")
    fleet.lose("north")
    request = died(fleet, f"evacuating:{moment}", "evacuate")
    assert request["status"] == "succeeded", request
    stands(fleet, "here", "active")
    fleet.carry_out("one", "stop")
    assert has_pattern(fleet.disk(instance), 7, 1, at_mib=500)


@pytest.mark.parametrize("after_s", [0.1, *only_long(0.02, 0.2, 0.35)])
@pytest.mark.parametrize("whose", ["here", "north"])
def test_a_machine_that_is_killed_leaves_at_most_one_with_the_disk(
    fleet: SharingFleet, whose: str, after_s: float
) -> None:
    fleet.share("north")
    instance = fleet.create("one", "here", root_gib=1)
    request = fleet.server.submit("one", "live_migrate", host="north").json()["request"]["id"]
    time.sleep(after_s)  # how far it has come is what is tried
    for process in guests_in(fleet.hosts()[whose]):
        os.kill(process, signal.SIGKILL)
    ended = fleet.server.ended(request)
    assert ended["status"] in {"succeeded", "failed"}, ended
    assert sum(fleet.running().values()) <= 1
    until(lambda: fleet.server.get("/v1/instances/one")["vm_state"] in {"active", "error"})
    fleet.carry_out("one", "reboot", hard=True)
    assert sum(fleet.running().values()) == 1
    fleet.carry_out("one", "stop", hard=True)
    assert is_whole(fleet.disk(instance))


@pytest.mark.parametrize("after_s", [0.05, *only_long(0.15)])
@pytest.mark.parametrize("whose", ["north", "south"])
def test_an_agent_that_is_killed_leaves_one_guest_with_the_disk(
    fleet: SharingFleet, whose: str, after_s: float
) -> None:
    """The guest goes from north to south."""
    for name in ("north", "south"):
        fleet.share(name)
    instance = fleet.create("one", "north", root_gib=1)
    request = fleet.server.submit("one", "live_migrate", host="south").json()["request"]["id"]
    time.sleep(after_s)  # how far it has come is what is tried
    fleet.agents[whose].kill()
    fleet.agents[whose].start()
    fleet.until_linked(whose)
    ended = fleet.server.ended(request)
    host = fleet.server.get("/v1/instances/one")["host"]
    assert (host, ended["status"]) in {("south", "succeeded"), ("north", "failed")}, ended
    stands(fleet, host, "active")
    fleet.carry_out("one", "stop")
    assert is_whole(fleet.disk(instance))


def test_an_abort_leaves_one_guest_with_the_disk(fleet: SharingFleet) -> None:
    fleet.share("north")
    instance = fleet.create("one", "here", root_gib=1)
    request = fleet.server.submit("one", "live_migrate", host="north").json()["request"]["id"]
    assert fleet.server.submit("one", "live_migrate_abort").status_code in {200, 202}
    ended = fleet.server.ended(request)
    assert sum(fleet.running().values()) == 1
    host = fleet.server.get("/v1/instances/one")["host"]
    assert (host == "here") == (ended["status"] == "cancelled")
    fleet.carry_out("one", "stop", hard=True)
    assert is_whole(fleet.disk(instance))


# --------------------------------------------------------------------------------------------- the other operations


def test_resize_rebuild_and_shelving_leave_one_disk_in_the_folder(fleet: SharingFleet) -> None:
    """Each on the host to which it went before, which has not made the disk."""
    fleet.share("north")
    instance = fleet.written("here", 7)
    fleet.carry_out("one", "migrate", host="north")
    fleet.carry_out("one", "resize", root_gib=2)
    assert len(list((fleet.shared / "instances" / instance).iterdir())) == 2
    fleet.carry_out("one", "revert_resize")
    assert has_pattern(fleet.disk(instance), 7, 1, at_mib=500)
    fleet.carry_out("one", "resize", root_gib=2)
    fleet.carry_out("one", "confirm_resize")
    assert has_pattern(fleet.disk(instance), 7, 1, at_mib=500)
    fleet.carry_out("one", "shelve")
    fleet.carry_out("one", "shelve_offload")
    assert fleet.instances() == []
    fleet.carry_out("one", "unshelve")
    assert has_pattern(fleet.disk(instance), 7, 1, at_mib=500)
    fleet.carry_out("one", "start")
    fleet.carry_out("one", "live_migrate", host="here")
    fleet.carry_out("one", "stop")
    fleet.carry_out("one", "rebuild")
    assert not has_pattern(fleet.disk(instance), 7, 1, at_mib=500)
    assert [name for name in fleet.hosts() if fleet.holds(name, instance)] == []
