"""The port, on a simulated host: what there is, on and off, and what a guest is told to. The rest is put together here.

How a call passes, and with which right to act: see `calls`. What a guest does: see `host`.
"""

from __future__ import annotations

from collections.abc import Callable

from interlock.core.errors import Refused
from interlock.core.records import Disk, Interface, Spec
from interlock.core.states import PowerState
from interlock.hypervisors.simulated.faults import AnswerLost, GuestVanishes, Hangs, Method, Refuses
from interlock.hypervisors.simulated.guest import RUNS, Command
from interlock.hypervisors.simulated.memory import MemoryCalls
from interlock.hypervisors.simulated.root_disks import DiskCalls
from interlock.hypervisors.simulated.senses import SenseCalls
from interlock.ports import HypervisorEvent, Observation, Permit


class SimulatedHypervisor(MemoryCalls, DiskCalls, SenseCalls):
    """Drives a `SimulatedHost`, which may outlive it. What it is made with: see `Calls`."""

    # --------------------------------------------------------------------------------------------- taking charge

    async def open(self, listener: Callable[[HypervisorEvent], None]) -> None:
        self.host.load()
        for guest in self.host.guests.values():
            # Nobody watched how long ago the button was pressed; long enough.
            self.host.answer_button(guest.instance_id)
        self._listener = listener
        self.host.watch(self)
        for guest in list(self.host.guests.values()):
            self._tell(guest, during_watch=False)
            if guest.frozen and guest.thaw_after_ms is not None:
                self._later(guest.thaw_after_ms, self.host.thaw, guest.instance_id)

    async def close(self) -> None:
        self.crash()

    async def known(self) -> frozenset[str]:
        self._must_be_open()
        return frozenset(self.host.guests)

    # --------------------------------------------------------------------------------------------------- looking

    async def inspect(self, instance_id: str) -> Observation:
        self._must_be_open()
        guest = self.host.guests.get(instance_id)
        fault, quiet = self._meets(instance_id, Method.INSPECT)
        responsive = True
        if guest is not None and (guest.frozen or not quiet):
            await self._pass(Method.INSPECT, fault)
            if isinstance(fault, Hangs):
                self._freeze(guest, fault)
            responsive = not guest.frozen or await self._answers(guest)
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
            responsive=responsive,
        )

    async def wait_powered_off(self, instance_id: str) -> None:
        self._must_be_open()
        while (guest := self.host.guests.get(instance_id)) is not None:
            if guest.seen not in RUNS:
                return
            await self._stir(instance_id)

    # ------------------------------------------------------------------------------------- what the host can do

    async def define(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        self._must_be_open()
        fault, quiet = self._meets(instance_id, Method.DEFINE)
        if not quiet:
            await self._pass(Method.DEFINE, fault)
        if isinstance(fault, Refuses):
            raise Refused(fault.message)
        if self.host.lacks(instance_id, spec):
            permit.check()
            self.host.define(instance_id, spec)
        if isinstance(fault, AnswerLost):
            await self._no_answer(instance_id)

    async def undefine(self, permit: Permit, instance_id: str) -> None:
        await self._end(permit, instance_id, Method.UNDEFINE)

    async def power_off(self, permit: Permit, instance_id: str) -> None:
        await self._end(permit, instance_id, Method.POWER_OFF)

    async def _end(self, permit: Permit, instance_id: str, method: Method) -> None:
        self._must_be_open()
        fault, quiet = self._meets(instance_id, method)
        if not quiet:
            await self._pass(method, fault)
        guest = self.host.guests.get(instance_id)
        if guest is None:
            return
        if method is Method.UNDEFINE:
            permit.check()
            self.host.undefine(guest)
        elif guest.power is not PowerState.NONE:
            permit.check()
            self.host.pull_plug(guest)
        self._unanswered.discard(instance_id)

    async def power_on(self, permit: Permit, instance_id: str, spec: Spec) -> None:
        guest = self._guest(instance_id)
        if guest.power in RUNS and not (guest.starting and guest.spec != spec):
            await self._command(permit, instance_id, Command(method=Method.UNPAUSE))
            return
        fault, quiet = self._meets(instance_id, Method.POWER_ON)
        if quiet:
            permit.check()
            self.host.start(guest, spec)
            return
        permit.check()
        if isinstance(fault, Refuses):
            raise Refused(fault.message)
        # As a real one is: there, with its processors still halted, and let go when everything is in place.
        self.host.start(guest, spec, PowerState.PAUSED)
        await self._pass(Method.POWER_ON, fault)
        await self._carry_out(permit, Command(method=Method.UNPAUSE), instance_id, fault)
        if isinstance(fault, GuestVanishes):
            self.host.vanish(instance_id)

    # ----------------------------------------------------------------------------------- what a guest is told to

    async def press_power_button(self, permit: Permit, instance_id: str) -> None:
        await self._command(permit, instance_id, Command(method=Method.PRESS_POWER_BUTTON))

    async def reset(self, permit: Permit, instance_id: str) -> None:
        await self._command(permit, instance_id, Command(method=Method.RESET))

    async def pause(self, permit: Permit, instance_id: str) -> None:
        await self._command(permit, instance_id, Command(method=Method.PAUSE))

    async def unpause(self, permit: Permit, instance_id: str) -> None:
        await self._command(permit, instance_id, Command(method=Method.UNPAUSE))

    async def attach_disk(self, permit: Permit, instance_id: str, disk: Disk) -> None:
        await self._command(permit, instance_id, Command(method=Method.ATTACH_DISK, disk=disk))

    async def detach_disk(self, permit: Permit, instance_id: str, disk_id: str) -> None:
        await self._command(permit, instance_id, Command(method=Method.DETACH_DISK, disk_id=disk_id))

    async def ask_shutdown(self, permit: Permit, instance_id: str) -> None:
        await self._command(permit, instance_id, Command(method=Method.ASK_SHUTDOWN))

    async def attach_interface(self, permit: Permit, instance_id: str, interface: Interface) -> None:
        await self._command(permit, instance_id, Command(method=Method.ATTACH_INTERFACE, interface=interface))

    async def detach_interface(self, permit: Permit, instance_id: str, interface_id: str) -> None:
        await self._command(permit, instance_id, Command(method=Method.DETACH_INTERFACE, interface_id=interface_id))
