"""Saves a guest's memory to a file and restores it. The files themselves are in `saved_memory`.

The guest is paused before its memory is written: then nothing is written twice, and under `tcg` the memory of a running
guest may be copied inconsistently. QEMU writes to, and reads from, a descriptor that it is given.

Saving, and what is found after a crash (`saving` is in the process record):

    crash after             finds                            save again               otherwise
    -                       the guest as it was              all of it
    `saving` recorded       the guest as it was              all of it                unpause: it runs
    stop                    it is paused                     all of it                unpause: it runs
    migrate                 it is paused, memory.part,       cancels that, all of it  unpause: cancels that,
                            QEMU is writing                                           removes the files, it runs
    all is written          `postmigrate`, memory.part       continues here           unpause: as above
    rename: memory.saved    `postmigrate`, memory.saved      ends the process         unpause: as above;
                                                                                      restore: ends the process first
    the process ended       memory.saved                     nothing                  restore; or it is discarded

Restoring; the phase is `starting` until QEMU reports that vCPUs run, which it does before they do:

    crash after             finds                            restore again            power_off
    process started         starting, memory.saved           ends it, all of it       ends it
    memory read             starting, memory.saved           ends it, all of it       ends it
    rename: memory.used     starting, memory.used            lets it run              ends it, renames back
    cont                    running, memory.used             removes the file         ends it
    file removed            running                          nothing                  ends it
    rename, and QEMU dies   no process, memory.used          not found: may have run  nothing

The last line loses a memory that perhaps never ran: server and QEMU crashed between two consecutive steps, and then it
cannot be known. It is the one choice that cannot corrupt a disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from interlock.core.errors import Fenced, GuestNotFound, HypervisorError, NotResponding, OperationRejected
from interlock.core.records import Spec
from interlock.core.states import PowerState
from interlock.hypervisors.qemu.command_line import Machine, device_name, disk_of_device, machine_of
from interlock.hypervisors.qemu.files.instance_folder import Phase, Saving
from interlock.hypervisors.qemu.guest import Guest, no_guest
from interlock.hypervisors.qemu.launch import Launcher
from interlock.hypervisors.qemu.memory.dump import dump
from interlock.hypervisors.qemu.memory.saved_memory import MemoryOrigin, SavedMemory
from interlock.hypervisors.qemu.process_registry import ProcessRegistry
from interlock.hypervisors.qemu.qmp.waiters import EventSubscription
from interlock.hypervisors.qemu.stall_timeout import StallTimeout
from interlock.images.atomic_files import sync_file
from interlock.ports import Permit, Report

_DESCRIPTOR_NAME: Final = "memory"
MIGRATION_ENDED: Final = frozenset({"none", "completed", "failed", "cancelled"})
"""The statuses of QEMU's `query-migrate` in which it moves no memory."""
BYTES_PER_S_MAX: Final = 1 << 40
"""A bandwidth that limits nothing. QEMU's default of 128 MiB/s is for networks."""


class GuestMemory:
    """Memory of guests: saved, restored, discarded, dumped. See `ports.Hypervisor` for the methods."""

    def __init__(self, registry: ProcessRegistry, launcher: Launcher) -> None:
        self._registry = registry
        self._launcher = launcher

    def _files(self, instance_id: str) -> SavedMemory:
        return SavedMemory(self._registry.folder(instance_id))

    async def save_memory(self, permit: Permit, instance_id: str, report: Report) -> None:
        files, guest = self._files(instance_id), self._registry.find(instance_id)
        if guest is not None:
            await _save(permit, guest, files, report)
        elif not files.saved.exists():
            raise no_guest(instance_id)

    async def restore_memory(self, permit: Permit, instance_id: str, spec: Spec, report: Report) -> None:
        files, guest = self._files(instance_id), self._registry.find(instance_id)
        if guest is not None and (guest.phase is Phase.ENDING or files.saved.exists()):
            await guest.kill(permit)
            guest = None
        if guest is not None:
            return await _run_restored(permit, guest, files)
        machine = files.machine_for(instance_id, spec)
        try:
            guest = await self._launcher.start(permit, instance_id, spec, machine)
            await _read(permit, guest, files, report)
            await _run_restored(permit, guest, files)
        except BaseException:
            with contextlib.suppress(HypervisorError, Fenced):
                if (guest := self._registry.find(instance_id)) is not None:
                    await end_process(permit, guest)
            raise

    async def forget_memory(self, permit: Permit, instance_id: str) -> None:
        files, guest = self._files(instance_id), self._registry.find(instance_id)
        if guest is not None and guest.phase is Phase.STARTING and files.any():
            await guest.kill(permit)
        with files.folder.os_errors_rejected():
            await files.remove(permit)

    async def dump_memory(self, permit: Permit, instance_id: str, target: Path, report: Report) -> None:
        await dump(permit, self._registry.require(instance_id), target, report)


