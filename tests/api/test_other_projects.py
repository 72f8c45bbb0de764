"""What is in another project cannot be told from what does not exist: over every route, by id and by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest

from api.conftest import OPERATOR, ApiServer, make
from in_process.embedded import IMAGE
from interlock.api.app import ROUTES
from interlock.api.http.route import Route
from interlock.core.roles import Role
from interlock.stores.queries import Queries

SERVER_WIDE = ("/v1/hosts", "/v1/policy")
"""What belongs to no project."""
UNKNOWN_ID = "0197a5d0-0000-7000-8000-0123456789ab"
LISTS = tuple(f"/v1/{what}" for what in ("instances", "volumes", "images", "projects", "networks", "security-groups"))
BODIES: dict[str, dict[str, object]] = {
    "PATCH /v1/instances/{reference}": {"tags": ["x"]},
    "POST /v1/instances/{reference}/requests": {"operation": "stop"},
    "POST /v1/instances/{reference}/allowed": {"operation": "stop"},
    "POST /v1/tokens/{reference}/rotate": {},
    "PATCH /v1/security-groups/{reference}": {"allow": "icmp"},
    "PATCH /v1/projects/{name}/quota": {"vcpus": 1},
}


class Site(NamedTuple):
    """What a project has, by collection: references, each with one of the same form and length that does not exist."""

    api: ApiServer
    references: dict[str, tuple[tuple[str, str], ...]]
    strangers: tuple[httpx.AsyncClient, ...]


@pytest.fixture
async def site(api: ApiServer) -> Site:
    owner = await api.token("their-token", Role.MEMBER, "their-project")
    await owner.post("/v1/volumes", json={"name": "their-volume", "size_mib": 1})
    await api.server.store.images.put(
        msgspec.structs.replace(IMAGE, id="their-image-id", name="their-image", project="their-project")
    )
    vm = await make(owner, "their-vm")
    request = (await owner.get("/v1/instances/their-vm/requests")).json()["items"][0]["id"]
    volume = (await owner.get("/v1/volumes/their-volume")).json()["id"]
    network = (await owner.post("/v1/networks", json={"name": "their-network"})).json()["id"]
    group = (await owner.post("/v1/security-groups", json={"name": "their-group"})).json()["id"]
    token = next(one for one in await api.server.tokens.list(OPERATOR) if one.name == "their-token")
    references = {
        "/v1/instances": ((vm["id"], UNKNOWN_ID), ("their-vm", "whose-vm"), (vm["id"][-12:], UNKNOWN_ID[-12:])),
        "/v1/requests": ((request, UNKNOWN_ID), (request[-12:], UNKNOWN_ID[-12:])),
        "/v1/images": (("their-image-id", "whose-image-id"), ("their-image", "whose-image")),
        "/v1/image-fetches": ((request, UNKNOWN_ID),),
        "/v1/volumes": ((volume, UNKNOWN_ID), ("their-volume", "whose-volume")),
        "/v1/tokens": ((token.id, UNKNOWN_ID), ("their-token", "whose-token")),
        "/v1/networks": ((network, UNKNOWN_ID), ("their-network", "whose-network")),
        "/v1/security-groups": ((group, UNKNOWN_ID), ("their-group", "whose-group")),
        "/v1/projects": (("their-project", "whose-project"),),
    }
    strangers = [await api.token(f"a-{role}", role, "elsewhere") for role in (Role.MEMBER, Role.PROJECT_ADMIN)]
    return Site(api, references, tuple(strangers))


async def answer(client: httpx.AsyncClient, route: Route, reference: str) -> tuple[int, str, dict[str, str]]:
    """The answer, without the reference that was asked for."""
    path = "/".join(reference if part.startswith("{") else part for part in route.path.split("/"))
    body = BODIES.get(f"{route.method} {route.path}")
    got = await client.request(route.method, path, json=body)
    return got.status_code, got.text.replace(reference, "X"), dict(got.headers)


async def test_no_route_shows_that_something_exists_in_another_project(site: Site) -> None:
    for route in ROUTES:
        if "{" not in route.path or route.path.startswith(SERVER_WIDE):
            continue
        (references,) = [found for of, found in site.references.items() if f"{route.path}/".startswith(f"{of}/")]
        for client in site.strangers:
            for foreign, unknown in references:
                found = await answer(client, route, foreign)
                assert found == await answer(client, route, unknown), (route.method, route.path)
                assert found[0] in {403, 404}, (route.method, route.path, found[1])


async def test_no_parameter_shows_that_something_exists_in_another_project(site: Site) -> None:
    for client, name in zip(site.strangers, ("own", "other"), strict=True):
        await make(client, name)
        for what, operation, field in (
            ("/v1/volumes", "attach_volume", "volume"),
            ("/v1/images", "rebuild", "image"),
            ("/v1/images", "rescue", "image"),
        ):
            for references in site.references[what]:
                found = set()
                for reference in references:
                    for path in ("requests", "allowed"):
                        body = {"operation": operation, "parameters": {field: reference}}
                        got = await client.post(f"/v1/instances/{name}/{path}", json=body)
                        assert got.status_code == 404, got.text
                        found.add(got.text.replace(reference, "X").replace(f"/{path}", ""))
                    new = await client.post("/v1/instances", json={"name": "new", "image": reference})
                    assert new.status_code == 404
                assert len(found) == 1
        for foreign, unknown in site.references["/v1/instances"]:
            texts = [
                (await client.get("/v1/events", params={"instance": one})).text.replace(one, "X")
                for one in (foreign, unknown)
            ]
            assert texts[0] == texts[1]


async def test_names_of_another_project_are_free(site: Site) -> None:
    lead = site.strangers[1]
    await make(lead, "their-vm")
    assert (await lead.post("/v1/volumes", json={"name": "their-volume", "size_mib": 1})).status_code == 201
    assert (await lead.post("/v1/security-groups", json={"name": "their-group"})).status_code == 201
    assert (await lead.post("/v1/tokens", json={"name": "their-token", "role": "member"})).status_code == 201


async def test_no_list_has_what_is_in_another_project(site: Site) -> None:
    """Also not the list of what is on a host that is drained."""
    for client in site.strangers:
        for path in (*LISTS, "/v1/stuck", "/v1/hosts/here/drain"):
            got = await client.get(path)
            assert got.status_code == 200, got.text
            for references in site.references.values():
                for foreign, _ in references:
                    assert f'"{foreign}"' not in got.text, path
    members = [one["name"] for one in (await site.strangers[1].get("/v1/tokens")).json()["items"]]
    assert members == ["a-member", "a-project_admin"]


async def test_as_much_is_looked_up_for_what_is_in_another_project_as_for_what_does_not_exist(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the time of an answer says nothing either; one more row may be read."""
    reads = 0

    def counting(read: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            nonlocal reads
            reads += 1
            return read(*arguments)

        return counted

    for name in ("_all", "_one"):
        monkeypatch.setattr(Queries, name, counting(getattr(Queries, name)))

    async def cost(client: httpx.AsyncClient, route: Route, reference: str) -> int:
        before = reads
        await answer(client, route, reference)
        return reads - before

    for route in ROUTES:
        for of, references in site.references.items():
            if route.path.startswith((f"{of}/{{reference}}", f"{of}/{{id}}")):
                for foreign, unknown in references:
                    costs = [await cost(site.strangers[0], route, one) for one in (foreign, unknown)]
                    assert abs(costs[0] - costs[1]) <= 1, (route.method, route.path, costs)
