"""A VM gets another name: at once, whatever is in flight, and found by it from then on."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from api.conftest import ApiServer, make
from api.test_gate_by_http import ask, freeze_in_pause


async def rename(
    client: httpx.AsyncClient, vm: str, name: Any, hold: str | None = None, **headers: str
) -> httpx.Response:
    body = {"operation": "rename", "parameters": {"name": name}} | ({} if hold is None else {"hold": hold})
    names = {header.replace("_", "-"): value for header, value in headers.items()}
    return await client.post(f"/v1/instances/{vm}/requests", json=body, headers=names)


async def test_a_renamed_vm_is_found_by_its_new_name_at_once(admin: httpx.AsyncClient) -> None:
    before = await make(admin, "old")
    answer = await rename(admin, "old", "New_1.example")
    assert (answer.status_code, answer.json()["request"]["status"]) == (200, "succeeded")
    after = (await admin.get("/v1/instances/New_1.example")).json()
    assert (after["id"], after["name"], after["vm_state"]) == (before["id"], "New_1.example", before["vm_state"])
    assert (await admin.get("/v1/instances/old")).status_code == 404
    listed = (await admin.get("/v1/instances", params={"name": "New_1.example"})).json()["items"]
    assert [one["id"] for one in listed] == [before["id"]]
    # Its history stays with it, and the old name is free.
    asked = (await admin.get("/v1/instances/New_1.example/requests")).json()["items"]
    assert [one["operation"] for one in asked] == ["rename", "create"]
    assert (await make(admin, "old"))["id"] != before["id"]


async def test_the_events_tell_both_names(admin: httpx.AsyncClient) -> None:
    vm = await make(admin, "old")
    await rename(admin, "old", "new")
    events = (await admin.get("/v1/instances/new/events")).json()["items"]
    (told,) = (event for event in events if event["kind"] == "instance.renamed")
    assert (told["data"]["before"], told["data"]["name"], told["instance"]) == ("old", "new", vm["id"])
    kinds = [event["kind"] for event in events[-3:]]
    assert kinds == ["request.admitted", "instance.renamed", "request.succeeded"]


async def test_a_name_that_is_in_use_is_refused_and_nothing_is_recorded(admin: httpx.AsyncClient) -> None:
    await make(admin, "a")
    await make(admin, "b")
    dry_run = {"operation": "rename", "parameters": {"name": "b"}}
    for answer in (await rename(admin, "a", "b"), await admin.post("/v1/instances/a/allowed", json=dry_run)):
        assert (answer.status_code, answer.json()["type"]) == (409, "urn:interlock:problem:name-taken")
        assert "A VM named b already exists" in answer.json()["detail"]
    assert [one["operation"] for one in (await admin.get("/v1/instances/a/requests")).json()["items"]] == ["create"]
    free = await admin.post("/v1/instances/a/allowed", json={"operation": "rename", "parameters": {"name": "c"}})
    assert free.json()["disposition"] == "admitted"


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("a b", "1 to 63 letters, digits, hyphens, dots and underscores"),
        ("-a", "starting and ending with a letter or digit"),
        ("a\n", "1 to 63 letters"),
        ("", "a length of at least 1"),
        ("x" * 64, "a length of at most 63"),
        (3, "expected a text"),
        ("018f3a2e-7b4c-7d10-8a5b-0c1d2e3f4a5b", "looks like an id"),
    ],
)
async def test_what_is_no_name_is_answered_with_the_rule(admin: httpx.AsyncClient, name: Any, rule: str) -> None:
    await make(admin, "vm")
    answer = await rename(admin, "vm", name)
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:interlock:problem:invalid")
    assert rule in answer.json()["detail"]
    assert "name" in answer.json()["detail"]


async def test_a_repeated_key_is_answered_by_the_old_name_too(admin: httpx.AsyncClient) -> None:
    await make(admin, "old")
    first = await rename(admin, "old", "new", Idempotency_Key="once")
    for reference in ("old", "new"):
        again = await rename(admin, reference, "new", Idempotency_Key="once")
        assert (again.status_code, again.json()["request"]["id"]) == (200, first.json()["request"]["id"])
    assert (await rename(admin, "old", "other", Idempotency_Key="once")).status_code == 404
    assert (await rename(admin, "new", "other", Idempotency_Key="once")).status_code == 422
    # Another VM that has the old name by now is not meant.
    await make(admin, "old")
    assert (await rename(admin, "old", "new", Idempotency_Key="once")).status_code == 422


async def test_a_double_click_renames_once(admin: httpx.AsyncClient) -> None:
    vm = str((await make(admin, "old"))["id"])
    answers = await asyncio.gather(*(rename(admin, vm, "new") for _ in range(4)))
    assert sorted(answer.json()["disposition"] for answer in answers) == ["admitted", *["redundant"] * 3]
    (said,) = {answer.json()["because"] for answer in answers if answer.json()["disposition"] == "redundant"}
    assert said == "The VM is called new already."
    asked = (await admin.get(f"/v1/instances/{vm}/requests")).json()["items"]
    assert [one["operation"] for one in asked] == ["rename", "create"]


async def test_of_two_vms_that_want_one_name_one_gets_it(admin: httpx.AsyncClient) -> None:
    for name in ("a", "b", "c"):
        await make(admin, name)
    answers = await asyncio.gather(*(rename(admin, name, "vm") for name in ("a", "b", "c")))
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409]


async def test_a_rename_does_not_wait_for_what_is_in_flight(api: ApiServer, admin: httpx.AsyncClient) -> None:
    pause = (await freeze_in_pause(api, admin)).json()["request"]["id"]
    assert (await rename(admin, "vm", "new")).json()["request"]["status"] == "succeeded"
    vm = (await admin.get("/v1/instances/new")).json()
    assert (vm["task_state"], [one["id"] for one in vm["outstanding"]]) == ("pausing", [pause])
    assert (await ask(admin, "delete", "new", Prefer="wait=20")).json()["request"]["status"] == "succeeded"


async def test_a_locked_vm_keeps_its_name_until_it_is_unlocked(api: ApiServer, admin: httpx.AsyncClient) -> None:
    member = await api.token("member")
    await make(admin, "vm")
    await ask(admin, "lock")
    denied = await rename(member, "vm", "new")
    assert (denied.status_code, denied.json()["reason"]) == (409, "locked")
    held = await rename(member, "vm", "new", hold="10m")
    assert held.json()["disposition"] == "held"
    await ask(admin, "unlock")
    ended = (await admin.get(held.headers["location"], params={"wait": "20s"})).json()
    assert ended["status"] == "succeeded"
    assert (await admin.get("/v1/instances/new")).status_code == 200


async def test_a_held_rename_to_a_name_that_is_taken_meanwhile_is_cancelled(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    """The VM's driver goes on: what is held beside it, and what is asked for afterwards."""
    member = await api.token("member")
    await make(admin, "vm")
    await ask(admin, "lock")
    held = await rename(member, "vm", "new", hold="10m")
    body = {"operation": "pause", "hold": "10m"}
    beside = await member.post("/v1/instances/vm/requests", json=body)
    await make(admin, "new")
    await ask(admin, "unlock")
    ended = (await admin.get(held.headers["location"], params={"wait": "20s"})).json()
    assert (ended["status"], ended["reason"]) == ("cancelled", "name_taken")
    assert "A VM named new already exists" in ended["message"]
    assert (await admin.get(beside.headers["location"], params={"wait": "20s"})).json()["status"] == "succeeded"
    assert (await ask(admin, "unpause", Prefer="wait=20")).json()["request"]["status"] == "succeeded"
