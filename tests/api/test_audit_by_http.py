"""The audit log over HTTP: what is recorded, by whom, from where, and who may read it."""

from __future__ import annotations

from typing import Any

import httpx

from api.conftest import ApiServer, make
from api.test_policy_live import NO_PAUSE, put

TOKEN = {"name": "ci", "role": "member", "project": "default"}


async def audit(admin: httpx.AsyncClient, **query: str | int) -> list[dict[str, Any]]:
    answer = await admin.get("/v1/audit", params={"action": "token", **query})
    assert answer.status_code == 200, answer.text
    return answer.json()["items"]  # type: ignore[no-any-return]


async def test_what_gives_and_takes_access_is_recorded_with_who_and_from_where(admin: httpx.AsyncClient) -> None:
    made = await admin.post("/v1/tokens", json=TOKEN)
    assert (await admin.post("/v1/tokens", json=TOKEN)).status_code == 409
    assert (await admin.post("/v1/tokens/ci/rotate", json={})).status_code == 200
    assert (await admin.delete("/v1/tokens/ci")).status_code == 204
    delete, rotate, refused, create = (await audit(admin))[:4]
    assert (delete["action"], rotate["action"]) == ("token.delete", "token.rotate")
    assert (create["action"], create["outcome"], create["target"]) == ("token.create", "succeeded", "ci")
    assert (create["who"], create["role"], create["address"]) == ("admin", "admin", "127.0.0.1")
    assert create["details"] == {"role": "member", "project_of_token": "default"}
    assert (refused["outcome"], refused["details"]["status"]) == ("refused", 409)
    assert made.json()["secret"] not in (await admin.get("/v1/audit")).text


async def test_projects_and_their_limits_are_recorded(admin: httpx.AsyncClient) -> None:
    await admin.post("/v1/projects", json={"name": "research", "quota": {"instances": 2}})
    await admin.patch("/v1/projects/research/quota", json={"instances": 3})
    await admin.delete("/v1/projects/research")
    found = await audit(admin, action="")
    assert [(one["action"], one["target"], one["details"]) for one in found[:3]] == [
        ("project.delete", "research", {}),
        ("quota.change", "research", {"instances": 3}),
        ("project.create", "research", {"instances": 2}),
    ]


async def test_failed_authentications_are_recorded_and_do_not_fill_the_disk(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    stranger = api.client("ilk_guessed")
    for _ in range(30):
        assert (await stranger.get("/v1/instances")).status_code == 401
    found = await audit(admin, action="authenticate")
    assert [one["details"]["count"] for one in found] == [10, 1]
    assert (found[0]["who"], found[0]["outcome"], found[0]["target"]) == ("", "refused", "/v1/instances")
    assert "ilk_guessed" not in str(found)


async def test_what_a_member_may_not_do_is_recorded_as_refused(api: ApiServer, admin: httpx.AsyncClient) -> None:
    member = api.client((await admin.post("/v1/tokens", json=TOKEN)).json()["secret"])
    assert (await member.post("/v1/policy/rollback", json={})).status_code == 403
    assert (await member.delete("/v1/tokens/admin")).status_code in {403, 404}
    found = await audit(admin, who="ci", action="")
    assert [(one["action"], one["outcome"]) for one in found] == [
        ("token.delete", "refused"),
        ("policy.switch", "refused"),
    ]
    assert (await member.get("/v1/audit")).status_code == 403


async def test_a_reset_of_a_state_is_recorded_and_other_operations_are_not(admin: httpx.AsyncClient) -> None:
    one = await make(admin, "one")
    await admin.post("/v1/instances/one/requests", json={"operation": "pause"})
    await admin.post(
        "/v1/instances/one/requests", json={"operation": "reset_state", "parameters": {"vm_state": "error"}}
    )
    found = await audit(admin, action="instance")
    assert [entry["action"] for entry in found] == ["instance.reset_state"]
    assert found[0]["target"] in {"one", one["id"]}
    assert found[0]["details"]["parameters"] == {"vm_state": "error"}


async def test_a_console_that_is_polled_is_recorded_once(admin: httpx.AsyncClient) -> None:
    await make(admin, "one")
    for _ in range(3):
        await admin.get("/v1/instances/one/console")
    assert len(await audit(admin, action="console.read")) == 1


async def test_a_policy_that_is_put_in_force_is_recorded_by_name(admin: httpx.AsyncClient) -> None:
    await put(admin, NO_PAUSE)
    (entry,) = await audit(admin, action="policy")
    assert (entry["action"], entry["target"], entry["details"]["number"]) == ("policy.switch", "no-pause", 2)


async def test_the_log_is_read_in_pages_and_followed(api: ApiServer, admin: httpx.AsyncClient) -> None:
    for name in ("a", "b", "c"):
        await admin.post("/v1/tokens", json={**TOKEN, "name": name})
    first = (await admin.get("/v1/audit", params={"limit": 2})).json()
    second = (await admin.get("/v1/audit", params={"limit": 2, "cursor": first["next_cursor"]})).json()
    assert [one["target"] for one in first["items"] + second["items"]][:3] == ["c", "b", "a"]
    assert second["next_cursor"] is None
    waiting = admin.get("/v1/audit", params={"after": first["next_after"], "wait": "60s"})
    await api.server.audit.record_own("host.fence", "north")
    followed = (await waiting).json()
    assert [(one["action"], one["who"], one["target"]) for one in followed["items"]] == [
        ("host.fence", "interlock", "north")
    ]


async def test_wrong_queries_are_refused_with_what_is_known(admin: httpx.AsyncClient) -> None:
    answer = await admin.get("/v1/audit", params={"outcome": "maybe"})
    assert (answer.status_code, answer.json()["remedy"]) == (422, "One of: succeeded, refused, failed.")
