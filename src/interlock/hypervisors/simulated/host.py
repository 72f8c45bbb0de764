"""The simulated host: its guests, and everything that can happen to them. No waiting happens here.

The rules of this file:

* The host outlives whoever drives it, as processes outlive a server. With a folder, it outlives the Python process
  too: each change is in the guest's file before the call that made it returns, so that a `kill -9` loses nothing.
* What a guest does by itself is kept as untold until the watcher has told it, so it is told once however the
  watcher dies.
* A frozen guest reads nothing. What is sent to it waits, and takes effect when it thaws, whoever sent it and whatever
  has become of the sender, unless the plug was pulled first.

Who waits for an answer, for how long, and with which right to act is not here: see `adapter`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, assert_never
from urllib.parse import quote

import msgspec

from interlock.core.errors import HypervisorError, NotThere, Refused, Unavailable
from interlock.core.records import Disk, GuestEvent, Spec
from interlock.core.states import PowerState
from interlock.hypervisors.simulated.faults import FaultPlan, FaultRates, Method
from interlock.hypervisors.simulated.guest import ROOT, RUNS, Command, Guest, root_disk


class Watcher(Protocol):
    """Who drives the host now."""

    def replaced(self) -> None:
        """Somebody else drives it from now on."""

    def stirred(self, guest: Guest) -> None:
        """The guest changed; it may have something untold."""

    def button_pressed(self, guest: Guest) -> None:
        """The guest will react to its power button, in its own time, by `SimulatedHost.answer_button`."""

    def answered(self, command: Command, error: HypervisorError | None) -> None:
        """A command that had waited was carried out, refused, or lost with the guest."""


class SimulatedHost:
    """Guests that are records, and the hooks by which a test lets them act by themselves.

    The hooks (`guest_powers_off` and so on) return whether the guest could do that: a guest that does not run,
    is paused or is frozen does nothing. They are called in the thread of the event loop.
    """

    def __init__(self, *, seed: int = 0, rates: FaultRates | None = None, folder: Path | None = None) -> None:
        self.faults = FaultPlan(seed, rates)
        self.guests: dict[str, Guest] = {}
        self._folder = folder
        self._watcher: Watcher | None = None

    # ------------------------------------------------------------------------------------------------------ keeping

    def load(self) -> None:
        """Read the folder again, where there is one.

        Raises:
            Unavailable: the folder cannot be used, or a file in it is not one of a guest.
        """
        if self._folder is None:
            return
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            kept = [msgspec.json.decode(path.read_bytes(), type=Guest) for path in sorted(self._folder.glob("*.json"))]
        except (OSError, msgspec.DecodeError) as error:
            raise Unavailable(
                f"The simulated host cannot read its guests in {self._folder}: {error}",
                remedy="Make the folder writable for this user; if a file in it is damaged, remove that file.",
            ) from error
        self.guests = {guest.instance_id: guest for guest in kept}

    def _file(self, guest: Guest) -> Path | None:
        return None if self._folder is None else self._folder / f"{quote(guest.instance_id, safe='')}.json"

    def keep(self, guest: Guest) -> None:
        """Write the guest's file, whole or not at all. Does nothing without a folder."""
        path = self._file(guest)
        if path is not None and self.guests.get(guest.instance_id) is guest:
            draft = path.with_suffix(".draft")
            draft.write_bytes(msgspec.json.encode(guest))
            draft.replace(path)

    def watch(self, watcher: Watcher) -> None:
        """Tell `watcher` from now on, and nobody else."""
        before, self._watcher = self._watcher, watcher
        if before is not None and before is not watcher:
            before.replaced()

    def unwatch(self, watcher: Watcher) -> None:
        """Tell nobody, if `watcher` is who was told."""
        if self._watcher is watcher:
            self._watcher = None

    def _changed(self, guest: Guest) -> None:
        self.keep(guest)
        if self._watcher is not None:
            self._watcher.stirred(guest)

    # ------------------------------------------------------------------------------------------- what a driver does

    def define(self, instance_id: str, spec: Spec) -> None:
        guest = self.guests[instance_id] = Guest(instance_id=instance_id, spec=spec)
        self.keep(guest)

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
        disks = {disk.id: disk for disk in (*root_disk(guest.instance_id, spec.image), *spec.disks)}
        self._refuse_if_in_use(guest, *disks.values())
        guest.spec = spec
        guest.disks = disks
        self._boot(guest, power)

    def pull_plug(self, guest: Guest) -> None:
        """End what holds the guest, and with it everything that was sent to it and not read."""
        self._drop_unread(guest)
        guest.power = PowerState.NONE
        guest.starting = guest.frozen = guest.button_pressed = False
        guest.thaw_after_ms = None
        self._changed(guest)

    def power_cycle(self, guest: Guest) -> None:
        """Pull the plug and start the guest again with the disks that it has. Raises as `start`."""
        self._refuse_if_in_use(guest, *guest.disks.values())
        self._boot(guest, PowerState.RUNNING)

    def _boot(self, guest: Guest, power: PowerState) -> None:
        self._drop_unread(guest)
        guest.power = power
        guest.starting = power is PowerState.PAUSED
        guest.starts += 1
        guest.frozen = guest.button_pressed = False
        guest.thaw_after_ms = None
        self._changed(guest)

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
            case Method.PRESS_POWER_BUTTON:
                self._press_button(guest)
            case Method.ATTACH_DISK:
                assert command.disk is not None
                self._attach(guest, command.disk)
            case Method.DETACH_DISK:
                assert command.disk_id is not None
                self._detach(guest, command.disk_id)
            case Method.INSPECT | Method.DEFINE | Method.UNDEFINE | Method.POWER_ON | Method.POWER_OFF:
                raise AssertionError(f"{command.method} is not sent to a guest.")
            case _:
                assert_never(command.method)

    def _halt(self, guest: Guest) -> None:
        self._must_run(guest)
        if guest.power is PowerState.PAUSED:
            return
        guest.power = PowerState.PAUSED
        self._changed(guest)

    def _go_on(self, guest: Guest) -> None:
        if not guest.starting:
            self._must_run(guest)
        if guest.power is PowerState.RUNNING:
            return
        guest.power = PowerState.RUNNING
        guest.starting = False
        self._changed(guest)
        self._notice_button(guest)

    def _reset(self, guest: Guest) -> None:
        if guest.starts == 0:
            raise NotThere(f"Instance {guest.instance_id} was never started on this host.")
        if guest.seen is PowerState.NONE:
            self.power_cycle(guest)
            return
        guest.power = PowerState.RUNNING
        guest.resets += 1
        guest.button_pressed = False
        self._changed(guest)

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
            self._refuse_if_in_use(guest, disk)
            guest.disks[disk.id] = disk
            self._changed(guest)

    def _detach(self, guest: Guest, disk_id: str) -> None:
        self._must_run(guest)
        if disk_id in guest.disks:
            del guest.disks[disk_id]
            self._changed(guest)

    def _must_run(self, guest: Guest) -> None:
        if guest.seen not in RUNS:
            raise NotThere(f"No guest of instance {guest.instance_id} runs on this host.")

    def _refuse_if_in_use(self, guest: Guest, *disks: Disk) -> None:
        for disk in disks:
            if disk.id == ROOT:
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
        self._changed(guest)
        self._notice_button(guest)
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
        self._changed(guest)
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
