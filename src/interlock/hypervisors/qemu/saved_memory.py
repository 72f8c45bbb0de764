"""The files of a guest's saved memory, and which of them says what. No guest is asked or told anything here.

    memory.part     is being written; worth something only to a process that says that it wrote all of it
    memory.saved    whole and durable; no processor has run since it was written
    memory.used     the same file, renamed durably before processors may run from it: not to be run from once more
    memory.json     the machine that it belongs to, durable before any of the above is begun

A guest runs from one saved memory once, because its disks go on with it: the same memory beside disks that have moved
on would damage them. So a file is renamed before `cont` is sent, and whatever lets a guest run for another reason
removes `memory.saved` first.
"""

from __future__ import annotations

import asyncio
import os

import msgspec

from interlock.core.errors import NotThere, Refused
from interlock.core.records import Spec
from interlock.hypervisors.durable_files import sync_folder
from interlock.hypervisors.qemu.command_line import Machine
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.instance_folder import InstanceFolder, Phase
from interlock.ports import Permit


class Belonging(msgspec.Struct, frozen=True, kw_only=True):
    """What a saved memory belongs to."""

    spec: Spec
    machine: Machine


class SavedMemory:
    """The files in one instance's folder."""

    def __init__(self, folder: InstanceFolder) -> None:
        self.folder = folder
        self._place = folder.path
        self.part = folder.path / "memory.part"
        self.saved = folder.path / "memory.saved"
        self.used = folder.path / "memory.used"
        self._belonging = folder.path / "memory.json"

    def any(self) -> bool:
        """Whether there is anything to remove."""
        return any(path.exists() for path in (self.saved, self.used, self.part, self._belonging))

    def can_be_gone_on_from(self, guest: Guest | None) -> bool:
        """Whether the guest can go on from it: it is there, or in a process that has not been let run yet."""
        return self.saved.exists() or (
            guest is not None and guest.phase is Phase.STARTING and not guest.has_run and self.used.exists()
        )

    def keep_belonging(self, permit: Permit, belonging: Belonging) -> None:
        """Keep what the memory belongs to, durably."""
        draft = self._belonging.with_name("memory.json.part")
        permit.check()
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            file.write(msgspec.json.encode(belonging))
            os.fsync(file.fileno())
        draft.replace(self._belonging)
        sync_folder(self._place)

    def machine_for(self, instance_id: str, spec: Spec) -> Machine:
        """The machine to make so that the guest can go on in it with `spec`.

        Raises:
            NotThere: nothing is saved.
            Refused: it was saved with another spec.
        """
        if not self.saved.exists():
            if self.used.exists():
                raise NotThere(
                    f"The guest of instance {instance_id} had begun to run from its saved memory when it was lost."
                )
            raise NotThere(f"No memory of instance {instance_id} is saved on this host.")
        try:
            belonging = msgspec.json.decode(self._belonging.read_bytes(), type=Belonging)
        except (FileNotFoundError, msgspec.DecodeError) as error:
            raise Refused(
                f"What the saved memory of instance {instance_id} belongs to cannot be read: {error}",
                remedy=f"Put {self._belonging} back, or start the instance afresh, which gives the memory up.",
            ) from error
        if _compared(belonging.spec) != _compared(spec):
            raise Refused(
                f"The memory of instance {instance_id} was saved with another specification: "
                f"{', '.join(_differing(belonging.spec, spec))} changed since.",
                remedy="Change it back, or start the instance afresh, which gives the memory up.",
            )
        return belonging.machine

    def new_part(self, permit: Permit) -> int:
        """A fresh file to write to, ours alone; the answer is its descriptor."""
        permit.check()
        self.part.unlink(missing_ok=True)
        return os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    async def keep(self, permit: Permit) -> None:
        """Make of what was written the saved memory. Its content is durable already."""
        permit.check()
        self.part.replace(self.saved)
        await asyncio.to_thread(sync_folder, self._place)

    async def spend(self, permit: Permit) -> None:
        """Make durable that processors may run from it now, and that nobody may run from it again."""
        permit.check()
        self.saved.replace(self.used)
        await asyncio.to_thread(sync_folder, self._place)

    async def take_back(self, permit: Permit, guest: Guest) -> None:
        """Undo `spend` for a guest whose process has ended and is known never to have run.

        That is known only of a process whose journal was read to its end: QEMU tells that processors run before they
        do. Where both it and we have died, nobody knows, and the memory stays spent.
        """
        if guest.process.ended.is_set() and not guest.has_run and self.used.exists():
            permit.check()
            self.used.replace(self.saved)
            await asyncio.to_thread(sync_folder, self._place)

    async def drop(self, permit: Permit) -> None:
        """Remove all of it, durably."""
        if not self.any():
            return
        for path in (self.saved, self.used, self.part, self._belonging):
            permit.check()
            path.unlink(missing_ok=True)
        await asyncio.to_thread(sync_folder, self._place)


def _compared(spec: Spec) -> Spec:
    """A spec in which the order of what was plugged in does not count: the machine knows what is where."""
    return msgspec.structs.replace(
        spec,
        disks=tuple(sorted(spec.disks, key=lambda disk: disk.id)),
        interfaces=tuple(sorted(spec.interfaces, key=lambda interface: interface.id)),
    )


def _differing(one: Spec, other: Spec) -> list[str]:
    one, other = _compared(one), _compared(other)
    return [name for name in Spec.__struct_fields__ if getattr(one, name) != getattr(other, name)]
