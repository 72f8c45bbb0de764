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
