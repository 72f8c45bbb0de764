"""One guest and its QEMU process: QMP commands, events, and the state that follows from them.

The steps of an operation are in the parts of the adapter; what they need of a guest is here.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog

from interlock.core.errors import GuestNotFound, HypervisorError, InterlockError, NotResponding, OperationRejected
from interlock.core.records import GuestEvent
from interlock.core.states import PowerState
from interlock.hypervisors.qemu.command_line import CONSOLE, disk_of_device, interface_of_device, is_port
from interlock.hypervisors.qemu.console.serial_console import Console
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder, Phase, ProcessRecord, Saving
from interlock.hypervisors.qemu.process.qemu_process import Process
from interlock.hypervisors.qemu.qmp.monitor import Monitor
from interlock.hypervisors.qemu.qmp.qmp_events import EventInterpreter, LivenessProbe, QemuEvent, QmpEventLog
from interlock.hypervisors.qemu.qmp.waiters import EventSubscriptions, UnplugWaiters
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.ports import HypervisorEvent, Permit

_LOG = structlog.get_logger(__name__)

_POWER_STATES: Final = {
    "running": PowerState.RUNNING,
    "shutdown": PowerState.SHUTDOWN,
    "guest-panicked": PowerState.CRASHED,
    "internal-error": PowerState.CRASHED,
}
"""QEMU's run states that are not a kind of pause."""

ENDED_STATES: Final = frozenset({PowerState.SHUTDOWN, PowerState.CRASHED, PowerState.NONE})
"""The power states in which no guest runs."""

_RESUME_INHIBITOR: Final = "paused-by-request"
"""A QEMU object that marks a halted guest as paused by request. QEMU keeps it, so that it outlives the server."""
_FIRMWARE_MAX_S: Final = 10.0
"""The longest wait for the firmware, in seconds, on a host that is too busy for it."""
_RESUME_INTERVAL_S: Final = 2.0
_RESUME_INTERVAL_MAX_S: Final = 60.0
"""Pause before a guest that was halted again at once is resumed again, in seconds."""


class _Unfenced:
    fence = 0

    def check(self) -> None:
        """Return: there is no right to lose."""


UNFENCED: Final = _Unfenced()
"""The permit for commands that belong to no request: they read, or continue what the guest does anyway."""


def no_guest(instance_id: str) -> GuestNotFound:
    """Return the error for an instance without a running guest."""
    return GuestNotFound(f"VM {instance_id} does not run.")


