"""Attach, detach, move and limit network interfaces, and forward ports to the first one.

The id of an interface is that of the request that attached it, and its default MAC address is derived from that.
"""

from __future__ import annotations

from typing import Any

import msgspec

from interlock.core.errors import GuestNotFound, NotFound, OperationRejected
from interlock.core.networks import IngressRule, Network, hostname_in, ingress_of, mac_of
from interlock.core.parameters import group_names
from interlock.core.records import Forward, Interface, Request
from interlock.core.specs import PRIMARY, with_groups
from interlock.driver.operation_context import Done, OperationContext
from interlock.driver.operations.volumes import detaching_on_timeout, require_releasable, runs_after_start
from interlock.ports import Store


async def attach(work: OperationContext) -> Done:
    """Hot-plug an interface if a guest runs, and add it to the spec."""
    interface = await interface_of(work.store, work.request)
    if interface.network is not None:
        named = hostname_in(interface.network, work.instance.name, work.instance.project)
        interface = msgspec.structs.replace(interface, hostname=named)
    others = tuple(one for one in work.spec.interfaces if one.id != interface.id)
    if any(one.mac == interface.mac for one in others):
        raise OperationRejected(f"{work.instance.name} already has an interface with the MAC address {interface.mac}.")
    spec = msgspec.structs.replace(work.spec, interfaces=(*others, interface))
    while True:
        looked_at = await work.look()
        if await work.keep_spec(spec, looked_at, guest_has_it=await _plug(work, interface)):
            leased = "".join(f" and the address {address}" for address in interface.addresses)
            return Done(message=f"The interface {interface.id} has the MAC address {interface.mac}{leased}.")


async def detach(work: OperationContext) -> Done:
    """Unplug an interface if a guest runs, and remove it from the spec."""
    interface_id = str(work.request.parameters["interface"])
    seen = await work.hypervisor.inspect(work.id)
    if interface_id not in {one.id for one in work.spec.interfaces} | set(seen.interfaces):
        if work.taken_up:
            return Done()
        raise NotFound(f"{work.instance.name} has no interface {interface_id}.")
    await require_releasable(work, interface_id, f"the interface {interface_id}")
    left = tuple(one for one in work.spec.interfaces if one.id != interface_id)
    spec = msgspec.structs.replace(work.spec, interfaces=left)
    while True:
        looked_at = await work.look()
        if await work.keep_spec(spec, looked_at, guest_has_it=await _unplug(work, interface_id)):
            return Done()


async def move(work: OperationContext) -> Done:
    """Connect an interface to another network, with the addresses that the request leased."""
    addresses = _addresses(work.request)
    network = await _network(work.store, work.request)
    named = hostname_in(network, work.instance.name, work.instance.project)
    moved = msgspec.structs.replace(_present(work), network=network, addresses=addresses, hostname=named)
    await _update(work, with_groups(moved, await _rules(work)))
    where = f" with the address {' and '.join(addresses)}" if addresses else ""
    return Done(message=f"The interface {moved.id} is in the network {network.name}{where}.")


async def set_limits(work: OperationContext) -> Done:
    """Change the limits of an interface, of which 0 removes one, and the rules on who may connect to it."""
    given = work.request.parameters
    changes: dict[str, Any] = {name: given[name] or None for name in ("inbound_kbit", "outbound_kbit") if name in given}
    own = ingress_of(given["allow"]) if "allow" in given else None
    groups = group_names(given["security_groups"]) if "security_groups" in given else None
    limited = msgspec.structs.replace(_present(work), **changes)
    await _update(work, with_groups(limited, await _rules(work), own=own, groups=groups))
    return Done()


async def add_forward(work: OperationContext) -> Done:
    """Forward another port of the host."""
    new = msgspec.convert(work.request.parameters, Forward)
    others = tuple(one for one in work.spec.forwards if one.host_port != new.host_port)
    await _update(work, _first(work), (*others, new))
    return Done()


async def remove_forward(work: OperationContext) -> Done:
    """End the forward of a port of the host."""
    host_port = work.request.parameters["host_port"]
    await _update(work, _first(work), tuple(one for one in work.spec.forwards if one.host_port != host_port))
    return Done()


def _first(work: OperationContext) -> Interface:
    return work.spec.primary or Interface(id=PRIMARY, mac=mac_of(work.id))


def _present(work: OperationContext) -> Interface:
    """Return the interface that the request names. Raises `NotFound`."""
    wanted = work.request.parameters["interface"]
    for one in (_first(work), *work.spec.interfaces):
        if one.id == wanted:
            return one
    raise NotFound(f"{work.instance.name} has no interface {wanted}.")


async def _update(work: OperationContext, interface: Interface, forwards: tuple[Forward, ...] | None = None) -> None:
    """Bring a running guest's interface to what it says, and record it."""
    kept = work.spec.forwards if forwards is None else forwards
    if interface.id != PRIMARY:
        others = tuple(interface if one.id == interface.id else one for one in work.spec.interfaces)
        spec = msgspec.structs.replace(work.spec, interfaces=others)
    elif forwards is None or work.spec.primary is not None:
        spec = msgspec.structs.replace(work.spec, primary=interface, forwards=kept)
    else:
        spec = msgspec.structs.replace(work.spec, forwards=kept)
    while True:
        looked_at = await work.look()
        if await work.keep_spec(spec, looked_at, guest_has_it=await _bring(work, interface, kept)):
            return


async def _bring(work: OperationContext, interface: Interface, forwards: tuple[Forward, ...]) -> bool:
    """Update it if a guest runs or is being started; return whether one did."""
    while True:
        try:
            await work.hypervisor.update_interface(work.permit, work.id, interface, forwards)
        except GuestNotFound:
            if not await runs_after_start(work):
                return False
        else:
            return True


async def interface_of(store: Store, request: Request) -> Interface:
    """Return the interface that a request attaches. Raises `NotFound` if its network was deleted."""
    mac = request.parameters.get("mac")
    network = await _network(store, request) if request.parameters.get("network") else None
    return Interface(
        id=request.id,
        mac=str(mac).lower() if mac else mac_of(request.id),
        network=network,
        addresses=_addresses(request),
    )


async def _rules(work: OperationContext) -> dict[str, tuple[IngressRule, ...]]:
    """Return the rules of the security groups of the instance's project, by name."""
    found = await work.store.security_groups.all()
    return {one.name: one.ingress for one in found if one.project == work.instance.project}


def _addresses(request: Request) -> tuple[str, ...]:
    return tuple(filter(None, request.parameters.get("address", "").split(",")))


async def _network(store: Store, request: Request) -> Network:
    """Return the network of a request. It cannot be deleted before the request ends."""
    wanted = request.parameters["network"]
    for network in await store.networks.all():
        if network.id == wanted:
            return network
    raise NotFound(f"The network {wanted} was deleted.")


async def _plug(work: OperationContext, interface: Interface) -> bool:
    """Hot-plug it if a guest runs or is being started; return whether one did."""
    while True:
        try:
            await work.hypervisor.attach_interface(work.permit, work.id, interface)
        except GuestNotFound:
            if not await runs_after_start(work):
                return False
        else:
            return True


async def _unplug(work: OperationContext, interface_id: str) -> bool:
    while True:
        try:
            async with detaching_on_timeout(work, interface_id):
                await work.hypervisor.detach_interface(work.permit, work.id, interface_id)
        except GuestNotFound:
            if not await runs_after_start(work):
                return False
        else:
            return True
