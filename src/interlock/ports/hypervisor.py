"""The hypervisor port: life cycle, devices, memory, disks and consoles of the guests of one host, and their events.

Its conformance suite is `tests/conformance/hypervisor/`: docstrings here are tested there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from interlock.core.records import Disk, Forward, GuestEvent, Interface, Spec
from interlock.core.states import PowerState


class Permit(Protocol):
    """A worker's right to act on one instance, which can be lost at any moment."""

    @property
    def fence(self) -> int:
        """The fencing token: the permit is lost when a greater one is issued."""
        ...

    def check(self) -> None:
        """Return if the worker may still act.

        Raises:
            Fenced: its request was superseded.
        """
        ...


class Report(Protocol):
    """Progress callback of a long operation."""

    def __call__(self, done: int, total: int | None = None) -> None:
        """Report the bytes done and the total. Cheap: may be called often.

        Raises:
            Fenced: the worker has lost its right to act.
        """
        ...


class TransferReport(Report, Protocol):
    """Progress callback with status text and warning."""

    def __call__(
        self, done: int, total: int | None = None, *, detail: str | None = None, warning: str | None = None
    ) -> None:
        """As `Report`; `detail` is a status text, `warning` says why the operation will not complete as things are."""
        ...


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """The actual state of an instance on a host."""

    defined: bool
    """Whether anything of it exists: disks, a folder, a QEMU process."""
    power_state: PowerState
    disks: tuple[str, ...] = ()
    """Ids of the running guest's disks, `root` included; empty if no guest runs."""
    interfaces: tuple[str, ...] = ()
    """Ids of the running guest's interfaces beyond the first."""
    memory_saved: bool = False
    """Whether the guest's memory is saved to a file."""
    paused: bool = False
    """Whether the guest was paused by request, and not halted for an error or suspended by itself."""
    responsive: bool = True
    """False if a QEMU process runs but timed out; power_state is then the last known."""


class GuestInterface(msgspec.Struct, frozen=True, kw_only=True):
    """A network interface as the guest agent reports it."""

    mac: str
    """In lower case."""
    addresses: tuple[str, ...] = ()
    """IPv4 and IPv6, without the length of their prefix."""


class Stream(Protocol):
    """A byte stream to a guest's console or display."""

    async def read(self) -> bytes:
        """Return the next bytes; empty at the end."""
        ...

    async def write(self, data: bytes) -> None:
        """Send bytes. Raises `GuestNotFound` if the guest has ended."""
        ...

    async def close(self) -> None:
        """Close the stream; the guest is not affected."""
        ...


class HypervisorEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a guest."""

    instance_id: str
    kind: GuestEvent
    during_watch: bool = True
    """False if it happened while no process watched the guest, and was recorded."""


class Hypervisor(Protocol):
    """The guests of one host.

    Every method that changes something takes the worker's permit and checks it immediately before each effect, not
    only at the start. Every one is idempotent: called again after a crash at any point, it completes what was begun,
    and does nothing if that is done already. All raise `OperationRejected`, `NotResponding` or `GuestNotFound` as
    defined in the error tree, and `Fenced` when the permit is lost; a worker may be cancelled at any await.
    """

    async def open(self, listener: Callable[[HypervisorEvent], None]) -> None:
        """Adopt the host's guests, and call `listener` (on the event loop) with their events from now on.

        Guests that outlived an earlier process are found again, and their events from the meantime are delivered with
        `during_watch=False` before this returns; those of a guest that does not respond at once, as soon as it does.
        A requested end of a guest is not an event. A QEMU process that stops responding is reported within a time
        limit, and so is its recovery. An operation that takes effect after it timed out is reported as a change.

        Raises:
            Unavailable: guests cannot run on this host; with reason and remedy.
        """
        ...

    async def close(self) -> None:
        """Detach from the guests, which keep running."""
        ...

    async def known(self) -> frozenset[str]:
        """Return the ids of all instances of which anything exists on the host, running or not."""
        ...

    async def inspect(self, instance_id: str) -> Observation:
        """Return the actual state. Never raises for an unknown or unresponsive instance."""
        ...

    async def define(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        """Create what the instance needs on this host without starting it, and remove what it no longer needs.

        That is: its folder; the root disk `spec.root` if it is missing and was never created (an empty overlay of the
        image, or an empty disk); the disk of its rescue image, new for each rescue, and none without a rescue; its
        cloud-init seed. Other root disks stay, see `drop_root_disks`. Root disks are in the folder `spec.shared`, if
        set.

        Raises:
            OperationRejected: the image, the rescue image or a volume is missing or damaged, or a root disk that was
                created before (`spec.root_made`) or has no backing file (only `root_disk_from` and `copy_root_disk`
                create those); the message names the file. Or no space is left; or the shared folder is missing or
                another one. Or it is not defined here yet, and this host lacks a bridge that it needs.
        """
        ...

    async def undefine(self, permit: Permit, instance_id: str) -> None:
        """Remove everything of the instance on this host; a running guest is ended first.

        Volumes and root disks in a shared folder stay: another host may use them.
        """
        ...

    async def power_on(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        """Start the guest with the disks of `spec`; return when its vCPUs run.

        Raises:
            OperationRejected: one of its files is missing or damaged; the message names it.
        """
        ...

    async def power_off(self, permit: Permit, instance_id: str) -> None:
        """Power off hard: the QEMU process has ended when this returns, responsive or not."""
        ...

    async def press_power_button(self, permit: Permit, instance_id: str) -> None:
        """Send the guest an ACPI power button event and return at once."""
        ...

    async def wait_powered_off(self, instance_id: str) -> None:
        """Wait until no guest runs: it powered itself off, or its QEMU process has ended. Changes nothing."""
        ...

    async def reset(self, permit: Permit, instance_id: str) -> None:
        """Reset the guest hard; it runs afterwards, also if it was powered off or crashed."""
        ...

    async def pause(self, permit: Permit, instance_id: str) -> None: ...

    async def unpause(self, permit: Permit, instance_id: str) -> None: ...

    async def attach_disk(self, permit: Permit, instance_id: str, disk: Disk) -> None:
        """Hot-plug a disk into the running guest. Idempotent.

        Raises:
            GuestNotFound: no guest runs.
        """
        ...

    async def detach_disk(self, permit: Permit, instance_id: str, disk_id: str) -> None:
        """Unplug a disk from the running guest; return when the guest has released it.

        Raises:
            GuestNotFound: no guest runs.
            NotResponding: the guest did not release it in time; the disk is still in use.
        """
        ...

    async def swap_disk(self, permit: Permit, instance_id: str, old: Disk, new: Disk, report: Report) -> None:
        """Mirror `old` to `new` while the guest writes, and switch the guest to `new`.

        The guest sees the same device. Does nothing if it has `new` and not `old`. On cancellation the guest keeps
        `old`.

        Raises:
            GuestNotFound: no guest runs.
            OperationRejected: the guest has neither, `new` is smaller, or no space is left; the guest keeps `old`, and
                `new` is not in use.
            NotResponding: the mirror can neither complete nor be cancelled, and `new` may be written to.
        """
        ...

    async def copy_disk(self, permit: Permit, instance_id: str, old: Disk, new: Disk, report: Report) -> None:
        """Copy `old` to `new`, at least as large, while no guest has either.

        Called again it starts over. On cancellation the content of `new` is undefined.

        Raises:
            OperationRejected: one of them is in use or not found, `new` is smaller, or no space is left.
        """
        ...

    async def attach_interface(self, permit: Permit, instance_id: str, interface: Interface) -> None:
        """Hot-plug an interface into the running guest. Idempotent. Raises `GuestNotFound`."""
        ...

    async def update_interface(
        self, permit: Permit, instance_id: str, interface: Interface, forwards: tuple[Forward, ...]
    ) -> None:
        """Bring an interface of the running guest, also the first, to what it says; the device stays. Idempotent.

        Another network, other addresses, limits and rules; of the first interface also all forwards of the guest. A
        guest that is moved to another network sees its link go down and up.

        Raises:
            GuestNotFound.
            OperationRejected: it has no such interface, or this host cannot do that.
        """
        ...

    async def detach_interface(self, permit: Permit, instance_id: str, interface_id: str) -> None:
        """Unplug an interface; return when the guest has released it. Raises as `detach_disk`."""
        ...

    # ------------------------------------------------------------------------------------------- memory

    async def save_memory(self, permit: Permit, instance_id: str, report: Report) -> None:
        """Save the guest's memory to a file and end its QEMU process; durable when this returns. Idempotent.

        On failure or cancellation the guest continues as it was (running or paused), and the file is removed.

        Raises:
            GuestNotFound: no guest runs, and no memory is saved.
            OperationRejected: it could not be written, such as no space left.
        """
        ...

    async def restore_memory(self, permit: Permit, instance_id: str, spec: Spec, report: Report) -> None:
        """Restore the guest from its saved memory; return when its vCPUs run and the file is removed.

        A guest runs from a saved memory at most once: the file is removed before its vCPUs run, and a repeated call
        runs a guest that was restored and is still paused. `spec` is the one with which it was saved.

        Raises:
            GuestNotFound: no memory is saved, and no guest runs.
            OperationRejected: it could not be read; it is still saved.
        """
        ...

    async def forget_memory(self, permit: Permit, instance_id: str) -> None:
        """Discard the saved memory, if there is one. `power_on` and `undefine` do so too."""
        ...

    async def dump_memory(self, permit: Permit, instance_id: str, target: Path, report: Report) -> None:
        """Write a dump of the guest's memory for a debugger (compressed kdump) to `target`, atomically.

        The guest is paused meanwhile, and continues afterwards as it was: running, paused or crashed.

        Raises:
            GuestNotFound: there is no guest.
            OperationRejected: it could not be written.
        """
        ...

    # -------------------------------------------------------------------------------------- the root disk

    async def copy_root_disk(self, permit: Permit, instance_id: str, old: Spec, new: Spec, report: Report) -> None:
        """Create the root disk of `new` as a copy of that of `old`, with the size in `new`, if it is missing.

        Call it while no guest runs. Does nothing if neither has one.

        Raises:
            OperationRejected: no space left, or it would be smaller.
        """
        ...

    async def root_disk_from(self, permit: Permit, instance_id: str, spec: Spec, source: Path, report: Report) -> None:
        """Create the root disk of `spec`, without backing file, from the qcow2 file at `source`, if it is missing."""
        ...

    async def drop_root_disks(self, permit: Permit, instance_id: str, spec: Spec, kept: frozenset[int]) -> None:
        """Remove every root disk of the instance but those numbers, in the folder of `spec`.

        Raises:
            OperationRejected: a guest of this host uses one of them, or the shared folder is missing or another one.
        """
        ...

    async def export_root_disk(
        self, permit: Permit, instance_id: str, spec: Spec, target: Path, report: Report
    ) -> None:
        """Write a point-in-time copy of the root disk to `target`: sparse, compressed qcow2 without backing file.

        The guest continues; with a guest agent, its file systems are flushed and frozen only until the copy begins.
        `target` is written atomically.

        Raises:
            OperationRejected: the instance has no root disk, or no space is left.
        """
        ...

    # --------------------------------------------------------------------------------------- guest agent

    async def agent_answers(self, instance_id: str) -> bool:
        """Whether the guest agent responds."""
        ...

    async def agent_interfaces(self, instance_id: str) -> tuple[GuestInterface, ...]:
        """Return the interfaces that have a MAC address, as the guest agent reports them. Nothing of it is verified.

        Raises:
            GuestNotFound: no guest runs.
            OperationRejected: the guest agent does not respond, or rejects it.
        """
        ...

    async def ask_shutdown(self, permit: Permit, instance_id: str) -> None:
        """Ask the guest to power itself off, by the guest agent if it responds, else by the ACPI power button."""
        ...

    async def set_password(self, permit: Permit, instance_id: str, user: str, password: str) -> None:
        """Set a user's password through the guest agent.

        Raises:
            GuestNotFound: no guest runs.
            OperationRejected: the guest agent does not respond, or rejects it.
        """
        ...

    # -------------------------------------------------------------------------------- console and display

    async def screenshot(self, instance_id: str) -> bytes:
        """Return a screenshot of the guest's display, as PNG.

        Raises:
            GuestNotFound: no guest runs.
            OperationRejected: the guest has no display.
        """
        ...

    async def open_console(self, instance_id: str) -> Stream:
        """Open a connection to the guest's serial console, with its output from now on.

        Any number may be open at once. It ends with the guest. Raises `GuestNotFound`.
        """
        ...

    async def open_display(self, instance_id: str) -> Stream:
        """Open a VNC (RFB) connection to the guest's display. Raises `GuestNotFound`, `OperationRejected`."""
        ...

    async def console_tail(self, instance_id: str, length: int) -> bytes | None:
        """Return the last `length` bytes of the guest's serial console output, whether it runs or not.

        None if there is no console log yet.
        """
        ...
