"""Interfaces that are attached to networks, moved between them and limited, and forwards, of guests that run or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from in_process.embedded import IMAGE, WAIT_MS, Embedded, admitted, refused
from interlock.core.errors import InUse, Invalid, NotFound
from interlock.core.networks import Network, NetworkKind, ingress_of, rule_text
from interlock.core.operations import Operation
from interlock.core.records import Forward, Instance, Interface, Spec, Status
from interlock.hypervisors.simulated import SimulatedHost
from interlock.hypervisors.simulated.faults import Method, Refuses, Slow
from interlock.service.request_models import NewInstance, NewInterface, NewNetwork, NewSubnet

pytestmark = pytest.mark.virtual_time

O = Operation  # noqa: E741


class Site(Embedded):
    """A server with the networks `lab`, `dmz` and `lan` (a bridge), and the VM `web` in `lab`."""

    networks: dict[str, Network]

    async def begin(self) -> None:
        await self.start()
        made = [
            NewNetwork(name="lab", subnets=(NewSubnet(prefix="10.7.0.0/24"),)),
            NewNetwork(name="dmz", subnets=(NewSubnet(prefix="10.8.0.0/24"), NewSubnet(prefix="fd00:8::/64"))),
            NewNetwork(name="lan", kind=NetworkKind.BRIDGE, bridge="br0"),
        ]
        self.networks = {one.name: await self.server.networks.create(self.caller, one) for one in made}
        await self.add("web", "lab")

    async def add(
        self, name: str, *networks: str, start: bool = True, security_groups: tuple[str, ...] = (), **more: Any
    ) -> None:
        interfaces = tuple(NewInterface(network=network, security_groups=security_groups) for network in networks)
        new = NewInstance(name=name, image=IMAGE.name, networks=interfaces, start=start, **more)
        answer = await self.server.instances.create(self.caller, new)
        if start:
            await self.ended(admitted(answer))

    async def first(self, name: str = "web") -> Interface:
        interface = (await self.spec(name)).primary
        assert interface is not None
        return interface

    async def seen(self, name: str = "web") -> Instance:
        return await self.server.instances.describe(self.caller, name)

    async def spec(self, name: str = "web") -> Spec:
        spec = (await self.seen(name)).spec
        assert spec is not None
        return spec

    def holder(self, network: str, address: str) -> str | None:
        return self.server.store.lease_holder(self.networks[network].id, address)


@pytest.fixture
def host() -> SimulatedHost:
    return SimulatedHost()


@pytest.fixture
async def site(tmp_path: Path, host: SimulatedHost) -> AsyncIterator[Site]:
    site = Site(tmp_path / "data", host)
    await site.begin()
    yield site
    await site.crash()


@pytest.mark.parametrize("running", [True, False])
async def test_an_interface_is_attached_to_a_network_with_an_address_of_its_own(
    site: Site, host: SimulatedHost, running: bool
) -> None:
    web = await site.seen()
    if not running:
        await site.carry_out("web", O.STOP)
    ended = await site.carry_out("web", O.ATTACH_INTERFACE, network="dmz", address="10.8.0.20")
    (attached,) = (await site.spec()).interfaces
    expected = ("10.8.0.20", "fd00:8::10")
    assert (attached.network, attached.addresses) == (site.networks["dmz"], expected)
    assert ended.message == (
        f"The interface {attached.id} has the MAC address {attached.mac} and the address 10.8.0.20 "
        "and the address fd00:8::10."
    )
    assert site.holder("dmz", "10.8.0.20") == site.holder("dmz", attached.mac) == web.id
    assert host.guests[web.id].interfaces == ({attached.id: attached} if running else {})
    await site.carry_out("web", O.DETACH_INTERFACE, interface=attached.id)
    assert site.holder("dmz", "10.8.0.20") is site.holder("dmz", attached.mac) is None


async def test_an_address_is_leased_from_the_admission_on_and_given_back_if_the_request_fails(
    site: Site, host: SimulatedHost
) -> None:
    web = await site.seen()
    host.faults.script(web.id, Method.ATTACH_INTERFACE, Slow(2_000))
    host.faults.script(web.id, Method.ATTACH_INTERFACE, Refuses("no port"))
    await site.add("other")
    first = admitted(await site.submit("web", O.ATTACH_INTERFACE, network="dmz"))
    second = admitted(await site.submit("web", O.ATTACH_INTERFACE, network="dmz"))
    assert (first.parameters["address"], second.parameters["address"]) == (
        "10.8.0.2,fd00:8::10",
        "10.8.0.3,fd00:8::11",
    )
    with pytest.raises(InUse, match=r"10\.8\.0\.3 of the network dmz is in use"):
        await site.submit("other", O.ATTACH_INTERFACE, network="dmz", address="10.8.0.3")
    with pytest.raises(InUse, match="in use by 1 VM"):
        await site.server.networks.delete(site.caller, "dmz")
    assert [(await site.ended(one)).status for one in (first, second)] == [Status.SUCCEEDED, Status.FAILED]
    assert (site.holder("dmz", "10.8.0.2"), site.holder("dmz", "10.8.0.3")) == (web.id, None)


async def test_an_address_without_a_network_is_refused(site: Site) -> None:
    with pytest.raises(Invalid, match="address: needs a network"):
        await site.submit("web", O.ATTACH_INTERFACE, address="10.7.0.9")


@pytest.mark.parametrize("running", [True, False])
async def test_an_interface_moves_to_another_network_and_keeps_its_mac_address(
    site: Site, host: SimulatedHost, running: bool
) -> None:
    web, before = await site.seen(), (await site.spec()).primary
    assert before is not None
    if not running:
        await site.carry_out("web", O.STOP)
    ended = await site.carry_out("web", O.MOVE_INTERFACE, interface="primary", network="dmz")
    after = (await site.spec()).primary
    assert after == Interface(
        id="primary",
        mac=before.mac,
        network=site.networks["dmz"],
        addresses=("10.8.0.2", "fd00:8::10"),
        hostname="web",
    )
    assert ended.message == "The interface primary is in the network dmz with the address 10.8.0.2 and fd00:8::10."
    assert (site.holder("lab", "10.7.0.2"), site.holder("dmz", "10.8.0.2")) == (None, web.id)
    if not running:
        await site.carry_out("web", O.START)
    assert host.guests[web.id].spec.primary == after


async def test_the_first_interface_of_a_vm_without_networks_moves_to_one(site: Site, host: SimulatedHost) -> None:
    await site.add("plain")
    assert (await site.spec("plain")).primary is None
    moving = {"interface": "primary", "network": "lan"}
    assert refused(await site.submit("plain", O.MOVE_INTERFACE, **moving)) == "guest_runs"
    await site.carry_out("plain", O.STOP)
    await site.carry_out("plain", O.MOVE_INTERFACE, **moving)
    await site.carry_out("plain", O.START)
    moved, plain = (await site.spec("plain")).primary, await site.seen("plain")
    assert moved is not None
    assert (moved.network, moved.addresses) == (site.networks["lan"], ())
    assert site.holder("lan", moved.mac) == plain.id
    assert host.guests[plain.id].spec.primary == moved


async def test_a_move_that_fails_leaves_the_interface_where_it_was(site: Site, host: SimulatedHost) -> None:
    web, before = await site.seen(), await site.spec()
    host.faults.script(web.id, Method.UPDATE_INTERFACE, Refuses("the bridge br0 does not exist"))
    ended = await site.carry_out("web", O.MOVE_INTERFACE, interface="primary", network="lan")
    assert (ended.status, ended.message) == (Status.FAILED, "the bridge br0 does not exist")
    assert await site.spec() == before
    assert site.holder("lab", "10.7.0.2") == web.id
    await site.server.networks.delete(site.caller, "lan")


async def test_limits_are_set_and_removed(site: Site, host: SimulatedHost) -> None:
    web = await site.seen()
    await site.carry_out("web", O.SET_INTERFACE, interface="primary", inbound_kbit=1000, outbound_kbit=500)
    await site.carry_out("web", O.SET_INTERFACE, interface="primary", outbound_kbit=0)
    first = host.guests[web.id].spec.primary
    assert first is not None
    assert (first.inbound_kbit, first.outbound_kbit) == (1000, None)
    assert first == (await site.spec()).primary


async def test_who_may_connect_is_said_for_each_interface(site: Site, host: SimulatedHost) -> None:
    web = await site.seen()
    for allow, rules in (("tcp 22 from 10.0.0.0/8, icmp", 2), ("udp 53", 1), ("", 0)):
        await site.carry_out("web", O.SET_INTERFACE, interface="primary", allow=allow)
        first = host.guests[web.id].spec.primary
        assert first is not None
        assert first == (await site.spec()).primary
        assert len(first.ingress) == rules
    with pytest.raises(Invalid, match="allow: 'tcp http'"):
        await site.submit("web", O.SET_INTERFACE, interface="primary", allow="tcp http")


async def rules_of(site: Site, host: SimulatedHost, name: str, count: int) -> None:
    """Wait until an interface of a VM has that many rules, in the record and in its guest."""
    seen = await site.seen(name)

    async def there() -> Interface | None:
        first = await site.first(name)
        return first if len(first.ingress) == count else None

    assert await site.server.instances.watch.until(seen.id, there, WAIT_MS), await site.first(name)
    if seen.id in host.guests:
        assert host.guests[seen.id].spec.primary == await site.first(name)


async def test_a_changed_security_group_reaches_the_guests_that_have_it(site: Site, host: SimulatedHost) -> None:
    groups = site.server.networks.security_groups
    await groups.create(site.caller, "web", "tcp 80")
    await groups.create(site.caller, "admin", "tcp 22 from 10.0.0.0/8")
    await site.carry_out("web", O.SET_INTERFACE, interface="primary", security_groups="web, admin", allow="icmp")
    await site.add("stopped", "lab", start=False, security_groups=("web",))
    assert list(map(rule_text, (await site.first()).ingress)) == ["icmp", "tcp 80", "tcp 22 from 10.0.0.0/8"]
    await groups.set(site.caller, "web", "tcp 80, tcp 443")
    await rules_of(site, host, "web", 4)
    await rules_of(site, host, "stopped", 2)
    await site.carry_out("web", O.SET_INTERFACE, interface="primary", allow="")
    await rules_of(site, host, "web", 3)
    await site.carry_out("web", O.SET_INTERFACE, interface="primary", security_groups="")
    assert (await site.first()).ingress == (await site.first()).own_ingress == ()


async def test_a_changed_group_reaches_guests_after_a_crash_and_after_a_refusal(
    site: Site, host: SimulatedHost
) -> None:
    await site.server.networks.security_groups.create(site.caller, "web", "tcp 80")
    await site.carry_out("web", O.SET_INTERFACE, interface="primary", security_groups="web")
    host.faults.script((await site.seen()).id, Method.UPDATE_INTERFACE, Refuses("nft is busy"))
    (group,) = await site.server.store.security_groups.all()
    await site.server.store.security_groups.replace(replace(group, ingress=ingress_of("tcp 80, icmp")))
    await site.crash()
    await site.start()
    await rules_of(site, host, "web", 2)


async def test_a_group_reaches_a_guest_once_its_state_admits_the_change(site: Site, host: SimulatedHost) -> None:
    groups = site.server.networks.security_groups
    await groups.create(site.caller, "web", "tcp 80")
    await site.carry_out("web", O.SET_INTERFACE, interface="primary", security_groups="web")
    await site.carry_out("web", O.SUSPEND)
    await groups.set(site.caller, "web", "tcp 80, icmp")
    await asyncio.sleep(60)
    assert len((await site.first()).ingress) == 1
    asked = [one.operation for one in (await site.server.instances.requests(site.caller, "web", 9, None)).items]
    assert asked == [O.SUSPEND, O.SET_INTERFACE, O.CREATE]
    await site.carry_out("web", O.RESUME)
    await rules_of(site, host, "web", 2)


async def test_a_security_group_in_use_or_asked_for_cannot_be_deleted(site: Site, host: SimulatedHost) -> None:
    groups, web = site.server.networks.security_groups, await site.seen()
    await groups.create(site.caller, "web", "tcp 80")
    host.faults.script(web.id, Method.UPDATE_INTERFACE, Slow(2_000))
    asked = admitted(await site.submit("web", O.SET_INTERFACE, interface="primary", security_groups="web"))
    with pytest.raises(InUse, match="in use by 1 VM"):
        await groups.delete(site.caller, "web")
    await site.ended(asked)
    with pytest.raises(InUse, match="in use by 1 VM"):
        await groups.delete(site.caller, "web")
    await site.carry_out("web", O.DELETE)
    await groups.delete(site.caller, "web")
    await site.add("other", "lab")
    with pytest.raises(NotFound, match="Security group not found"):
        await site.submit("other", O.SET_INTERFACE, interface="primary", security_groups="web")
    with pytest.raises(NotFound, match="Security group not found"):
        await site.add("third", "lab", security_groups=("web",))


@pytest.mark.parametrize("running", [True, False])
async def test_forwards_are_added_and_removed_while_the_guest_runs_or_not(
    site: Site, host: SimulatedHost, running: bool
) -> None:
    await site.add("plain")
    plain = await site.seen("plain")
    if not running:
        await site.carry_out("plain", O.STOP)
    await site.carry_out("plain", O.ADD_FORWARD, host_port=8080, guest_port=80)
    await site.carry_out("plain", O.ADD_FORWARD, host_port=5353, guest_port=53, protocol="udp", host_address="0.0.0.0")
    added = (
        Forward(host_port=8080, guest_port=80),
        Forward(host_port=5353, guest_port=53, protocol="udp", host_address="0.0.0.0"),
    )
    assert (await site.spec("plain")).forwards == added
    assert (await site.spec("plain")).primary is None, "a forward makes no network of its own"
    if running:
        assert host.guests[plain.id].spec.forwards == added
    assert site.server.store.port_user("here", 8080) == plain.id
    await site.carry_out("plain", O.REMOVE_FORWARD, host_port=8080)
    assert (await site.spec("plain")).forwards == added[1:]
    assert site.server.store.port_user("here", 8080) is None


async def test_a_port_of_another_vm_is_refused_and_free_again_when_that_gave_it_back(site: Site) -> None:
    await site.add("one")
    await site.add("two")
    await site.carry_out("one", O.ADD_FORWARD, host_port=8080, guest_port=80)
    with pytest.raises(InUse, match="8080"):
        await site.submit("two", O.ADD_FORWARD, host_port=8080, guest_port=80)
    await site.carry_out("one", O.REMOVE_FORWARD, host_port=8080)
    assert (await site.carry_out("two", O.ADD_FORWARD, host_port=8080, guest_port=80)).status is Status.SUCCEEDED


@pytest.mark.parametrize(
    ("operation", "parameters", "reason"),
    [
        (O.MOVE_INTERFACE, {"interface": "none", "network": "dmz"}, "no_such_interface"),
        (O.MOVE_INTERFACE, {"interface": "primary", "network": "lab"}, "same_network"),
        (O.SET_INTERFACE, {"interface": "none", "inbound_kbit": 9}, "no_such_interface"),
        (O.DETACH_INTERFACE, {"interface": "primary"}, "no_such_interface"),
        (O.REMOVE_FORWARD, {"host_port": 8080}, "not_forwarded"),
    ],
)
async def test_what_cannot_work_is_refused_at_once(
    site: Site, operation: Operation, parameters: dict[str, Any], reason: str
) -> None:
    assert refused(await site.submit("web", operation, **parameters)) == reason


async def test_forwards_and_bridges_exclude_each_other(site: Site) -> None:
    await site.carry_out("web", O.ADD_FORWARD, host_port=8080, guest_port=80)
    assert refused(await site.submit("web", O.ADD_FORWARD, host_port=8080, guest_port=81)) == "already_forwarded"
    moving = {"interface": "primary", "network": "lan"}
    assert refused(await site.submit("web", O.MOVE_INTERFACE, **moving)) == "has_forwards"
    await site.carry_out("web", O.REMOVE_FORWARD, host_port=8080)
    await site.carry_out("web", O.MOVE_INTERFACE, **moving)
    assert refused(await site.submit("web", O.ADD_FORWARD, host_port=8080, guest_port=80)) == "on_bridge"


async def test_a_user_network_has_no_limits(site: Site) -> None:
    await site.add("plain")
    answer = await site.submit("plain", O.SET_INTERFACE, interface="primary", inbound_kbit=9)
    assert refused(answer) == "user_network"


async def test_a_move_is_finished_by_the_next_server(site: Site, host: SimulatedHost) -> None:
    web = await site.seen()
    host.faults.script(web.id, Method.UPDATE_INTERFACE, Slow(5_000))
    moving = admitted(await site.submit("web", O.MOVE_INTERFACE, interface="primary", network="dmz"))
    await site.until_event(web.id, "request.taken")
    await site.crash()
    await site.start()
    assert (await site.ended(moving)).status is Status.SUCCEEDED
    after = await site.spec()
    assert host.guests[web.id].spec.primary == after.primary
    assert site.holder("lab", "10.7.0.2") is None
    assert site.holder("dmz", "10.8.0.2") == web.id
