"""A dump of a guest's memory for a debugger: written by QEMU to a file of ours, beside its target until it is whole.

QEMU stops the guest for it and lets it go on by itself, and cannot be told to stop writing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Final

from interlock.core.errors import NotResponding, NotThere, Refused
from interlock.hypervisors.durable_files import sync_file, sync_folder
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.journal import QemuEvent
from interlock.hypervisors.qemu.launch import refused
from interlock.ports import Permit, Report

_DESCRIPTOR_NAME: Final = "dump"
_PREFERRED: Final = ("kdump-zlib", "elf")
_HELD_FOR_A_DUMP: Final = "save-vm"


async def dump(permit: Permit, guest: Guest, target: Path, report: Report) -> None:
    """Write the dump, unless it is there. Raises as `Hypervisor.dump_memory`."""
    if target.exists():  # noqa: ASYNC240 - one look at a folder of ours
        return
    await _await_earlier(guest)
    part = target.with_name(target.name + ".part")
    with refused(guest.folder):
        permit.check()
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            await _write(permit, guest, descriptor, report)
            await asyncio.to_thread(sync_file, part)
            permit.check()
            part.replace(target)
        finally:
            os.close(descriptor)
            # Whoever superseded us may write one of its own by now, but not under this name: a target is one request's.
            part.unlink(missing_ok=True)
        await asyncio.to_thread(sync_folder, target.parent)


async def _write(permit: Permit, guest: Guest, descriptor: int, report: Report) -> None:
    formats = (await guest.ask("query-dump-guest-memory-capability"))["formats"]
    await guest.tell(permit, "getfd", {"fdname": _DESCRIPTOR_NAME}, attach=descriptor)
    wanted = {
        "paging": False,
        "protocol": f"fd:{_DESCRIPTOR_NAME}",
        "detach": True,
        "format": next(name for name in _PREFERRED if name in formats),
    }
    with guest.events("DUMP_COMPLETED") as told, guest.events("RESUME") as resumed:
        await guest.tell(permit, "dump-guest-memory", wanted)
        loop = asyncio.get_running_loop()
        done, moved_at = -1, loop.time()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(guest.settings.memory_look_interval_ms / 1000):
                    event = await told.get()
                    break
            with contextlib.suppress(NotResponding):
                seen = await guest.ask("query-dump")
                if seen["total"]:
                    report(seen["completed"], seen["total"])
            if (now_at := os.lseek(descriptor, 0, os.SEEK_CUR)) != done:
                done, moved_at = now_at, loop.time()
            elif loop.time() - moved_at > guest.settings.memory_stall_timeout_ms / 1000:
                raise NotResponding(
                    f"QEMU has not gone on with the dump of instance {guest.instance_id} for "
                    f"{guest.settings.memory_stall_timeout_ms} ms.",
                    remedy="Look at the host's storage; the guest stands still until the dump has ended.",
                )
        await _gone_on(guest, resumed)
    if event is None:
        raise NotThere(f"What held instance {guest.instance_id} has ended.")
    result = event.data["result"]
    if event.data.get("error") or result["status"] != "completed":
        raise Refused(
            f"The memory of instance {guest.instance_id} could not be dumped: {event.data.get('error', 'it failed')}.",
            remedy="See that there is room for it.",
        )
    report(result["completed"], result["total"])


async def _await_earlier(guest: Guest) -> None:
    """Wait for a dump whose worker was cancelled or killed: there is one at a time, and it cannot be ended."""
    with guest.events("DUMP_COMPLETED") as told, guest.events("RESUME") as resumed:
        try:
            async with asyncio.timeout(guest.settings.memory_stall_timeout_ms / 1000):
                if (await guest.ask("query-dump"))["status"] == "active":
                    await told.get()
        except TimeoutError:
            raise Refused(
                f"An earlier dump of instance {guest.instance_id} is still being written.",
                remedy="Ask again when it has ended; it cannot be stopped.",
            ) from None
        await _gone_on(guest, resumed)


async def _gone_on(guest: Guest, resumed: asyncio.Queue[QemuEvent | None]) -> None:
    """Wait until QEMU has let the guest go on.

    It tells that a dump is complete a moment before it does. In between it takes no other dump, and what pauses the
    guest would be undone.
    """
    try:
        async with asyncio.timeout(guest.settings.memory_stall_timeout_ms / 1000):
            while (await guest.ask("query-status"))["status"] == _HELD_FOR_A_DUMP and await resumed.get() is not None:
                pass
    except TimeoutError:
        raise NotResponding(
            f"QEMU has dumped the memory of instance {guest.instance_id}, and does not let the guest go on.",
            remedy="Ask for a hard reboot.",
        ) from None
