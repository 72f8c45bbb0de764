"""Calls of the port that speak with a simulated guest: its agent, its console, its screen."""

from __future__ import annotations

import hashlib
from typing import TypeVar

from interlock.core.errors import Refused
from interlock.core.states import PowerState
from interlock.hypervisors.simulated.calls import Calls
from interlock.hypervisors.simulated.console import SimulatedConsole, SimulatedDisplay, SimulatedStream, picture
from interlock.hypervisors.simulated.faults import Method, Refuses
from interlock.hypervisors.simulated.guest import Guest
from interlock.ports import Permit, Stream

_StreamT = TypeVar("_StreamT", bound=SimulatedStream)


class SenseCalls(Calls):
    """How a guest is spoken with, and seen."""

    async def agent_answers(self, instance_id: str) -> bool:
        self._must_be_open()
        guest = self.host.guests.get(instance_id)
        return guest is not None and _agent_listens(guest)

    async def set_password(self, permit: Permit, instance_id: str, user: str, password: str) -> None:
        guest = self._guest(instance_id)
        fault, quiet = self._meets(instance_id, Method.SET_PASSWORD)
        if not quiet or guest.frozen:
            await self._pass(Method.SET_PASSWORD, fault)
            await self._meet(guest, fault)
        self._must_run(guest)
        if isinstance(fault, Refuses):
            raise Refused(fault.message)
        if not _agent_listens(guest):
            raise Refused(
                f"No guest agent answers in instance {instance_id}.",
                remedy="Install qemu-guest-agent in the guest, and see that it runs.",
            )
        permit.check()
        guest.passwords[user] = hashed(instance_id, user, password)
        self.host.changed(guest)
        await self._afterwards(instance_id, fault)

    async def screenshot(self, instance_id: str) -> bytes:
        guest = self._guest(instance_id)
        self._must_run(guest)
        await self._meet(guest, None)
        return picture(guest)

    async def open_console(self, instance_id: str) -> Stream:
        return self._connected(self._guest(instance_id), SimulatedConsole)

    async def open_display(self, instance_id: str) -> Stream:
        return self._connected(self._guest(instance_id), SimulatedDisplay)

    def _connected(self, guest: Guest, kind: type[_StreamT]) -> _StreamT:
        self._must_run(guest)
        stream = kind(guest, lambda ended: self._disconnected(guest.instance_id, ended))
        self._streams.setdefault(guest.instance_id, set()).add(stream)
        return stream

    def _disconnected(self, instance_id: str, stream: SimulatedStream) -> None:
        streams = self._streams.get(instance_id, set())
        streams.discard(stream)
        if not streams:
            self._streams.pop(instance_id, None)

    async def console_tail(self, instance_id: str, length: int) -> bytes | None:  # noqa: ARG002 - none has one
        return None


def hashed(instance_id: str, user: str, password: str) -> str:
    """What a simulated guest keeps of a user's password."""
    return hashlib.scrypt(password.encode(), salt=f"{instance_id}/{user}".encode(), n=2, r=1, p=1).hex()


def _agent_listens(guest: Guest) -> bool:
    return guest.has_agent and guest.power is PowerState.RUNNING and not guest.frozen
