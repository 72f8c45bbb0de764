"""Access tokens over HTTP: expiry, rotation and what their list says."""

from __future__ import annotations

import httpx

from api.conftest import ApiServer
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
    await eventually(lambda: api.server.store.now_ms() >= api.server.callers._tokens[made["id"]].expires_at_ms)
    answer = await client.get("/v1/instances")
    assert (answer.status_code, answer.json()["detail"]) == (401, "The access token ci has expired.")
    assert "interlock token rotate ci" in answer.json()["remedy"]
    (listed,) = [one for one in (await admin.get("/v1/tokens")).json()["items"] if one["name"] == "ci"]
    assert (listed["expired"], listed["last_used_at"]) == (True, None)
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


async def test_only_admins_rotate(api: ApiServer, admin: httpx.AsyncClient) -> None:
    made = await make(admin)
    answer = await api.client(made["secret"]).post("/v1/tokens/admin/rotate", json={})
    assert answer.status_code == 403
