"""Networks as a resource, and the addresses that instances lease of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from in_process.embedded import IMAGE, Embedded
from interlock.core.errors import Forbidden, InsufficientCapacity, InUse, Invalid, NotFound, QuotaExceeded
from interlock.core.networks import Network, NetworkKind
from interlock.core.operations import Operation
from interlock.core.quotas import Quota
from interlock.core.records import Instance
from interlock.core.roles import Role
from interlock.hypervisors.simulated import SimulatedHost
from interlock.service.auth import Caller
from interlock.service.request_models import NewForward, NewInstance, NewInterface, NewNetwork, NewSubnet

pytestmark = pytest.mark.virtual_time

O = Operation  # noqa: E741
ANN = Caller(token_id="ann", name="ann", role=Role.MEMBER, project="research")


class Site(Embedded):
    """A server with a managed network `lab` of six addresses, one of them the gateway's."""

    lab: Network

    async def network(self, name: str, subnet: str = "", *, caller: Caller | None = None, **fields: Any) -> Network:
        subnets = (NewSubnet(prefix=subnet),) if subnet else ()
        return await self.server.networks.create(
            caller or self.caller, NewNetwork(name=name, subnets=subnets, **fields)
        )

    async def make(self, name: str, *networks: NewInterface, caller: Caller | None = None, **fields: Any) -> Instance:
        new = NewInstance(name=name, image=IMAGE.name, networks=networks, **{"start": False, **fields})
        return (await self.server.instances.create(caller or self.caller, new)).instance

    def holder(self, address: str) -> str | None:
        return self.server.store.lease_holder(self.lab.id, address)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path / "data", SimulatedHost())
    await site.start()
    await site.server.projects.create(site.caller, "research", Quota())
    site.lab = await site.network("lab", "10.7.0.0/29")
    yield site
    await site.crash()


LAB = NewInterface(network="lab")


def first(instance: Instance) -> tuple[str, ...]:
    assert instance.spec is not None
    assert instance.spec.primary is not None
    return instance.spec.primary.addresses


async def test_a_new_instance_has_its_network_and_an_address_of_it_from_its_first_moment(site: Site) -> None:
    made = await site.make("web", LAB, replace(LAB, addresses=("10.7.0.6",), mac="52:54:00:AA:BB:CC"))
    spec = made.spec
    assert spec is not None
    assert spec.primary is not None
    assert (spec.primary.id, spec.primary.network, spec.primary.addresses) == ("primary", site.lab, ("10.7.0.2",))
    assert [(one.mac, one.addresses) for one in spec.interfaces] == [("52:54:00:aa:bb:cc", ("10.7.0.6",))]
    assert site.holder("10.7.0.2") == site.holder("10.7.0.6") == site.holder(spec.primary.mac) == made.id
    assert (await site.make("plain")).spec.primary is None  # type: ignore[union-attr]


async def test_cloud_init_is_told_of_each_interface_unless_the_caller_says_how(site: Site) -> None:
    both = (LAB, LAB)
    made = await site.make("web", *both)
    assert made.spec is not None
    assert made.spec.seed is not None
    told = json.loads(made.spec.seed.network_config or "")
    assert (made.spec.seed.hostname, told["version"]) == ("web", 2)
    assert [one["match"]["macaddress"] for one in told["ethernets"].values()] == [
        one.mac for one in made.spec.all_interfaces
    ]
    assert [(one["dhcp4"], one.get("optional", False)) for one in told["ethernets"].values()] == [
        (True, False),
        (True, True),
    ]
    one = await site.make("one", LAB)
    assert one.spec is not None
    assert one.spec.seed is None, "cloud-init asks for the address of the first interface by itself"
    own = await site.make("own", LAB, network_config="version: 1")
    assert own.spec is not None
    assert own.spec.seed is not None
    assert own.spec.seed.network_config == "version: 1"


async def test_of_many_who_ask_at_once_each_gets_an_address_of_its_own_until_none_is_left(site: Site) -> None:
    answers = await asyncio.gather(*(site.make(f"vm{number}", LAB) for number in range(7)), return_exceptions=True)
    got = [first(one) for one in answers if isinstance(one, Instance)]
    assert sorted(got) == [(f"10.7.0.{number}",) for number in range(2, 7)]
    assert [type(one) for one in answers if not isinstance(one, Instance)] == [InsufficientCapacity] * 2


