"""Networks over HTTP, and what an instance shows of them."""

from __future__ import annotations

import httpx
import pytest

from api.conftest import ApiServer
from in_process.embedded import IMAGE
from interlock.core.roles import Role

SUBNET = {"prefix": "10.7.0.0/24"}


async def test_a_network_is_made_shown_used_and_deleted(admin: httpx.AsyncClient) -> None:
    made = await admin.post("/v1/networks", json={"name": "lab", "subnets": [SUBNET], "mtu": 1400})
    assert made.status_code == 201
    network = (await admin.get(made.headers["location"])).json()
    assert network == (await admin.get("/v1/networks/lab")).json() == made.json()
    shown = {key: network[key] for key in ("kind", "project", "subnets", "domain", "mtu", "instances", "created_by")}
    assert shown == {
        "kind": "managed",
        "project": "default",
        "subnets": [{"prefix": "10.7.0.0/24", "gateway": "10.7.0.1"}],
        "domain": "lab.internal",
        "mtu": 1400,
        "instances": 0,
        "created_by": "admin",
    }
    wanted = {
        "name": "web",
        "image": IMAGE.name,
        "start": False,
        "networks": [{"network": "lab", "allow": "tcp 22"}, {"network": "lab"}],
    }
    vm = (await admin.post("/v1/instances", json=wanted)).json()["instance"]
    assert (vm["primary"]["network"], vm["primary"]["addresses"]) == ("lab", ["10.7.0.2"])
    assert vm["primary"]["allow"] == ["tcp 22"]
    assert [one["addresses"] for one in vm["interfaces"]] == [["10.7.0.3"]]
    assert (await admin.get("/v1/networks/lab")).json()["instances"] == 1
    refused = await admin.delete("/v1/networks/lab")
    assert (refused.status_code, refused.json()["detail"]) == (409, "The network lab is in use by 1 VM.")
    await admin.post("/v1/networks", json={"name": "other"})
    assert [one["name"] for one in (await admin.get("/v1/networks")).json()["items"]] == ["lab", "other"]
    assert (await admin.delete("/v1/networks/other")).status_code == 204
    audited = (await admin.get("/v1/audit?action=network")).json()["items"]
    assert [(one["action"], one["target"], one["outcome"]) for one in audited] == [
        ("network.delete", "other", "succeeded"),
        ("network.create", "other", "succeeded"),
        ("network.delete", "lab", "refused"),
        ("network.create", "lab", "succeeded"),
    ]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"name": "a b"}, 422),
        ({"name": "x", "kind": "overlay"}, 422),
        ({"name": "x", "subnets": [{"prefix": "10.7.0.0/31"}]}, 422),
        ({"name": "x", "subnets": [SUBNET, SUBNET]}, 422),
        ({"name": "x", "bridge": "br0"}, 422),
        ({"name": "x", "kind": "bridge", "bridge": "br0;reboot"}, 422),
        ({"name": "x", "kind": "user", "vlan": 7}, 422),
    ],
)
async def test_an_invalid_network_is_refused(admin: httpx.AsyncClient, body: dict[str, object], status: int) -> None:
    assert (await admin.post("/v1/networks", json=body)).status_code == status
    assert (await admin.get("/v1/networks")).json()["items"] == []


