"""Projects and their quotas over HTTP."""

from __future__ import annotations

import asyncio

import httpx

from api.conftest import ApiServer
from in_process.embedded import IMAGE
from interlock.core.roles import Role

NONE = {"instances": 0, "vcpus": 0, "memory_mib": 0, "disk_mib": 0, "volumes": 0, "images": 0, "networks": 0}
NEW_VM = {"image": IMAGE.name, "start": False}


async def test_a_project_is_made_limited_shown_and_deleted(admin: httpx.AsyncClient) -> None:
    made = await admin.post("/v1/projects", json={"name": "research", "quota": {"vcpus": 8}})
    assert (made.status_code, made.headers["location"]) == (201, "/v1/projects/research")
    assert made.json()["created_by"] == "admin"
    assert {name: limit for name, limit in made.json()["quota"].items() if limit is not None} == {"vcpus": 8}
    assert made.json()["used"] == {**NONE, "outstanding_requests": 0, "held_requests": 0}
    assert (await admin.post("/v1/projects", json={"name": "research"})).status_code == 409
    changed = await admin.patch("/v1/projects/research/quota", json={"vcpus": None, "memory_mib": 1024})
    assert (changed.json()["quota"]["vcpus"], changed.json()["quota"]["memory_mib"]) == (None, 1024)
    await admin.patch("/v1/projects/research/quota", json={"instances": 3})
    shown = (await admin.get("/v1/projects/research")).json()["quota"]
    assert (shown["instances"], shown["memory_mib"]) == (3, 1024), "what is not named stays"
    assert [one["name"] for one in (await admin.get("/v1/projects")).json()["items"]] == ["default", "research"]
    for wrong in ({"vcpus": -1}, {"cores": 1}, {"vcpus": "many"}):
        assert (await admin.patch("/v1/projects/research/quota", json=wrong)).status_code == 422
    assert (await admin.delete("/v1/projects/research")).status_code == 204
    assert (await admin.get("/v1/projects/research")).status_code == 404


async def test_an_exceeded_quota_is_a_problem_of_its_own_with_all_amounts(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    await admin.post("/v1/projects", json={"name": "research", "quota": {"vcpus": 2}})
    ann = await api.token("ann", Role.MEMBER, "research")
    assert (await ann.post("/v1/instances", json={"name": "one", **NEW_VM})).status_code == 201
    answer = await ann.post("/v1/instances", json={"name": "two", "vcpus": 2, **NEW_VM})
    problem = answer.json()
    assert (answer.status_code, problem["type"]) == (409, "urn:interlock:problem:quota")
    amounts = {name: problem[name] for name in ("needed", "used", "limit", "free")}
    assert amounts == {"needed": {"vcpus": 2}, "used": {"vcpus": 1}, "limit": {"vcpus": 2}, "free": {"vcpus": 1}}
    assert "interlock project quota research" in problem["remedy"]
    assert (
        await ann.post("/v1/instances/one/allowed", json={"operation": "resize", "parameters": {"vcpus": 3}})
    ).json()["type"] == "urn:interlock:problem:quota"


async def test_of_many_clients_who_ask_at_once_only_one_gets_the_last(api: ApiServer, admin: httpx.AsyncClient) -> None:
    await admin.post("/v1/projects", json={"name": "research", "quota": {"instances": 1, "volumes": 1}})
    clients = [await api.token(f"c{number}", Role.MEMBER, "research") for number in range(6)]
    vms = [client.post("/v1/instances", json={"name": f"vm{n}", **NEW_VM}) for n, client in enumerate(clients)]
    volumes = [client.post("/v1/volumes", json={"name": f"v{n}", "size_mib": 1}) for n, client in enumerate(clients)]
    answers = await asyncio.gather(*vms, *volumes)
    assert sorted(one.status_code for one in answers[:6]) == [201, *[409] * 5]
    assert sorted(one.status_code for one in answers[6:]) == [201, *[409] * 5]
    used = (await clients[0].get("/v1/projects/research")).json()["used"]
    assert (used["instances"], used["volumes"]) == (1, 1)


async def test_whoever_is_in_a_project_sees_its_quota_and_only_admins_change_it(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    for role in (Role.READER, Role.MEMBER, Role.PROJECT_ADMIN):
        client = await api.token(f"a-{role}", role, "research")
        assert (await client.get("/v1/projects/research")).json()["quota"]["vcpus"] is None
        assert [one["name"] for one in (await client.get("/v1/projects")).json()["items"]] == ["research"]
        for method, path, body in (
            ("POST", "/v1/projects", {"name": "other"}),
            ("PATCH", "/v1/projects/research/quota", {"vcpus": 100}),
            ("DELETE", "/v1/projects/research", None),
        ):
            assert (await client.request(method, path, json=body)).status_code == 403
    assert (await admin.get("/v1/projects/research")).status_code == 200


async def test_a_token_for_an_unknown_project_creates_it_and_says_so(admin: httpx.AsyncClient) -> None:
    for expected in (True, False):
        wanted = {"name": f"t-{expected}", "role": "member", "project": "research"}
        made = await admin.post("/v1/tokens", json=wanted)
        assert (made.status_code, made.json()["project_created"]) == (201, expected)
    assert (await admin.get("/v1/projects/research")).json()["created_by"] == "admin"
