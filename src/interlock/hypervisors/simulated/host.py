"""The simulated host: its guests, and everything that can happen to them. Nothing waits here.

The host outlives its watcher, as processes outlive a server; with a folder, it outlives the Python process too: each
change is in the guest's file before the call that made it returns, so that a `kill -9` loses nothing. Events are stored
as pending until the watcher has delivered them, so that each is delivered once.

A frozen guest executes nothing. Commands that are sent to it wait, and take effect when it thaws, even if their sender
has ended, unless its process is ended first.

Timeouts and permits are in `calls`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import msgspec

from interlock.core.errors import GuestNotFound, HypervisorError, OperationRejected
from interlock.core.records import Disk, Forward, GuestEvent, Interface, Spec
from interlock.core.specs import PRIMARY
from interlock.core.states import PowerState
from interlock.hypervisors.simulated.faults import FaultPlan, FaultRates, Method
from interlock.hypervisors.simulated.guest import RESCUE, ROOT, RUNS, Command, SimulatedGuest
from interlock.hypervisors.simulated.persistence import GuestFiles
from interlock.hypervisors.simulated.storage import Storage, rescued_from


class Watcher(Protocol):
    """Receives the changes of a host's guests."""

    def replaced(self) -> None:
        """Another watcher watches the host from now on."""

    def changed(self, guest: SimulatedGuest) -> None:
        """The guest changed; it may have pending events."""

    def froze(self, guest: SimulatedGuest) -> None:
        """The guest does not respond from now on."""

    def button_pressed(self, guest: SimulatedGuest) -> None:
        """The guest will react to its power button: call `SimulatedHost.answer_button` for that."""

    def released(self, guest: SimulatedGuest) -> None:
        """The guest has released a device by itself."""

    def executed(self, instance_id: str, command: Command, error: HypervisorError | None) -> None:
        """A command to a frozen guest was executed, rejected, or lost with the guest."""