async def test_a_shared_network_does_not_show_how_much_other_projects_use_it(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    await admin.post("/v1/networks", json={"name": "lan", "kind": "bridge", "bridge": "br0", "shared": True})
    member = await api.token("ann", Role.MEMBER, "research")
    assert (await member.get("/v1/networks/lan")).json()["instances"] is None
    assert (await admin.get("/v1/networks/lan")).json()["instances"] == 0
    assert (await member.delete("/v1/networks/lan")).status_code == 403
    reader = await api.token("ron", Role.READER, "research")
    assert (await reader.post("/v1/networks", json={"name": "x"})).status_code == 403
    assert (await reader.get("/v1/networks")).status_code == 200


async def test_a_security_group_is_made_shown_used_changed_and_deleted(
    api: ApiServer, admin: httpx.AsyncClient
) -> None:
    await admin.post("/v1/networks", json={"name": "lab"})
    made = await admin.post("/v1/security-groups", json={"name": "web", "allow": "tcp 80,icmp"})
    assert made.status_code == 201
    assert (await admin.get(made.headers["location"])).json() == made.json()
    assert made.json()["allow"] == ["tcp 80", "icmp"]
    networks = [{"network": "lab", "allow": "udp 53", "security_groups": ["web"]}]
    wanted = {"name": "web", "image": IMAGE.name, "start": False, "networks": networks}
    vm = (await admin.post("/v1/instances", json=wanted)).json()["instance"]
    assert (vm["primary"]["security_groups"], vm["primary"]["allow"]) == (["web"], ["udp 53", "tcp 80", "icmp"])
    changed = await admin.patch("/v1/security-groups/web", json={"allow": "tcp 443"})
    assert (changed.json()["allow"], changed.json()["instances"]) == (["tcp 443"], 1)
    refused = await admin.delete("/v1/security-groups/web")
    assert (refused.status_code, refused.json()["detail"]) == (409, "The security group web is in use by 1 VM.")
    await admin.post("/v1/security-groups", json={"name": "other"})
    assert [one["name"] for one in (await admin.get("/v1/security-groups")).json()["items"]] == ["web", "other"]
    assert (await admin.delete("/v1/security-groups/other")).status_code == 204
    missing = (await admin.get("/v1/security-groups/none")).json()
    assert (missing["detail"], missing["remedy"]) == (
        "Security group not found: none.",
        "List them with `interlock security-group list`.",
    )
    audited = (await admin.get("/v1/audit?action=security_group")).json()["items"]
    assert [(one["action"], one["target"], one["outcome"]) for one in audited] == [
        ("security_group.delete", "other", "succeeded"),
        ("security_group.create", "other", "succeeded"),
        ("security_group.delete", "web", "refused"),
        ("security_group.change", "web", "succeeded"),
        ("security_group.create", "web", "succeeded"),
    ]


@pytest.mark.parametrize("body", [{"name": "a b"}, {"name": "x", "allow": "tcp http"}, {"name": "x", "rules": []}])
async def test_an_invalid_security_group_is_refused(admin: httpx.AsyncClient, body: dict[str, object]) -> None:
    assert (await admin.post("/v1/security-groups", json=body)).status_code == 422
    assert (await admin.get("/v1/security-groups")).json()["items"] == []


async def test_readers_change_no_security_groups_and_there_are_not_endlessly_many(api: ApiServer) -> None:
    reader, member = [await api.token(f"a-{role}", role, "research") for role in (Role.READER, Role.MEMBER)]
    assert (await member.post("/v1/security-groups", json={"name": "web"})).status_code == 201
    assert (await member.post("/v1/security-groups", json={"name": "web"})).status_code == 409
    assert (await reader.post("/v1/security-groups", json={"name": "x"})).status_code == 403
    assert (await reader.patch("/v1/security-groups/web", json={"allow": ""})).status_code == 403
    assert (await reader.delete("/v1/security-groups/web")).status_code == 403
    for number in range(99):
        await member.post("/v1/security-groups", json={"name": f"g{number}"})
    full = await member.post("/v1/security-groups", json={"name": "full"})
    assert (full.status_code, full.json()["detail"]) == (
        422,
        "The project research has 100 security groups, the most that it may have.",
    )


async def test_addresses_are_told_apart_by_who_says_them(admin: httpx.AsyncClient) -> None:
    await admin.post("/v1/networks", json={"name": "lab", "subnets": [SUBNET]})
    wanted = {"name": "web", "image": IMAGE.name, "start": False, "networks": [{"network": "lab"}]}
    await admin.post("/v1/instances", json=wanted)
    found = (await admin.get("/v1/instances/web/addresses")).json()
    (one,) = found["items"]
    assert (one["id"], one["network"], one["leased"], one["reported"]) == ("primary", "lab", ["10.7.0.2"], [])
    assert found["detail"], "why its guest reports nothing"
    started = (await admin.post("/v1/instances/web/requests", json={"operation": "start"})).json()["request"]["id"]
    await admin.get(f"/v1/requests/{started}?wait=60s")
    found = (await admin.get("/v1/instances/web/addresses")).json()
    assert [one["reported"] for one in found["items"]] == [["10.7.0.2"]]
    assert found["detail"] == ""