async def end_process(permit: Permit, guest: Guest) -> None:
    """End the process of a guest; a memory that it was about to run from, and did not, is saved again."""
    await guest.kill(permit)
    with guest.folder.os_errors_rejected():
        await SavedMemory(guest.folder).mark_unused(permit, guest)


# ------------------------------------------------------------------------------------------------------------ saving


async def _save(permit: Permit, guest: Guest, files: SavedMemory, report: Report) -> None:
    """Save the memory of a guest and end its process. Raises as `Hypervisor.save_memory`."""
    if files.saved.exists():
        # It is complete, and nothing has run since: only the end of the process is left.
        await guest.kill(permit)
        return
    state = await guest.require_running()
    before = guest.saving or (Saving.RAN if state is PowerState.RUNNING else Saving.STOOD_STILL)
    try:
        with guest.folder.os_errors_rejected():
            await _pause_and_write(permit, guest, files, before, report)
            await asyncio.to_thread(sync_file, files.part)
            guest.require_process()
            permit.check()
            # From here on its end is requested, and no event.
            guest.record_phase(Phase.ENDING)
            await files.commit(permit)
    except BaseException:
        with contextlib.suppress(HypervisorError, Fenced, OSError):
            await _resume(permit, guest, files, before)
        raise
    await guest.kill(permit)


async def _pause_and_write(permit: Permit, guest: Guest, files: SavedMemory, before: Saving, report: Report) -> None:
    status = (await guest.query("query-status"))["status"]
    if status == "postmigrate" and files.part.exists():
        return  # an earlier worker's write has completed: the file is that of the last migration
    await cancel_migration(permit, guest)
    if status == "postmigrate":
        # QEMU can write the memory again only after the vCPUs have run, for however short a time.
        await guest.execute(permit, "cont")
    permit.check()
    guest.record_saving(before)
    await guest.execute(permit, "stop")
    spec = guest.folder.spec()
    if spec is None:
        raise OperationRejected(f"The spec that VM {guest.instance_id} was started with is missing.")
    files.write_origin(permit, MemoryOrigin(spec=spec, machine=await machine_of_guest(guest)))
    descriptor = files.new_part(permit)
    try:
        await _write(permit, guest, descriptor, report)
    finally:
        os.close(descriptor)


async def machine_of_guest(guest: Guest) -> Machine:
    """Return the machine that the guest's memory belongs to: QEMU identifies each device by its port."""
    ports = await guest.device_ports()
    # A device keeps its name when its disk is swapped; in a new machine it is named after the new disk.
    disks = await guest.disk_devices()
    found = {name: port for name, port in ports.items() if disk_of_device(name) is None}
    found |= {device_name(disk_id): ports[name] for disk_id, name in disks.items()}
    kind = await guest.query("qom-get", path="/machine", property="type")
    created = guest.folder.machine() or machine_of(guest.settings, guest.folder.spec())
    return msgspec.structs.replace(created, kind=str(kind).removesuffix("-machine"), ports=found)


async def _write(permit: Permit, guest: Guest, descriptor: int, report: Report) -> None:
    async def report_progress() -> None:
        memory = (await guest.query("query-migrate")).get("ram")
        if memory is not None:
            report(memory["total"] - memory["remaining"], memory["total"])

    await _prepare(permit, guest, descriptor)
    with guest.events("MIGRATION") as events:
        await guest.execute(permit, "migrate", {"uri": f"fd:{_DESCRIPTOR_NAME}"})
        status = await _follow(guest, events, descriptor, report_progress)
    if status != "completed":
        why = (await guest.query("query-migrate")).get("error-desc", status)
        raise OperationRejected(
            f"The memory of VM {guest.instance_id} could not be written: {why}.",
            remedy=f"Make room for it on the file system of {guest.folder.path}.",
        )
    await report_progress()


