"""The hypervisor port on QEMU: which steps each verb takes, and how it converges from whatever is found.

One process per guest. No thread, no timer and no polling per guest: pidfds, pipes and sockets wake the event loop. What
a step does is in the modules beside this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from interlock.core.errors import NotResponding, NotThere, Refused, Unavailable
from interlock.core.records import Disk, GuestEvent, Spec
from interlock.core.states import PowerState
from interlock.hypervisors.qemu import console_log, disks
from interlock.hypervisors.qemu.guest import ENDED_STATES, Guest
from interlock.hypervisors.qemu.instance_folder import InstanceFolder, Phase
from interlock.hypervisors.qemu.launch import launch, refused
from interlock.hypervisors.qemu.process import Account, account, find_in, runs_in, started_ticks
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.ports import HypervisorEvent, Observation, Permit

_SAFE_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_UNKNOWN: Final = Observation(defined=False, power_state=PowerState.NONE)
_LOOK_FOR_PROCESS_S: Final = 2.0
"""How long a process that was being started as we were killed may take to become recognisable."""


class QemuHypervisor:
    """Holds guests as QEMU processes that outlive it. See `ports.Hypervisor` for what each method promises."""

    def __init__(self, settings: QemuSettings) -> None:
        self._settings = settings
        self._folder = settings.folder.absolute()
        self._guests: dict[str, Guest] = {}
        self._lock: int | None = None
        self._account: Account | None = None
        self._listener: Callable[[HypervisorEvent], None] = _nobody
        self._closing: set[asyncio.Task[Any]] = set()
        self._console_timer: asyncio.TimerHandle | None = None

    # ----------------------------------------------------------------------------------------- taking charge

    async def open(self, listener: Callable[[HypervisorEvent], None]) -> None:
        self._account = account(self._settings)
        for program, package in self._needed().items():
            if shutil.which(program) is None:
                raise Unavailable(f"{program} is not installed.", remedy=f"Run: apt-get install {package}")
        self._take_folder()
        self._listener = listener
        try:
            async with asyncio.TaskGroup() as adoptions:
                for instance_id in sorted(await self.known()):
                    adoptions.create_task(self._adopt(instance_id))
        except BaseExceptionGroup as failures:
            await self.close()
            raise failures.exceptions[0] from failures
        self._cut_console_logs()

    def _needed(self) -> dict[str, str]:
        return {
            self._settings.qemu_binary: "qemu-system-x86",
            self._settings.image_tool_binary: "qemu-utils",
            "setpriv": "util-linux",
            "prlimit": "util-linux",
            "env": "coreutils",
        }

    def _take_folder(self) -> None:
        try:
            (self._folder / "vms").mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._let_go_of_folder()
            raise Unavailable(
                f"Another server is in charge of the guests in {self._folder}.",
                remedy="Stop it first, or give this one a folder of its own.",
            ) from None
        except OSError as error:
            raise Unavailable(
                f"The guests' folder {self._folder} cannot be used: {error.strerror}.",
                remedy="Give the server's user write access to it, and see that there is room.",
            ) from error

    def _let_go_of_folder(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _adopt(self, instance_id: str) -> None:
        """Find out what became of an instance while nobody watched."""
        folder = self._folder_of(instance_id)
        record = folder.process_record()
        guest = None
        if folder.held():
            process_id = await self._find_process(folder)
            if process_id is not None:
                with contextlib.suppress(ProcessLookupError):
                    guest = self._hold(instance_id, folder, process_id)
        if guest is not None:
            await guest.catch_up()
        elif record is not None:
            if record.phase is Phase.RUNNING:
                self._listener(HypervisorEvent(instance_id=instance_id, kind=GuestEvent.VANISHED, during_watch=False))
            folder.forget_process_record()

    async def _find_process(self, folder: InstanceFolder) -> int | None:
        """The process that holds the instance: the one on record if it is that still, else looked for among all."""
        record = folder.process_record()
        if (
            record is not None
            and record.process_id
            and started_ticks(record.process_id) == record.started_ticks
            and runs_in(record.process_id, folder.inside)
        ):
            return record.process_id
        deadline = asyncio.get_running_loop().time() + _LOOK_FOR_PROCESS_S
        while folder.held():
            found = find_in(folder.inside)
            if found is not None:
                return found
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable(
                    f"A process that cannot be seen from here holds the instance in {folder.path}.",
                    remedy="Run the server as the user who started it, or end that process.",
                )
            # It has been forked and has not reached its own program yet: nothing announces that it does.
            await asyncio.sleep(0.005)
        return None

    def _hold(self, instance_id: str, folder: InstanceFolder, process_id: int) -> Guest:
        guest = Guest(instance_id, folder, process_id, self._settings, tell=self._tell, on_end=self._forget)
        self._guests[instance_id] = guest
        return guest

    def _tell(self, event: HypervisorEvent) -> None:
        self._listener(event)

    def _forget(self, guest: Guest) -> None:
        if self._guests.get(guest.instance_id) is guest:
            del self._guests[guest.instance_id]
        closing = asyncio.get_running_loop().create_task(guest.monitor.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        self._listener = _nobody
        if self._console_timer is not None:
            self._console_timer.cancel()
            self._console_timer = None
        guests, self._guests = tuple(self._guests.values()), {}
        await asyncio.gather(*(guest.close() for guest in guests), *self._closing)
        self._let_go_of_folder()

    def _cut_console_logs(self) -> None:
        for guest in tuple(self._guests.values()):
            with contextlib.suppress(OSError):
                console_log.cut(guest.folder.console, self._settings.console_bytes_max)
        delay_s = self._settings.console_check_interval_ms / 1000
        self._console_timer = asyncio.get_running_loop().call_later(delay_s, self._cut_console_logs)

    # --------------------------------------------------------------------------------------------- looking

    async def known(self) -> frozenset[str]:
        with os.scandir(self._folder / "vms") as entries:
            return frozenset(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))

    async def inspect(self, instance_id: str) -> Observation:
        if _SAFE_ID.fullmatch(instance_id) is None:
            return _UNKNOWN
        guest = self._guests.get(instance_id)
        if guest is not None:
            try:
                state = await guest.look()
                plugged = () if state in ENDED_STATES else await guest.disks()
            except NotResponding:
                seen, plugged = guest.last_seen, guest.last_disks
                return Observation(
                    defined=True, power_state=seen, disks=() if seen in ENDED_STATES else plugged, responsive=False
                )
            except NotThere:
                pass
            else:
                return Observation(defined=True, power_state=state, disks=plugged)
        defined = self._folder_of(instance_id).exists()
        return Observation(defined=defined, power_state=PowerState.NONE)

    async def wait_powered_off(self, instance_id: str) -> None:
        guest = self._guests.get(instance_id)
        if guest is not None:
            await guest.rests.wait()

    def console_path(self, instance_id: str) -> Path | None:
        if _SAFE_ID.fullmatch(instance_id) is None:
            return None
        console = self._folder_of(instance_id).console
        return console if console.exists() else None

    # -------------------------------------------------------------------------------- making and removing

    async def define(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        folder = self._folder_of(instance_id)
        with refused(folder):
            folder.make(permit)
            await disks.make_root_disk(permit, folder, spec, self._settings)

    async def undefine(self, permit: Permit, instance_id: str) -> None:
        await self.power_off(permit, instance_id)
        folder = self._folder_of(instance_id)
        with refused(folder):
            folder.remove(permit)

    # ---------------------------------------------------------------------------------------- on and off

    async def power_on(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        guest = self._guests.get(instance_id)
        if guest is not None:
            state = await self._look_unless_gone(guest)
            if state is PowerState.RUNNING:
                return
            stale = guest.phase is Phase.STARTING and guest.folder.spec() != spec
            if stale or (state in ENDED_STATES and guest.phase is not Phase.STARTING):
                await guest.kill(permit)
                guest = None
        if guest is None:
            guest = await self._start(permit, instance_id, spec)
        await guest.tell(permit, "cont")

    async def _look_unless_gone(self, guest: Guest) -> PowerState:
        """What state the guest is in; as good as powered off when its process has just ended."""
        try:
            return await guest.look()
        except NotThere:
            if not guest.process.ended.is_set():
                raise
            guest.keep(Phase.ENDED)
            return PowerState.NONE

    async def _start(self, permit: Permit, instance_id: str, spec: Spec) -> Guest:
        """Start a process whose guest stands still, and wait until it answers."""
        folder = self._folder_of(instance_id)
        if not folder.inside.is_dir():
            raise NotThere(f"Instance {instance_id} is not defined on this host.")
        if len(self._guests) >= self._settings.processes_max:
            raise Refused(
                f"This host holds {len(self._guests)} guests, as many as it may.",
                remedy="Stop one, or raise processes_max.",
            )
        process_id = launch(permit, instance_id, folder, spec, self._settings, self._account)
        guest = self._hold(instance_id, folder, process_id)
        guest.journal.negotiate()
        guest.watch()
        await self._await_greeting(guest)
        return guest

    async def _await_greeting(self, guest: Guest) -> None:
        greeting = asyncio.ensure_future(guest.monitor.connect(self._settings.start_timeout_ms))
        ended = asyncio.ensure_future(guest.process.ended.wait())
        try:
            await asyncio.wait({greeting, ended}, return_when=asyncio.FIRST_COMPLETED)
            if greeting.done() and (greeting.exception() is None or isinstance(greeting.exception(), NotResponding)):
                return greeting.result()
            # The connection breaks a moment before the process has ended.
            await asyncio.wait({ended}, timeout=self._settings.qmp_timeout_ms / 1000)
        finally:
            for task in (greeting, ended):
                task.cancel()
        raise Refused(
            f"QEMU did not start for instance {guest.instance_id}: {guest.folder.last_error()}",
            remedy=f"QEMU's own words are in {guest.folder.errors}.",
        )

    async def power_off(self, permit: Permit, instance_id: str) -> None:
        guest = self._guests.get(instance_id)
        if guest is not None:
            await guest.kill(permit)

    async def press_power_button(self, permit: Permit, instance_id: str) -> None:
        await self._guest(instance_id).tell(permit, "system_powerdown")

    async def reset(self, permit: Permit, instance_id: str) -> None:
        guest = self._guests.get(instance_id)
        try:
            if guest is not None and guest.phase is not Phase.STARTING:
                await guest.tell(permit, "system_reset")
                await guest.tell(permit, "cont")
                return
        except (NotResponding, NotThere):
            permit.check()
        spec = self._folder_of(instance_id).spec()
        if spec is None:
            raise NotThere(f"Instance {instance_id} was never started on this host.")
        await self.power_off(permit, instance_id)
        await self.power_on(permit, instance_id, spec)

    async def pause(self, permit: Permit, instance_id: str) -> None:
        guest = self._guest(instance_id)
        state = await guest.look()
        if state in ENDED_STATES:
            raise NotThere(f"No guest of instance {instance_id} runs.")
        if state is not PowerState.PAUSED:
            await guest.tell(permit, "stop")

    async def unpause(self, permit: Permit, instance_id: str) -> None:
        guest = self._guest(instance_id)
        state = await guest.look()
        if state in ENDED_STATES:
            raise NotThere(f"No guest of instance {instance_id} runs.")
        if state is not PowerState.RUNNING:
            await guest.tell(permit, "cont")

    # --------------------------------------------------------------------------------------------- disks

    async def attach_disk(self, permit: Permit, instance_id: str, disk: Disk) -> None:
        guest = self._guest(instance_id)
        await disks.plug(guest, permit, disk)
        self._remember_disk(permit, guest.folder, disk.id, disk)

    async def detach_disk(self, permit: Permit, instance_id: str, disk_id: str) -> None:
        guest = self._guest(instance_id)
        await disks.unplug(guest, permit, disk_id)
        self._remember_disk(permit, guest.folder, disk_id, None)

    def _remember_disk(self, permit: Permit, folder: InstanceFolder, disk_id: str, disk: Disk | None) -> None:
        """Keep what is plugged in for a reset that has to start another process."""
        spec = folder.spec()
        if spec is None:
            return
        others = tuple(one for one in spec.disks if one.id != disk_id)
        wanted = others if disk is None else (*others, disk)
        if wanted != spec.disks:
            permit.check()
            with refused(folder):
                folder.keep_spec(msgspec.structs.replace(spec, disks=wanted))

    # ---------------------------------------------------------------------------------------- finding them

    def guest(self, instance_id: str) -> Guest | None:
        """The guest that a process holds, for tests and measurements: what is done through it passes the fence."""
        return self._guests.get(instance_id)

    def _guest(self, instance_id: str) -> Guest:
        guest = self._guests.get(instance_id)
        if guest is None:
            raise NotThere(f"No guest of instance {instance_id} runs.")
        return guest

    def _folder_of(self, instance_id: str) -> InstanceFolder:
        if _SAFE_ID.fullmatch(instance_id) is None:
            raise Refused(f"The instance id {instance_id!r} cannot be used as the name of a folder.")
        return InstanceFolder(self._folder / "vms" / instance_id)


def _nobody(_event: HypervisorEvent) -> None:
    """Takes events while nobody is in charge; there are none."""