class Guest:
    """A QEMU process with its guest. It ends once, and is of no use afterwards."""

    def __init__(
        self,
        instance_id: str,
        folder: InstanceFolder,
        process_id: int,
        settings: QemuSettings,
        *,
        listener: Callable[[HypervisorEvent], None],
        on_end: Callable[[Guest], None],
        on_disconnected: Callable[[Guest, str], None],
    ) -> None:
        """Adopt the process. Events that wait in its event log count as unobserved until `watch`.

        Raises:
            ProcessLookupError: it has ended.
        """
        self.instance_id = instance_id
        self.folder = folder
        self.settings = settings
        self.watching = False
        """Whether events are read as they happen; False while those from before the adoption are read."""
        self.powered_off = asyncio.Event()
        """Set while no guest runs in the process: it powered itself off, crashed, or the process has ended."""
        self.agent_lock = asyncio.Lock()
        """Serialises conversations with the guest agent."""
        self.console = Console(instance_id, lambda: folder.connect(CONSOLE), settings.console_reader_bytes_max)
        self.last_state = PowerState.NONE
        self.last_status = ""
        """QEMU's run state as last queried."""
        self.last_disks: tuple[str, ...] = ()
        self.last_interfaces: tuple[str, ...] = ()
        self.halted: GuestEvent | None = None
        """Why QEMU halted the guest, `NO_SPACE` or `IO_ERROR`; None if it did not."""
        self._halts_in_a_row = 0
        self._resume_at = self._halt_recurs_until = -math.inf
        self.job_changed = asyncio.Event()
        """Set when a block job changes its status, or the process has ended."""
        self.unplugs = UnplugWaiters()
        self._listener, self._on_end, self._on_disconnected = listener, on_end, on_disconnected
        self._subscriptions = EventSubscriptions(instance_id)
        self.events = self._subscriptions.subscribe
        """Subscribes to the QMP events of one kind."""
        self._record = folder.process_record() or ProcessRecord(phase=Phase.STARTING)
        self.has_run = self.phase is not Phase.STARTING
        """False only if the vCPUs are known never to have run in this process."""
        self._interpreter = EventInterpreter(settings.reset_settle_ms)
        self.monitor = Monitor(instance_id, folder.connect_monitor, settings.qmp_timeout_ms, self._changed_late)
        self.process = Process(process_id, self._process_ended)
        try:
            self.event_log = QmpEventLog(
                folder.open_event_pipe("in"), folder.open_event_pipe("out"), self._on_event, self._on_probe_answer
            )
        except BaseException:
            self.process.detach()
            raise
        self.note_boot()  # also of one that is adopted: it may have been reset a moment ago
        self._liveness = LivenessProbe(self.event_log.send_probe, self._report)
        if self.phase is not Phase.RUNNING:
            self.powered_off.set()
        self.record_phase(self.phase)

    # --------------------------------------------------------------------------------------------------- phases

    @property
    def phase(self) -> Phase:
        return self._record.phase

    @property
    def saving(self) -> Saving | None:
        return self._record.saving

    def record_saving(self, saving: Saving | None) -> None:
        """Record the guest's state before its memory is saved; None when that is over."""
        self._write_record(self.phase, saving)

    def record_phase(self, phase: Phase) -> None:
        """Record the phase of the process for a later server."""
        self._write_record(phase, self.saving)

    def _write_record(self, phase: Phase, saving: Saving | None) -> None:
        record = ProcessRecord(
            phase=phase,
            process_id=self.process.process_id,
            started_ticks=self.process.started_ticks,
            saving=saving,
        )
        if record != self._record:
            self._record = record
            # A full disk must not stop the operation; at worst a requested end is reported as an event.
            with contextlib.suppress(OSError):
                self.folder.write_process_record(record)

    # --------------------------------------------------------------------------------------------------- events

    def watch(self) -> None:
        """Read what waits in the event log, and then events as they happen."""
        self.event_log.drain()
        self.watching = True
        self.event_log.watch()

    def note_boot(self) -> None:
        """Note that the machine begins to boot."""
        self._booted_at, self._waited_s = self._loop_time(), self.process.run_queue_wait_s()

    async def wait_past_firmware(self) -> None:
        """Wait until the machine can be reset: see `firmware_ms`.

        While its threads wait for a processor of a busy host, the firmware gets nowhere.
        """
        last = self._booted_at + _FIRMWARE_MAX_S
        while (now := self._loop_time()) < last:
            executed_s = now - self._booted_at - (self.process.run_queue_wait_s() - self._waited_s)
            left_s = self.settings.firmware_ms / 1000 - executed_s
            if left_s <= 0:
                return
            await asyncio.sleep(min(left_s, last - now))

    def _loop_time(self) -> float:
        return asyncio.get_running_loop().time()

    @property
    def _is_transferring(self) -> bool:
        """Whether its memory is being moved, which QEMU may be too busy with to respond."""
        return bool(self._subscriptions)

    def _on_event(self, event: QemuEvent) -> None:
        self._subscriptions.publish(event)
        match event.event:
            case "STOP" if not self.powered_off.is_set():
                self.last_state = PowerState.PAUSED
            case "RESUME":
                self.last_state = PowerState.RUNNING
                self.has_run = True
                self.powered_off.clear()
                if self.phase is not Phase.ENDING or self.saving is not None:
                    self._write_record(Phase.RUNNING, None)
            case "DEVICE_DELETED" | "DEVICE_UNPLUG_GUEST_ERROR" if "device" in event.data:
                self._on_unplug(event.data["device"], released=event.event == "DEVICE_DELETED")
            case "NETDEV_STREAM_DISCONNECTED":
                self._on_disconnected(self, event.data["netdev-id"])
            case "JOB_STATUS_CHANGE":
                self.job_changed.set()
            case _:
                pass
        self._note_halt(event)
        meaning = self._interpreter.interpret(event)
        if meaning is None:
            return
        if meaning is not GuestEvent.RESET:
            self.last_state = PowerState.SHUTDOWN if meaning is GuestEvent.STOPPED else PowerState.CRASHED
            self.powered_off.set()
        self._report_if_running(meaning)

    def _on_unplug(self, device: str, *, released: bool) -> None:
        if not self.unplugs.resolve(device, released=released) and released:
            self._changed_late()

    def _report_if_running(self, kind: GuestEvent) -> None:
        """Report what the guest did by itself, unless its end was requested or reported already."""
        if self.phase is not Phase.RUNNING:
            return
        self._report(kind)
        if kind in {GuestEvent.STOPPED, GuestEvent.CRASHED}:
            # Recorded after the report: a crash in between reports it twice rather than never.
            self.record_phase(Phase.ENDED)

    def _report(self, kind: GuestEvent) -> None:
        self._listener(HypervisorEvent(instance_id=self.instance_id, kind=kind, during_watch=self.watching))

    def _changed_late(self) -> None:
        """Report the effect of a command that nobody waits for any more, or that was not requested."""
        if self.phase is Phase.RUNNING:
            self._report(GuestEvent.CHANGED)

    def _process_ended(self) -> None:
        self.event_log.drain()
        self.powered_off.set()
        self.job_changed.set()
        self.unplugs.resolve_all()
        self._subscriptions.end()
        self._report_if_running(GuestEvent.VANISHED)
        self.event_log.close()
        self.folder.remove_process_record()
        self._on_end(self)

    async def catch_up(self) -> bool:
        """Report the events from before the adoption, and changes whose event an earlier server read and lost.

        Return False if QEMU did not respond within the timeout.
        """
        responded = True
        self.event_log.drain()
        self.event_log.negotiate()
        try:
            state = await self.query_power_state()
            await self.disks()
            await self.interfaces()
        except (NotResponding, GuestNotFound) as failure:
            # Its state is unknown until it responds; meanwhile it counts as what was recorded last.
            responded = not isinstance(failure, NotResponding)
            if self.last_state is PowerState.NONE and self.phase is Phase.RUNNING:
                self.last_state = PowerState.RUNNING
        else:
            self.event_log.drain()
            self._reconcile(state)
            with contextlib.suppress(NotResponding, GuestNotFound):
                await self._query_halt()
        self.watch()
        return responded

    def _reconcile(self, state: PowerState) -> None:
        if state is PowerState.RUNNING and self.phase is Phase.STARTING:
            self.has_run = True
            self.record_phase(Phase.RUNNING)
            self.powered_off.clear()
        elif state in {PowerState.SHUTDOWN, PowerState.CRASHED}:
            self.powered_off.set()
            self._report_if_running(GuestEvent.STOPPED if state is PowerState.SHUTDOWN else GuestEvent.CRASHED)

    # ------------------------------------------------------------------------------------------------- liveness

    def check_liveness(self, rounds_max: int, rounds_max_busy: int) -> None:
        """Start a round of `LivenessProbe`, with another limit while the guest's memory is being moved."""
        if self.phase is Phase.RUNNING:
            self.event_log.drain()  # the answer may have come while the event loop was busy
            self._liveness.start_round(rounds_max_busy if self._is_transferring else rounds_max)

    def _on_probe_answer(self) -> None:
        self._liveness.responded()

    # ------------------------------------------------------------------------------------- halted by an I/O error

    def _note_halt(self, event: QemuEvent) -> None:
        if (halted := self._interpreter.halt(event)) is not None:
            self._halt(halted)
        elif event.event == "RESUME" and self.halted is not None:
            self.halted = None
            self._report(GuestEvent.WENT_ON)

    def _halt(self, why: GuestEvent) -> None:
        self.halted = why
        self._halts_in_a_row = self._halts_in_a_row + 1 if self._loop_time() < self._halt_recurs_until else 0
        _LOG.warning("guest halted", instance=self.instance_id, why=why.value)
        self._report(why)

    async def _query_halt(self) -> None:
        """Find out whether and why the guest is halted: an earlier server may have read the event."""
        if self.last_status != "io-error":
            self.halted = None
        elif self.halted is None:
            statuses = {block.get("io-status") for block in await self.query("query-block")}
            self._halt(GuestEvent.NO_SPACE if "nospace" in statuses else GuestEvent.IO_ERROR)

    async def resume_halted(self) -> None:
        """Resume a guest that was halted for lack of space, unless it was paused by request meanwhile.

        A guest whose memory is being moved is left alone. One that halts again at once waits longer each time.
        """
        if self._loop_time() < self._resume_at or self.halted is not GuestEvent.NO_SPACE or self._is_transferring:
            return
        self._resume_at = self._loop_time() + min(_RESUME_INTERVAL_S * 2**self._halts_in_a_row, _RESUME_INTERVAL_MAX_S)
        self._halt_recurs_until = self._resume_at + _RESUME_INTERVAL_S
        with contextlib.suppress(HypervisorError):
            await self.query_power_state()
            if self.last_status == "io-error" and not await self._is_resume_inhibited():
                await self.execute(UNFENCED, "cont")

    async def inhibit_resume(self, permit: Permit) -> None:
        """Keep a halted guest paused when there is space again."""
        if not await self._is_resume_inhibited():
            await self.execute(permit, "object-add", {"qom-type": "secret", "id": _RESUME_INHIBITOR, "data": ""})

    async def allow_resume(self, permit: Permit) -> None:
        """Undo `inhibit_resume`."""
        if await self._is_resume_inhibited():
            await self.execute(permit, "object-del", {"id": _RESUME_INHIBITOR})

    async def _is_resume_inhibited(self) -> bool:
        return any(child["name"] == _RESUME_INHIBITOR for child in await self.query("qom-list", path="/objects"))

    # -------------------------------------------------------------------------------------------------- queries

    async def query_power_state(self) -> PowerState:
        """Return the guest's power state. Raises `NotResponding`, `GuestNotFound`."""
        answer = await self._unless_ended(self.monitor.query())
        self.last_status = str(answer["status"])
        if self.phase is Phase.STARTING and self.last_status != "running":
            self.last_state = PowerState.NONE  # its vCPUs have never run
        else:
            self.last_state = _POWER_STATES.get(self.last_status, PowerState.PAUSED)
        self.has_run = self.has_run or self.last_state is PowerState.RUNNING
        return self.last_state

    async def require_running(self) -> PowerState:
        """As `query_power_state`; raises `GuestNotFound` also if no guest runs in the process."""
        state = await self.query_power_state()
        if state in ENDED_STATES:
            raise no_guest(self.instance_id)
        return state

    def require_process(self) -> None:
        """Raise `GuestNotFound` if the process has ended."""
        if self.process.ended.is_set():
            raise GuestNotFound(f"The QEMU process of VM {self.instance_id} has ended.")

    async def disks(self) -> tuple[str, ...]:
        """Return the ids of the plugged-in disks. Raises as `query_power_state`."""
        self.last_disks = tuple(sorted(await self.disk_devices()))
        return self.last_disks

    async def disk_devices(self) -> dict[str, str]:
        """Return the device name of each plugged-in disk, by disk id. Raises as `query_power_state`."""
        names = await self.devices()
        devices = {name: disk for name in names if (disk := disk_of_device(name)) is not None}
        aliases = self.folder.node_names()
        if aliases:
            # A disk was swapped: the name of its device still says the former one.
            devices |= {
                name: aliases[node]
                for name, node in (await self.device_nodes()).items()
                if name in devices and node in aliases
            }
        return {disk: name for name, disk in devices.items()}

    async def device_nodes(self) -> dict[str, str]:
        """Return the block node that each disk device uses, by device name. Raises as `query_power_state`."""
        found = {}
        for block in await self.query("query-block"):
            _, _, device = block.get("qdev", "").partition("/machine/peripheral/")
            if device and "inserted" in block:
                found[device.partition("/")[0]] = str(block["inserted"]["node-name"])
        return found

    async def interfaces(self) -> tuple[str, ...]:
        """Return the ids of the plugged-in interfaces beyond the first. Raises as `query_power_state`."""
        found = (interface_of_device(name) for name in await self.devices())
        self.last_interfaces = tuple(sorted(interface for interface in found if interface is not None))
        return self.last_interfaces

    async def devices(self) -> frozenset[str]:
        """Return the names of the devices with an id. Raises as `query_power_state`."""
        answer = await self.query("qom-list", path="/machine/peripheral")
        return frozenset(child["name"] for child in answer)

    async def device_ports(self) -> dict[str, str]:
        """Return the port of each device that is in one, by device name. Raises as `query_power_state`.

        The devices themselves are queried: `query-pci` shows nothing behind a port until the firmware has enumerated
        it, which it does again after every reset.
        """
        found = {}
        for name in await self.devices():
            # The guest may have released it a moment ago.
            with contextlib.suppress(OperationRejected):
                if not is_port(name):
                    bus = str(await self.query("qom-get", path=f"/machine/peripheral/{name}", property="parent_bus"))
                    if is_port(port := bus.rpartition("/")[2]):
                        found[name] = port
        return found

    async def query(self, command: str, **arguments: Any) -> Any:
        """Return the answer to a QMP command without an effect. Raises as `query_power_state`."""
        return await self._unless_ended(self.monitor.query(command, arguments))

    async def _unless_ended(self, answer: Awaitable[Any]) -> Any:
        try:
            return await answer
        except (NotResponding, GuestNotFound):
            self.require_process()
            raise

    # -------------------------------------------------------------------------------------------------- effects

    async def execute(
        self, permit: Permit, command: str, arguments: dict[str, Any] | None = None, *, attach: int | None = None
    ) -> Any:
        """Execute a QMP command. Its events are processed when this returns.

        Raises:
            Fenced, OperationRejected, NotResponding, GuestNotFound: see `Monitor.execute`.
        """
        answer = await self._unless_ended(self.monitor.execute(permit, command, arguments or {}, attach=attach))
        self.event_log.drain()
        return answer

    async def kill(self, permit: Permit) -> None:
        """End the process, responsive or not. Raises `Fenced`, `NotResponding`."""
        permit.check()
        self.record_phase(Phase.ENDING)
        self.process.kill()
        await self.process.wait_ended(self.settings.kill_timeout_ms)

    async def close(self) -> None:
        """Detach from the process, which keeps running."""
        self.console.close()
        self.event_log.close()
        self.process.detach()
        with contextlib.suppress(InterlockError):
            await self.monitor.close()
