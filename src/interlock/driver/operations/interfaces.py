"""Attach and detach network interfaces.

The id of an interface is that of the request that attached it, and its default MAC address is derived from that.
"""

from __future__ import annotations

import hashlib

import msgspec

from interlock.core.errors import GuestNotFound, NotFound, OperationRejected
from interlock.core.records import Interface, Request
from interlock.driver.operation_context import Done, OperationContext
from interlock.driver.operations.volumes import detaching_on_timeout, require_releasable, runs_after_start


async def attach(work: OperationContext) -> Done:
    """Hot-plug an interface if a guest runs, and add it to the spec."""
    interface = _wanted(work)
    others = tuple(one for one in work.spec.interfaces if one.id != interface.id)
    if any(one.mac == interface.mac for one in others):
        raise OperationRejected(f"{work.instance.name} already has an interface with the MAC address {interface.mac}.")
    spec = msgspec.structs.replace(work.spec, interfaces=(*others, interface))
    while True:
        looked_at = await work.look()
        if await work.keep_spec(spec, looked_at, guest_has_it=await _plug(work, interface)):
            return Done(message=f"The interface {interface.id} has the MAC address {interface.mac}.")


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


def mac_of(request_id: str) -> str:
    """Return a MAC address in QEMU's range (52:54:00), derived from the request id."""
    tail = hashlib.sha256(request_id.encode()).digest()[:3]
    return "52:54:00:" + tail.hex(":")


def _wanted(work: OperationContext) -> Interface:
    return interface_of(work.request)


def interface_of(request: Request) -> Interface:
    """Return the interface that a request attaches."""
    mac = request.parameters.get("mac")
    return Interface(id=request.id, mac=str(mac).lower() if mac else mac_of(request.id))


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
