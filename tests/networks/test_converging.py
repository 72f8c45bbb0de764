"""What a host makes of what it finds: after a kill in any step, a reboot, and changes by hand."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from interlock.core.specs import Forward
from interlock.networks import host_networks, nftables
from interlock.networks.dnsmasq import DhcpServers
from interlock.networks.links import Links
from interlock.networks.router_settings import RouterSettings
from networks.conftest import NOTHING, Host, interface, lab, spec
from networks.namespaces import processes_with
from tiers import only_long
from waiting import eventually

EFFECTS = [
    *((Links, name) for name in ("add_bridge", "prepare_bridge", "set_mtu", "set_master", "set_up", "limit", "remove")),
    *((nftables, "apply"), (DhcpServers, "serve"), (DhcpServers, "remove"), (RouterSettings, "need")),
    *((RouterSettings, "restore"), (host_networks, "open_tap")),
]
"""Everything that changes the host."""


class Killed(BaseException):
    """The server was killed: nothing that it does has an effect from then on."""


def kill_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let a number of effects happen, and none after them."""
    left = [steps]

    def counted(effect: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return effect(*arguments, **named)

        return called

    for owner, name in EFFECTS:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("steps", [0, 2, 4, 6, *only_long(1, 3, 5, 7, 8)])
async def test_a_kill_in_any_step_of_plug_leaves_what_runs_and_nothing_else(
    host: Host, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    fields = {"inbound_kbit": 1000}
    with monkeypatch.context() as killing:
        kill_after(killing, steps)
        with pytest.raises(Killed):
            await host.networks.plug("one", interface(5, lab(), **fields))

    await host.restarted().open({})
    assert host.left() == NOTHING
    guest = await host.guest("one", interface(5, lab(), **fields))
    assert guest.pings("10.7.0.1")


@pytest.mark.parametrize("steps", [1, 3, *only_long(0, 2, 4)])
async def test_a_kill_in_any_step_of_unplug_leaves_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    await host.guest("one", interface(5, lab()))
    with monkeypatch.context() as killing:
        kill_after(killing, steps)
        with pytest.raises(Killed):
            await host.networks.unplug("one", "primary")

    await host.restarted().open({})

    assert host.left() == NOTHING


@pytest.mark.parametrize("steps", [2, 5, 7, *only_long(0, 1, 3, 4, 6, 8)])
async def test_a_kill_in_any_step_of_a_move_is_completed(
    host: Host, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    guest = await host.guest("one", interface(5, lab(7)), configured=False)
    guest.configure("10.8.0.5/24")
    moved = interface(5, lab(8))
    with monkeypatch.context() as killing:
        kill_after(killing, steps)
        with pytest.raises(Killed):
            await host.networks.update("one", moved, [Forward(host_port=8080, guest_port=80)])

    await host.restarted().open({"one": spec(moved)})

    assert guest.pings("10.8.0.1")
    assert len(host.left()["processes"]) == 1
    assert len(host.left()["links"]) == 2


async def test_a_server_that_starts_again_finds_its_networks_as_they_were(host: Host) -> None:
    guest = await host.guest("one", interface(5, lab()))
    before = host.left()

    await host.restarted().open({"one": spec(interface(5, lab()))})

    assert host.left() == before
    assert guest.pings("10.7.0.1")
    host.end(guest)
    await host.networks.unplug("one", "primary")
    assert host.left() == NOTHING


def reboot(host: Host) -> None:
    """Remove what a reboot of the host removes."""
    for guest in list(host.guests):
        host.end(guest)
    for link in host.left()["links"]:
        host.namespace.ip(f"link del {link}")
    host.namespace.run("nft", "flush", "ruleset")
    host.namespace.run("sysctl", "-qw", "net.ipv4.ip_forward=0")
    for process in processes_with(f"--interface=il{host.tag}"):
        os.kill(process, signal.SIGKILL)


async def test_after_a_reboot_nothing_is_left_or_guests_are_connected_anew(host: Host) -> None:
    await host.guest("one", interface(5, lab()))
    reboot(host)
    await eventually(lambda: not host.left()["processes"])
    await host.restarted().open({})
    assert host.left() == NOTHING

    guest = await host.guest("one", interface(5, lab()))
    with host.internet.serving(80):
        assert guest.reads("192.0.2.1", 80) == b"hello"


def remove_bridge(host: Host) -> None:
    for link in host.left()["links"]:
        if link.startswith(f"il{host.tag}b"):
            host.namespace.ip(f"link del {link}")


def remove_address(host: Host) -> None:
    bridge = next(link for link in host.left()["links"] if link.startswith(f"il{host.tag}b"))
    host.namespace.ip(f"addr flush dev {bridge}")


def flush_rules(host: Host) -> None:
    host.namespace.run("nft", "flush", "ruleset")


def kill_dnsmasq(host: Host) -> None:
    for process in processes_with(f"--interface=il{host.tag}"):
        os.kill(process, signal.SIGKILL)


def disconnect(host: Host) -> None:
    tap = next(link for link in host.left()["links"] if link.startswith(f"il{host.tag}t"))
    host.namespace.ip(f"link set {tap} nomaster")


@pytest.mark.parametrize("break_it", [remove_bridge, remove_address, flush_rules, kill_dnsmasq, disconnect])
async def test_what_somebody_removes_is_repaired_while_the_server_runs(
    host: Host, break_it: Callable[[Host], None]
) -> None:
    await host.networks.open({})
    guest = await host.guest("one", interface(5, lab()))
    rules = host.namespace.run("nft", "list", "ruleset").count("\n")

    break_it(host)

    await eventually(lambda: guest.asks_dhcp(within_s=0.3) and guest.pings("10.7.0.1", within_s=0.3))
    await eventually(lambda: host.namespace.run("nft", "list", "ruleset").count("\n") == rules)
