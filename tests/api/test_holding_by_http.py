"""Held requests and protection, as HTTP has them."""

from __future__ import annotations

import httpx
import pytest

from api.conftest import ApiServer, make
from interlock.hypervisors.simulated.faults import Hangs, Method


async def hold(client: httpx.AsyncClient, operation: str, time: object = "10m") -> httpx.Response:
    return await client.post("/v1/instances/vm/requests", json={"operation": operation, "hold": time})


async def test_what_is_held_is_listed_and_admitted_when_the_state_allows_it(admin: httpx.AsyncClient) -> None:
    await make(admin, "vm")
    answer = await hold(admin, "unpause")
    # Of a running VM an unpause is redundant, which leaves nothing to wait for.
    assert (answer.status_code, answer.json()["disposition"]) == (200, "redundant")
    await admin.patch("/v1/instances/vm", json={"blocked_operations": ["pause"]})
    answer = await hold(admin, "pause")
    said = answer.json()
    assert (answer.status_code, said["disposition"], said["reason"]) == (202, "held", "operation_blocked")
    assert answer.headers["location"] == f"/v1/requests/{said['request']['id']}"
    shown = (await admin.get("/v1/instances/vm")).json()
    assert [(one["id"], one["status"]) for one in shown["held"]] == [(said["request"]["id"], "held")]
    listed = (await admin.get("/v1/instances/vm/requests")).json()["items"]
    assert listed[0]["status"] == "held"


async def test_taking_the_protection_away_lets_a_held_request_through(admin: httpx.AsyncClient) -> None:
    await make(admin, "vm")
    await admin.patch("/v1/instances/vm", json={"blocked_operations": ["pause"]})
    refused = await admin.post("/v1/instances/vm/requests", json={"operation": "pause"})
    assert (refused.status_code, refused.json()["reason"]) == (409, "operation_blocked")
    allowed = (await admin.get("/v1/instances/vm/allowed")).json()["operations"]
    assert next(one for one in allowed if one["operation"] == "pause")["reason"] == "operation_blocked"
    held = (await hold(admin, "pause")).json()["request"]
    await admin.patch("/v1/instances/vm", json={"blocked_operations": []})
    ended = (await admin.get(f"/v1/requests/{held['id']}", params={"wait": "20s"})).json()
    assert ended["status"] == "succeeded"
    assert (await admin.get("/v1/instances/vm")).json()["vm_state"] == "paused"


async def test_a_held_request_can_be_withdrawn(admin: httpx.AsyncClient) -> None:
    await make(admin, "vm")
    await admin.patch("/v1/instances/vm", json={"blocked_operations": ["pause"]})
    held = (await hold(admin, "pause")).json()["request"]
    answer = await admin.delete(f"/v1/requests/{held['id']}")
    assert (answer.status_code, answer.json()["request"]["status"]) == (200, "cancelled")
    assert (await admin.get("/v1/instances/vm")).json()["held"] == []


async def test_a_held_request_is_given_up_by_itself(admin: httpx.AsyncClient) -> None:
    await make(admin, "vm")
    await admin.patch("/v1/instances/vm", json={"blocked_operations": ["pause"]})
    held = (await hold(admin, "pause", "300ms")).json()["request"]
    ended = (await admin.get(f"/v1/requests/{held['id']}", params={"wait": "20s"})).json()
    assert (ended["status"], ended["reason"]) == ("cancelled", "hold_expired")


async def test_behind_a_hung_operation_it_waits_until_it_may_take_over(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    instance = await make(admin, "vm")
    api.host.faults.script(str(instance["id"]), Method.PAUSE, Hangs())
    await admin.post("/v1/instances/vm/requests", json={"operation": "pause"})
    while (await admin.get("/v1/instances/vm")).json()["task_state"] != "pausing":
        await admin.get("/v1/instances/vm", params={"after_generation": 10**6, "wait": "10ms"})
    said = (await hold(admin, "reboot")).json()
    assert (said["disposition"], said["blocked_by"]["operation"]) == ("held", "pause")
    assert 170 < said["retry_after_s"] <= 180


@pytest.mark.parametrize("time", ["", "10", "-3m", "1e9s", "8d", 7, None, "٣m", "0s"])
async def test_a_time_that_is_none_is_refused(admin: httpx.AsyncClient, time: object) -> None:
    await make(admin, "vm")
    answer = await hold(admin, "unrescue", time)
    if time is None:
        assert answer.status_code == 409
    else:
        assert answer.status_code == 422
        assert "hold" in answer.json()["detail"]


async def test_an_owner_notes_something_of_a_vm(admin: httpx.AsyncClient) -> None:
    await make(admin, "vm")

    async def note(**parameters: object) -> httpx.Response:
        body = {"operation": "set_metadata", "parameters": parameters}
        return await admin.post("/v1/instances/vm/requests", json=body)

    answer = await note(set={"owner": "ada", "shelf": "3"})
    assert (answer.status_code, answer.json()["request"]["status"]) == (200, "succeeded")
    await note(set={"shelf": "4"}, remove=["owner"])
    assert (await admin.get("/v1/instances/vm")).json()["metadata"] == {"shelf": "4"}
    assert (await note(set={"": "no"})).status_code == 422
    assert (await note(set={"key": 7})).status_code == 422


async def test_what_is_admitted_is_served_while_something_is_held(admin: httpx.AsyncClient) -> None:
    """What is held waits for the policy, and nothing waits for what is held."""
    await make(admin, "vm")
    await admin.patch("/v1/instances/vm", json={"blocked_operations": ["pause"]})
    assert (await hold(admin, "pause", "1h")).json()["disposition"] == "held"
    for body in ({"operation": "stop", "parameters": {"hard": True}}, {"operation": "start"}, {"operation": "delete"}):
        asked = (await admin.post("/v1/instances/vm/requests", json=body)).json()["request"]
        ended = (await admin.get(f"/v1/requests/{asked['id']}", params={"wait": "20s"})).json()
        assert ended["status"] == "succeeded", body


async def test_whoever_prefers_to_wait_gets_the_end_of_what_was_held(admin: httpx.AsyncClient) -> None:
    await make(admin, "vm")
    await admin.patch("/v1/instances/vm", json={"blocked_operations": ["pause"]})
    body = {"operation": "pause", "hold": "200ms"}
    answer = await admin.post("/v1/instances/vm/requests", json=body, headers={"Prefer": "wait=20"})
    assert (answer.status_code, answer.headers["preference-applied"]) == (200, "wait=20")
    assert answer.json()["request"]["reason"] == "hold_expired"


async def test_what_a_policy_cancels_says_by_which_rule_of_which_policy(admin: httpx.AsyncClient) -> None:
    await make(admin, "vm")
    for operation in ("pause", "unpause"):
        await admin.post("/v1/instances/vm/requests", json={"operation": operation})
    await admin.post("/v1/instances/vm/requests", json={"operation": "delete"})
    told = (await admin.get("/v1/instances/vm/events", params={"limit": 500})).json()["items"]
    by_policy = [one["data"] for one in told if one["kind"] == "request.cancelled"]
    assert all(one["policy"]["name"] == "patient" and one["rule"] for one in by_policy)
