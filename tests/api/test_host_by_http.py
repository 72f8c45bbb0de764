"""What a host has room for, and what becomes of a guest that ends, over HTTP."""

from __future__ import annotations

import httpx

from api.conftest import ApiServer, make
from in_process.embedded import IMAGE
from interlock.ports import Limits


async def test_what_does_not_fit_is_a_problem_with_what_is_needed_and_free(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    api.server.capacity._limits = Limits(memory_mib=300)
    answer = await admin.post("/v1/instances", json={"name": "big", "image": IMAGE.name, "memory_mib": 512})
    assert answer.status_code == 409
    problem = answer.json()
    assert problem["type"] == "urn:interlock:problem:no-room"
    assert (problem["needed"], problem["free"]) == ({"memory_mib": 512}, {"memory_mib": 300})
    assert problem["detail"] == "big does not fit on the host here: needs 512 MiB of memory, 300 MiB free."


async def test_the_host_tells_how_it_stands(api: ApiServer, admin: httpx.AsyncClient) -> None:
    api.server.capacity._limits = Limits(memory_mib=1000)
    await admin.post("/v1/instances", json={"name": "one", "image": IMAGE.name, "memory_mib": 400})
    reader = await api.token("reader")
    stands = (await reader.get("/v1/host")).json()
    assert (stands["name"], stands["hypervisor"], stands["accelerator"]) == ("here", "simulated", None)
    assert stands["guests"] == 1
    assert stands["total"] == {"memory_mib": 1000, "vcpus": None, "disk_mib": None}
    assert stands["promised"] == {"memory_mib": 400, "vcpus": 1, "disk_mib": 0}
    assert stands["free"]["memory_mib"] == 600
    figures = (await admin.get("/metrics")).text.splitlines()
    assert 'interlock_host_capacity{of="free",what="memory_mib"} 600.0' in figures
    assert 'interlock_host_capacity{of="promised",what="vcpus"} 1.0' in figures


async def test_what_is_done_when_a_guest_ends_is_given_shown_and_changed(admin: httpx.AsyncClient) -> None:
    wish = {"name": "one", "image": IMAGE.name, "restart": {"on_crash": "restart"}}
    made = (await admin.post("/v1/instances", json=wish)).json()["instance"]
    assert made["restart"]["on_crash"] == "restart"
    assert (made["restart"]["restarts_max"], made["restarts"], made["restart_due_at"]) == (5, 0, None)
    changed = (await admin.patch("/v1/instances/one", json={"restart": {"on_power_off": "restart"}})).json()
    assert (changed["restart"]["on_crash"], changed["restart"]["on_power_off"]) == ("leave", "restart")
    wrong = await admin.patch("/v1/instances/one", json={"restart": {"on_crash": "explode"}})
    assert wrong.status_code == 422
    absurd = await admin.patch("/v1/instances/one", json={"restart": {"restarts_max": 0}})
    assert absurd.status_code == 422


async def test_a_window_in_which_the_limit_of_restarts_is_never_reached_is_refused(admin: httpx.AsyncClient) -> None:
    void = {"on_crash": "restart", "restarts_max": 1, "window_s": 1, "backoff_s": 1}
    refused = await admin.post("/v1/instances", json={"name": "one", "image": IMAGE.name, "restart": void})
    assert refused.status_code == 422
    assert "restarts_max would never be reached" in refused.json()["detail"]
    sound = {**void, "window_s": 2}
    made = await admin.post("/v1/instances", json={"name": "one", "image": IMAGE.name, "restart": sound})
    assert made.is_success
    five = {"on_crash": "restart", "window_s": 31}
    assert (await admin.patch("/v1/instances/one", json={"restart": five})).status_code == 422
    assert (await admin.patch("/v1/instances/one", json={"restart": {**five, "window_s": 32}})).status_code == 200


async def test_no_token_speaks_in_the_name_of_the_upkeep(admin: httpx.AsyncClient) -> None:
    answer = await admin.post("/v1/tokens", json={"name": "interlock", "role": "member", "project": "default"})
    assert answer.status_code == 422
    assert "reserved" in answer.json()["detail"]


async def test_who_has_a_volume_is_told_by_name(admin: httpx.AsyncClient) -> None:
    await make(admin, "one")
    await make(admin, "two")
    assert (await admin.post("/v1/volumes", json={"name": "data", "size_mib": 1})).status_code == 201
    wish = {"operation": "attach_volume", "parameters": {"volume": "data"}}
    attached = await admin.post("/v1/instances/one/requests", json=wish, headers={"Prefer": "wait=20"})
    assert attached.status_code == 200, attached.text
    refused = await admin.post("/v1/instances/two/requests", json=wish)
    kept = await admin.delete("/v1/volumes/data")
    assert (refused.status_code, kept.status_code) == (409, 409)
    assert refused.json()["detail"] == kept.json()["detail"] == "The volume data is attached to the VM one."
