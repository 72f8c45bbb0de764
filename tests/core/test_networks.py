"""Networks: which are valid, and which addresses they lease."""

from __future__ import annotations

from typing import Any

import pytest

from interlock.core.errors import InsufficientCapacity, InUse, Invalid
from interlock.core.networks import (
    Network,
    NetworkKind,
    Subnet,
    check_network,
    domain_of,
    free_subnet,
    hostname_in,
    ingress_of,
    lease,
    mac_of,
    overlapping,
    rule_text,
    subnet_of,
)


def managed(*prefixes: str, **fields: Any) -> Network:
    subnets = tuple(subnet_of(prefix) for prefix in prefixes)
    return Network(**{"id": "n", "name": "lab", "kind": NetworkKind.MANAGED, "subnets": subnets, **fields})


def bridge(name: str = "br0", **fields: Any) -> Network:
    return Network(id="b", name="lan", kind=NetworkKind.BRIDGE, bridge=name, **fields)


LAB = managed("10.7.0.0/29")


def test_the_gateway_is_the_first_address_unless_another_is_given() -> None:
    assert subnet_of("10.7.0.0/24") == Subnet(prefix="10.7.0.0/24", gateway="10.7.0.1")
    assert subnet_of("10.7.0.0/24", "10.7.0.254").gateway == "10.7.0.254"
    assert subnet_of("FD00:7:0::/64") == Subnet(prefix="fd00:7::/64", gateway="fd00:7::1")


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("lab", "not a range"),
        ("10.7.0.0/33", "not a range"),
        ("10.7.0.5/24", "an address, not a range"),
        ("10.7.0.0", "an address, not a range"),
        ("10.7.0.0/31", "expected a prefix from /8 to /30"),
        ("0.0.0.0/0", "reserved"),
        ("127.1.0.0/16", "loopback"),
        ("169.254.0.0/16", "link-local"),
        ("224.0.0.0/24", "multicast"),
        ("10.0.0.0/16", "10.0.2.0/24"),
        ("fe80::/64", "link-local"),
        ("fd00:7::/48", "/64"),
    ],
)
def test_a_subnet_that_cannot_work_is_refused_with_why(prefix: str, said: str) -> None:
    with pytest.raises(Invalid, match="subnet: ") as refused:
        subnet_of(prefix)
    assert said in refused.value.message


@pytest.mark.parametrize("gateway", ["10.8.0.1", "10.7.0.0", "10.7.0.255", "first", "fd00::1"])
def test_a_gateway_that_is_no_host_of_the_subnet_is_refused(gateway: str) -> None:
    with pytest.raises(Invalid, match="gateway: "):
        subnet_of("10.7.0.0/24", gateway)


@pytest.mark.parametrize(
    ("network", "field"),
    [
        (managed(), "subnets"),
        (managed("10.7.0.0/24", "10.8.0.0/24"), "subnets"),
        (managed("10.7.0.0/24", bridge="br0"), "bridge"),
        (managed("10.7.0.0/24", vlan=7), "vlan"),
        (managed("10.7.0.0/24", mtu=500), "mtu"),
        (managed("10.7.0.0/24", "fd00:7::/64", mtu=1000), "mtu"),
        (managed("10.7.0.0/24", domain="Lab_1"), "domain"),
        (managed("10.7.0.0/24", domain="a;b"), "domain"),
        (bridge(""), "bridge"),
        (bridge("a-name-too-long0"), "bridge"),
        (bridge("br0;reboot"), "bridge"),
        (bridge("a/b"), "bridge"),
        (bridge(".."), "bridge"),
        (bridge("br0\n"), "bridge"),
        (bridge(vlan=0), "vlan"),
        (bridge(vlan=4095), "vlan"),
        (bridge(outbound=False), "outbound"),
        (bridge(subnets=LAB.subnets), "subnets"),
        (Network(id="u", name="u", kind=NetworkKind.USER, mtu=1500), "mtu"),
    ],
)
def test_a_field_that_contradicts_the_kind_or_is_out_of_range_is_named(network: Network, field: str) -> None:
    with pytest.raises(Invalid, match=f"^{field}: "):
        check_network(network)


@pytest.mark.parametrize(
    "network",
    [
        managed("10.7.0.0/24", "fd00:7::/64", mtu=9000, domain="lab.internal", outbound=False),
        bridge("vmbr0.100", vlan=4094, mtu=1400),
        Network(id="u", name="u", kind=NetworkKind.USER, outbound=False),
    ],
)
def test_a_network_of_each_kind_is_valid(network: Network) -> None:
    check_network(network)


