"""The hypervisor port on a simulated host.

How a call runs, with delay, fault and permit, is in `calls`; what a guest does, in `host`; events are in `watcher`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

from interlock.core.errors import GuestNotFound, OperationRejected
from interlock.core.networks import NetworkKind
from interlock.core.records import Disk, Forward, Interface, Spec
from interlock.core.states import PowerState
from interlock.hypervisors.simulated.calls import CallRunner
from interlock.hypervisors.simulated.console import SimulatedConsole, SimulatedDisplay, SimulatedStream, screenshot_png
from interlock.hypervisors.simulated.disk_content import GIB, whole_file, write_qcow2
from interlock.hypervisors.simulated.faults import AnswerLost, GuestVanishes, Hangs, Method, Refuses
from interlock.hypervisors.simulated.guest import RUNS, Command, SimulatedGuest, hashed
from interlock.hypervisors.simulated.host import SimulatedHost
from interlock.hypervisors.simulated.storage import missing_root
from interlock.hypervisors.simulated.watcher import GuestWatcher
from interlock.ports import GuestInterface, HypervisorEvent, Observation, Permit, Report, Stream
from interlock.ports.hosts import NetworkAbility

_MIB: Final = 1 << 20
_KDUMP: Final = b"KDUMP   "
"""The signature of a compressed kdump."""
_StreamT = TypeVar("_StreamT", bound=SimulatedStream)


class SimulatedHypervisor:
    """Drives a `SimulatedHost`, which may outlive it. See `ports.Hypervisor` for the methods.

    Args:
        host: the guests; default: a new host in memory.
        delays_ms: the delay of each call before its effect, in milliseconds; default 0.
        power_off_ms: how long a guest takes to react to its power button, in milliseconds.
        answer_timeout_s: the timeout of a call, in seconds.
        liveness_timeout_ms: after what time without a response a guest is reported, in milliseconds.
        sleep: waits for seconds; pass that of a virtual clock to work in virtual time.
    """

    def __init__(
        self,
        host: SimulatedHost | None = None,
        *,
        delays_ms: Mapping[Method, int] | None = None,
        power_off_ms: int = 0,
        answer_timeout_s: float = 5.0,
        liveness_timeout_ms: int = 15_000,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self.host = host or SimulatedHost()
        self._watcher = GuestWatcher(
            self.host, sleep, power_off_ms=power_off_ms, liveness_timeout_ms=liveness_timeout_ms
        )
        self._calls = CallRunner(self._watcher, sleep, delays_ms=delays_ms or {}, answer_timeout_s=answer_timeout_s)

    @property
    def networks(self) -> tuple[NetworkAbility, ...]:
        """The kinds of network that guests on this host can have: all."""
        return tuple(NetworkAbility(kind=kind, available=True, detail="simulated") for kind in NetworkKind)

    async def open(self, listener: Callable[[HypervisorEvent], None]) -> None:
        self._watcher.open(listener)

    async def close(self) -> None:
        self._watcher.close()

    def crash(self) -> None:
        """End as the process of a killed server does: nothing is reported or changed from now on."""
        self._watcher.close()

    # --------------------------------------------------------------------------------------------------- state

    async def known(self) -> frozenset[str]:
        self._watcher.require_open()
        return frozenset(self.host.guests)

    async def inspect(self, instance_id: str) -> Observation:
        self._watcher.require_open()
        guest = self.host.guests.get(instance_id)
        fault, quiet = self._calls.next_fault(instance_id, Method.INSPECT)
        responsive = True
        if guest is not None and (guest.frozen or not quiet):
            await self._calls.delay(Method.INSPECT, fault)
            if isinstance(fault, Hangs):
                self._calls.freeze(guest, fault)
            responsive = not guest.frozen or await self._calls.responds(guest)
            guest = self.host.guests.get(instance_id)
        if guest is None:
            return Observation(defined=False, power_state=PowerState.NONE)
        seen = guest.seen
        runs = seen in RUNS
        return Observation(
            defined=True,
            power_state=seen,
            disks=tuple(guest.disks) if runs else (),
            interfaces=tuple(guest.interfaces) if runs else (),
            memory_saved=guest.memory_saved,
            paused=seen is PowerState.PAUSED and not guest.paused_for_memory,
            responsive=responsive,
        )

    async def wait_powered_off(self, instance_id: str) -> None:
        self._watcher.require_open()
        while (guest := self.host.guests.get(instance_id)) is not None:
            if guest.seen not in RUNS:
                return
            await self._watcher.wait_for_change(instance_id)

    # ----------------------------------------------------------------------------------------- without the guest

    async def define(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        self._watcher.require_open()
        fault, quiet = self._calls.next_fault(instance_id, Method.DEFINE)
        if not quiet:
            await self._calls.delay(Method.DEFINE, fault)
        if isinstance(fault, Refuses):
            raise OperationRejected(fault.message)
        if self.host.lacks(instance_id, spec):
            permit.check()
            self.host.define(instance_id, spec)
        if isinstance(fault, AnswerLost):
            await self._calls.time_out(instance_id)

    async def undefine(self, permit: Permit, instance_id: str) -> None:
        await self._end(permit, instance_id, Method.UNDEFINE)

    async def power_off(self, permit: Permit, instance_id: str) -> None:
        await self._end(permit, instance_id, Method.POWER_OFF)

    async def _end(self, permit: Permit, instance_id: str, method: Method) -> None:
        self._watcher.require_open()
        fault, quiet = self._calls.next_fault(instance_id, method)
        if not quiet:
            await self._calls.delay(method, fault)
        guest = self.host.guests.get(instance_id)
        if guest is None:
            return
        if method is Method.UNDEFINE:
            permit.check()
            self.host.undefine(guest)
        elif guest.power is not PowerState.NONE:
            permit.check()
            self.host.end_process(guest)
        self._watcher.unresponsive.discard(instance_id)

    async def power_on(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        guest = self._calls.guest(instance_id)
        if guest.power in RUNS and not (guest.starting and guest.spec != spec):
            await self._calls.command(permit, instance_id, Command(method=Method.UNPAUSE))
            return
        fault, quiet = self._calls.next_fault(instance_id, Method.POWER_ON)
        permit.check()
        if quiet:
            self.host.start(guest, spec)
            return
        if isinstance(fault, Refuses):
            raise OperationRejected(fault.message)
        # As with QEMU: the process is there, with its vCPUs paused until everything is in place.
        self.host.start(guest, spec, PowerState.PAUSED)
        await self._calls.delay(Method.POWER_ON, fault)
        await self._calls.execute(permit, Command(method=Method.UNPAUSE), instance_id, fault)
        if isinstance(fault, GuestVanishes):
            self.host.vanish(instance_id)

    # ------------------------------------------------------------------------------------------ commands to a guest

    async def press_power_button(self, permit: Permit, instance_id: str) -> None:
        await self._calls.command(permit, instance_id, Command(method=Method.PRESS_POWER_BUTTON))

    async def ask_shutdown(self, permit: Permit, instance_id: str) -> None:
        await self._calls.command(permit, instance_id, Command(method=Method.ASK_SHUTDOWN))

    async def reset(self, permit: Permit, instance_id: str) -> None:
        await self._calls.command(permit, instance_id, Command(method=Method.RESET))

    async def pause(self, permit: Permit, instance_id: str) -> None:
        await self._calls.command(permit, instance_id, Command(method=Method.PAUSE))

    async def unpause(self, permit: Permit, instance_id: str) -> None:
        await self._calls.command(permit, instance_id, Command(method=Method.UNPAUSE))

    async def attach_disk(self, permit: Permit, instance_id: str, disk: Disk) -> None:
        await self._calls.command(permit, instance_id, Command(method=Method.ATTACH_DISK, disk=disk))

    async def detach_disk(self, permit: Permit, instance_id: str, disk_id: str) -> None:
        await self._calls.command(permit, instance_id, Command(method=Method.DETACH_DISK, disk_id=disk_id))

    async def attach_interface(self, permit: Permit, instance_id: str, interface: Interface) -> None:
        await self._calls.command(permit, instance_id, Command(method=Method.ATTACH_INTERFACE, interface=interface))

    async def update_interface(
        self, permit: Permit, instance_id: str, interface: Interface, forwards: tuple[Forward, ...]
    ) -> None:
        command = Command(method=Method.UPDATE_INTERFACE, interface=interface, forwards=forwards)
        await self._calls.command(permit, instance_id, command)

    async def detach_interface(self, permit: Permit, instance_id: str, interface_id: str) -> None:
        command = Command(method=Method.DETACH_INTERFACE, interface_id=interface_id)
        await self._calls.command(permit, instance_id, command)

    # ---------------------------------------------------------------------------------------------- memory

    async def save_memory(self, permit: Permit, instance_id: str, report: Report) -> None:
        guest = self._calls.guest(instance_id)
        if guest.memory_saved:
            return
        fault, _ = self._calls.next_fault(instance_id, Method.SAVE_MEMORY)
        await self._calls.apply_before(guest, fault)
        self._calls.require_running(guest)
        with self._calls.paused(permit, guest):
            total = guest.spec.memory_mib * _MIB
            await self._calls.run_long(
                permit, Method.SAVE_MEMORY, fault, report, total, lambda: self._calls.require_running(guest)
            )
            permit.check()
            self.host.save_memory(guest)
        await self._calls.apply_after(instance_id, fault)

    async def restore_memory(self, permit: Permit, instance_id: str, spec: Spec, report: Report) -> None:
        guest = self._calls.guest(instance_id)
        if not guest.memory_saved:
            self._calls.require_running(guest)
            await self._calls.command(permit, instance_id, Command(method=Method.UNPAUSE))
            return
        fault, _ = self._calls.next_fault(instance_id, Method.RESTORE_MEMORY)

        def still_saved() -> None:
            if self.host.guests.get(instance_id) is not guest or not guest.memory_saved:
                raise GuestNotFound(f"The memory of VM {instance_id} is no longer saved.")

        await self._calls.run_long(
            permit, Method.RESTORE_MEMORY, fault, report, guest.spec.memory_mib * _MIB, still_saved
        )
        permit.check()
        self.host.restore_memory(guest, spec)
        if isinstance(fault, GuestVanishes):
            self.host.vanish(instance_id)
        else:
            await self._calls.apply_before(guest, fault)
        await self._calls.apply_after(instance_id, fault)

    async def forget_memory(self, permit: Permit, instance_id: str) -> None:
        self._watcher.require_open()
        fault, quiet = self._calls.next_fault(instance_id, Method.FORGET_MEMORY)
        if not quiet:
            await self._calls.delay(Method.FORGET_MEMORY, fault)
        guest = self.host.guests.get(instance_id)
        if guest is not None and guest.memory_saved:
            permit.check()
            guest.memory_saved = False
            self.host.changed(guest)

    async def dump_memory(self, permit: Permit, instance_id: str, target: Path, report: Report) -> None:
        guest = self._calls.guest(instance_id)
        fault, _ = self._calls.next_fault(instance_id, Method.DUMP_MEMORY)
        await self._calls.apply_before(guest, fault)

        def still_there() -> None:
            held = self.host.guests.get(instance_id) is guest and guest.power is not PowerState.NONE
            if not held or guest.starting:
                raise GuestNotFound(f"VM {instance_id} is not on this host.")

        still_there()
        with self._calls.paused(permit, guest):
            total = guest.spec.memory_mib * _MIB
            await self._calls.run_long(permit, Method.DUMP_MEMORY, fault, report, total, still_there)
            permit.check()
            with whole_file(target) as draft:
                runs = "running" if guest.seen in RUNS else guest.seen.value
                draft.write_bytes(_KDUMP + f"VM {instance_id}, start {guest.starts}, {runs}\n".encode())
        await self._calls.apply_after(instance_id, fault)

    # ----------------------------------------------------------------------------------------------- disks

    async def swap_disk(self, permit: Permit, instance_id: str, old: Disk, new: Disk, report: Report) -> None:
        guest = self._calls.guest(instance_id)
        self._calls.require_running(guest)
        if new.id in guest.disks and old.id not in guest.disks:
            return
        fault, _ = self._calls.next_fault(instance_id, Method.SWAP_DISK)
        await self._calls.apply_before(guest, fault)

        def swappable() -> None:
            self._calls.require_running(guest)
            if old.id not in guest.disks:
                raise OperationRejected(f"VM {instance_id} has no disk {old.id}.")

        swappable()
        self.host.require_unused(guest, new)
        before, after = self.host.storage.volume(old).size_bytes, self.host.storage.volume(new).size_bytes
        if 0 < after < before:
            raise OperationRejected(
                f"The disk {new.id} has {after} bytes, which are fewer than the {before} of {old.id}."
            )
        await self._calls.run_long(permit, Method.SWAP_DISK, fault, report, before or GIB, swappable)
        permit.check()
        self.host.swap_disk(guest, old, new)
        await self._calls.apply_after(instance_id, fault)

    async def copy_disk(self, permit: Permit, instance_id: str, old: Disk, new: Disk, report: Report) -> None:
        self._watcher.require_open()
        fault, _ = self._calls.next_fault(instance_id, Method.COPY_DISK)
        before, after = self.host.storage.volume(old).size_bytes, self.host.storage.volume(new).size_bytes
        if 0 < after < before:
            raise OperationRejected(
                f"The disk {new.id} has {after} bytes, which are fewer than the {before} of {old.id}."
            )

        def unused() -> None:
            self.host.require_unused(None, old, new)

        unused()
        await self._calls.run_long(permit, Method.COPY_DISK, fault, report, before or GIB, unused)
        permit.check()
        self.host.storage.copy_volume(old, new)
        if isinstance(fault, AnswerLost):
            await self._calls.time_out(instance_id)

    async def copy_root_disk(self, permit: Permit, instance_id: str, old: Spec, new: Spec, report: Report) -> None:
        self._watcher.require_open()
        await self._make(
            permit,
            (instance_id, new),
            Method.COPY_ROOT_DISK,
            report,
            lambda guest: self.host.storage.copy_root(guest, old, new),
        )

    async def root_disk_from(self, permit: Permit, instance_id: str, spec: Spec, source: Path, report: Report) -> None:
        self._watcher.require_open()
        await self._make(
            permit,
            (instance_id, spec),
            Method.ROOT_DISK_FROM,
            report,
            lambda guest: self.host.storage.root_from(guest, spec, source),
        )

    async def _make(
        self,
        permit: Permit,
        made: tuple[str, Spec],
        method: Method,
        report: Report,
        make: Callable[[SimulatedGuest], bool],
    ) -> None:
        """Create the root disk of an instance's spec if it is missing."""
        instance_id, spec = made
        guest = self.host.guests.get(instance_id)
        if not spec.has_root or (guest is not None and spec.root in guest.roots):
            return
        fault, _ = self._calls.next_fault(instance_id, method)
        await self._calls.run_long(permit, method, fault, report, max(spec.image.size_bytes, spec.root_gib * GIB))
        permit.check()
        guest = self.host.guest_of(instance_id, spec)
        if make(guest):
            self.host.changed(guest)
        if isinstance(fault, AnswerLost):
            await self._calls.time_out(instance_id)

    async def drop_root_disks(self, permit: Permit, instance_id: str, spec: Spec, kept: frozenset[int]) -> None:  # noqa: ARG002 - simulated hosts share nothing
        self._watcher.require_open()
        guest = self.host.guests.get(instance_id)
        if guest is None or kept.issuperset(guest.roots):
            return
        fault, quiet = self._calls.next_fault(instance_id, Method.DROP_ROOT_DISKS)
        if not quiet:
            await self._calls.run_long(permit, Method.DROP_ROOT_DISKS, fault, _no_report, 0)
        permit.check()
        if self.host.storage.drop_roots(guest, kept):
            self.host.changed(guest)
        if isinstance(fault, AnswerLost):
            await self._calls.time_out(instance_id)

    async def export_root_disk(
        self, permit: Permit, instance_id: str, spec: Spec, target: Path, report: Report
    ) -> None:
        guest = self._calls.guest(instance_id)
        content = guest.roots.get(spec.root) if spec.has_root else None
        if content is None:
            raise missing_root(guest, spec)
        fault, _ = self._calls.next_fault(instance_id, Method.EXPORT_ROOT_DISK)
        await self._calls.run_long(permit, Method.EXPORT_ROOT_DISK, fault, report, content.size_bytes)
        permit.check()
        write_qcow2(target, content)
        if isinstance(fault, AnswerLost):
            await self._calls.time_out(instance_id)

    # ----------------------------------------------------------------------------- agent, console, display

    async def agent_answers(self, instance_id: str) -> bool:
        self._watcher.require_open()
        guest = self.host.guests.get(instance_id)
        return guest is not None and guest.has_responsive_agent

    async def agent_interfaces(self, instance_id: str) -> tuple[GuestInterface, ...]:
        guest = self._calls.guest(instance_id)
        self._calls.require_running(guest)
        if not guest.has_responsive_agent:
            raise _no_agent(instance_id)
        plugged = (*filter(None, (guest.spec.primary,)), *guest.interfaces.values())
        return tuple(GuestInterface(mac=one.mac, addresses=one.addresses) for one in plugged)

    async def set_password(self, permit: Permit, instance_id: str, user: str, password: str) -> None:
        guest = self._calls.guest(instance_id)
        fault, quiet = self._calls.next_fault(instance_id, Method.SET_PASSWORD)
        if not quiet or guest.frozen:
            await self._calls.delay(Method.SET_PASSWORD, fault)
            await self._calls.apply_before(guest, fault)
        self._calls.require_running(guest)
        if isinstance(fault, Refuses):
            raise OperationRejected(fault.message)
        if not guest.has_responsive_agent:
            raise _no_agent(instance_id)
        permit.check()
        guest.passwords[user] = hashed(instance_id, user, password)
        self.host.changed(guest)
        await self._calls.apply_after(instance_id, fault)

    async def screenshot(self, instance_id: str) -> bytes:
        guest = self._calls.guest(instance_id)
        self._calls.require_running(guest)
        await self._calls.apply_before(guest, None)
        return screenshot_png(guest)

    async def open_console(self, instance_id: str) -> Stream:
        return self._connected(self._calls.guest(instance_id), SimulatedConsole)

    async def open_display(self, instance_id: str) -> Stream:
        return self._connected(self._calls.guest(instance_id), SimulatedDisplay)

    def _connected(self, guest: SimulatedGuest, kind: type[_StreamT]) -> _StreamT:
        self._calls.require_running(guest)
        stream = kind(guest, lambda ended: self._watcher.remove_stream(guest.instance_id, ended))
        self._watcher.add_stream(guest.instance_id, stream)
        return stream

    async def console_tail(self, instance_id: str, length: int) -> bytes | None:  # noqa: ARG002 - none has one
        return None


def _no_report(done: int, total: int | None = None) -> None:
    """Drop a report."""


def _no_agent(instance_id: str) -> OperationRejected:
    return OperationRejected(
        f"No guest agent answers in VM {instance_id}.",
        remedy="Install qemu-guest-agent in the guest, and check that it runs.",
    )
