"""Attach and detach network interfaces, as volumes are: what is recorded and what the guest has agree.

An interface has the id of the request that attached it, and a MAC address that follows from that id.
"""

from __future__ import annotations

import hashlib

import msgspec

from interlock.core.errors import NotFound, NotThere, Refused
from interlock.core.records import Interface
from interlock.driver.operations.volumes import runs_after_all
from interlock.driver.work import Done, Work


async def attach(work: Work) -> Done:
    """Plug an interface in if a guest runs, and keep it in the spec for the next start."""
    interface = _wanted(work)
    others = tuple(one for one in work.spec.interfaces if one.id != interface.id)
    if any(one.mac == interface.mac for one in others):
        raise Refused(f"{work.instance.name} has an interface with the address {interface.mac} already.")
    spec = msgspec.structs.replace(work.spec, interfaces=(*others, interface))
    while True:
        looked_at = await work.look()
        if await work.keep_spec(spec, looked_at, guest_has_it=await _plug(work, interface)):
            return Done(message=f"The interface {interface.id} has the address {interface.mac}.")


async def detach(work: Work) -> Done:
    """Unplug an interface if a guest runs, and forget it for the next start."""
    interface_id = str(work.request.parameters["interface"])
    seen = await work.hypervisor.inspect(work.id)
    if interface_id not in {one.id for one in work.spec.interfaces} | set(seen.interfaces):
        if work.taken_up:
            return Done()
        raise NotFound(f"{work.instance.name} has no interface {interface_id}.")
    left = tuple(one for one in work.spec.interfaces if one.id != interface_id)
    spec = msgspec.structs.replace(work.spec, interfaces=left)
    while True:
        looked_at = await work.look()
        if await work.keep_spec(spec, looked_at, guest_has_it=await _unplug(work, interface_id)):
            return Done()


def mac_of(request_id: str) -> str:
    """An address of the range that QEMU's guests use, locally administered; the same for the same request."""
    tail = hashlib.sha256(request_id.encode()).digest()[:3]
    return "52:54:00:" + tail.hex(":")


def _wanted(work: Work) -> Interface:
    mac = work.request.parameters.get("mac")
    return Interface(id=work.request.id, mac=str(mac).lower() if mac else mac_of(work.request.id))


async def _plug(work: Work, interface: Interface) -> bool:
    """Plug it into the guest, if one runs or is about to; whether one did."""
    while True:
        try:
            await work.hypervisor.attach_interface(work.permit, work.id, interface)
        except NotThere:
            if not await runs_after_all(work):
                return False
        else:
            return True


async def _unplug(work: Work, interface_id: str) -> bool:
    while True:
        try:
            await work.hypervisor.detach_interface(work.permit, work.id, interface_id)
        except NotThere:
            if not await runs_after_all(work):
                return False
        else:
            return True
