"""What a store promises of sums: they are what the instances are, also of those that are on their way to the disk."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any, Final

from msgspec.structs import replace

from conformance.store.harness import IMAGE, Bench, admitting, check, creating, ending, putting
from interlock.core.networks import Network, NetworkKind
from interlock.core.operations import Operation
from interlock.core.quotas import place, use_of
from interlock.core.records import Forward, Instance, Interface, Spec
from interlock.core.resource_claims import apart_place, claims_of, leases_of, security_groups_of, shared_place
from interlock.core.restart_policy import Restarts
from interlock.core.states import VmState
from interlock.ports import InstanceFilter, Store, Tally, every_instance

_MIB: Final = 1024**2
_STATES: Final = (VmState.ACTIVE, VmState.STOPPED, VmState.SHELVED_OFFLOADED, VmState.RESIZED, VmState.DELETED)
_PORTS: Final = 40


async def _counted(store: Store) -> dict[Tally, dict[str, int]]:
    """The sums, by looking at every instance."""
    sums: dict[Tally, Counter[str]] = {what: Counter() for what in Tally}
    async for instance in every_instance(store):
        sums[Tally.STATES][instance.vm_state.value] += 1
        sums[Tally.RECORDED][instance.host] += 1
        sums[Tally.IMAGES].update(instance.image_ids)
        sums[Tally.NETWORKS].update({network for network, _ in leases_of(instance)})
        sums[Tally.SECURITY_GROUPS].update(security_groups_of(instance))
        sums[Tally.OUTSTANDING_IN_PROJECT][instance.project] += len(instance.outstanding)
        sums[Tally.OUTSTANDING_ON_HOST][instance.host] += len(instance.outstanding)
        sums[Tally.HELD_IN_PROJECT][instance.project] += len(instance.held)
        used = use_of(instance)
        sums[Tally.IMAGES_IN_PROJECT][instance.project] += used["images"]
        for resource in ("instances", "vcpus", "memory_mib", "disk_mib"):
            sums[Tally.QUOTA][place(resource, instance.project)] += used[resource]
        if instance.spec is not None and instance.spec.shared is not None:
            sums[Tally.SHARED][shared_place(instance.spec.shared)] += 1
        for claim in claims_of(instance):
            sums[Tally.GUESTS][claim.host] += 1
            sums[Tally.MEMORY_MIB][claim.host] += claim.memory_mib
            sums[Tally.VCPUS][claim.host] += claim.vcpus
            sums[Tally.DISK_MIB][claim.host] += -(-claim.disk_bytes // _MIB)
            sums[Tally.APART].update(apart_place(claim.host, group) for group in claim.apart)
    return {what: {of: amount for of, amount in found.items() if amount} for what, found in sums.items()}


async def _ports(store: Store) -> dict[tuple[str, int], str]:
    return {
        (claim.host, port): instance.id
        async for instance in every_instance(store)
        for claim in claims_of(instance)
        for port in claim.ports
    }


async def _agree(store: Store) -> None:
    counted = await _counted(store)
    for what in Tally:
        assert store.tallies(what) == counted[what], what
        assert all(store.tally(what, of) == amount for of, amount in counted[what].items())
        assert store.tally(what, "nowhere") == 0
    taken = await _ports(store)
    hosts = {host for host, _ in taken} | {"h0"}
    for host in hosts:
        for port in range(_PORTS):
            assert store.port_user(host, port) == taken.get((host, port))
    leased = {lease: one.id async for one in every_instance(store) for lease in leases_of(one)}
    for number in range(_PORTS):
        for network in ("n0", "n1"):
            address = f"10.7.0.{number}"
            assert store.lease_holder(network, address) == leased.get((network, address))


def _spec(chance: random.Random, port: int | None = None) -> Spec:
    forwards = () if port is None else (Forward(host_port=port, guest_port=22),)
    primary = None
    if port is not None:
        network = Network(id=f"n{chance.randrange(2)}", name="n", kind=NetworkKind.MANAGED)
        primary = Interface(id="primary", mac=f"mac{port}", network=network, addresses=(f"10.7.0.{port}",))
    image = replace(IMAGE, kind="disk", size_bytes=chance.randrange(1, 1 << 32))
    memory_mib, vcpus, root_gib = chance.choice((64, 100, 2048)), chance.randrange(1, 5), chance.randrange(3)
    return Spec(image=image, memory_mib=memory_mib, vcpus=vcpus, root_gib=root_gib, forwards=forwards, primary=primary)


async def _change(bench: Bench, chance: random.Random, number: int) -> None:
    """One decision of those that change what is promised."""
    instance = await bench.kept(f"i{chance.randrange(10)}")
    wanted: Any
    match chance.randrange(7):
        case 6:
            wanted = putting(apart_from=chance.choice(((), ("db",), ("db", "web"))))
        case 0:
            wanted = putting(vm_state=chance.choice(_STATES))
        case 1:
            wanted = putting(host=f"h{chance.randrange(3)}")
        case 2:
            wanted = putting(spec=_spec(chance, _port(instance)), prior_spec=chance.choice((None, instance.spec)))
        case 3 if not instance.outstanding:
            wanted = _asked(f"r{number}", Operation.RESIZE, {"memory_mib": 4096, "root_gib": 7})
        case 4 if not instance.outstanding:
            wanted = _asked(f"r{number}", Operation.MIGRATE, {"host": f"h{chance.randrange(3)}"})
        case _ if instance.outstanding:
            wanted = ending(instance.outstanding[0].id)
        case _:
            wanted = admitting(f"r{number}")
    await bench.store.change(instance.id, wanted)


def _port(instance: Instance) -> int | None:
    assert instance.spec is not None
    return next((forward.host_port for forward in instance.spec.forwards), None)


def _asked(request_id: str, operation: Operation, parameters: dict[str, Any]) -> Any:
    def decide(instance: Instance, now_ms: int) -> Any:
        change = admitting(request_id, operation)(instance, now_ms)
        request = replace(change.requests[0], parameters=parameters)
        outstanding = (*instance.outstanding, request)
        return replace(change, requests=(request,), instance=replace(change.instance, outstanding=outstanding))

    return decide


@check
async def sums_are_what_the_instances_are_whatever_happens_to_them(bench: Bench) -> None:
    chance = random.Random(7)
    for number in range(10):
        create = creating(f"i{number}", host=f"h{number % 3}")
        spec = _spec(chance, number if number % 2 else None)

        def decide(now_ms: int, create: Any = create, spec: Spec = spec) -> Any:
            change = create(now_ms)
            return replace(change, instance=replace(change.instance, spec=spec))

        await bench.store.create(decide)
    await _agree(bench.store)
    for number in range(120):
        await _change(bench, chance, number)
        if number % 10 == 0:
            await _agree(bench.store)
    await _agree(bench.store)
    await bench.reopen()
    await _agree(bench.store)


@check
async def what_was_decided_counts_before_it_is_durable(bench: Bench) -> None:
    await bench.create("a")
    changing = asyncio.ensure_future(bench.store.change("a", putting(host="h9")))
    while bench.store.tally(Tally.RECORDED, "h9") == 0:
        assert not changing.done()
        await asyncio.sleep(0)
    await changing
    assert bench.store.tally(Tally.RECORDED, "h1") == 0


@check
async def a_decision_that_is_not_kept_counts_for_nothing(bench: Bench) -> None:
    await bench.create("a", vm_state=VmState.STOPPED)

    def refuse(instance: Instance, now_ms: int) -> Any:
        putting(host="h9")(instance, now_ms)
        raise ValueError

    try:
        await bench.store.change("a", refuse)
    except ValueError:
        assert bench.store.tallies(Tally.RECORDED) == {"h1": 1}


@check
async def those_for_which_something_may_be_due_are_found(bench: Bench) -> None:
    due = Restarts(due_at_ms=5)
    await bench.create("stopped", vm_state=VmState.STOPPED)
    await bench.create("resized", vm_state=VmState.RESIZED)
    await bench.create("failed", vm_state=VmState.ERROR)
    await bench.create("restarting", vm_state=VmState.ERROR, restarts=due)
    where = InstanceFilter(upkeep=True)
    assert [one.id async for one in every_instance(bench.store, where)] == ["resized", "restarting"]
    await bench.store.change("resized", putting(vm_state=VmState.ACTIVE))
    await bench.store.change("stopped", putting(restarts=due))
    assert [one.id async for one in every_instance(bench.store, where)] == ["stopped", "restarting"]
