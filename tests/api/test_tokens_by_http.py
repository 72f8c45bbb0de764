"""Access tokens over HTTP: expiry, rotation and what their list says."""

from __future__ import annotations

import httpx

from api.conftest import ApiServer
from interlock.core.roles import Role
from waiting import PATIENCE_S, eventually

NEW = {"name": "ci", "role": "member", "project": "default"}


async def make(admin: httpx.AsyncClient, **fields: str) -> dict[str, str]:
    answer = await admin.post("/v1/tokens", json={**NEW, **fields})
    assert answer.status_code == 201, answer.text
    return {"secret": answer.json()["secret"], **answer.json()["token"]}


async def test_an_expired_token_is_told_that_it_has_expired(api: ApiServer, admin: httpx.AsyncClient) -> None:
    made = await make(admin, expires_in="50ms")
    assert made["expires_at"] is not None
    client = api.client(made["secret"])
    await eventually(lambda: api.server.callers.authenticate(made["secret"]) is None)
    answer = await client.get("/v1/instances")
    assert (answer.status_code, answer.json()["detail"]) == (401, "The access token ci has expired.")
    assert "interlock token rotate ci" in answer.json()["remedy"]
    (listed,) = [one for one in (await admin.get("/v1/tokens")).json()["items"] if one["name"] == "ci"]
    assert listed["expired"]
    rotated = await admin.post("/v1/tokens/ci/rotate", json={"expires_in": "1h"})
    assert rotated.headers["cache-control"] == "no-store"
    assert (await api.client(rotated.json()["secret"]).get("/v1/instances")).status_code == 200


