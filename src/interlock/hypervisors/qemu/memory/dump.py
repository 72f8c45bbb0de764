"""Dump of a guest's memory for a debugger: written by QEMU to a draft, which is renamed when it is complete.

QEMU pauses the guest meanwhile and resumes it by itself; a dump cannot be cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Final

from interlock.core.errors import NotResponding, OperationRejected
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.qmp.waiters import EventSubscription
from interlock.hypervisors.qemu.stall_timeout import StallTimeout
from interlock.images.atomic_files import sync_file, sync_folder
from interlock.ports import Permit, Report

_DESCRIPTOR_NAME: Final = "dump"
_PREFERRED: Final = ("kdump-zlib", "elf")
_DUMP_STATUS: Final = "save-vm"


async def dump(permit: Permit, guest: Guest, target: Path, report: Report) -> None:
    """Write the dump, unless it exists. Raises as `Hypervisor.dump_memory`."""
    if target.exists():  # noqa: ASYNC240 - one look at a local folder
        return
    await _await_earlier(guest)
    part = target.with_name(target.name + ".part")
    with guest.folder.os_errors_rejected():
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
            # A worker that superseded this one has another target: each request has its own.
            part.unlink(missing_ok=True)
        await asyncio.to_thread(sync_folder, target.parent)


async def _write(permit: Permit, guest: Guest, descriptor: int, report: Report) -> None:
    formats = (await guest.query("query-dump-guest-memory-capability"))["formats"]
    await guest.execute(permit, "getfd", {"fdname": _DESCRIPTOR_NAME}, attach=descriptor)
    wanted = {
        "paging": False,
        "protocol": f"fd:{_DESCRIPTOR_NAME}",
        "detach": True,
        "format": next(name for name in _PREFERRED if name in formats),
    }
    with guest.events("DUMP_COMPLETED") as completed, guest.events("RESUME") as resumed:
        await guest.execute(permit, "dump-guest-memory", wanted)
        stall = StallTimeout(
            guest.settings.memory_stall_timeout_ms,
            NotResponding(
                f"The dump of VM {guest.instance_id} made no progress for {guest.settings.memory_stall_timeout_ms} ms.",
                remedy="Check the host's storage; the VM is paused until the dump has ended.",
            ),
        )
        while (event := await completed.next_within(guest.settings.memory_look_interval_ms)) is None:
            with contextlib.suppress(NotResponding):
                seen = await guest.query("query-dump")
                if seen["total"]:
                    report(seen["completed"], seen["total"])
            stall.note(os.lseek(descriptor, 0, os.SEEK_CUR))
        await _wait_resumed(guest, resumed)
    result = event.data["result"]
    if event.data.get("error") or result["status"] != "completed":
        raise OperationRejected(
            f"The memory of VM {guest.instance_id} could not be dumped: {event.data.get('error', 'it failed')}.",
            remedy="Make room for it.",
        )
    report(result["completed"], result["total"])


async def _await_earlier(guest: Guest) -> None:
    """Wait for a dump whose worker was cancelled or killed: QEMU writes one at a time."""
    with guest.events("DUMP_COMPLETED") as completed, guest.events("RESUME") as resumed:
        try:
            async with asyncio.timeout(guest.settings.memory_stall_timeout_ms / 1000):
                if (await guest.query("query-dump"))["status"] == "active":
                    await completed.next()
        except TimeoutError:
            raise OperationRejected(
                f"An earlier dump of VM {guest.instance_id} is still being written.",
                remedy="Try again when it has ended; it cannot be cancelled.",
            ) from None
        await _wait_resumed(guest, resumed)


async def _wait_resumed(guest: Guest, resumed: EventSubscription) -> None:
    """Wait until QEMU has resumed the guest.

    It reports a dump as complete a moment before that. In between it accepts no other dump, and would undo a pause.
    """
    try:
        async with asyncio.timeout(guest.settings.memory_stall_timeout_ms / 1000):
            while (await guest.query("query-status"))["status"] == _DUMP_STATUS:
                await resumed.next()
    except TimeoutError:
        raise NotResponding(
            f"QEMU has dumped the memory of VM {guest.instance_id}, and does not resume it.",
            remedy="Reboot the VM hard.",
        ) from None
