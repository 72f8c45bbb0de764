"""One guest and the process that holds it: its monitors put together, its news told once, its state told from QEMU's.

What operations need of a guest is here; in which order they use it is the adapter's.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

import structlog

from interlock.core.errors import InterlockError, NotResponding, NotThere
from interlock.core.records import GuestEvent
from interlock.core.states import PowerState
from interlock.hypervisors.qemu.command_line import CONSOLE, disk_of_device
from interlock.hypervisors.qemu.console import Console
from interlock.hypervisors.qemu.instance_folder import InstanceFolder, Phase, ProcessRecord, Saving
from interlock.hypervisors.qemu.journal import Journal, Meaning, QemuEvent
from interlock.hypervisors.qemu.monitor import Monitor
from interlock.hypervisors.qemu.networks import interface_of_device
from interlock.hypervisors.qemu.process import Process
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.ports import HypervisorEvent, Permit

_LOG = structlog.get_logger(__name__)

POWER_STATES: Final = {
    "running": PowerState.RUNNING,
    "shutdown": PowerState.SHUTDOWN,
    "guest-panicked": PowerState.CRASHED,
    "internal-error": PowerState.CRASHED,
}
"""QEMU's run states that are not a kind of pause."""

ENDED_STATES: Final = frozenset({PowerState.SHUTDOWN, PowerState.CRASHED, PowerState.NONE})