def test_overlapping_subnets_are_found_in_the_same_family_only() -> None:
    assert overlapping(subnet_of("10.7.0.0/16"), (LAB,)) is LAB
    assert overlapping(subnet_of("10.8.0.0/16"), (LAB,)) is None
    assert overlapping(subnet_of("fd00:7::/64"), (LAB,)) is None


def test_a_free_subnet_overlaps_no_other() -> None:
    first = free_subnet(())
    assert overlapping(free_subnet((managed(first.prefix),)), (managed(first.prefix),)) is None
    with pytest.raises(Invalid, match="no free range"):
        free_subnet((managed("10.128.0.0/9"),))


def test_the_first_free_addresses_are_leased_and_never_the_gateway() -> None:
    both = managed("10.7.0.0/24", "fd00:7::/64")
    assert lease(both, ()) == ("10.7.0.2", "fd00:7::10")
    assert lease(both, {"10.7.0.2", "fd00:7::10"}) == ("10.7.0.3", "fd00:7::11")
    assert lease(both, (), ("FD00:7::0:20",)) == ("10.7.0.2", "fd00:7::20"), "in the shortest notation"
    assert lease(bridge(), ()) == ()


def test_an_exhausted_network_says_how_many_are_free() -> None:
    with pytest.raises(InsufficientCapacity, match="no free address") as refused:
        lease(LAB, {f"10.7.0.{number}" for number in range(2, 7)})
    assert (refused.value.needed, refused.value.free) == ({"addresses": 1}, {"addresses": 0})


def test_a_taken_address_is_refused_with_some_that_are_free() -> None:
    with pytest.raises(InUse, match=r"10\.7\.0\.4 of the network lab is in use") as refused:
        lease(LAB, {"10.7.0.2", "10.7.0.4"}, ("10.7.0.4",))
    assert "10.7.0.3, 10.7.0.5, 10.7.0.6 are free" in str(refused.value.remedy)
    with pytest.raises(InUse) as full:
        lease(LAB, {f"10.7.0.{number}" for number in range(2, 7)}, ("10.7.0.2",))
    assert full.value.remedy == "No address is free."


@pytest.mark.parametrize("address", ["10.8.0.2", "10.7.0.1", "10.7.0.0", "10.7.0.7", "web", "fd00::2"])
def test_an_address_that_the_network_cannot_lease_is_refused(address: str) -> None:
    with pytest.raises(Invalid, match=r"^address: "):
        lease(LAB, (), (address,))
    with pytest.raises(Invalid, match=r"^address: "):
        lease(bridge(), (), (address,))


def test_a_generated_mac_address_is_one_that_is_not_taken() -> None:
    first = mac_of("vm")
    assert mac_of("vm") == first != mac_of("other")
    assert mac_of("vm", {first}) not in {first, mac_of("vm", ())}


def test_the_name_in_dns_is_a_label_and_on_a_shared_network_has_the_project_in_it() -> None:
    own = managed("10.7.0.0/24", project="research")
    assert hostname_in(own, "Web_1.b", "research") == "web-1-b"
    assert hostname_in(managed("10.7.0.0/24"), "web", "research") == "web-research"
    assert len(hostname_in(managed("10.7.0.0/24"), "w" * 63, "research")) <= 63
    assert hostname_in(bridge(), "web", "research") == ""


def test_rules_are_read_as_they_are_shown() -> None:
    rules = ingress_of("tcp 22 from 10.0.0.0/8,  udp   5000-5010, icmp, any from fd00::/8")
    assert [rule_text(one) for one in rules] == [
        *("tcp 22 from 10.0.0.0/8", "udp 5000-5010", "icmp", "any from fd00::/8"),
    ]
    assert ingress_of(" , ") == ()


@pytest.mark.parametrize(
    "text",
    [
        "tcp http",
        "tcp 0",
        "tcp 70000",
        "tcp 20-10",
        "icmp 7",
        "sctp 1",
        "tcp 22 from lan",
        "tcp 22 from 10.0.0.1/8",
        "22",
    ],
)
def test_a_rule_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match=r"^allow: "):
        ingress_of(f"icmp, {text}")


def test_the_default_domain_is_made_of_the_name() -> None:
    assert [domain_of(name) for name in ("lab", "My_Lab.1")] == ["lab.internal", "my-lab.1.internal"]
