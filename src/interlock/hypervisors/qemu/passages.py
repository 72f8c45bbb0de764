"""Guests that go to another host or come from one: what the port promises of that, on QEMU.

Two marks in the folder say, to whoever comes after a crash, what must not be forgotten: `awaited`, on the host
to which a guest goes, for as long as it was never let run there; and `sent`, on the host that it leaves, from before
anything is sent until it goes on there after all. How it is sent is in `migration`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from interlock.core.errors import NotThere, Refused
from interlock.core.records import Spec
from interlock.core.states import PowerState
from interlock.hypervisors.durable_files import sync_folder
from interlock.hypervisors.qemu import memory, migration
from interlock.hypervisors.qemu.command_line import Machine
from interlock.hypervisors.qemu.components import Components
from interlock.hypervisors.qemu.guest import ENDED_STATES, Guest
from interlock.hypervisors.qemu.instance_folder import InstanceFolder, Phase
from interlock.hypervisors.qemu.launch import refused
from interlock.ports import Permit, Report
from interlock.ports.travelling import Arrival, Passage

_RAN = "ran"
_STOOD_STILL = "stood still"


class Passages(Components):
    """The part of the adapter that sends and receives guests; see `ports.travelling`."""

    _awaited: dict[str, migration.Awaited]

    def __init__(self, *words: Any, **named: Any) -> None:
        super().__init__(*words, **named)
        self._awaited = {}

    async def _start(self, permit: Permit, instance_id: str, spec: Spec, machine: Machine | None = None) -> Guest:
        raise NotImplementedError

    async def machine_kind(self, instance_id: str) -> str:
        return msgspec.json.encode(await memory.machine_of_guest(self._guest(instance_id))).decode()

    async def receive_guest(self, permit: Permit, instance_id: str, spec: Spec, machine: str) -> Passage:
        folder = self._folder_of(instance_id)
        guest = self._guests.get(instance_id)
        if guest is not None:
            if guest.phase is not Phase.STARTING:
                raise Refused(f"A guest of instance {instance_id} runs on this host already.")
            await guest.kill(permit)
        self._stop_awaiting(instance_id)
        with refused(folder):
            permit.check()
            _mark(folder, "awaited", "")
        guest = await self._start(permit, instance_id, spec, msgspec.json.decode(machine, type=Machine))
        awaited = await migration.prepare(permit, guest, self._settings.migration_address, disk=_sent_along(spec))
        self._awaited[instance_id] = awaited
        return awaited.passage

    def _stop_awaiting(self, instance_id: str) -> None:
        awaited = self._awaited.pop(instance_id, None)
        if awaited is not None:
            awaited.close()

    async def send_guest(self, permit: Permit, instance_id: str, passage: Passage, report: Report) -> None:
        guest = self._guest(instance_id)
        state = await guest.look()
        if state in ENDED_STATES:
            raise NotThere(f"No guest of instance {instance_id} runs.")
        spec = guest.folder.spec()
        with refused(guest.folder):
            permit.check()
            _mark(guest.folder, "sent", _RAN if state is PowerState.RUNNING else _STOOD_STILL)
        await migration.send(
            permit,
            guest,
            passage,
            report,
            self._account,
            disk=spec is not None and _sent_along(spec),
            ran=state is PowerState.RUNNING,
        )

    async def hurry_guest(self, permit: Permit, instance_id: str) -> None:
        await self._guest(instance_id).tell(permit, "stop")

    async def arrival(self, instance_id: str) -> Arrival:
        if _read(self._folder_of(instance_id), "awaited") is None:
            return Arrival.NONE
        guest = self._guests.get(instance_id)
        return Arrival.LOST if guest is None or guest.process.ended.is_set() else Arrival.AWAITED

    async def await_guest(self, instance_id: str) -> None:
        await migration.until_whole(self._guest(instance_id))

    async def take_guest(self, permit: Permit, instance_id: str) -> None:
        guest = self._guest(instance_id)
        if _read(guest.folder, "awaited") is None and guest.phase is not Phase.STARTING:
            return
        await migration.until_whole(guest)
        with refused(guest.folder):
            permit.check()
            _unmark(guest.folder, "awaited")
        await migration.let_run(permit, guest)
        self._stop_awaiting(instance_id)

    async def keep_guest(self, permit: Permit, instance_id: str) -> None:
        folder = self._folder_of(instance_id)
        before = _read(folder, "sent")
        if before is None:
            return
        await migration.go_on(permit, self._guest(instance_id), ran=before == _RAN)
        with refused(folder):
            permit.check()
            _unmark(folder, "sent")

    def _forget_passages(self, permit: Permit, instance_id: str) -> None:
        """Before a guest is started afresh: none is awaited or was sent."""
        self._stop_awaiting(instance_id)
        folder = self._folder_of(instance_id)
        for name in ("awaited", "sent"):
            if _read(folder, name) is not None:
                with refused(folder):
                    permit.check()
                    _unmark(folder, name)

    def _awaits(self, instance_id: str) -> bool:
        return _read(self._folder_of(instance_id), "awaited") is not None


def _sent_along(spec: Spec) -> bool:
    """Whether the guest's root disk goes with it: one in a shared folder is there already."""
    return spec.has_root and spec.shared is None


def _place(folder: InstanceFolder, name: str) -> Path:
    return folder.path / name


def _mark(folder: InstanceFolder, name: str, text: str) -> None:
    draft = folder.path / f"{name}.new"
    draft.write_text(text)
    draft.replace(_place(folder, name))
    sync_folder(folder.path)


def _unmark(folder: InstanceFolder, name: str) -> None:
    _place(folder, name).unlink(missing_ok=True)
    sync_folder(folder.path)


def _read(folder: InstanceFolder, name: str) -> str | None:
    try:
        return _place(folder, name).read_text()
    except OSError:
        return None
