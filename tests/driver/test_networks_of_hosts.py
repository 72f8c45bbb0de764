"""Which host an instance with networks is put on, and where it may go."""

from __future__ import annotations

from typing import Any

import pytest

from in_process.embedded import refused
from in_process.three_hosts import Street
from interlock.core.errors import Invalid
from interlock.core.networks import NetworkKind
from interlock.core.operations import Operation
from interlock.core.records import Instance
from interlock.ports.hosts import NetworkAbility
from interlock.service.request_models import NewNetwork

O = Operation  # noqa: E741
LAB: dict[str, Any] = {"networks": [{"network": "lab"}]}
MANAGED = NetworkAbility(kind=NetworkKind.MANAGED, available=True)
WITHOUT = NetworkAbility(kind=NetworkKind.MANAGED, available=False, detail="dnsmasq is not installed")


async def connect_anew(street: Street, **networks: tuple[NetworkAbility, ...]) -> None:
    for name, abilities in networks.items():
        other = getattr(street, name)
        other.networks = abilities
        await other.disconnect()
        await other.connect(street.house)
    await street.house.server.networks.create(street.house.caller, NewNetwork(name="lab"))


async def seen(street: Street, reference: str) -> Instance:
    return await street.house.server.instances.describe(street.house.caller, reference)


async def test_any_takes_a_host_that_has_the_networks_of_the_instance(street: Street) -> None:
    await connect_anew(street, north=(WITHOUT,), south=(MANAGED,))
    for number in range(3):
        await street.create(f"plain{number}", host="here")
    await street.create("web", host="any", **LAB)
    assert (await seen(street, "web")).host == "south"


async def test_a_host_without_the_network_is_refused_with_what_is_missing(street: Street) -> None:
    await connect_anew(street, north=(WITHOUT,))
    for host, said in (("north", "kind managed: dnsmasq is not installed."), ("south", "kind managed.")):
        with pytest.raises(Invalid, match=said) as refusal:
            await street.create("web", host=host, **LAB)
        assert f"The host {host} has no networks of the" in refusal.value.message
    await street.create("plain", host="north")


async def test_a_migration_to_a_host_without_the_network_is_refused(street: Street) -> None:
    await connect_anew(street, north=(WITHOUT,), south=(MANAGED,))
    vm = await street.create("web", **LAB)
    before = await seen(street, vm)
    assert refused(await street.house.submit(vm, O.MIGRATE, host="north")) == "host_lacks_network"
    moved = await street.house.carry_out(vm, O.MIGRATE, host="any")
    after = await seen(street, vm)
    assert (moved.status.value, after.host) == ("succeeded", "south")
    assert (before.spec is not None, after.spec and after.spec.primary) == (True, before.spec and before.spec.primary)


async def test_an_agent_of_an_earlier_version_gets_no_instance_with_networks(street: Street) -> None:
    await connect_anew(street)
    vm = await street.create("web", **LAB)
    for host in ("north", "south"):
        assert refused(await street.house.submit(vm, O.MIGRATE, host=host)) == "host_lacks_network"
    assert refused(await street.house.submit(vm, O.MIGRATE, host="any")) == "no_other_host"
