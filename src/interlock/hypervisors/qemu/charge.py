"""Being in charge of a host's guests: taking the folder, finding the guests that outlived us, letting go of them.

What is done with a guest is not here: see `adapter`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Coroutine
from typing import Any, Final

from interlock.core.errors import NotThere, Refused, Unavailable
from interlock.core.records import GuestEvent
from interlock.hypervisors.qemu import console_log, guest_agent
from interlock.hypervisors.qemu.accelerator import choose
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.instance_folder import InstanceFolder, Phase
from interlock.hypervisors.qemu.process import Account, account, find_in, runs_in, started_ticks
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.ports import HypervisorEvent

SAFE_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LOOK_FOR_PROCESS_S: Final = 2.0
"""How long a process that was being started as we were killed may take to become recognisable."""


class Charge:
    """The part of the adapter that finds guests; see `ports.Hypervisor` for what its public methods promise."""

    def __init__(self, settings: QemuSettings) -> None:
        self._settings = settings
        self._folder = settings.folder.absolute()
        self._guests: dict[str, Guest] = {}
        self._lock: int | None = None
        self._account: Account | None = None
        self.why_not_kvm = ""
        """For people; empty where guests run with KVM, and until it is open."""
        self._listener: Callable[[HypervisorEvent], None] = _nobody
        self._closing: set[asyncio.Task[Any]] = set()
        self._console_timer: asyncio.TimerHandle | None = None

    # ----------------------------------------------------------------------------------------- taking charge

    async def open(self, listener: Callable[[HypervisorEvent], None]) -> None:
        self._settle_accelerator()
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

    def _settle_accelerator(self) -> None:
        chosen = choose(self._settings, account(self._settings))
        self._settings, self._account = chosen.settings, chosen.account
        self.why_not_kvm = chosen.because

    @property
    def accelerator(self) -> str:
        """What executes guests' code: `kvm` or `tcg`; `auto` until it is open."""
        return self._settings.accelerator

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
            if folder.is_noted_frozen():
                self._later(guest_agent.thaw_forgotten(guest))
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
        self._later(guest.monitor.close())

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """Have something done that nobody waits for before `close`."""
        task = asyncio.get_running_loop().create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

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

    async def known(self) -> frozenset[str]:
        with os.scandir(self._folder / "vms") as entries:
            return frozenset(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))

    # ---------------------------------------------------------------------------------------- finding them

    def guest(self, instance_id: str) -> Guest | None:
        """The guest that a process holds, for tests and measurements: what is done through it passes the fence."""
        return self._guests.get(instance_id)

    def _guest(self, instance_id: str) -> Guest:
        guest = self._guests.get(instance_id)
        if guest is None:
            raise NotThere(f"No guest of instance {instance_id} runs.")
        return guest

    def _guest_that_runs(self, instance_id: str) -> Guest:
        guest = self._guest(instance_id)
        if guest.phase is Phase.STARTING:
            raise NotThere(f"No guest of instance {instance_id} runs.")
        return guest

    def _folder_of(self, instance_id: str) -> InstanceFolder:
        if SAFE_ID.fullmatch(instance_id) is None:
            raise Refused(f"The instance id {instance_id!r} cannot be used as the name of a folder.")
        return InstanceFolder(self._folder / "vms" / instance_id)


def _nobody(_event: HypervisorEvent) -> None:
    """Takes events while nobody is in charge; there are none."""
