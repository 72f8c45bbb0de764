"""The simulated host: its guests, and everything that can happen to them. No waiting happens here.

A frozen guest reads nothing. What is sent to it waits, and takes effect when it thaws, whoever sent it and whatever has
become of the sender, unless the plug was pulled first.

How guests are kept, and who is told of them, is in `keeping`. Who waits for an answer, for how long, and with which
right to act is in `calls`.
"""

from __future__ import annotations

from pathlib import Path

from interlock.core.errors import HypervisorError, NotThere, Refused
from interlock.core.records import Disk, GuestEvent, Interface, Spec
from interlock.core.states import PowerState
from interlock.hypervisors.simulated.faults import FaultPlan, FaultRates, Method
from interlock.hypervisors.simulated.guest import RESCUE, ROOT, RUNS, Command, Guest
from interlock.hypervisors.simulated.keeping import KeptGuests
from interlock.hypervisors.simulated.storage import Storage, rescued_from


class SimulatedHost(KeptGuests):
    """Guests that are records, and the hooks by which a test lets them act by themselves.

    The hooks (`guest_powers_off` and so on) return whether the guest could do that: a guest that does not run,
    is paused or is frozen does nothing. They are called in the thread of the event loop.
    """

    def __init__(self, *, seed: int = 0, rates: FaultRates | None = None, folder: Path | None = None) -> None:
        super().__init__(folder)
        self.faults = FaultPlan(seed, rates)
        self.storage = Storage(folder)

    # ------------------------------------------------------------------------------------------- what a driver does

    def lacks(self, instance_id: str, spec: Spec) -> bool:
        """Whether something is to be made or removed for this spec."""
        guest = self.guests.get(instance_id)
        if guest is None or guest.rescued_from != rescued_from(spec):
            return True
        return spec.has_root and spec.root not in guest.roots

    def define(self, instance_id: str, spec: Spec) -> Guest:
        """Make what the spec needs and is missing. Raises `Refused` where that cannot be made."""
        guest = self.guests.get(instance_id) or Guest(instance_id=instance_id, spec=spec)
        if self.storage.prepare(guest, spec) or instance_id not in self.guests:
            self.guests[instance_id] = guest
            self.changed(guest)
        return guest

    def folder_of(self, instance_id: str, spec: Spec) -> Guest:
        """The instance's guest; one without any disk where there is none."""
        return self.guests.setdefault(instance_id, Guest(instance_id=instance_id, spec=spec))

    def undefine(self, guest: Guest) -> None:
        guest.untold.clear()
        self.pull_plug(guest)
        path = self._file(guest)
        if path is not None:
            path.unlink(missing_ok=True)
        if self.guests.get(guest.instance_id) is guest:
            del self.guests[guest.instance_id]

    def start(self, guest: Guest, spec: Spec, power: PowerState = PowerState.RUNNING) -> None:
        """Start a guest, in place of one that has powered itself off or panicked; `PAUSED` halts its processors.

        Raises:
            Refused: another guest uses one of the disks.
        """
        self._plug(guest, spec)
        self._boot(guest, power)

    def _plug(self, guest: Guest, spec: Spec) -> None:
        disks = self.storage.plugged(guest, spec)
        self.refuse_if_in_use(guest, *disks.values())
        guest.spec = spec
        guest.disks = disks
        guest.interfaces = {interface.id: interface for interface in spec.interfaces}

    def pull_plug(self, guest: Guest) -> None:
        """End what holds the guest, and with it everything that was sent to it and not read."""
        self._drop_unread(guest)
        guest.power = PowerState.NONE
        guest.starting = guest.frozen = guest.button_pressed = guest.standing_still = False
        guest.thaw_after_ms = None
        self.changed(guest)

    def power_cycle(self, guest: Guest) -> None:
        """Pull the plug and start the guest again with the disks that it has. Raises as `start`."""
        self.refuse_if_in_use(guest, *guest.disks.values())
        self._boot(guest, PowerState.RUNNING)

    def _boot(self, guest: Guest, power: PowerState) -> None:
        self._drop_unread(guest)
        guest.power = power
        guest.starting = power is PowerState.PAUSED
        guest.starts += 1
        guest.frozen = guest.button_pressed = guest.standing_still = guest.memory_saved = False
        guest.thaw_after_ms = None
        self.changed(guest)

    def stand_still(self, guest: Guest) -> None:
        """Halt a guest that runs for something long that is done with its memory."""
        if guest.power is PowerState.RUNNING:
            guest.power = PowerState.PAUSED
            guest.standing_still = True
            self.changed(guest)

    def run_on(self, guest: Guest) -> None:
        """Let a guest go on that stood still; nothing where it is something else by now."""
        if guest.standing_still and guest.power is PowerState.PAUSED:
            self._go_on(guest)

    def save_memory(self, guest: Guest) -> None:
        """Keep the guest's memory, and end what holds it."""
        guest.memory_saved = True
        self.pull_plug(guest)

    def restore_memory(self, guest: Guest, spec: Spec) -> None:
        """Let the guest go on from its saved memory, which is none any more. Raises `Refused` as `start`."""
        self._plug(guest, spec)
        guest.memory_saved = False
        guest.power = PowerState.RUNNING
        self.changed(guest)

    def swap_disk(self, guest: Guest, old: Disk, new: Disk) -> None:
        """Put the content of one volume on another, and that in its place."""
        self.storage.copy_volume(old, new)
        guest.disks = {
            (new.id if disk_id == old.id else disk_id): (new if disk_id == old.id else disk)
            for disk_id, disk in guest.disks.items()
        }
        self.changed(guest)

    def send(self, guest: Guest, command: Command) -> None:
        """Leave a command for a frozen guest."""
        guest.unread.append(command)
        self.keep(guest)

    def execute(self, guest: Guest, command: Command) -> None:
        """Carry a command out now. Where what it leads to holds already, nothing changes.

        Raises:
            NotThere: no guest runs, and the command needs one.
            Refused: another guest uses the disk.
        """
        match command.method:
            case Method.PAUSE:
                self._halt(guest)
            case Method.UNPAUSE:
                self._go_on(guest)
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
            case Method.DETACH_INTERFACE:
                assert command.interface_id is not None
                self._detach_interface(guest, command.interface_id)
            case _:
                raise AssertionError(f"{command.method} is not sent to a guest.")

    def _halt(self, guest: Guest) -> None:
        self._must_run(guest)
        if guest.power is PowerState.PAUSED and not guest.standing_still:
            return
        guest.power = PowerState.PAUSED
        guest.standing_still = False
        self.changed(guest)

    def _go_on(self, guest: Guest) -> None:
        if not guest.starting:
            self._must_run(guest)
        if guest.power is PowerState.RUNNING:
            return
        guest.power = PowerState.RUNNING
        guest.starting = guest.standing_still = False
        self.changed(guest)
        self._notice_button(guest)

    def _reset(self, guest: Guest) -> None:
        if guest.starts == 0:
            raise NotThere(f"Instance {guest.instance_id} was never started on this host.")
        if guest.seen is PowerState.NONE:
            self.power_cycle(guest)
            return
        guest.power = PowerState.RUNNING
        guest.resets += 1
        guest.button_pressed = guest.standing_still = False
        self.changed(guest)

    def _press_button(self, guest: Guest) -> None:
        if guest.power is PowerState.NONE:
            raise NotThere(f"No guest of instance {guest.instance_id} runs on this host.")
        if guest.seen in RUNS:
            guest.button_pressed = True
            self.keep(guest)
            self._notice_button(guest)

    def _attach(self, guest: Guest, disk: Disk) -> None:
        self._must_run(guest)
        if disk.id not in guest.disks:
            self.refuse_if_in_use(guest, disk)
            guest.disks[disk.id] = disk
            self.changed(guest)

    def _detach(self, guest: Guest, disk_id: str) -> None:
        self._must_run(guest)
        if disk_id in guest.disks:
            del guest.disks[disk_id]
            self.changed(guest)

    def _attach_interface(self, guest: Guest, interface: Interface) -> None:
        self._must_run(guest)
        if interface.id not in guest.interfaces:
            guest.interfaces[interface.id] = interface
            self.changed(guest)

    def _detach_interface(self, guest: Guest, interface_id: str) -> None:
        self._must_run(guest)
        if guest.interfaces.pop(interface_id, None) is not None:
            self.changed(guest)

    def _must_run(self, guest: Guest) -> None:
        if guest.seen not in RUNS:
            raise NotThere(f"No guest of instance {guest.instance_id} runs on this host.")

    def refuse_if_in_use(self, guest: Guest | None, *disks: Disk) -> None:
        """Raise `Refused` if another guest (None: any) has one of the disks."""
        for disk in disks:
            if disk.id in {ROOT, RESCUE}:
                continue  # an instance's own, and looking at every guest takes time
            for other in self.guests.values():
                if other is not guest and other.uses(disk):
                    raise Refused(f"The disk {disk.path} is in use by instance {other.instance_id}.")

    # -------------------------------------------------------------------------------------- what happens by itself

    def freeze(self, instance_id: str, thaw_after_ms: int | None = None) -> bool:
        """Stop what holds the guest, as SIGSTOP does; it goes on by itself only if a time is given."""
        guest = self.guests.get(instance_id)
        if guest is None or guest.power is PowerState.NONE or guest.frozen:
            return False
        guest.frozen = True
        guest.thaw_after_ms = thaw_after_ms
        self.keep(guest)
        return True

    def thaw(self, instance_id: str) -> bool:
        """Let what holds the guest go on: it does what was sent to it meanwhile, in order."""
        guest = self.guests.get(instance_id)
        if guest is None or not guest.frozen:
            return False
        guest.frozen = False
        guest.thaw_after_ms = None
        unread, guest.unread = guest.unread, []
        for command in unread:
            try:
                self.execute(guest, command)
            except HypervisorError as error:
                self._answer(command, error)
            else:
                self._answer(command, None)
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

    def guest_resets(self, instance_id: str) -> bool:
        return self._acts(instance_id, PowerState.RUNNING, GuestEvent.RESET)

    def vanish(self, instance_id: str) -> bool:
        """End what holds the guest, unasked; a frozen or paused one too."""
        guest = self.guests.get(instance_id)
        if guest is None or guest.power is PowerState.NONE:
            return False
        if guest.seen in RUNS:
            guest.untold.append(GuestEvent.VANISHED)
        self.pull_plug(guest)
        return True

    def ignore_power_button(self, instance_id: str, *, ignores: bool = True) -> None:
        """Let the guest ignore its power button from now on, or heed it again."""
        guest = self.guests[instance_id]
        guest.ignores_power_button = ignores
        self.keep(guest)

    def answer_button(self, instance_id: str) -> bool:
        """Let the guest react to its power button, if that was pressed and nothing came between."""
        guest = self.guests.get(instance_id)
        heeds = guest is not None and guest.button_pressed and not guest.ignores_power_button
        return heeds and self.guest_powers_off(instance_id)

    def _acts(self, instance_id: str, power: PowerState, event: GuestEvent) -> bool:
        guest = self.guests.get(instance_id)
        if guest is None or guest.power is not PowerState.RUNNING or guest.frozen:
            return False
        guest.power = power
        guest.resets += event is GuestEvent.RESET
        guest.button_pressed = False
        guest.untold.append(event)
        self.changed(guest)
        return True

    def _notice_button(self, guest: Guest) -> None:
        able = guest.power is PowerState.RUNNING and not guest.frozen and not guest.ignores_power_button
        if able and guest.button_pressed and self._watcher is not None:
            self._watcher.button_pressed(guest)

    def _drop_unread(self, guest: Guest) -> None:
        unread, guest.unread = guest.unread, []
        for command in unread:
            self._answer(command, NotThere(f"What held instance {guest.instance_id} has ended."))

    def _answer(self, command: Command, error: HypervisorError | None) -> None:
        if self._watcher is not None:
            self._watcher.answered(command, error)
