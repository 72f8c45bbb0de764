"""A guest's memory written to a file, and a guest that goes on from it. The files themselves are `saved_memory`'s.

The guest is stopped before its memory is written: nothing is then written twice, and under `tcg` a guest that runs
meanwhile may not be copied truthfully. QEMU writes to, and reads from, a file that we opened and handed over.

Saving, and what whoever comes after a crash finds (`saving` is in the process's record):

    crash after             finds                            save again               anything else
    -                       the guest as it was              all of it
    `saving` kept           the guest as it was              all of it                unpause: it runs
    stop                    it stands still                  all of it                unpause: it runs
    migrate                 it stands still, memory.part,    cancels that, all of it  unpause: cancels that,
                            QEMU is writing                                           drops the files, it runs
    all is written          `postmigrate`, memory.part       goes on from here        unpause: as above
    rename: memory.saved    `postmigrate`, memory.saved      ends the process         unpause: as above;
                                                                                      restore: ends the process first
    the process ended       memory.saved                     nothing                  restore; or it is dropped

Restoring; the process's phase is `starting` until QEMU tells that processors run, which it does before they do:

    crash after             finds                            restore again            power_off
    process started         starting, memory.saved           ends it, all of it       ends it
    memory read             starting, memory.saved           ends it, all of it       ends it
    rename: memory.used     starting, memory.used            lets it run              ends it, renames back
    cont                    running, memory.used             drops the file           ends it
    file dropped            running                          nothing                  ends it
    rename, and QEMU dies   no process, memory.used          NotThere: may have run   nothing

The last line loses a memory that perhaps never ran: both of us died between two steps that follow each other at once,
and then nobody can know. It is the one choice that cannot damage a disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from interlock.core.errors import Fenced, HypervisorError, NotResponding, NotThere, Refused
from interlock.core.states import PowerState
from interlock.hypervisors.durable_files import sync_file
from interlock.hypervisors.qemu import hotplug
from interlock.hypervisors.qemu.command_line import Machine, device_name, disk_of_device, machine_of
from interlock.hypervisors.qemu.guest import ENDED_STATES, Guest
from interlock.hypervisors.qemu.instance_folder import Phase, Saving
from interlock.hypervisors.qemu.journal import QemuEvent
from interlock.hypervisors.qemu.launch import refused
from interlock.hypervisors.qemu.saved_memory import Belonging, SavedMemory
from interlock.ports import Permit, Report

_DESCRIPTOR_NAME: Final = "memory"
_ENDS: Final = frozenset({"none", "completed", "failed", "cancelled"})
_BYTES_PER_S_MAX: Final = 1 << 40
"""QEMU would keep to 128 MiB/s, which is for networks."""


# ------------------------------------------------------------------------------------------------------------ saving


async def save(permit: Permit, guest: Guest, files: SavedMemory, report: Report) -> None:
    """Write the memory of a guest and end its process. Raises as `Hypervisor.save_memory`."""
    if files.saved.exists():
        # It was written, and nothing has run since: all that is left is to end what held it.
        await guest.kill(permit)
        return
    state = await guest.look()
    if state in ENDED_STATES:
        raise NotThere(f"No guest of instance {guest.instance_id} runs.")
    before = guest.saving or (Saving.RAN if state is PowerState.RUNNING else Saving.STOOD_STILL)
    try:
        with refused(guest.folder):
            await _stop_and_write(permit, guest, files, before, report)
            await asyncio.to_thread(sync_file, files.part)
            _require_process(guest)
            permit.check()
            # From here on its end is not news.
            guest.keep(Phase.ENDING)
            await files.keep(permit)
    except BaseException:
        with contextlib.suppress(HypervisorError, Fenced, OSError):
            await _go_on(permit, guest, files, before)
        raise
    await guest.kill(permit)


async def _stop_and_write(permit: Permit, guest: Guest, files: SavedMemory, before: Saving, report: Report) -> None:
    status = (await guest.ask("query-status"))["status"]
    if status == "postmigrate" and files.part.exists():
        return  # an earlier worker's writing came to its end: the file is that of the last migration, and is whole
    await _end_migration(permit, guest)
    if status == "postmigrate":
        # Only a machine that has run since can be written once more, for however short a time.
        await guest.tell(permit, "cont")
    permit.check()
    guest.keep_saving(before)
    await guest.tell(permit, "stop")
    with contextlib.suppress(FileNotFoundError):
        permit.check()
        files.part.unlink()
    spec = guest.folder.spec()
    if spec is None:
        raise Refused(f"It is not known with what instance {guest.instance_id} was started.")
    files.keep_belonging(permit, Belonging(spec=spec, machine=await machine_of_guest(guest)))
    descriptor = files.new_part(permit)
    try:
        await _write(permit, guest, descriptor, report)
    finally:
        os.close(descriptor)


async def machine_of_guest(guest: Guest) -> Machine:
    """What the machine is that the memory belongs to: QEMU finds each device again by its place."""
    places = await hotplug.places(guest)
    # A device keeps its name when another disk is swapped in; a machine that is made afresh names it after that one.
    plugged = await guest.plugged()
    ports = {name: port for name, port in places.items() if disk_of_device(name) is None}
    ports |= {device_name(disk_id): places[name] for disk_id, name in plugged.items()}
    kind = await guest.ask("qom-get", path="/machine", property="type")
    made = guest.folder.machine() or machine_of(guest.settings, guest.folder.spec())
    return msgspec.structs.replace(made, kind=str(kind).removesuffix("-machine"), ports=ports)


async def _write(permit: Permit, guest: Guest, descriptor: int, report: Report) -> None:
    async def tell_progress() -> None:
        memory = (await guest.ask("query-migrate")).get("ram")
        if memory is not None:
            report(memory["total"] - memory["remaining"], memory["total"])

    await _prepare(permit, guest, descriptor)
    with guest.events("MIGRATION") as told:
        await guest.tell(permit, "migrate", {"uri": f"fd:{_DESCRIPTOR_NAME}"})
        end = await _follow(guest, told, descriptor, tell_progress)
    if end != "completed":
        why = (await guest.ask("query-migrate")).get("error-desc", end)
        raise Refused(
            f"The memory of instance {guest.instance_id} could not be written: {why}.",
            remedy=f"See that there is room for it on the file system of {guest.folder.path}.",
        )
    await tell_progress()


async def _prepare(permit: Permit, guest: Guest, descriptor: int) -> None:
    """Have QEMU tell how it goes, keep to no rate, and know the file."""
    await guest.tell(permit, "migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
    await guest.tell(permit, "migrate-set-parameters", {"max-bandwidth": _BYTES_PER_S_MAX})
    await guest.tell(permit, "getfd", {"fdname": _DESCRIPTOR_NAME}, attach=descriptor)


async def _follow(
    guest: Guest,
    told: asyncio.Queue[QemuEvent | None],
    descriptor: int,
    tell_progress: Callable[[], Awaitable[None]],
) -> str:
    """Wait until QEMU tells the end, which is the answer. What it answers in the meantime is only for people.

    Whether it moves is seen from the position in the file, which QEMU and we have in common.

    Raises:
        NotResponding: it has not moved for too long.
        NotThere: the process ended.
    """
    loop = asyncio.get_running_loop()
    position, moved_at = -1, loop.time()
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(guest.settings.memory_look_interval_ms / 1000):
                event = await told.get()
                if event is None:
                    _require_process(guest)
                elif event.data.get("status") in _ENDS:
                    return str(event.data["status"])
                continue
        with contextlib.suppress(NotResponding):
            # It may be too busy with just this to answer.
            await tell_progress()
        if (now_at := os.lseek(descriptor, 0, os.SEEK_CUR)) != position:
            position, moved_at = now_at, loop.time()
        elif loop.time() - moved_at > guest.settings.memory_stall_timeout_ms / 1000:
            raise NotResponding(
                f"QEMU has not moved the memory of instance {guest.instance_id} for "
                f"{guest.settings.memory_stall_timeout_ms} ms.",
                remedy="Look at the host's storage; memory_stall_timeout_ms says how long is waited.",
            )


def _require_process(guest: Guest) -> None:
    if guest.process.ended.is_set():
        raise NotThere(f"What held instance {guest.instance_id} has ended.")


async def _end_migration(permit: Permit, guest: Guest) -> None:
    """See that QEMU writes no memory any more, whoever asked it to."""
    status = (await guest.ask("query-migrate")).get("status", "none")
    if status in _ENDS:
        return
    with guest.events("MIGRATION") as told:
        await guest.tell(permit, "migrate_cancel")
        deadline = guest.settings.memory_stall_timeout_ms / 1000
        try:
            async with asyncio.timeout(deadline):
                while (await guest.ask("query-migrate")).get("status", "none") not in _ENDS:
                    if await told.get() is None:
                        _require_process(guest)
        except TimeoutError:
            raise NotResponding(f"QEMU goes on writing the memory of instance {guest.instance_id}.") from None


async def _go_on(permit: Permit, guest: Guest, files: SavedMemory, before: Saving) -> None:
    """Make a guest again what it was before its memory was to be written."""
    if guest.process.ended.is_set():
        if not files.saved.exists():
            await files.drop(permit)
        return
    await _end_migration(permit, guest)
    await files.drop(permit)
    status = (await guest.ask("query-status"))["status"]
    if before is Saving.RAN or status == "postmigrate":
        await guest.tell(permit, "cont")
    if before is Saving.STOOD_STILL:
        if status == "postmigrate":
            # QEMU gives its disks back only to a machine that runs, for however short a time.
            await guest.tell(permit, "stop")
        permit.check()
        guest.keep(Phase.RUNNING)
        guest.keep_saving(None)


async def make_way(permit: Permit, guest: Guest, files: SavedMemory) -> None:
    """Before a guest is let run for another reason: no memory of it is being written, and none is saved."""
    if guest.saving is not None:
        await _end_migration(permit, guest)
    await files.drop(permit)


# --------------------------------------------------------------------------------------------------------- restoring


def of_no_use(guest: Guest, files: SavedMemory) -> bool:
    """Whether a process stands in the way of going on from the saved memory."""
    return guest.phase is Phase.ENDING or files.saved.exists()


async def read(permit: Permit, guest: Guest, files: SavedMemory, report: Report) -> None:
    """Fill a process that was started to take it with the saved memory; its guest stands still afterwards.

    Raises:
        Refused: it could not be read.
        NotResponding: it took too long.
    """
    with refused(guest.folder):
        descriptor = os.open(files.saved, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    total = os.fstat(descriptor).st_size

    async def tell_progress() -> None:
        report(os.lseek(descriptor, 0, os.SEEK_CUR), total)

    try:
        await _prepare(permit, guest, descriptor)
        with guest.events("MIGRATION") as told:
            await guest.tell(permit, "migrate-incoming", {"uri": f"fd:{_DESCRIPTOR_NAME}"})
            end = await _follow(guest, told, descriptor, tell_progress)
        if end != "completed":
            raise _unreadable(guest, end)
        report(total, total)
    except NotThere as ended:
        raise _unreadable(guest, guest.folder.last_error()) from ended
    finally:
        os.close(descriptor)


def _unreadable(guest: Guest, why: Any) -> Refused:
    return Refused(
        f"The saved memory of instance {guest.instance_id} could not be read: {why}",
        remedy="It is still saved: put right what is wrong and resume again, or start the instance afresh.",
    )


async def run(permit: Permit, guest: Guest, files: SavedMemory) -> None:
    """Let the guest run that was filled, unless it does; the memory is spent from then on, and then gone."""
    if guest.phase is Phase.STARTING:
        if files.saved.exists():
            with refused(guest.folder):
                await files.spend(permit)
        elif not files.used.exists():
            raise NotThere(f"No memory of instance {guest.instance_id} is saved, and no guest runs.")
        await guest.tell(permit, "cont")
    else:
        state = await guest.look()
        if state in ENDED_STATES:
            raise NotThere(f"No guest of instance {guest.instance_id} runs.")
        if state is not PowerState.RUNNING:
            await make_way(permit, guest, files)
            await guest.tell(permit, "cont")
    await files.drop(permit)
