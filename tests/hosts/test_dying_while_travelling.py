"""A server that is killed while an instance is on two hosts: it is on one of them afterwards, and runs once."""

from __future__ import annotations

import pytest

from processes.crash_injection import MOMENTS
from processes.real_fleet import Fleet
from processes.real_server import guests_in
from tiers import only_long
from waiting import until

pytestmark = pytest.mark.qemu


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_live_migration_comes_to_its_end(fleet: Fleet, moment: str) -> None:
    """The guest ran on one host at every moment, and has one copy on one of them."""
    fleet.add("north")
    fleet.create("one", "here", root_gib=1)
    request = died(fleet, f"migrating:{moment}", "live_migrate", host="north")
    stands(fleet, came_to(request), "active")
    fleet.carry_out("one", "pause")
    fleet.carry_out("one", "unpause")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("state", ["active", *only_long("stopped")])
def test_a_cold_migration_comes_to_its_end(fleet: Fleet, moment: str, state: str) -> None:
    fleet.add("north")
    instance = fleet.create("one", "here", root_gib=1)
    if state == "stopped":
        fleet.carry_out("one", "stop")
    request = died(fleet, f"migrating_out:{moment}", "migrate", host="north")
    host = came_to(request)
    stands(fleet, host, state)
    is_nowhere_else(fleet, host, instance)
    assert fleet.left_over() == []


@pytest.mark.parametrize("effects", [3, 6, 9, *only_long(4, 5, 7, 8, 10)])
def test_a_cold_migration_comes_to_its_end_after_each_of_its_effects(fleet: Fleet, effects: int) -> None:
    fleet.add("north")
    instance = fleet.create("one", "here", root_gib=1)
    request = died(fleet, f"migrating_out:amid:{effects}", "migrate", host="north")
    host = came_to(request)
    stands(fleet, host, "active")
    is_nowhere_else(fleet, host, instance)
    assert fleet.left_over() == []


@pytest.mark.parametrize("moment", [MOMENTS[0], *only_long(*MOMENTS[1:])])
def test_an_evacuation_comes_to_its_end(fleet: Fleet, moment: str) -> None:
    north = fleet.add("north")
    fleet.create("one", "north", root_gib=1)
    north.clear()
    fleet.until_gone("north")
    fleet.server.client.post("/v1/hosts/north/fence", json={"guests_have_ended": True}).raise_for_status()
    request = died(fleet, f"evacuating:{moment}", "evacuate", host="here", from_image=True)
    assert request["status"] == "succeeded", request
    stands(fleet, "here", "active")


def died(fleet: Fleet, dying_in: str, operation: str, **parameters: object) -> dict[str, object]:
    """How an operation ended that a server died of, once the next one has come up with the agents."""
    restart(fleet, dying_in)
    request = fleet.server.submit("one", operation, **parameters).json()["request"]["id"]
    fleet.server.until_dead()
    restart(fleet, None)
    return fleet.server.ended(request)


def came_to(request: dict[str, object]) -> str:
    """Where the instance is: a target that is not connected again when a server goes on has it stay."""
    assert request["status"] in {"succeeded", "failed"}, request
    assert request["status"] == "succeeded" or "north" in str(request["message"]), request
    return "north" if request["status"] == "succeeded" else "here"


def restart(fleet: Fleet, dying_in: str | None) -> None:
    """Another server, which has another port, so that the agents begin anew too."""
    fleet.server.stop()
    fleet.server.start(dying_in)
    for agent in fleet.agents.values():
        if agent.running:
            agent.kill()
            agent.start()
            fleet.until_linked(agent.name)


def is_nowhere_else(fleet: Fleet, host: str, instance: str) -> None:
    """Return once only that host has a root disk of it: what is left elsewhere is removed when all hosts are there."""
    expected = {one: one == host for one in ("here", *fleet.agents)}

    def found() -> dict[str, bool]:
        return {one: bool(fleet.holds(one, instance)) for one in expected}

    until(lambda: found() == expected, found)


def stands(fleet: Fleet, host: str, vm_state: str) -> None:
    """Fails unless the record says so, and one guest is on that host, if it runs, and none on any other."""
    one = fleet.server.get("/v1/instances/one")
    assert (one["host"], one["vm_state"]) == (host, vm_state)
    folders = {"here": fleet.server.folder} | {name: agent.folder for name, agent in fleet.agents.items()}
    expected = {name: int(name == host and vm_state == "active") for name in folders}

    def found() -> dict[str, int]:
        return {name: len(guests_in(folder)) for name, folder in folders.items()}

    until(lambda: found() == expected, found)  # what is left of it elsewhere is removed by and by
