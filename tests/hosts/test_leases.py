"""A host whose agent is silent ends its guests in time, and only then may they be taken up elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from interlock.api.schemas.responses import Instance
from interlock.cli.commands.vm_table import next_steps
from processes.real_fleet import Fleet
from processes.real_server import guests_in
from waiting import until

pytestmark = pytest.mark.qemu

LEASE_MS = 6_000
MARGIN_MS = 2_000


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet with short leases."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="interlock-lease-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)
        one = Fleet(
            folder,
            {"INTERLOCK_HOSTS_LEASE_MS": str(LEASE_MS), "INTERLOCK_HOSTS_LEASE_MARGIN_MS": str(MARGIN_MS)},
        )
        try:
            one.start()
            yield one
        finally:
            one.clear()


def state_of(fleet: Fleet, name: str) -> str:
    return str(fleet.server.get(f"/v1/hosts/{name}")["state"])


def test_guests_of_a_killed_agent_end_with_its_lease_and_are_evacuated_not_earlier(short: Fleet) -> None:
    north = short.add("north")
    instance = short.create("one", "north")
    (before,) = north.guests()
    north.kill()
    refused = short.server.submit("one", "evacuate")
    assert refused.status_code == 409, refused.text
    assert north.guests() == [before]
    admitted: list[str] = []

    def evacuates() -> bool:
        answer = short.server.submit("one", "evacuate")
        if answer.status_code == 409:
            return False
        assert north.guests() == [], "it was admitted before the guest had ended"
        admitted.append(answer.json()["request"]["id"])
        return True

    until(evacuates)
    assert state_of(short, "north") == "fenced"
    assert short.server.ended(admitted[0])["status"] == "succeeded"
    assert len(guests_in(short.server.folder)) == 1
    assert short.server.get(f"/v1/instances/{instance}")["host"] == "here"
    north.start()
    short.until_linked("north")
    until(lambda: not any((north.folder / "guests" / "vms").iterdir()), "what was left on the lost host stays there")
    assert north.guests() == []
    assert len(guests_in(short.server.folder)) == 1


def test_an_admin_can_say_that_a_lost_host_is_fenced_but_not_one_that_is_connected(short: Fleet) -> None:
    north = short.add("north")
    word = {"guests_have_ended": True}
    assert short.server.client.post("/v1/hosts/north/fence", json=word).status_code == 422
    north.stop()
    short.until_gone("north")
    answer = short.server.client.post("/v1/hosts/north/fence", json=word)
    assert (answer.status_code, answer.json()["state"], answer.json()["fenced_by"]) == (200, "fenced", "admin")


def test_an_evacuation_whose_server_is_killed_is_finished_by_the_next(short: Fleet) -> None:
    north = short.add("north")
    short.create("one", "north")
    north.kill()
    short.until_fenced("north")
    request = short.server.submit("one", "evacuate").json()["request"]["id"]
    short.server.kill()
    short.server.start()
    assert short.server.ended(request)["status"] == "succeeded"
    assert len(guests_in(short.server.folder)) == 1
    assert north.guests() == []


def test_a_guest_that_ended_with_its_hosts_lease_says_so(short: Fleet) -> None:
    """It is told from one that crashed: in the record, its events, and what is said of it while its host is away."""
    north = short.add("north")
    short.create("one", "north")
    north.kill()
    short.until_fenced("north")
    get = short.server.get
    one = get("/v1/instances/one")
    assert (one["vm_state"], one["power_state"], one["host_state"]) == ("active", "unknown", "fenced")
    shown = msgspec.convert(one, Instance)
    assert next_steps(shown, None) == "`vm evacuate` rebuilds it on another host"
    (stuck,) = get("/v1/stuck")["items"]
    assert (stuck["name"], stuck["host_state"]) == ("one", "fenced")
    assert {"evacuate", "delete"} <= set(stuck["allowed"])
    assert [event["kind"] for event in get("/v1/hosts/north/events")["items"]] == ["joined", "lost", "fenced"]
    figures = short.server.client.get("/metrics").text
    assert 'interlock_other_host_state{host="north",state="fenced"} 1.0' in figures
    assert 'interlock_other_host_instances_to_evacuate{host="north"} 1.0' in figures
    north.start()
    short.until_linked("north")
    expected = {"instance.host_lost", "instance.host_fenced", "guest.lease_ended", "instance.host_back"}
    until(lambda: what_ended(short) == expected, lambda: what_ended(short))
    one = get("/v1/instances/one")
    assert one["vm_state"] == "error"
    assert "because the lease of host north expired" in one["error"]


def what_ended(fleet: Fleet) -> set[str]:
    """The kinds of events that tell what became of the guest and its host."""
    events = fleet.server.get("/v1/instances/one/events?limit=500")["items"]
    return {event["kind"] for event in events if event["kind"].startswith(("guest.", "instance.host_"))}
