"""What the gate says, as HTTP has it: admitted, redundant, refused, and the headers that change what is asked."""

from __future__ import annotations

import asyncio
from datetime import datetime

import httpx
import pytest

from api.conftest import OPERATOR, ApiServer, make
from in_process.embedded import IMAGE
from interlock.api.app import ROUTES
from interlock.api.http.route import Route
from interlock.core.roles import Role
from interlock.hypervisors.simulated.faults import Hangs, Method, Refuses


async def ask(client: httpx.AsyncClient, operation: str, vm: str = "vm", **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.post(f"/v1/instances/{vm}/requests", json={"operation": operation}, headers=names)


async def freeze_in_pause(api: ApiServer, client: httpx.AsyncClient) -> httpx.Response:
    """Ask for a pause whose guest hangs; it is in flight and shows no life when this returns."""
    instance = await make(client, "vm")
    api.host.faults.script(str(instance["id"]), Method.PAUSE, Hangs())
    answer = await ask(client, "pause")
    while (await client.get("/v1/instances/vm")).json()["task_state"] != "pausing":
        await client.get("/v1/instances/vm", params={"after_generation": 10**6, "wait": "10ms"})
    return answer


async def test_an_admission_says_where_its_request_is(admin: httpx.AsyncClient) -> None:
    await make(admin, "vm")
    answer = await ask(admin, "pause")
    assert answer.status_code == 202
    said = answer.json()
    assert (said["disposition"], said["request"]["operation"]) == ("admitted", "pause")
    assert answer.headers["location"] == f"/v1/requests/{said['request']['id']}"
    ended = (await admin.get(answer.headers["location"], params={"wait": "20s"})).json()
    assert (ended["status"], ended["id"]) == ("succeeded", said["request"]["id"])
    assert (await admin.get("/v1/instances/vm")).json()["vm_state"] == "paused"


async def test_a_refusal_says_what_blocks_whose_it_is_since_when_and_when_to_come_back(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    other = await api.token("other")
    earlier = (await freeze_in_pause(api, other)).json()["request"]
    answer = await ask(admin, "reboot")
    assert (answer.status_code, answer.headers["content-type"]) == (409, "application/problem+json")
    said = answer.json()
    blocker = said["blocked_by"]
    assert (said["reason"], said["rule"]) == ("in_progress", "reboot-during-pause")
    assert (blocker["request"], blocker["operation"], blocker["by"]) == (earlier["id"], "pause", "other")
    assert (blocker["phase"], blocker["status"] in {"in_flight", "unknown"}) == ("pausing", True)
    assert 170 < said["retry_after_s"] <= 180
    assert 171 <= int(answer.headers["retry-after"]) <= 180
    wait = datetime.fromisoformat(said["allowed_at"]) - datetime.fromisoformat(blocker["last_sign_of_life"])
    assert wait.total_seconds() == pytest.approx(180, abs=0.01)
    assert "delete" in said["allowed_instead"]
    assert "reboot" not in said["allowed_instead"]
    for part in ("reboot", "pausing", "other", said["allowed_at"]):
        assert part in said["detail"]


async def test_what_is_on_its_way_is_answered_with_the_earlier_request(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    earlier = (await freeze_in_pause(api, admin)).json()["request"]
    answer = await ask(admin, "pause")
    assert (answer.status_code, answer.json()["disposition"]) == (200, "redundant")
    assert answer.json()["request"]["id"] == earlier["id"]


async def test_of_two_who_ask_at_once_one_is_admitted_and_the_other_told_so(admin: httpx.AsyncClient) -> None:
    await make(admin, "vm")
    answers = await asyncio.gather(*(ask(admin, "stop") for _ in range(8)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [200] * 7 + [202]
    (first,) = (answer.json()["request"]["id"] for answer in answers if answer.status_code == 202)
    assert {answer.json()["request"]["id"] for answer in answers} == {first}


async def test_of_two_who_take_a_name_at_once_one_gets_it(admin: httpx.AsyncClient) -> None:
    wish = {"name": "vm", "image": IMAGE.name}
    answers = await asyncio.gather(*(admin.post("/v1/instances", json=wish) for _ in range(4)))
    assert sorted(answer.status_code for answer in answers) == [202, 409, 409, 409]
    assert {answer.json()["type"] for answer in answers if answer.status_code == 409} == {
        "urn:interlock:problem:name-taken"
    }


async def test_a_preference_to_wait_answers_with_the_end(admin: httpx.AsyncClient) -> None:
    await make(admin, "vm")
    answer = await ask(admin, "stop", Prefer="respond-async, wait=20")
    assert (answer.status_code, answer.json()["request"]["status"]) == (200, "succeeded")
    assert answer.headers["preference-applied"] == "wait=20"


async def test_a_key_answers_as_the_first_time_and_asks_nothing_anew(admin: httpx.AsyncClient) -> None:
    await make(admin, "vm")
    first = await ask(admin, "stop", Idempotency_Key="k 1", Prefer="wait=20")
    again = await ask(admin, "stop", Idempotency_Key="k 1")
    assert again.json()["request"]["id"] == first.json()["request"]["id"]
    listed = (await admin.get("/v1/instances/vm/requests")).json()["items"]
    assert [one["operation"] for one in listed] == ["stop", "create"]
    other = await ask(admin, "start", Idempotency_Key="k 1")
    assert (other.status_code, other.json()["type"]) == (422, "urn:interlock:problem:key-reused")


async def test_a_key_answers_although_the_name_is_gone_with_the_first_time(admin: httpx.AsyncClient) -> None:
    """A client that lost the answer to its delete repeats it with the same path."""
    await make(admin, "vm")
    first = await ask(admin, "delete", Idempotency_Key="bye", Prefer="wait=20")
    assert (await admin.get("/v1/instances/vm")).status_code == 404
    again = await ask(admin, "delete", Idempotency_Key="bye")
    assert again.json()["request"]["id"] == first.json()["request"]["id"]
    for other in (await ask(admin, "delete", Idempotency_Key="new"), await ask(admin, "stop", Idempotency_Key="bye")):
        assert (other.status_code, other.json()["type"]) == (404, "urn:interlock:problem:not-found")


async def test_a_creation_with_a_key_makes_one_instance(admin: httpx.AsyncClient) -> None:
    wish = {"name": "vm", "image": IMAGE.name, "start": False}
    first, again = [await admin.post("/v1/instances", json=wish, headers={"Idempotency-Key": "once"}) for _ in range(2)]
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json()["instance"]["id"] == again.json()["instance"]["id"]
    assert first.json()["request"] is None


async def test_names_take_capitals_dots_and_underscores(admin: httpx.AsyncClient) -> None:
    for name in ("Web_Server.Example", "web_server.example", "9"):
        made = await admin.post("/v1/instances", json={"name": name, "image": IMAGE.name, "start": False})
        assert (made.status_code, made.json()["instance"]["name"]) == (201, name)
        assert (await admin.get(f"/v1/instances/{name}")).json()["id"] == made.json()["instance"]["id"]


async def test_what_happened_to_a_deleted_vm_is_found_by_its_last_name(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    for _ in range(2):
        last = (await make(admin, "vm", start=False))["id"]
        assert (await ask(admin, "delete", Prefer="wait=20")).status_code == 200
    events = (await admin.get("/v1/instances/vm/events")).json()["items"]
    assert {event["instance"] for event in events} == {last}
    asked = (await admin.get("/v1/instances/vm/requests")).json()["items"]
    assert [(one["operation"], one["instance"]) for one in asked] == [("delete", last)]
    assert (await admin.get("/v1/instances/vm")).status_code == 404
    stranger = await api.token("stranger", Role.ADMIN, "elsewhere", server_admin=True)
    assert (await stranger.get("/v1/instances/vm/events")).status_code == 404
    again = (await make(admin, "vm", start=False))["id"]
    events = (await admin.get("/v1/instances/vm/events")).json()["items"]
    assert {event["instance"] for event in events} == {again}, "one that has the name comes first"


async def test_an_admin_sees_the_instances_of_all_projects(api: ApiServer, admin: httpx.AsyncClient) -> None:
    member, other = await api.token("member"), await api.token("other", Role.ADMIN, "elsewhere", server_admin=True)
    for client, name in ((admin, "here"), (other, "there")):
        made = await client.post("/v1/instances", json={"name": name, "image": IMAGE.name, "start": False})
        assert made.status_code == 201, made.text
    listed = (await admin.get("/v1/instances", params={"all_projects": "true"})).json()["items"]
    assert [(one["name"], one["project"]) for one in listed] == [("here", "default"), ("there", "elsewhere")]
    own = (await admin.get("/v1/instances", params={"all_projects": "false"})).json()["items"]
    assert [one["name"] for one in own] == ["here"]
    assert (await member.get("/v1/instances", params={"all_projects": "true"})).status_code == 403
    assert (await admin.get("/v1/instances", params={"all_projects": "yes"})).status_code == 422


async def test_a_decision_on_an_old_generation_is_not_carried_out(admin: httpx.AsyncClient) -> None:
    await make(admin, "vm")
    tag = (await admin.get("/v1/instances/vm")).headers["etag"]
    await ask(admin, "stop", Prefer="wait=20")
    stale = await ask(admin, "start", If_Match=tag)
    assert (stale.status_code, stale.json()["type"]) == (412, "urn:interlock:problem:generation-mismatch")
    assert (await admin.get("/v1/instances/vm")).json()["vm_state"] == "stopped"
    now = (await admin.get("/v1/instances/vm")).headers["etag"]
    assert (await ask(admin, "start", If_Match=now)).status_code == 202
    assert (await ask(admin, "reboot", If_Match="*")).status_code in {200, 202, 409}


async def test_the_list_of_what_is_allowed_agrees_with_the_gate(api: ApiServer, admin: httpx.AsyncClient) -> None:
    await freeze_in_pause(api, admin)
    listed = (await admin.get("/v1/instances/vm/allowed")).json()
    answers = {one["operation"]: one for one in listed["operations"]}
    refused = (await ask(admin, "reboot")).json()
    told = answers["reboot"]
    assert [told[name] for name in ("disposition", "rule", "reason", "because", "allowed_at")] == [
        "denied",
        *(refused[name] for name in ("rule", "reason", "because", "allowed_at")),
    ]
    assert told["blocked_by"]["request"] == refused["blocked_by"]["request"]
    admitted = [name for name, one in answers.items() if one["disposition"] == "admitted"]
    assert admitted == refused["allowed_instead"]


async def test_a_reader_may_look_and_is_refused_everything_else(api: ApiServer, admin: httpx.AsyncClient) -> None:
    await make(admin, "vm")
    reader = await api.token("looker", Role.READER)
    assert (await reader.get("/v1/instances/vm")).status_code == 200
    answer = await ask(reader, "stop")
    assert (answer.status_code, answer.json()["type"]) == (403, "urn:interlock:problem:forbidden")
    for method, path in (("POST", "/v1/tokens"), ("POST", "/v1/volumes"), ("POST", "/v1/instances")):
        body = {"name": "a", "image": "nothing", "role": "admin", "project": "default", "size_mib": 1}
        wanted = {"/v1/tokens": ("name", "role", "project"), "/v1/volumes": ("name", "size_mib")}
        fields = wanted.get(path, ("name", "image"))
        answer = await reader.request(method, path, json={name: body[name] for name in fields})
        assert (answer.status_code, answer.json()["type"]) == (403, "urn:interlock:problem:forbidden")


async def test_roles_are_those_that_are_known_and_a_project_admin_may_what_a_member_may(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    await make(admin, "vm")
    wrong = await admin.post("/v1/tokens", json={"name": "x", "role": "guest", "project": "default"})
    assert (wrong.status_code, wrong.json()["type"]) == (422, "urn:interlock:problem:invalid")
    assert "guest" in wrong.json()["detail"]
    lead = await api.token("lead", Role.PROJECT_ADMIN)
    found = [
        (await one.get("/v1/instances/vm/allowed")).json()["operations"]
        for one in (lead, await api.token("member"), admin)
    ]
    assert found[0] == found[1] != found[2]
    assert (await ask(lead, "stop")).status_code == 202
    _, secret = await api.server.tokens.make(OPERATOR, "north", Role.AGENT, "default", "north")
    answer = await ask(api.client(secret), "stop")
    assert answer.status_code == 403


async def test_instances_of_another_project_do_not_exist(api: ApiServer, admin: httpx.AsyncClient) -> None:
    instance = await make(admin, "vm")
    stranger = await api.token("stranger", Role.ADMIN, "elsewhere", server_admin=True)
    asked = (await admin.get("/v1/instances/vm/requests")).json()["items"][0]["id"]
    for path in (f"/v1/instances/{instance['id']}", "/v1/instances/vm", f"/v1/requests/{asked}"):
        assert (await stranger.get(path)).status_code == 404
    assert (await ask(stranger, "delete", str(instance["id"]))).status_code == 404
    assert (await stranger.delete(f"/v1/requests/{asked}")).status_code == 404
    assert (await stranger.get("/v1/instances")).json()["items"] == []


BODIES: dict[str, dict[str, object]] = {
    "/v1/instances/{reference}": {"tags": ["x"]},
    "/v1/instances/{reference}/requests": {"operation": "stop"},
    "/v1/instances/{reference}/allowed": {"operation": "stop"},
}


async def test_an_instance_of_another_project_cannot_be_told_from_one_that_is_unknown(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    """Whatever is asked, and however: the same status, the same words, the same headers."""
    foreign = str((await make(admin, "vm"))["id"])
    unknown = foreign[:-12] + "0123456789ab"
    stranger = await api.token("stranger", Role.ADMIN, "elsewhere", server_admin=True)

    async def told(one: Route, reference: str, body: dict[str, object] | None, headers: dict[str, str]) -> object:
        path = one.path.replace("{reference}", reference).replace("{name}", "any")
        answer = await stranger.request(one.method, path, json=body, headers=headers)
        assert answer.status_code == 404, (one.path, answer.text)
        return answer.text.replace(reference, "ID"), {name: answer.headers[name] for name in answer.headers}

    for one in (route for route in ROUTES if "{reference}" in route.path and "instances" in route.path):
        bodies = [BODIES.get(one.path) if one.method in {"POST", "PATCH", "PUT"} else None]
        if one.path.endswith(("/requests", "/allowed")) and one.method == "POST":
            bodies += [
                {"operation": "attach_volume", "parameters": {"volume": "nothing"}},
                {"operation": "rebuild", "parameters": {"image": "nothing"}},
                {"operation": "snapshot", "parameters": {"name": "new"}},
                {"operation": "resize", "parameters": {"vcpus": 2}},
                {"operation": "stop", "hold": "10m"},
            ]
        for body in bodies:
            for headers in ({}, {"If-Match": '"1"'}, {"Idempotency-Key": "once"}):
                assert await told(one, foreign, body, headers) == await told(one, unknown, body, headers), one.path
    for reference in (foreign, unknown):
        answer = await stranger.get("/v1/events", params={"instance": reference})
        assert answer.status_code == 404, answer.text


async def test_a_cancellation_says_plainly_what_became_of_it(api: ApiServer, admin: httpx.AsyncClient) -> None:
    in_flight = (await freeze_in_pause(api, admin)).json()["request"]["id"]
    late = await admin.delete(f"/v1/requests/{in_flight}")
    assert (late.status_code, late.json()["type"]) == (409, "urn:interlock:problem:too-late")
    queued = await ask(admin, "unpause")
    assert queued.status_code == 202
    gone = await admin.delete(queued.headers["location"])
    assert (gone.status_code, gone.json()["outcome"]) == (200, "cancelled")
    assert gone.json()["request"]["status"] == "cancelled"
    assert (await admin.delete("/v1/requests/nothing")).status_code == 404


async def test_a_locked_vm_keeps_its_labels_until_whom_the_lock_lets_unlocks_it(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    await make(admin, "vm")
    member = await api.token("member")
    await member.patch("/v1/instances/vm", json={"blocked_operations": ["delete"]})
    assert (await ask(admin, "lock")).status_code in {200, 202}
    shown = (await member.get("/v1/instances/vm")).json()
    assert (shown["locked_by"], shown["lock_role"]) == ("admin", "admin")
    answer = await member.patch("/v1/instances/vm", json={"blocked_operations": []})
    assert (answer.status_code, answer.json()["type"]) == (403, "urn:interlock:problem:forbidden")
    assert answer.json()["remedy"] == "Ask an admin to unlock it."
    answer = await ask(member, "unlock")
    assert (answer.status_code, answer.json()["reason"]) == (409, "locked")
    assert (await ask(admin, "unlock")).status_code in {200, 202}
    assert (await member.get("/v1/instances/vm")).json()["lock_role"] is None
    assert (await member.patch("/v1/instances/vm", json={"blocked_operations": []})).status_code == 200


async def test_protected_tags_are_set_and_removed_by_admins_only(api: ApiServer, admin: httpx.AsyncClient) -> None:
    await make(admin, "vm", tags=["freeze", "web"])
    member = await api.token("member")
    wish = {"name": "other", "image": IMAGE.name, "tags": ["freeze"]}
    for answer in (
        await member.post("/v1/instances", json=wish),
        await member.patch("/v1/instances/vm", json={"tags": ["web"]}),
    ):
        assert (answer.status_code, answer.json()["type"]) == (403, "urn:interlock:problem:forbidden")
        assert "only an admin may set or remove the tag freeze" in answer.json()["detail"]
    assert (await member.patch("/v1/instances/vm", json={"tags": ["freeze"]})).status_code == 200
    assert (await admin.patch("/v1/instances/vm", json={"tags": []})).status_code == 200
    assert (await member.get("/v1/policy")).json()["protected_tags"] == ["freeze"]


async def test_an_instance_says_what_failed_since_it_last_succeeded_and_since_when_it_is_in_its_state(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    before = await make(admin, "vm")
    api.host.faults.script(str(before["id"]), Method.PAUSE, Refuses())
    failed = await admin.get((await ask(admin, "pause")).headers["location"], params={"wait": "20s"})
    assert failed.json()["status"] == "failed"
    shown = (await admin.get("/v1/instances/vm")).json()
    assert (shown["failures"], shown["state_since_at"]) == ({"pause": 1}, before["state_since_at"])
    await admin.get((await ask(admin, "pause")).headers["location"], params={"wait": "20s"})
    shown = (await admin.get("/v1/instances/vm")).json()
    assert shown["failures"] == {}
    assert shown["state_since_at"] > before["state_since_at"]