class Guest:
    """A running process with its guest. It ends once, and is then of no more use."""

    def __init__(
        self,
        instance_id: str,
        folder: InstanceFolder,
        process_id: int,
        settings: QemuSettings,
        *,
        tell: Callable[[HypervisorEvent], None],
        on_end: Callable[[Guest], None],
    ) -> None:
        """Take charge of the process, and read what waits in its journal as having happened before.

        Raises:
            ProcessLookupError: it has ended.
        """
        self.instance_id = instance_id
        self.folder = folder
        self.settings = settings
        self.watching = False
        """Whether what is read now happens now; False while what was kept is read."""
        self.rests = asyncio.Event()
        """Set while no guest runs in the process: it powered itself off, crashed, or the process has ended."""
        self.agent_turn = asyncio.Lock()
        """Held by who talks with the guest's agent."""
        self.console = Console(instance_id, lambda: folder.call(CONSOLE), settings.console_reader_bytes_max)
        self.last_seen = PowerState.NONE
        self.last_disks: tuple[str, ...] = ()
        self.last_interfaces: tuple[str, ...] = ()
        self.job_news = asyncio.Event()
        """Set whenever a job in the process has gone on to its next state, or the process has ended."""
        self._tell = tell
        self._on_end = on_end
        self._let_go_waiters: dict[str, set[asyncio.Future[bool]]] = {}
        self._queues: dict[str, set[asyncio.Queue[QemuEvent | None]]] = {}
        self._record = folder.process_record() or ProcessRecord(phase=Phase.STARTING)
        self.has_run = self.phase is not Phase.STARTING
        """False only if its processors are known never to have run in this process."""
        self._boots_since = -math.inf
        self._meaning = Meaning(settings.reset_settle_ms)
        self.monitor = Monitor(instance_id, folder.call_monitor, settings.qmp_timeout_ms)
        self.process = Process(process_id, self._process_ended)
        try:
            self.journal = Journal(folder.open_journal("in"), folder.open_journal("out"), self._hear)
        except BaseException:
            self.process.let_go()
            raise
        if self.phase is not Phase.RUNNING:
            self.rests.set()
        self.keep(self.phase)

    # --------------------------------------------------------------------------------------------------- phases

    @property
    def phase(self) -> Phase:
        return self._record.phase

    @property
    def saving(self) -> Saving | None:
        return self._record.saving

    def keep_saving(self, saving: Saving | None) -> None:
        """Keep what the guest was when writing its memory began, or that this is over."""
        self._keep(self.phase, saving)

    def keep(self, phase: Phase) -> None:
        """Keep how far the process has come, for whoever finds it after us."""
        self._keep(phase, self.saving)

    def _keep(self, phase: Phase, saving: Saving | None) -> None:
        record = ProcessRecord(
            phase=phase,
            process_id=self.process.process_id,
            started_ticks=self.process.started_ticks,
            saving=saving,
        )
        if record != self._record:
            self._record = record
            # A full disk must not keep us from what we do; at worst an end is told that was asked for.
            with contextlib.suppress(OSError):
                self.folder.keep_process_record(record)

    # --------------------------------------------------------------------------------------------------- events

    def watch(self) -> None:
        """Go over from what was kept to what happens."""
        self.journal.drain()
        self.watching = True
        self.journal.watch()

    def boots(self) -> None:
        """Note that the machine has just begun to boot."""
        self._boots_since = asyncio.get_running_loop().time()

    async def past_firmware(self) -> None:
        """Wait until the machine can be reset: see `firmware_ms`."""
        firmware_s = self.settings.firmware_ms / 1000
        await asyncio.sleep(self._boots_since + firmware_s - asyncio.get_running_loop().time())

    @contextlib.contextmanager
    def events(self, kind: str) -> Iterator[asyncio.Queue[QemuEvent | None]]:
        """What QEMU tells of this kind within the block; None at the end of the process."""
        queue: asyncio.Queue[QemuEvent | None] = asyncio.Queue()
        self._queues.setdefault(kind, set()).add(queue)
        if self.process.ended.is_set():
            queue.put_nowait(None)
        try:
            yield queue
        finally:
            self._queues[kind].discard(queue)

    def _hear(self, event: QemuEvent) -> None:
        for queue in self._queues.get(event.event, ()):
            queue.put_nowait(event)
        if event.event == "STOP" and not self.rests.is_set():
            self.last_seen = PowerState.PAUSED
        if event.event == "RESUME":
            self.last_seen = PowerState.RUNNING
            self.has_run = True
            self.rests.clear()
            if self.phase is not Phase.ENDING or self.saving is not None:
                self._keep(Phase.RUNNING, None)
        if event.event == "DEVICE_DELETED" and "device" in event.data:
            self._answer_let_go(event.data["device"], let_go=True)
        if event.event == "DEVICE_UNPLUG_GUEST_ERROR" and "device" in event.data:
            self._answer_let_go(event.data["device"], let_go=False)
        if event.event == "JOB_STATUS_CHANGE":
            self.job_news.set()
        self._tell_of_a_full_disk(event)
        news = self._meaning.of(event)
        if news is None:
            return
        if news is not GuestEvent.RESET:
            self.last_seen = PowerState.SHUTDOWN if news is GuestEvent.STOPPED else PowerState.CRASHED
            self.rests.set()
        self._say(news)

    def _tell_of_a_full_disk(self, event: QemuEvent) -> None:
        if self._meaning.halts_for_room(event):
            _LOG.warning(
                "a guest stands still: there is no room for what it writes",
                instance=self.instance_id,
                remedy="make room on the file system of its disks; then pause and unpause it, and it goes on",
            )

    def _say(self, news: GuestEvent) -> None:
        if self.phase is not Phase.RUNNING:
            return
        self._tell(HypervisorEvent(instance_id=self.instance_id, kind=news, during_watch=self.watching))
        if news in {GuestEvent.STOPPED, GuestEvent.CRASHED}:
            # Kept after it was told: whoever is killed in between tells it twice rather than never.
            self.keep(Phase.ENDED)

    def _process_ended(self) -> None:
        self.journal.drain()
        self.rests.set()
        self.job_news.set()
        for device in tuple(self._let_go_waiters):
            self._answer_let_go(device, let_go=False)
        for queues in self._queues.values():
            for queue in queues:
                queue.put_nowait(None)
        self._say(GuestEvent.VANISHED)
        self.journal.close()
        self.folder.forget_process_record()
        self._on_end(self)

    async def catch_up(self) -> None:
        """Hear what was kept, and see what was not: news that an earlier process of ours read and could not tell."""
        self.journal.drain()
        self.journal.negotiate()
        try:
            state = await self.look()
            await self.disks()
            await self.interfaces()
        except (NotResponding, NotThere):
            # What it holds is not known before it answers; until then it counts as what was last heard.
            if self.last_seen is PowerState.NONE and self.phase is Phase.RUNNING:
                self.last_seen = PowerState.RUNNING
        else:
            self.journal.drain()
            self._see(state)
        self.watch()

    def _see(self, state: PowerState) -> None:
        if state is PowerState.RUNNING and self.phase is Phase.STARTING:
            self.has_run = True
            self.keep(Phase.RUNNING)
            self.rests.clear()
        elif state is PowerState.SHUTDOWN:
            self.rests.set()
            self._say(GuestEvent.STOPPED)
        elif state is PowerState.CRASHED:
            self.rests.set()
            self._say(GuestEvent.CRASHED)

    # ------------------------------------------------------------------------------------------------ questions

    async def look(self) -> PowerState:
        """What state the guest is in. Raises `NotResponding`, `NotThere`."""
        answer = await self._unless_ended(self.monitor.ask())
        self.last_seen = self._state(answer["status"])
        self.has_run = self.has_run or self.last_seen is PowerState.RUNNING
        return self.last_seen

    def _state(self, status: str) -> PowerState:
        if self.phase is Phase.STARTING and status != "running":
            return PowerState.NONE  # its processors have never run
        return POWER_STATES.get(status, PowerState.PAUSED)

    async def disks(self) -> tuple[str, ...]:
        """Ids of the disks that are plugged in. Raises as `look`."""
        self.last_disks = tuple(sorted(await self.plugged()))
        return self.last_disks

    async def plugged(self) -> dict[str, str]:
        """The name of the device of each disk that is plugged in, by the disk's id. Raises as `look`."""
        names = await self.devices()
        devices = {name: disk for name in names if (disk := disk_of_device(name)) is not None}
        aliases = self.folder.node_names()
        if aliases:
            # Another disk was swapped in where one was: what a device is called tells no more which disk it has.
            devices |= {
                name: aliases[node]
                for name, node in (await self.drives()).items()
                if name in devices and node in aliases
            }
        return {disk: name for name, disk in devices.items()}

    async def drives(self) -> dict[str, str]:
        """The name of the node that each of our disks' devices uses, by the device's name. Raises as `look`."""
        found = {}
        for block in await self.ask("query-block"):
            _, _, device = block.get("qdev", "").partition("/machine/peripheral/")
            if device and "inserted" in block:
                found[device.partition("/")[0]] = str(block["inserted"]["node-name"])
        return found

    async def interfaces(self) -> tuple[str, ...]:
        """Ids of the interfaces that are plugged in, beyond the first. Raises as `look`."""
        found = (interface_of_device(name) for name in await self.devices())
        self.last_interfaces = tuple(sorted(interface for interface in found if interface is not None))
        return self.last_interfaces

    async def devices(self) -> frozenset[str]:
        """Names of the devices that were plugged in by us. Raises as `look`."""
        answer = await self.ask("qom-list", path="/machine/peripheral")
        return frozenset(child["name"] for child in answer)

    async def ask(self, question: str, **arguments: Any) -> Any:
        """The answer to another question without an effect. Raises as `look`."""
        return await self._unless_ended(self.monitor.ask(question, arguments))

    async def _unless_ended(self, question: Awaitable[Any]) -> Any:
        try:
            return await question
        except (NotResponding, NotThere):
            if self.process.ended.is_set():
                raise NotThere(f"What held instance {self.instance_id} has ended.") from None
            raise

    # -------------------------------------------------------------------------------------------------- effects

    async def tell(
        self, permit: Permit, command: str, arguments: dict[str, Any] | None = None, *, attach: int | None = None
    ) -> Any:
        """Have QEMU carry out a command. What it tells by that has been heard when this returns.

        Raises:
            Fenced, Refused, NotResponding, NotThere: see `Monitor.tell`.
        """
        answer = await self._unless_ended(self.monitor.tell(permit, command, arguments or {}, attach=attach))
        self.journal.drain()
        return answer

    async def kill(self, permit: Permit) -> None:
        """End the process, answering or not. Raises `Fenced`, `NotResponding`."""
        permit.check()
        self.keep(Phase.ENDING)
        self.process.kill()
        await self.process.wait_ended(self.settings.kill_timeout_ms)

    # -------------------------------------------------------------------------------------------------- letting go

    def expect_let_go(self, device: str) -> asyncio.Future[bool]:
        """Becomes true when the guest has let go of a device, false when it refused or ended."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._let_go_waiters.setdefault(device, set()).add(future)
        future.add_done_callback(lambda done: self._forget_waiter(device, done))
        return future

    def _forget_waiter(self, device: str, future: asyncio.Future[bool]) -> None:
        waiters = self._let_go_waiters.get(device, set())
        waiters.discard(future)
        if not waiters:
            self._let_go_waiters.pop(device, None)

    def _answer_let_go(self, device: str, *, let_go: bool) -> None:
        for future in tuple(self._let_go_waiters.get(device, ())):
            if not future.done():
                future.set_result(let_go)

    async def close(self) -> None:
        """Let go of the process without disturbing it."""
        self.console.close()
        self.journal.close()
        self.process.let_go()
        with contextlib.suppress(InterlockError):
            await self.monitor.close()
