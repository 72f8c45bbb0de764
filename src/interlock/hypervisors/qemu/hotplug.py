"""What plugging a device into a running guest and unplugging it needs, whatever kind of device it is."""

from __future__ import annotations

import asyncio

from interlock.core.errors import NotResponding, NotThere, Refused
from interlock.hypervisors.qemu.command_line import is_port
from interlock.hypervisors.qemu.guest import ENDED_STATES, Guest
from interlock.ports import Permit


async def require_guest(guest: Guest) -> None:
    """Raise `NotThere` if no guest runs in the process."""
    if await guest.look() in ENDED_STATES:
        raise NotThere(f"No guest of instance {guest.instance_id} runs.")


async def free_port(guest: Guest) -> str:
    """The first place for a device in which there is none. Raises `Refused`."""
    for bus in await guest.ask("query-pci"):
        for bridge in sorted(bus["devices"], key=lambda device: str(device["qdev_id"])):
            if is_port(bridge["qdev_id"]) and not bridge.get("pci_bridge", {}).get("devices"):
                return str(bridge["qdev_id"])
    raise Refused(
        f"The guest of instance {guest.instance_id} has no free place for another disk or interface.",
        remedy="Detach something, or raise hotplug_ports for guests started from then on.",
    )


async def ask_back(guest: Guest, permit: Permit, device: str, what: str) -> None:
    """Have the guest let go of a device that it has.

    Args:
        guest: which has it.
        permit: of the worker that wants it back.
        device: its name.
        what: what it is, for people.

    Raises:
        NotThere: the guest has ended.
        NotResponding: it did not let go in time.
    """
    let_go = guest.expect_let_go(device)
    try:
        try:
            await guest.tell(permit, "device_del", {"id": device})
        except Refused:
            # It was asked back before and is still in use, or the guest let go of it a moment ago.
            if device not in await guest.devices():
                return
        async with asyncio.timeout(guest.settings.detach_timeout_ms / 1000):
            gone = await let_go
    except TimeoutError:
        gone = False
    finally:
        let_go.cancel()
    if guest.process.ended.is_set():
        raise NotThere(f"The guest of instance {guest.instance_id} has ended.")
    if not gone and device in await guest.devices():
        raise NotResponding(
            f"The guest of instance {guest.instance_id} did not let go of {what}.",
            remedy="Have the guest stop using it and ask again; it is detached in any case when the guest is reset or "
            "ends.",
        )