class SimulatedHost:
    """Guests that are records, and hooks by which a test lets them act by themselves.

    The hooks (`guest_powers_off` and so on) return whether the guest could do that: a guest that does not run,
    is paused or is frozen does nothing. They are called in the thread of the event loop.
    """

    def __init__(self, *, seed: int = 0, rates: FaultRates | None = None, folder: Path | None = None) -> None:
        self.guests: dict[str, SimulatedGuest] = {}
        self.faults = FaultPlan(seed, rates)
        self.storage = Storage(folder)
        self._files = None if folder is None else GuestFiles(folder)
        self._watcher: Watcher | None = None

    # --------------------------------------------------------------------------------------------------- records

    def load(self) -> None:
        """Read the guests from the folder, if there is one. Raises `Unavailable`."""
        if self._files is not None:
            self.guests = self._files.load()

    def keep(self, guest: SimulatedGuest) -> None:
        """Write the guest's file, if there is a folder."""
        if self._files is not None and self.guests.get(guest.instance_id) is guest:
            self._files.write(guest)

    def changed(self, guest: SimulatedGuest) -> None:
        """Write the guest's file, and notify the watcher."""
        self.keep(guest)
        if self._watcher is not None:
            self._watcher.changed(guest)

    def watch(self, watcher: Watcher) -> None:
        """Notify `watcher` from now on, in place of any other."""
        before, self._watcher = self._watcher, watcher
        if before is not None and before is not watcher:
            before.replaced()

    def unwatch(self, watcher: Watcher) -> None:
        """Stop notifying `watcher`."""
        if self._watcher is watcher:
            self._watcher = None

    # ------------------------------------------------------------------------------------------- calls of the port

    def lacks(self, instance_id: str, spec: Spec) -> bool:
        """Whether something is to be created or removed for this spec."""
        guest = self.guests.get(instance_id)
        if guest is None or guest.rescued_from != rescued_from(spec):
            return True
        return spec.has_root and spec.root not in guest.roots

    def define(self, instance_id: str, spec: Spec) -> SimulatedGuest:
        """Create what the spec needs and is missing. Raises `OperationRejected`."""
        guest = self.guests.get(instance_id) or SimulatedGuest(instance_id=instance_id, spec=spec)
        if self.storage.prepare(guest, spec) or instance_id not in self.guests:
            self.guests[instance_id] = guest
            self.changed(guest)
        return guest

    def guest_of(self, instance_id: str, spec: Spec) -> SimulatedGuest:
        """Return the instance's guest; create one without disks if it is missing."""
        return self.guests.setdefault(instance_id, SimulatedGuest(instance_id=instance_id, spec=spec))

    def undefine(self, guest: SimulatedGuest) -> None:
        guest.pending_events.clear()
        self.end_process(guest)
        if self._files is not None:
            self._files.remove(guest)
        if self.guests.get(guest.instance_id) is guest:
            del self.guests[guest.instance_id]

    def start(self, guest: SimulatedGuest, spec: Spec, power: PowerState = PowerState.RUNNING) -> None:
        """Start a guest, in place of one that has powered itself off or panicked; `PAUSED`: its vCPUs do not run yet.

        Raises:
            OperationRejected: another guest uses one of the disks.
        """
        self._plug(guest, spec)
        self._boot(guest, power)

    def _plug(self, guest: SimulatedGuest, spec: Spec) -> None:
        disks = self.storage.plugged(guest, spec)
        self.require_unused(guest, *disks.values())
        guest.spec = spec
        guest.disks = disks
        guest.interfaces = {interface.id: interface for interface in spec.interfaces}

    def end_process(self, guest: SimulatedGuest) -> None:
        """End the guest's process; commands that it has not executed are lost."""
        self._drop_commands(guest)
        guest.power = PowerState.NONE
        guest.starting = guest.frozen = guest.button_pressed = guest.paused_for_memory = False
        guest.thaw_after_ms = None
        self.changed(guest)

    def power_cycle(self, guest: SimulatedGuest) -> None:
        """End the guest's process, and start it again with its disks. Raises as `start`."""
        self.require_unused(guest, *guest.disks.values())
        self._boot(guest, PowerState.RUNNING)

    def _boot(self, guest: SimulatedGuest, power: PowerState) -> None:
        self._drop_commands(guest)
        guest.power = power
        guest.starting = power is PowerState.PAUSED
        guest.starts += 1
        guest.release_requests.clear()
        guest.frozen = guest.button_pressed = guest.paused_for_memory = guest.memory_saved = False
        guest.thaw_after_ms = None
        self.changed(guest)

    def pause_for_memory(self, guest: SimulatedGuest) -> None:
        """Pause a guest that runs for a long operation on its memory."""
        if guest.power is PowerState.RUNNING:
            guest.power = PowerState.PAUSED
            guest.paused_for_memory = True
            self.changed(guest)

    def resume_from_memory(self, guest: SimulatedGuest) -> None:
        """Undo `pause_for_memory`, unless the guest was paused or ended meanwhile."""
        if guest.paused_for_memory and guest.power is PowerState.PAUSED:
            self._resume(guest)

    def save_memory(self, guest: SimulatedGuest) -> None:
        """Save the guest's memory, and end its process."""
        guest.memory_saved = True
        self.end_process(guest)

    def restore_memory(self, guest: SimulatedGuest, spec: Spec) -> None:
        """Run the guest from its saved memory, which is then discarded. Raises as `start`."""
        self._plug(guest, spec)
        guest.memory_saved = False
        guest.power = PowerState.RUNNING
        self.changed(guest)

    def swap_disk(self, guest: SimulatedGuest, old: Disk, new: Disk) -> None:
        """Copy one volume to another, and swap them."""
        self.storage.copy_volume(old, new)
        guest.disks = {
            (new.id if disk_id == old.id else disk_id): (new if disk_id == old.id else disk)
            for disk_id, disk in guest.disks.items()
        }
        self.changed(guest)

    def send(self, guest: SimulatedGuest, command: Command) -> None:
        """Send a command to a frozen guest."""
        guest.waiting_commands.append(command)
        self.keep(guest)

    def execute(self, guest: SimulatedGuest, command: Command) -> None:
        """Execute a command now. Idempotent.

        Raises:
            GuestNotFound: no guest runs, and the command needs one.
            OperationRejected: another guest uses the disk.
        """
        match command.method:
            case Method.PAUSE:
                self._pause(guest)
            case Method.UNPAUSE:
                self._resume(guest)
            case Method.RESET:
                self._reset(guest)
            case Method.PRESS_POWER_BUTTON | Method.ASK_SHUTDOWN:
                self._press_button(guest)
            case Method.ATTACH_DISK:
                assert command.disk is not None
                self._attach(guest, command.disk)
            case Method.DETACH_DISK:
                assert command.disk_id is not None
                self._detach(guest, command.disk_id)
            case Method.ATTACH_INTERFACE:
                assert command.interface is not None
                self._attach_interface(guest, command.interface)
            case Method.UPDATE_INTERFACE:
                assert command.interface is not None
                self._update_interface(guest, command.interface, command.forwards)
            case Method.DETACH_INTERFACE:
                assert command.interface_id is not None
                self._detach_interface(guest, command.interface_id)
            case _:
                raise AssertionError(f"{command.method} is not a command to a guest.")

    def _pause(self, guest: SimulatedGuest) -> None:
        self._require_running(guest)
        if guest.power is PowerState.PAUSED and not guest.paused_for_memory:
            return
        guest.power = PowerState.PAUSED
        guest.paused_for_memory = False
        self.changed(guest)

    def _resume(self, guest: SimulatedGuest) -> None:
        if not guest.starting:
            self._require_running(guest)
        if guest.power is PowerState.RUNNING:
            return
        guest.power = PowerState.RUNNING
        guest.starting = guest.paused_for_memory = False
        self.changed(guest)
        self._notice_button(guest)

    def _reset(self, guest: SimulatedGuest) -> None:
        if guest.starts == 0:
            raise GuestNotFound(f"VM {guest.instance_id} was never started on this host.")
        if guest.seen is PowerState.NONE:
            self.power_cycle(guest)
            return
        guest.power = PowerState.RUNNING
        guest.resets += 1
        self.lets_go(guest.instance_id)
        guest.button_pressed = guest.paused_for_memory = False
        self.changed(guest)

    def _press_button(self, guest: SimulatedGuest) -> None:
        if guest.power is PowerState.NONE:
            raise GuestNotFound(f"VM {guest.instance_id} does not run on this host.")
        if guest.seen in RUNS:
            guest.button_pressed = True
            self.keep(guest)
            self._notice_button(guest)

    def _attach(self, guest: SimulatedGuest, disk: Disk) -> None:
        self._require_running(guest)
        if disk.id not in guest.disks:
            self.require_unused(guest, disk)
            guest.disks[disk.id] = disk
            self.changed(guest)

    def _detach(self, guest: SimulatedGuest, disk_id: str) -> None:
        self._require_running(guest)
        if disk_id in guest.disks:
            del guest.disks[disk_id]
            self.changed(guest)

    def _attach_interface(self, guest: SimulatedGuest, interface: Interface) -> None:
        self._require_running(guest)
        if interface.id not in guest.interfaces:
            guest.interfaces[interface.id] = interface
            self.changed(guest)

    def _update_interface(self, guest: SimulatedGuest, interface: Interface, forwards: tuple[Forward, ...]) -> None:
        self._require_running(guest)
        if interface.id == PRIMARY:
            guest.spec = msgspec.structs.replace(guest.spec, primary=interface, forwards=forwards)
        elif interface.id in guest.interfaces:
            guest.interfaces[interface.id] = interface
        else:
            raise OperationRejected(f"VM {guest.instance_id} has no interface {interface.id}.")
        self.changed(guest)

    def _detach_interface(self, guest: SimulatedGuest, interface_id: str) -> None:
        self._require_running(guest)
        if guest.interfaces.pop(interface_id, None) is not None:
            self.changed(guest)

    def _require_running(self, guest: SimulatedGuest) -> None:
        if guest.seen not in RUNS:
            raise GuestNotFound(f"VM {guest.instance_id} does not run on this host.")

    def require_unused(self, guest: SimulatedGuest | None, *disks: Disk) -> None:
        """Raise `OperationRejected` if another guest (None: any) uses one of the disks."""
        for disk in disks:
            if disk.id in {ROOT, RESCUE}:
                continue  # used by its own instance only, and checking every guest takes time
            for other in self.guests.values():
                if other is not guest and other.uses(disk):
                    raise OperationRejected(f"The disk {disk.path} is in use by VM {other.instance_id}.")

    # -------------------------------------------------------------------------------------- hooks: the guest acts

    def freeze(self, instance_id: str, thaw_after_ms: int | None = None) -> bool:
        """Stop the guest's process, as SIGSTOP does; it continues by itself only if a time is given."""
        guest = self.guests.get(instance_id)
        if guest is None or guest.power is PowerState.NONE or guest.frozen:
            return False
        guest.frozen = True
        guest.thaw_after_ms = thaw_after_ms
        self.keep(guest)
        if self._watcher is not None:
            self._watcher.froze(guest)
        return True

    def thaw(self, instance_id: str) -> bool:
        """Continue the guest's process: it executes the commands that were sent meanwhile, in order."""
        guest = self.guests.get(instance_id)
        if guest is None or not guest.frozen:
            return False
        guest.frozen = False
        guest.thaw_after_ms = None
        waiting, guest.waiting_commands = guest.waiting_commands, []
        for command in waiting:
            try:
                self.execute(guest, command)
            except HypervisorError as error:
                self._report_executed(guest, command, error)
            else:
                self._report_executed(guest, command, None)
        self.changed(guest)
        self._notice_button(guest)
        return True

    def guest_writes(self, instance_id: str, word: str, disk_id: str = ROOT) -> bool:
        """Let the guest write to one of its disks."""
        guest = self.guests.get(instance_id)
        if guest is None or guest.power is not PowerState.RUNNING or guest.frozen or disk_id not in guest.disks:
            return False
        self.storage.write(guest, disk_id, word)
        self.changed(guest)
        return True

    def guest_powers_off(self, instance_id: str) -> bool:
        return self._acts(instance_id, PowerState.SHUTDOWN, GuestEvent.STOPPED)

    def guest_panics(self, instance_id: str) -> bool:
        return self._acts(instance_id, PowerState.CRASHED, GuestEvent.CRASHED)

    def guest_halts(self, instance_id: str, why: GuestEvent = GuestEvent.NO_SPACE) -> bool:
        """Halt a guest as QEMU does for lack of space or a disk error."""
        return self._acts(instance_id, PowerState.PAUSED, why)

    def guest_goes_on(self, instance_id: str) -> bool:
        """Resume a guest that was halted so."""
        guest = self.guests.get(instance_id)
        if guest is None or guest.power is not PowerState.PAUSED or guest.frozen:
            return False
        guest.power = PowerState.RUNNING
        guest.pending_events.append(GuestEvent.WENT_ON)
        self.changed(guest)
        return True

    def guest_resets(self, instance_id: str) -> bool:
        return self._acts(instance_id, PowerState.RUNNING, GuestEvent.RESET)

    def vanish(self, instance_id: str) -> bool:
        """End the guest's process without a request, even if it is frozen or paused."""
        guest = self.guests.get(instance_id)
        if guest is None or guest.power is PowerState.NONE:
            return False
        if guest.seen in RUNS:
            guest.pending_events.append(GuestEvent.VANISHED)
        self.end_process(guest)
        return True

    def request_release(self, guest: SimulatedGuest, device: str) -> None:
        """Note that the guest should release a disk or interface, and does not for now."""
        if device not in guest.release_requests:
            guest.release_requests.append(device)
            self.keep(guest)

    def lets_go(self, instance_id: str) -> bool:
        """Let the guest release the devices that it should, even if nobody waits for that any more."""
        guest = self.guests.get(instance_id)
        if guest is None or not guest.release_requests or guest.frozen or guest.seen is not PowerState.RUNNING:
            return False
        for device in guest.release_requests:
            guest.disks.pop(device, None)
            guest.interfaces.pop(device, None)
        guest.release_requests.clear()
        self.changed(guest)
        if self._watcher is not None:
            self._watcher.released(guest)
        return True

    def ignore_power_button(self, instance_id: str, *, ignores: bool = True) -> None:
        """Let the guest ignore its power button from now on, or not any more."""
        guest = self.guests[instance_id]
        guest.ignores_power_button = ignores
        self.keep(guest)

    def answer_button(self, instance_id: str) -> bool:
        """Let the guest react to its power button, if that is pressed."""
        guest = self.guests.get(instance_id)
        reacts = guest is not None and guest.button_pressed and not guest.ignores_power_button
        return reacts and self.guest_powers_off(instance_id)

    def _acts(self, instance_id: str, power: PowerState, event: GuestEvent) -> bool:
        guest = self.guests.get(instance_id)
        if guest is None or guest.power is not PowerState.RUNNING or guest.frozen:
            return False
        guest.power = power
        guest.resets += event is GuestEvent.RESET
        if event is GuestEvent.RESET:
            self.lets_go(instance_id)
        guest.button_pressed = False
        guest.pending_events.append(event)
        self.changed(guest)
        return True

    def _notice_button(self, guest: SimulatedGuest) -> None:
        able = guest.power is PowerState.RUNNING and not guest.frozen and not guest.ignores_power_button
        if able and guest.button_pressed and self._watcher is not None:
            self._watcher.button_pressed(guest)

    def _drop_commands(self, guest: SimulatedGuest) -> None:
        waiting, guest.waiting_commands = guest.waiting_commands, []
        for command in waiting:
            self._report_executed(guest, command, GuestNotFound(f"VM {guest.instance_id} has ended."))

    def _report_executed(self, guest: SimulatedGuest, command: Command, error: HypervisorError | None) -> None:
        if self._watcher is not None:
            self._watcher.executed(guest.instance_id, command, error)
