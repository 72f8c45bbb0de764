"""What a host must be able to do with guests, and how it tells what they do by themselves.

Its conformance suite is `testing/check_hypervisor/`: a sentence in a docstring here is a test there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from interlock.core.records import Disk, GuestEvent, Interface, Spec
from interlock.core.states import PowerState


class Permit(Protocol):
    """A worker's right to act on one instance, which can be lost at any moment."""

    @property
    def fence(self) -> int:
        """Which right it is: it is lost when one with a greater number is given."""
        ...

    def check(self) -> None:
        """Return if the worker may still act.

        Raises:
            Fenced: its request was superseded.
        """
        ...


class Report(Protocol):
    """Where something long says how far it is."""

    def __call__(self, done: int, total: int | None = None) -> None:
        """Say that so many bytes of so many are done. Cheap: may be called often.

        Raises:
            Fenced: the worker that waits for it has lost its right to act.
        """
        ...


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """What a hypervisor holds of an instance, found by looking."""

    defined: bool
    """Whether it has anything at all of it: disks, a folder, a process."""
    power_state: PowerState
    disks: tuple[str, ...] = ()
    """Ids of the disks that the running guest has, `root` included; empty when no guest runs."""
    interfaces: tuple[str, ...] = ()
    """Ids of the interfaces beyond the first that the running guest has."""
    memory_saved: bool = False
    """Whether the guest's memory is in a file, from which it can be restored."""
    responsive: bool = True
    """False if something holds the guest but gave no answer in time; power_state is then the last known."""


class Stream(Protocol):
    """A connection with a guest, of bytes."""

    async def read(self) -> bytes:
        """The next bytes; empty at the end."""
        ...

    async def write(self, data: bytes) -> None:
        """Send bytes. Raises `NotThere` when it has ended."""
        ...

    async def close(self) -> None:
        """Let go of it; the guest is not disturbed."""
        ...


class HypervisorEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that the hypervisor told of its own accord."""

    instance_id: str
    kind: GuestEvent
    during_watch: bool = True
    """False if it happened while nobody watched, and was kept."""


class Hypervisor(Protocol):
    """Holds guests. One object serves one host.

    Every method that changes something takes the worker's permit and checks it immediately before each effect, not
    only at the start. Every one converges: called again after a crash at any point, it completes what was begun, and
    where what it leads to holds already it does nothing. All raise `Refused`, `NotResponding` or `NotThere` with the
    meanings of the error tree, and `Fenced` when the permit is lost; a worker may be cancelled at any await.
    """

    async def open(self, listener: Callable[[HypervisorEvent], None]) -> None:
        """Take charge of the host's guests, and from now on tell `listener` (on the event loop) what they do.

        Guests that outlived an earlier process are found again, and what they did meanwhile is told with
        `during_watch=False` before this returns. An end that this object was asked for is not told.

        Raises:
            Unavailable: with the reason and the remedy, when guests cannot be held here.
        """
        ...

    async def close(self) -> None:
        """Let go of the guests without disturbing them."""
        ...

    async def known(self) -> frozenset[str]:
        """The ids of all instances of which anything is here, running or not."""
        ...

    async def inspect(self, instance_id: str) -> Observation:
        """Look at what is there. Never raises for an unknown or frozen instance: that is an answer."""
        ...

    async def define(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        """Make what the instance needs on this host without starting it, and remove what it needs no more.

        That is: its folder; the root disk `spec.root` if it is missing (an empty layer over the image, or an empty
        disk), never one that is there; the disk of its rescue image while it has one, fresh for each rescue, and none
        while it has none; its seed. Other root disks stay, see `drop_root_disks`. Root disks are in the folder that
        `spec.shared` names, for all hosts that have it.

        Raises:
            Refused: the image, or its rescue image, is not there any more, or a root disk that stands by itself is
                not, which only `root_disk_from` and `copy_root_disk` make; or there is no room; or the shared folder is
                not there, or is another one.
        """
        ...

    async def undefine(self, permit: Permit, instance_id: str) -> None:
        """Remove everything of the instance that is this host's; a running guest is ended first.

        Volumes' files are not touched, and no root disk in a shared folder: another host may use it.
        """
        ...

    async def power_on(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        """Start the guest with the disks that `spec` lists; returns when its processors run."""
        ...

    async def power_off(self, permit: Permit, instance_id: str) -> None:
        """Pull the plug: whatever holds the guest has ended when this returns, frozen or not."""
        ...

    async def press_power_button(self, permit: Permit, instance_id: str) -> None:
        """Ask the guest to power itself off. Returns at once; whether it does is told or can be seen."""
        ...

    async def wait_powered_off(self, instance_id: str) -> None:
        """Return as soon as no guest runs: it powered itself off, or what held it has ended. Changes nothing."""
        ...

    async def reset(self, permit: Permit, instance_id: str) -> None:
        """Reset the machine, as its reset button would; it runs afterwards also if it was powered off or crashed."""
        ...

    async def pause(self, permit: Permit, instance_id: str) -> None: ...

    async def unpause(self, permit: Permit, instance_id: str) -> None: ...

    async def attach_disk(self, permit: Permit, instance_id: str, disk: Disk) -> None:
        """Plug a disk into the running guest. Does nothing where it is plugged in already.

        Raises:
            NotThere: no guest runs.
        """
        ...

    async def detach_disk(self, permit: Permit, instance_id: str, disk_id: str) -> None:
        """Unplug a disk from the running guest; returns when the guest has let go of it.

        Raises:
            NotThere: no guest runs.
            NotResponding: the guest did not let go in time; the disk is still in use.
        """
        ...

    async def swap_disk(self, permit: Permit, instance_id: str, old: Disk, new: Disk, report: Report) -> None:
        """Copy the content of `old` to `new` while the guest writes, and let the guest go on with `new` in its place.

        The guest sees the same device. Where it has `new` and not `old`, nothing is done. A worker that is cancelled
        half-way leaves the guest with `old`.

        Raises:
            NotThere: no guest runs.
            Refused: the guest has neither, `new` is smaller, or there is no room; the guest has `old`, and nothing has
                `new`.
            NotResponding: what was begun can neither be gone on with nor ended, and `new` may be written to.
        """
        ...

    async def copy_disk(self, permit: Permit, instance_id: str, old: Disk, new: Disk, report: Report) -> None:
        """Copy the content of `old` to `new`, at least as large, while no guest has either.

        Called again it begins anew. A worker that is cancelled half-way leaves `new` with anything.

        Raises:
            Refused: something has one of them open, one is not there, `new` is smaller, or there is no room.
        """
        ...

    async def attach_interface(self, permit: Permit, instance_id: str, interface: Interface) -> None:
        """Plug an interface into the running guest. Does nothing where it is plugged in. Raises `NotThere`."""
        ...

    async def detach_interface(self, permit: Permit, instance_id: str, interface_id: str) -> None:
        """Unplug an interface; returns when the guest has let go of it. Raises as `detach_disk`."""
        ...

    # ------------------------------------------------------------------------------------------- memory

    async def save_memory(self, permit: Permit, instance_id: str, report: Report) -> None:
        """Write the guest's memory to a file and end what held it; durable when this returns.

        Where it is saved already, nothing is done. A guest of which it failed, or whose worker was cancelled, goes on
        as it was (running or paused), with no file.

        Raises:
            NotThere: no guest runs, and nothing is saved.
            Refused: it could not be written, such as for lack of room.
        """
        ...

    async def restore_memory(self, permit: Permit, instance_id: str, spec: Spec, report: Report) -> None:
        """Go on with the guest from its saved memory; returns when its processors run, and nothing is saved any more.

        A guest runs from one saved memory once: from the moment its processors may have run, the file is no more, and
        a call that finds the guest so lets it run. `spec` is that with which it was saved.

        Raises:
            NotThere: nothing is saved, and no guest runs.
            Refused: it could not be read; it is still saved.
        """
        ...

    async def forget_memory(self, permit: Permit, instance_id: str) -> None:
        """Give up the saved memory, if there is one. `power_on` and `undefine` do so too."""
        ...

    async def dump_memory(self, permit: Permit, instance_id: str, target: Path, report: Report) -> None:
        """Write a dump of the guest's memory for a debugger (compressed kdump) to `target`, there whole or not at all.

        The guest stands still meanwhile, and is afterwards what it was: running, paused or crashed.

        Raises:
            NotThere: no guest is there.
            Refused: it could not be written.
        """
        ...

    # -------------------------------------------------------------------------------------- the root disk

    async def copy_root_disk(self, permit: Permit, instance_id: str, old: Spec, new: Spec, report: Report) -> None:
        """Make the root disk of `new` as a copy of that of `old`, as large as `new` says, if it is missing.

        To be called while no guest runs. Does nothing where neither has one.

        Raises:
            Refused: there is no room, or it would be smaller.
        """
        ...

    async def root_disk_from(self, permit: Permit, instance_id: str, spec: Spec, source: Path, report: Report) -> None:
        """Make the root disk of `spec`, which is whole, from the image file (qcow2) at `source`, if it is missing."""
        ...

    async def drop_root_disks(self, permit: Permit, instance_id: str, spec: Spec, kept: frozenset[int]) -> None:
        """Remove every root disk of the instance but those numbers, where `spec` has them.

        Raises:
            Refused: a guest of this host has one of them, or the shared folder is not there, or is another one.
        """
        ...

    async def export_root_disk(
        self, permit: Permit, instance_id: str, spec: Spec, target: Path, report: Report
    ) -> None:
        """Write the root disk as it is at one moment to `target`: sparse, compressed qcow2 that needs no other file.

        The guest goes on meanwhile; one that has a guest agent is asked to flush its file systems before that moment
        and frozen for no longer than it takes to begin. `target` is there whole or not at all.

        Raises:
            Refused: the instance has no root disk, or there is no room.
        """
        ...

    # --------------------------------------------------------------------------------------- guest agent

    async def agent_answers(self, instance_id: str) -> bool:
        """Whether a guest agent answers in the guest."""
        ...

    async def ask_shutdown(self, permit: Permit, instance_id: str) -> None:
        """Ask the guest to power itself off, by its agent if that answers, else by its power button."""
        ...

    async def set_password(self, permit: Permit, instance_id: str, user: str, password: str) -> None:
        """Have the guest agent set a user's password.

        Raises:
            NotThere: no guest runs.
            Refused: no guest agent answers, or it says no.
        """
        ...

    # ------------------------------------------------------------------------------ seeing and being seen

    async def screenshot(self, instance_id: str) -> bytes:
        """What the guest's screen shows, as PNG.

        Raises:
            NotThere: no guest runs.
            Refused: the guest has no screen.
        """
        ...

    async def open_console(self, instance_id: str) -> Stream:
        """A connection to the guest's serial console: what it writes from now on, and what is typed.

        Any number may be open at once. It ends when the guest does. Raises `NotThere`.
        """
        ...

    async def open_display(self, instance_id: str) -> Stream:
        """A connection that speaks VNC (RFB) with the guest's screen. Raises `NotThere`, `Refused`."""
        ...

    async def console_tail(self, instance_id: str, length: int) -> bytes | None:
        """The last so many bytes that the guest wrote on its serial console, whether it runs or not.

        None where there is no console, or none was written yet.
        """
        ...