async def test_an_instance_keeps_its_address_over_a_restart_of_the_server_and_loses_it_when_it_is_deleted(
    site: Site,
) -> None:
    made = await site.make("web", replace(LAB, addresses=("10.7.0.5",)), start=True)
    await site.ended(made.outstanding[0])
    for operation in (O.STOP, O.START):
        await site.carry_out("web", operation)
    await site.crash()
    await site.start()
    assert site.holder("10.7.0.5") == made.id
    assert first(await site.make("other", LAB)) == ("10.7.0.2",)
    await site.carry_out("web", O.DELETE)
    assert site.holder("10.7.0.5") is None
    assert first(await site.make("third", replace(LAB, addresses=("10.7.0.5",)))) == ("10.7.0.5",)


async def test_an_address_or_mac_address_in_use_is_refused(site: Site) -> None:
    one = await site.make("one", LAB)
    with pytest.raises(InUse, match=r"10\.7\.0\.2 of the network lab is in use"):
        await site.make("two", replace(LAB, addresses=("10.7.0.2",)))
    assert one.spec is not None
    assert one.spec.primary is not None
    with pytest.raises(InUse, match="MAC address"):
        await site.make("two", replace(LAB, mac=one.spec.primary.mac))
    with pytest.raises(Invalid, match="cannot be leased"):
        await site.make("two", replace(LAB, addresses=("10.8.0.2",)))
    with pytest.raises(InUse):
        await site.make("two", replace(LAB, addresses=("10.7.0.3",)), replace(LAB, addresses=("10.7.0.3",)))


async def test_a_network_is_deleted_only_when_no_instance_uses_it(site: Site) -> None:
    await site.make("web", LAB)
    with pytest.raises(InUse, match="in use by 1 VM"):
        await site.server.networks.delete(site.caller, "lab")
    await site.carry_out("web", O.DELETE)
    await site.server.networks.delete(site.caller, "lab")
    with pytest.raises(NotFound):
        await site.make("web", LAB)
    assert await site.server.store.networks.all() == ()


async def test_a_network_and_an_instance_in_it_are_never_committed_past_each_other(site: Site) -> None:
    for _ in range(5):
        made, deleted = await asyncio.gather(
            site.make("web", LAB), site.server.networks.delete(site.caller, "lab"), return_exceptions=True
        )
        assert isinstance(made, NotFound) or isinstance(deleted, InUse)
        if isinstance(made, Instance):
            await site.carry_out("web", O.DELETE)
        else:
            site.lab = await site.network("lab", "10.7.0.0/29")


async def test_networks_of_other_projects_are_out_of_sight_and_shared_ones_are_for_all(site: Site) -> None:
    shared = await site.network("shared", shared=True)
    own = await site.network("lab", caller=ANN)
    assert {one.id for one in site.server.networks.list(ANN)} == {shared.id, own.id}
    assert site.server.networks.find(ANN, "lab") == own
    with pytest.raises(NotFound):
        site.server.networks.find(ANN, site.lab.id)
    made = await site.make("web", NewInterface(network="shared"), caller=ANN)
    assert site.server.store.lease_holder(shared.id, first(made)[0]) == made.id


async def test_what_touches_the_hosts_or_all_projects_is_for_admins(site: Site) -> None:
    with pytest.raises(Forbidden):
        await site.network("x", caller=ANN, shared=True)
    with pytest.raises(Forbidden):
        await site.network("x", caller=ANN, kind=NetworkKind.BRIDGE, bridge="br0")
    await site.network("shared", shared=True)
    with pytest.raises(Forbidden):
        await site.server.networks.delete(ANN, "shared")


async def test_overlapping_subnets_are_refused_and_the_networks_of_others_are_not_named(site: Site) -> None:
    with pytest.raises(Invalid, match=r"overlaps the network lab\."):
        await site.network("two", "10.7.0.0/24")
    with pytest.raises(Invalid, match=r"overlaps another network\."):
        await site.network("two", "10.7.0.0/24", caller=ANN)
    chosen = [(await site.network(f"n{number}")).subnets[0].prefix for number in range(3)]
    assert len(set(chosen)) == 3


async def test_networks_count_against_the_quota_of_their_project(site: Site) -> None:
    await site.server.projects.limit(site.caller, "research", {"networks": 1})
    await site.network("one", caller=ANN)
    with pytest.raises(QuotaExceeded, match="1 of 1 networks are used"):
        await site.network("two", caller=ANN)
    with pytest.raises(InUse, match="1 network"):
        await site.server.projects.delete(site.caller, "research")
    await site.server.networks.delete(ANN, "one")
    await site.network("two", caller=ANN)


async def test_forwards_to_a_guest_on_a_bridge_are_refused(site: Site) -> None:
    await site.network("lan", kind=NetworkKind.BRIDGE, bridge="br0")
    forwards = (NewForward(host_port=8080, guest_port=80),)
    with pytest.raises(Invalid, match="kind bridge, which has none"):
        await site.make("web", NewInterface(network="lan"), forwards=forwards)
