"""What plugging a device into a running guest and unplugging it needs, whatever kind of device it is."""

from __future__ import annotations

import asyncio
import contextlib

from interlock.core.errors import NotResponding, NotThere, Refused
from interlock.hypervisors.qemu.command_line import is_port
from interlock.hypervisors.qemu.guest import ENDED_STATES, Guest
from interlock.ports import Permit


async def require_guest(guest: Guest) -> None:
    """Raise `NotThere` if no guest runs in the process."""
    if await guest.look() in ENDED_STATES:
        raise NotThere(f"No guest of instance {guest.instance_id} runs.")


async def places(guest: Guest) -> dict[str, str]:
    """The port in which each device is that is in one, by the device's name. Raises as `Guest.look`.

    Asked of the devices themselves: what `query-pci` shows behind a port is nothing until the firmware has been there,
    which it is once more after every reset.
    """
    found = {}
    for name in await guest.devices():
        if is_port(name):
            continue
        # It may have been let go of a moment ago.
        with contextlib.suppress(Refused):
            bus = str(await guest.ask("qom-get", path=f"/machine/peripheral/{name}", property="parent_bus"))
            port = bus.rpartition("/")[2]
            if is_port(port):
                found[name] = port
    return found


async def free_port(guest: Guest) -> str:
    """The first place for a device in which there is none. Raises `Refused`."""
    taken = set((await places(guest)).values())
    for port in sorted(name for name in await guest.devices() if is_port(name)):
        if port not in taken:
            return port
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
