"""Memory dumps and passwords over HTTP."""

from __future__ import annotations

import httpx

from api.conftest import ApiServer, make
from interlock.core.roles import Role


async def _dumped(client: httpx.AsyncClient, name: str) -> str:
    asked = await client.post(
        f"/v1/instances/{name}/requests", json={"operation": "crash_dump"}, headers={"Prefer": "wait=20"}
    )
    assert asked.json()["request"]["status"] == "succeeded", asked.text
    made: str = asked.json()["request"]["id"]
    return made


async def test_a_dump_is_listed_and_downloaded_by_its_owners_only(api: ApiServer, admin: httpx.AsyncClient) -> None:
    await make(admin, "one")
    made = await _dumped(admin, "one")
    (listed,) = (await admin.get("/v1/instances/one/dumps")).json()["items"]
    assert listed["id"] == made
    got = await admin.get(f"/v1/instances/one/dumps/{made}")
    assert (got.status_code, got.headers["Cache-Control"]) == (200, "no-store")
    assert got.content.startswith(b"KDUMP   ")
    assert len(got.content) == listed["size_bytes"]
    assert (await admin.get("/v1/instances/one/dumps/another")).status_code == 404
    reader = await api.token("reader", Role.READER)
    assert (await reader.get("/v1/instances/one/dumps")).status_code == 200
    assert (await reader.get(f"/v1/instances/one/dumps/{made}")).status_code == 403
    stranger = await api.token("stranger", project="elsewhere")
    assert (await stranger.get("/v1/instances/one/dumps")).status_code == 404
    assert (await stranger.get(f"/v1/instances/one/dumps/{made}")).status_code == 404


async def test_a_dump_is_deleted_by_its_owners_only(api: ApiServer, admin: httpx.AsyncClient) -> None:
    await make(admin, "one")
    made, kept = await _dumped(admin, "one"), await _dumped(admin, "one")
    path = f"/v1/instances/one/dumps/{made}"
    assert (await (await api.token("reader", Role.READER)).delete(path)).status_code == 403
    assert (await (await api.token("stranger", project="elsewhere")).delete(path)).status_code == 404
    assert (await (await api.token("member", Role.MEMBER)).delete(path)).status_code == 204
    assert [dump["id"] for dump in (await admin.get("/v1/instances/one/dumps")).json()["items"]] == [kept]
    assert (await admin.delete(path)).status_code == 404


async def test_a_password_that_was_made_up_is_told_once(admin: httpx.AsyncClient) -> None:
    await make(admin, "one")
    asked = await admin.post(
        "/v1/instances/one/requests",
        json={"operation": "set_password", "parameters": {"user": "ada"}},
        headers={"Prefer": "wait=20"},
    )
    answer = asked.json()
    assert answer["request"]["status"] == "succeeded"
    password = answer["password"]
    assert len(password) >= 16
    for path in ("/v1/instances/one", "/v1/instances/one/requests", "/v1/instances/one/events"):
        assert password not in (await admin.get(path)).text
