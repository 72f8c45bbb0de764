"""What a host refuses, in words, and what is left then: nothing."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from interlock.core.errors import OperationRejected
from interlock.core.networks import Network, NetworkKind
from interlock.core.specs import Forward
from interlock.networks import host_abilities, host_programs, nftables
from interlock.networks.connections import Names
from networks.conftest import NOTHING, Host, interface, lab

LAN = Network(id="0191-lan", name="lan", kind=NetworkKind.BRIDGE, bridge="br0")


def vlan(number: int) -> Network:
    return Network(id="0191-vlan", name="vlan", kind=NetworkKind.BRIDGE, bridge="br0", vlan=number)


def with_bridge(host: Host) -> None:
    host.namespace.ip("link add br0 type bridge")


def with_another_kind(host: Host) -> None:
    host.namespace.ip("link add br0 type veth peer name other")


def with_the_address(host: Host) -> None:
    host.namespace.ip("addr add 10.7.0.77/24 dev up0")


def with_a_route(host: Host) -> None:
    host.namespace.ip("route add 10.0.0.0/8 via 192.0.2.1")


def with_the_name(host: Host) -> None:
    host.namespace.ip(f"link add {Names(host.tag).bridge(lab())} type veth peer name other")


def with_nothing(host: Host) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "network", "message"),
    [
        (with_nothing, LAN, "The bridge br0 of the network lan does not exist on this host."),
        (
            with_another_kind,
            LAN,
            "br0, the bridge of the network lan, is not a bridge of the kernel on this host, but veth.",
        ),
        (
            *(with_bridge, vlan(5)),
            "The bridge br0 does not filter VLANs, so that the network vlan cannot have VLAN 5 on this host.",
        ),
        (
            *(with_bridge, Network(id="0191-big", name="big", kind=NetworkKind.BRIDGE, bridge="br0", mtu=9000)),
            "The MTU of the network big is 9000, and that of its bridge br0 is only 1500 on this host.",
        ),
        (
            *(with_the_address, lab()),
            "The subnet 10.7.0.0/24 of the network lab7 overlaps the address 10.7.0.77/24 of up0 of this host.",
        ),
        (
            *(with_a_route, lab()),
            "The subnet 10.7.0.0/24 of the network lab7 overlaps the route 10.0.0.0/8 by up0 of this host.",
        ),
        (with_the_name, lab(), "is taken by a link of another kind (veth)."),
    ],
)
async def test_a_network_that_the_host_cannot_have_is_refused_and_leaves_nothing(
    host: Host, prepare: Callable[[Host], None], network: Network, message: str
) -> None:
    prepare(host)
    before = host.left()

    with pytest.raises(OperationRejected) as refused:
        await host.networks.plug("one", interface(5, network))

    assert message in refused.value.message
    assert host.left() == before | {
        "links": [name for name in host.left()["links"] if name == Names(host.tag).bridge(lab())]
    }


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            Forward(host_port=8080, guest_port=80),
            "The forward of 127.0.0.1 port 8080/tcp cannot be made: Address already in use.",
        ),
        (
            Forward(host_port=8081, guest_port=80, host_address="203.0.113.1"),
            "The forward of 203.0.113.1 port 8081/tcp cannot be made: Cannot assign requested address.",
        ),
        (
            Forward(host_port=8081, guest_port=80, host_address="::1"),
            "The forward of ::1 port 8081/tcp cannot be made: the kernel forwards no IPv6 loopback.",
        ),
        (
            Forward(host_port=8081, guest_port=80, host_address="::"),
            "The forward of :: port 8081/tcp cannot be made: the guest has no IPv6 address in the network lab7.",
        ),
        (
            Forward(host_port=9090, guest_port=80),
            "The forward of 127.0.0.1 port 9090/tcp cannot be made: another VM has it.",
        ),
    ],
)
async def test_a_forward_that_cannot_be_made_is_refused_and_the_guest_keeps_the_others(
    host: Host, forward: Forward, message: str
) -> None:
    good = Forward(host_port=9091, guest_port=80)
    guest = await host.guest("one", interface(5, lab()), [good])
    await host.guest("two", interface(6, lab()), [Forward(host_port=9090, guest_port=80)])

    with host.namespace.serving(8080, "127.0.0.1"), pytest.raises(OperationRejected) as refused:
        await host.networks.update("one", interface(5, lab()), [good, forward])

    assert refused.value.message == message
    with guest.serving(80):
        assert host.namespace.reads("127.0.0.1", 9091) == b"hello"


@pytest.mark.parametrize("program", ["nft", "dnsmasq"])
async def test_a_missing_program_is_named_with_its_package(
    host: Host, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    found = host_programs.find
    monkeypatch.setattr(host_programs, "find", lambda name: None if name == program else found(name))

    with pytest.raises(OperationRejected, match=f"{program} is not installed on this host") as refused:
        await host.networks.plug("one", interface(5, lab()))

    assert refused.value.remedy == f"Install the package {host_programs.PACKAGES[program]} there."
    managed = next(one for one in host.networks.abilities() if one.kind is NetworkKind.MANAGED)
    assert not managed.available
    assert managed.detail == f"{program} is not installed (package {host_programs.PACKAGES[program]})"
    monkeypatch.undo()
    await host.networks.unplug("one", "primary")
    assert host.left() == NOTHING


async def test_without_privileges_a_host_says_what_it_lacks(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status = tmp_path / "status"
    status.write_text("CapEff:\t0000000000000000\n")
    monkeypatch.setattr(host_abilities, "_STATUS", status)

    by_kind = {one.kind: one for one in host.networks.abilities()}

    assert by_kind[NetworkKind.USER].available
    assert not by_kind[NetworkKind.BRIDGE].available
    assert by_kind[NetworkKind.BRIDGE].detail == "the server has no CAP_NET_ADMIN (run it as root)"


async def test_a_host_with_everything_can_have_each_kind(host: Host) -> None:
    assert [one for one in host.networks.abilities() if not one.available] == []


async def test_rules_are_applied_again_while_nftables_is_busy(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    busy = tmp_path / "nft"
    real, tries = shutil.which("nft", path=f"{os.environ['PATH']}:/usr/sbin"), tmp_path / "tries"
    busy.write_text(
        f"#!/bin/sh\necho x >> {tries}\n"
        f'[ $(wc -l < {tries}) -lt 3 ] || exec {real} "$@"\necho "Error: Device or resource busy" >&2; exit 1\n'
    )
    busy.chmod(0o755)
    monkeypatch.setattr(host_programs, "find", lambda name: str(busy) if name == nftables.NFT else shutil.which(name))

    guest = await host.guest("one", interface(5, lab()))

    assert guest.pings("10.7.0.1")


async def test_another_dns_server_on_the_address_is_named(host: Host) -> None:
    with host.namespace.opened(kind=socket.SOCK_DGRAM) as other:
        other.bind(("0.0.0.0", 53))
        with pytest.raises(OperationRejected, match=r"dnsmasq did not start: .*Address already in use"):
            await host.networks.plug("one", interface(5, lab()))

    assert host.left() == NOTHING


async def test_two_data_folders_on_a_host_have_networks_of_their_own(host: Host, tmp_path: Path) -> None:
    open_to_all = lab(8, open_outside=True)
    other = Host.beside(host, tmp_path / "other")
    one = await host.guest("one", interface(5, lab(7)))
    two = await other.guest("one", interface(5, open_to_all))

    with pytest.raises(
        OperationRejected, match=r"10\.8\.0\.0/24 of the network lab8 overlaps the address 10\.8\.0\.1/24"
    ):
        await host.networks.plug("two", interface(6, open_to_all))
    assert one.pings("10.7.0.1")
    assert two.pings("10.8.0.1")
    with two.serving(80):
        assert one.reads("10.8.0.5", 80, within_s=0.2) == b""
    await host.restarted().open({})
    assert two.pings("10.8.0.1")
    assert two.asks_dhcp()
    host.end(one)
    other.end(two)
    await other.networks.unplug("one", "primary")
    assert other.left() == NOTHING
    await other.networks.close()