async def _prepare(permit: Permit, guest: Guest, descriptor: int) -> None:
    """Enable migration events, lift the bandwidth limit, and hand the file to QEMU."""
    await guest.execute(permit, "migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
    await guest.execute(permit, "migrate-set-parameters", {"max-bandwidth": BYTES_PER_S_MAX})
    await guest.execute(permit, "getfd", {"fdname": _DESCRIPTOR_NAME}, attach=descriptor)


async def _follow(
    guest: Guest, events: EventSubscription, descriptor: int, report_progress: Callable[[], Awaitable[None]]
) -> str:
    """Return the final status that QEMU reports. Progress is measured by the shared position in the file.

    Raises:
        NotResponding: it made no progress for too long.
        GuestNotFound: the process ended.
    """
    stall = StallTimeout(
        guest.settings.memory_stall_timeout_ms,
        NotResponding(
            f"QEMU has not moved the memory of VM {guest.instance_id} for {guest.settings.memory_stall_timeout_ms} ms.",
            remedy="Check the host's storage, or raise memory_stall_timeout_ms.",
        ),
    )
    while True:
        event = await events.next_within(guest.settings.memory_look_interval_ms)
        if event is None:
            with contextlib.suppress(NotResponding):
                # It may be too busy with the migration to respond.
                await report_progress()
            stall.note(os.lseek(descriptor, 0, os.SEEK_CUR))
        elif event.data.get("status") in MIGRATION_ENDED:
            return str(event.data["status"])


async def cancel_migration(permit: Permit, guest: Guest) -> None:
    """Cancel a migration of the guest, to a file or host, if one is in progress, and wait for its end.

    Raises:
        NotResponding: it does not end.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + guest.settings.memory_stall_timeout_ms / 1000
    with guest.events("MIGRATION") as events:
        while (status := (await guest.query("query-migrate")).get("status", "none")) not in MIGRATION_ENDED:
            if status != "cancelling":
                await guest.execute(permit, "migrate_cancel")
            if loop.time() > deadline:
                raise NotResponding(f"QEMU does not stop sending the memory of VM {guest.instance_id}.")
            await events.next_within(guest.settings.memory_look_interval_ms)


async def _resume(permit: Permit, guest: Guest, files: SavedMemory, before: Saving) -> None:
    """Restore the state that the guest had before its memory was to be written."""
    if guest.process.ended.is_set():
        if not files.saved.exists():
            await files.remove(permit)
        return
    await cancel_migration(permit, guest)
    await files.remove(permit)
    status = (await guest.query("query-status"))["status"]
    if before is Saving.RAN or status == "postmigrate":
        await guest.execute(permit, "cont")
    if before is Saving.STOOD_STILL:
        if status == "postmigrate":
            # QEMU reopens its disks only when the vCPUs run, for however short a time.
            await guest.execute(permit, "stop")
        permit.check()
        guest.record_phase(Phase.RUNNING)
        guest.record_saving(None)


async def resume_unsaved(permit: Permit, guest: Guest) -> None:
    """Resume a guest whose save was abandoned."""
    files = SavedMemory(guest.folder)
    if guest.saving is not None and not files.saved.exists():
        with guest.folder.os_errors_rejected():
            await _resume(permit, guest, files, guest.saving)


async def discard_saved(permit: Permit, guest: Guest) -> None:
    """Cancel the write of the guest's memory, and remove what is saved: it is about to run for another reason."""
    if guest.saving is not None:
        await cancel_migration(permit, guest)
    with guest.folder.os_errors_rejected():
        await SavedMemory(guest.folder).remove(permit)


# --------------------------------------------------------------------------------------------------------- restoring


async def _read(permit: Permit, guest: Guest, files: SavedMemory, report: Report) -> None:
    """Load the saved memory into a process that was started for it; its guest is paused afterwards.

    Raises:
        OperationRejected: it could not be read.
        NotResponding: it took too long.
    """
    with guest.folder.os_errors_rejected():
        descriptor = os.open(files.saved, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    total = os.fstat(descriptor).st_size

    async def report_progress() -> None:
        report(os.lseek(descriptor, 0, os.SEEK_CUR), total)

    try:
        await _prepare(permit, guest, descriptor)
        with guest.events("MIGRATION") as events:
            await guest.execute(permit, "migrate-incoming", {"uri": f"fd:{_DESCRIPTOR_NAME}"})
            status = await _follow(guest, events, descriptor, report_progress)
        if status != "completed":
            raise _unreadable(guest, files, status)
        report(total, total)
    except GuestNotFound as ended:
        raise _unreadable(guest, files, guest.folder.last_error()) from ended
    finally:
        os.close(descriptor)


def _unreadable(guest: Guest, files: SavedMemory, why: Any) -> OperationRejected:
    return OperationRejected(
        f"The saved memory of VM {guest.instance_id} could not be read from {files.saved}: {why}",
        remedy="It is still saved: correct the cause and resume again, or start the VM, which discards it.",
    )


async def _run_restored(permit: Permit, guest: Guest, files: SavedMemory) -> None:
    """Run a restored guest, unless it runs. The memory is used from then on, and then removed."""
    if guest.phase is Phase.STARTING:
        if files.saved.exists():
            with guest.folder.os_errors_rejected():
                await files.mark_used(permit)
        elif not files.used.exists():
            raise GuestNotFound(f"No memory of VM {guest.instance_id} is saved, and it does not run.")
        await guest.execute(permit, "cont")
    elif await guest.require_running() is not PowerState.RUNNING:
        await discard_saved(permit, guest)
        await guest.execute(permit, "cont")
    await files.remove(permit)
