"""Calls of the port on a simulated guest's memory: saved, restored, forgotten, dumped."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from interlock.core.errors import NotThere
from interlock.core.records import Spec
from interlock.core.states import PowerState
from interlock.hypervisors.simulated.calls import Calls
from interlock.hypervisors.simulated.contents import whole_file
from interlock.hypervisors.simulated.faults import GuestVanishes, Method
from interlock.hypervisors.simulated.guest import RUNS, Command
from interlock.ports import Permit, Report

_MIB: Final = 1 << 20
_KDUMP: Final = b"KDUMP   "
"""How the file of a compressed kdump begins."""


class MemoryCalls(Calls):
    """What can be done with a guest's memory."""

    async def save_memory(self, permit: Permit, instance_id: str, report: Report) -> None:
        guest = self._guest(instance_id)
        if guest.memory_saved:
            return
        fault, _ = self._meets(instance_id, Method.SAVE_MEMORY)
        await self._meet(guest, fault)
        self._must_run(guest)
        with self._standing_still(permit, guest):
            total = guest.spec.memory_mib * _MIB
            await self._take_long(permit, Method.SAVE_MEMORY, fault, report, total, lambda: self._must_run(guest))
            permit.check()
            self.host.save_memory(guest)
        await self._afterwards(instance_id, fault)

    async def restore_memory(self, permit: Permit, instance_id: str, spec: Spec, report: Report) -> None:
        guest = self._guest(instance_id)
        if not guest.memory_saved:
            self._must_run(guest)
            await self._command(permit, instance_id, Command(method=Method.UNPAUSE))
            return
        fault, _ = self._meets(instance_id, Method.RESTORE_MEMORY)

        def still_saved() -> None:
            if self.host.guests.get(instance_id) is not guest or not guest.memory_saved:
                raise NotThere(f"The memory of instance {instance_id} is not saved any more.")

        await self._take_long(permit, Method.RESTORE_MEMORY, fault, report, guest.spec.memory_mib * _MIB, still_saved)
        permit.check()
        self.host.restore_memory(guest, spec)
        if isinstance(fault, GuestVanishes):
            self.host.vanish(instance_id)
        else:
            await self._meet(guest, fault)
        await self._afterwards(instance_id, fault)

    async def forget_memory(self, permit: Permit, instance_id: str) -> None:
        self._must_be_open()
        fault, quiet = self._meets(instance_id, Method.FORGET_MEMORY)
        if not quiet:
            await self._pass(Method.FORGET_MEMORY, fault)
        guest = self.host.guests.get(instance_id)
        if guest is not None and guest.memory_saved:
            permit.check()
            guest.memory_saved = False
            self.host.changed(guest)

    async def dump_memory(self, permit: Permit, instance_id: str, target: Path, report: Report) -> None:
        guest = self._guest(instance_id)
        fault, _ = self._meets(instance_id, Method.DUMP_MEMORY)
        await self._meet(guest, fault)

        def still_there() -> None:
            held = self.host.guests.get(instance_id) is guest and guest.power is not PowerState.NONE
            if not held or guest.starting:
                raise NotThere(f"No guest of instance {instance_id} is on this host.")

        still_there()
        with self._standing_still(permit, guest):
            total = guest.spec.memory_mib * _MIB
            await self._take_long(permit, Method.DUMP_MEMORY, fault, report, total, still_there)
            permit.check()
            with whole_file(target) as draft:
                runs = "running" if guest.seen in RUNS else guest.seen.value
                draft.write_bytes(_KDUMP + f"instance {instance_id}, start {guest.starts}, {runs}\n".encode())
        await self._afterwards(instance_id, fault)
