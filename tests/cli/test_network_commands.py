"""`interlock network`, and what `interlock vm` says of networks."""

from __future__ import annotations

from typing import Any

import pytest

from cli.conftest import Interlock
from cli.scripted_server import Given, ScriptedServer
from cli.wire_samples import AT, admitted, instance
from interlock.api.schemas.networks import (
    AddressList,
    Interface,
    InterfaceAddresses,
    Network,
    NetworkList,
    SecurityGroup,
    SecurityGroupList,
    Subnet,
)
from interlock.api.schemas.responses import Created, InstancePage
from interlock.core.networks import NetworkKind

LAB = Network(
    id="n-1",
    name="lab",
    kind=NetworkKind.MANAGED,
    project="default",
    subnets=(Subnet(prefix="10.7.0.0/24", gateway="10.7.0.1"),),
    domain="lab.internal",
    instances=2,
    created_at=AT,
    created_by="ann",
)
FIRST = Interface(id="primary", mac="52:54:00:00:00:01", network="lab", addresses=("10.7.0.2", "fd00:7::10"))


def sent(server: ScriptedServer) -> dict[str, Any]:
    return {key: value for key, value in server.asked[-1].json.items() if value not in (None, "", [], False)}


def test_a_network_with_a_bridge_is_of_the_kind_bridge_and_others_are_managed(
    interlock: Interlock, server: ScriptedServer
) -> None:
    server.on("POST", "/v1/networks", Given(201, LAB))
    ran = interlock("network", "create", "lab", "--subnet", "10.7.0.0/24,10.7.0.9", "--subnet", "fd00:7::/64")
    assert ran.out == "Created: network lab (10.7.0.0/24), id n-1\n"
    assert sent(server) == {
        "name": "lab",
        "kind": "managed",
        "outbound": True,
        "subnets": [
            {"prefix": "10.7.0.0/24", "gateway": "10.7.0.9"},
            {"prefix": "fd00:7::/64", "gateway": None},
        ],
    }
    interlock("network", "create", "lan", "--bridge", "br0", "--vlan", "7", "--shared", "--no-outbound")
    assert sent(server) == {"name": "lan", "kind": "bridge", "bridge": "br0", "vlan": 7, "shared": True}


def test_networks_are_listed_and_shown(interlock: Interlock, server: ScriptedServer) -> None:
    server.on("GET", "/v1/networks", Given(value=NetworkList(items=(LAB,))))
    assert interlock("network", "list").out.splitlines()[1].split()[:5] == [
        *("lab", "managed", "10.7.0.0/24", "default", "2"),
    ]
    server.on("GET", "/v1/networks/lab", Given(value=LAB))
    shown = interlock("network", "show", "lab").out
    assert "10.7.0.0/24 (gateway 10.7.0.1)" in shown
    assert "lab.internal" in shown


def test_a_vm_is_created_with_networks_in_their_order(interlock: Interlock, server: ScriptedServer) -> None:
    created = Created(instance=instance(), request=admitted().request, rule="x", because=None)
    server.on("POST", "/v1/instances", Given(202, created))
    networks = ("--network", "lab,address=10.7.0.20,address=fd00:7::20,mac=52:54:00:00:00:09", "--network", "lan")
    interlock("vm", "create", "demo", "--image", "small", *networks, "--no-wait")
    assert [{key: value for key, value in one.items() if value} for one in server.asked[-1].json["networks"]] == [
        {"network": "lab", "addresses": ["10.7.0.20", "fd00:7::20"], "mac": "52:54:00:00:00:09"},
        {"network": "lan"},
    ]


@pytest.mark.parametrize("value", ["lab,10.7.0.2", "lab,address=", "lab,vlan=7", "lab,mac=a,mac=b"])
def test_an_option_of_a_network_that_does_not_exist_is_refused(interlock: Interlock, value: str) -> None:
    ran = interlock("vm", "create", "demo", "--image", "small", "--network", value)
    assert ran.code == 2
    assert "expected NAME, then options such as address=10.7.0.20" in ran.err


def test_a_vm_shows_its_networks_and_leased_addresses(interlock: Interlock, server: ScriptedServer) -> None:
    one = instance(primary=FIRST, interfaces=(Interface(id="i-9", mac="52:54:00:00:00:02", inbound_kbit=500),))
    server.on("GET", "/v1/instances", Given(value=InstancePage(items=(one, instance()), next_cursor=None)))
    rows = interlock("vm", "list", "--columns", "name,network,address").out.splitlines()
    assert [row.split() for row in rows[1:]] == [["demo", "lab", "10.7.0.2,", "fd00:7::10"], ["demo", "-", "10.0.2.15"]]
    server.on("GET", "/v1/instances/demo", Given(value=one))
    shown = interlock("vm", "show", "demo").out
    assert "lab, 10.7.0.2, fd00:7::10, 52:54:00:00:00:01" in shown
    assert "52:54:00:00:00:02, in 500 kbit/s [i-9]" in shown


def test_a_vm_shows_what_its_guest_reports_apart_from_what_is_leased(
    interlock: Interlock, server: ScriptedServer
) -> None:
    server.on("GET", "/v1/instances/demo", Given(200, instance(primary=FIRST)))
    one = InterfaceAddresses(id="primary", mac=FIRST.mac, leased=FIRST.addresses, reported=("10.7.0.99", "fe80::1"))
    found = AddressList(items=(one,))
    asked = f"/v1/instances/{instance().id}/addresses"
    server.on("GET", asked, Given(200, found), Given(200, AddressList(items=(), detail="No guest agent answers.")))
    shown = interlock("vm", "show", "demo").out
    assert "Network:        lab, 10.7.0.2, fd00:7::10," in shown
    assert "Guest reports:  10.7.0.99, fe80::1 [primary]" in shown
    assert "Guest reports:  No guest agent answers." in interlock("vm", "show", "demo").out


def test_security_groups_are_made_listed_shown_changed_and_deleted(
    interlock: Interlock, server: ScriptedServer
) -> None:
    group = SecurityGroup(
        id="g-1", name="web", project="default", allow=("tcp 80",), instances=2, created_at=AT, created_by="ann"
    )
    server.on("POST", "/v1/security-groups", Given(201, group))
    made = interlock("security-group", "create", "web", "--allow", "tcp 80")
    assert made.out == "Created: security group web, id g-1\n"
    assert sent(server) == {"name": "web", "allow": "tcp 80"}
    server.on("GET", "/v1/security-groups", Given(value=SecurityGroupList(items=(group,))))
    assert interlock("security-group", "list").out.splitlines()[1].split()[:5] == ["web", "tcp", "80", "default", "2"]
    server.on("GET", "/v1/security-groups/web", Given(value=group))
    assert "tcp 80" in interlock("security-group", "show", "web").out
    server.on("PATCH", "/v1/security-groups/web", Given(value=group))
    changed = interlock("security-group", "set", "web", "--allow", "tcp 80")
    assert changed.out == "Changed: security group web allows tcp 80\n"
    server.on("DELETE", "/v1/security-groups/web", Given(204))
    assert interlock("security-group", "delete", "web", "--yes").out == "Deleted: web\n"