async def test_a_rotation_keeps_the_former_secret_for_as_long_as_asked(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    made = await make(admin)
    former = api.client(made["secret"])
    first = (await admin.post("/v1/tokens/ci/rotate", json={"overlap": f"{PATIENCE_S}s"})).json()
    assert first["token"]["former_until_at"] > first["token"]["rotated_at"] > made["created_at"]
    assert (await former.get("/v1/instances")).status_code == 200
    second = (await admin.post(f"/v1/tokens/{made['id']}/rotate", json={})).json()
    assert second["token"]["former_until_at"] is None
    assert (await former.get("/v1/instances")).status_code == 401
    assert (await api.client(first["secret"]).get("/v1/instances")).json()["detail"] == (
        "The access token ci was rotated; this secret has expired."
    )
    assert (await api.client(second["secret"]).get("/v1/instances")).status_code == 200


async def test_the_list_says_who_made_a_token_and_when_it_was_used(api: ApiServer, admin: httpx.AsyncClient) -> None:
    made = await make(admin)
    assert made["created_by"] == "admin"
    await api.client(made["secret"]).get("/v1/instances")
    listed = {one["name"]: one for one in (await admin.get("/v1/tokens")).json()["items"]}
    assert listed["ci"]["last_used_at"] >= made["created_at"]
    assert "secret" not in str(listed), "neither a secret nor the hash of one"


async def test_an_invalid_duration_is_refused_by_name(admin: httpx.AsyncClient) -> None:
    await make(admin)
    for path, field in (("/v1/tokens", "expires_in"), ("/v1/tokens/ci/rotate", "overlap")):
        body = {**NEW, "name": "other"} if path == "/v1/tokens" else {}
        for wrong in ("soon", "0s", "4000d"):
            answer = await admin.post(path, json={**body, field: wrong})
            assert answer.status_code == 422
            assert f"Invalid {field} '{wrong}'" in answer.json()["detail"]


async def test_members_and_readers_administer_no_tokens(api: ApiServer, admin: httpx.AsyncClient) -> None:
    await make(admin)
    for role in (Role.READER, Role.MEMBER):
        client = await api.token(f"a-{role}", role)
        for method, path, body in (
            ("GET", "/v1/tokens", None),
            ("POST", "/v1/tokens", {**NEW, "name": "other"}),
            ("POST", "/v1/tokens/ci/rotate", {}),
            ("DELETE", "/v1/tokens/ci", None),
        ):
            answer = await client.request(method, path, json=body)
            assert answer.status_code == 403
            assert answer.json()["remedy"] == "Use a token with the role project_admin of that project, or admin."


async def test_an_admin_of_a_project_is_a_project_admin_and_one_of_the_server_says_so(
    admin: httpx.AsyncClient,
) -> None:
    wanted = {"name": "head", "role": "admin", "project": "research"}
    answer = await admin.post("/v1/tokens", json=wanted)
    assert answer.status_code == 422
    assert answer.json()["detail"] == (
        "role: a token with the role admin administers the whole server, not only the project research."
    )
    assert "project_admin" in answer.json()["remedy"]
    assert (await admin.post("/v1/tokens", json={**wanted, "server_admin": True})).status_code == 201
    assert (await admin.post("/v1/tokens", json={"name": "own", "role": "admin"})).json()["token"][
        "project"
    ] == "default"


async def test_a_project_admin_administers_the_tokens_of_its_own_project(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    lead = await api.token("lead", Role.PROJECT_ADMIN, "research", groups=("ops",))
    await make(admin, name="ci")
    made = await lead.post("/v1/tokens", json={"name": "ci", "role": "member", "groups": ["ops"]})
    assert (made.status_code, made.json()["token"]["project"]) == (201, "research"), "names are of one project"
    assert sorted(one["name"] for one in (await lead.get("/v1/tokens")).json()["items"]) == ["ci", "lead"]
    rotated = await lead.post("/v1/tokens/ci/rotate", json={})
    assert (await api.client(rotated.json()["secret"]).get("/v1/volumes")).status_code == 200
    second = await lead.post("/v1/tokens", json={"name": "second", "role": "project_admin"})
    assert (second.status_code, (await lead.delete("/v1/tokens/second")).status_code) == (201, 204)
    assert (await admin.delete("/v1/tokens/ci")).json()["detail"] == (
        "Several tokens are named ci, in the projects default, research."
    )
    assert (await admin.delete(f"/v1/tokens/{made.json()['token']['id']}")).status_code == 204


async def test_a_project_admin_gets_no_more_than_it_has(api: ApiServer, admin: httpx.AsyncClient) -> None:
    lead = await api.token("lead", Role.PROJECT_ADMIN, "research")
    await api.token("boss", Role.ADMIN, "research", server_admin=True)
    await api.token("auditor", Role.MEMBER, "research", groups=("audit",))
    other = await make(admin, name="theirs", project="other")
    for wanted, status in (
        ({"role": "admin"}, 403),
        ({"role": "admin", "server_admin": True}, 403),
        ({"role": "agent", "host": "north"}, 403),
        ({"role": "member", "groups": ["audit"]}, 403),
        ({"role": "member", "project": "other"}, 403),
        ({"role": "member", "project": "nobodys"}, 403),
    ):
        answer = await lead.post("/v1/tokens", json={"name": "new", **wanted})
        assert (answer.status_code, answer.json()["type"]) == (status, "urn:interlock:problem:forbidden"), wanted
    assert (await lead.post("/v1/tokens/boss/rotate", json={})).status_code == 403
    assert (await lead.delete("/v1/tokens/boss")).status_code == 403
    assert (await lead.post("/v1/tokens/auditor/rotate", json={})).status_code == 403, "its secret has the group"
    for reference in (other["id"], "theirs"):
        assert (await lead.post(f"/v1/tokens/{reference}/rotate", json={})).status_code == 404
        assert (await lead.delete(f"/v1/tokens/{reference}")).status_code == 404


async def test_a_project_admin_administers_nothing_of_the_server(api: ApiServer) -> None:
    lead = await api.token("lead", Role.PROJECT_ADMIN, "research")
    for method, path, body in (
        ("POST", "/v1/images/small", {"name": "new"}),
        ("PUT", "/v1/policy", {"policy": "standard"}),
        ("POST", "/v1/hosts/north/fence", {"guests_have_ended": True}),
        ("GET", "/v1/image-fetches", None),
        ("GET", "/v1/host-moves", None),
        ("GET", "/v1/instances?all_projects=true", None),
    ):
        answer = await lead.request(method, path, json=body)
        assert answer.status_code == 403, (path, answer.text)
        assert answer.json()["remedy"] == "Use a token with the role admin, which administers the whole server."
