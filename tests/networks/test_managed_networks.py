"""Managed networks on a host in a namespace, with guests that are namespaces behind their taps."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import uvloop

from interlock.networks.host_networks import HostNetworks
from networks.conftest import NOTHING, TAGS, Host, interface, lab
from networks.namespaces import Namespace


async def test_a_guest_gets_its_leased_address_by_dhcp_and_reaches_its_gateway(host: Host) -> None:
    guest = await host.guest("web", interface(5, lab(), hostname="web"), configured=False)

    found = guest.asks_dhcp()

    assert socket.inet_ntoa(found[0]) == "10.7.0.5"
    assert socket.inet_ntoa(found[3]) == "10.7.0.1"
    assert found[15] == b"lab7.internal"
    guest.configure("10.7.0.5/24", "10.7.0.1")
    assert guest.pings("10.7.0.1")


async def test_a_guest_reaches_the_internet_through_translation(host: Host) -> None:
    guest = await host.guest("web", interface(5, lab()))

    with host.internet.serving(80, answer=b""):
        assert guest.reads("192.0.2.1", 80) == b"192.0.2.2"


async def test_nothing_is_left_after_the_last_interface_was_unplugged(host: Host) -> None:
    one = await host.guest("one", interface(5, lab()))
    two = await host.guest("two", interface(6, lab()))
    for instance_id, guest in (("one", one), ("two", two)):
        host.end(guest)
        assert host.left()["processes"]
        await host.networks.unplug(instance_id, "primary")

    assert host.left() == NOTHING


async def test_guests_of_a_network_reach_each_other_and_resolve_their_names(host: Host) -> None:
    one = await host.guest("one", interface(5, lab(), hostname="one"))
    two = await host.guest("two", interface(6, lab(), hostname="two"))

    assert one.resolves("two.lab7.internal", "10.7.0.1") == "10.7.0.6"
    with two.serving(80):
        assert one.reads("10.7.0.6", 80) == b"hello"


def test_networks_are_made_on_the_event_loop_that_a_server_uses(host_namespace: Namespace, tmp_path: Path) -> None:
    networks = HostNetworks(next(TAGS), tmp_path)

    async def make_and_remove() -> None:
        os.close(await networks.plug("one", interface(2, lab())))
        await networks.unplug("one", "primary")
        await networks.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(make_and_remove())
    assert "il" not in host_namespace.run("ip", "-br", "link")
