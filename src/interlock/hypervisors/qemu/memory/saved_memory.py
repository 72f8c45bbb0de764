"""The files of a guest's saved memory.

    memory.part     being written; valid only if its QEMU process reports that it wrote all of it
    memory.saved    complete and durable; no vCPU has run since it was written
    memory.used     the same file, renamed durably before vCPUs may run from it: must not be run from again
    memory.json     the spec and machine that it belongs to, durable before any of the above is created

A guest runs from a saved memory at most once: the same memory with disks that have changed since would corrupt them. So
the file is renamed before `cont` is sent, and whatever else runs the guest removes `memory.saved` first.
"""

from __future__ import annotations

import asyncio
import os

import msgspec

from interlock.core.errors import GuestNotFound, OperationRejected
from interlock.core.records import Spec
from interlock.hypervisors.qemu.command_line import Machine
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder, Phase
from interlock.hypervisors.qemu.guest import Guest
from interlock.images.atomic_files import sync_folder, write_atomically
from interlock.ports import Permit


class MemoryOrigin(msgspec.Struct, frozen=True, kw_only=True):
    """The spec and machine that a saved memory belongs to."""

    spec: Spec
    machine: Machine


class SavedMemory:
    """The files in one instance's folder."""

    def __init__(self, folder: InstanceFolder) -> None:
        self.folder = folder
        self._path = folder.path
        self.part = folder.path / "memory.part"
        self.saved = folder.path / "memory.saved"
        self.used = folder.path / "memory.used"
        self._origin = folder.path / "memory.json"

    def any(self) -> bool:
        """Whether any of the files exists."""
        return any(path.exists() for path in (self.saved, self.used, self.part, self._origin))

    def is_usable_by(self, guest: Guest | None) -> bool:
        """Whether the guest can be restored: it is saved, or in a process whose vCPUs have not run yet."""
        return self.saved.exists() or (
            guest is not None and guest.phase is Phase.STARTING and not guest.has_run and self.used.exists()
        )

    def write_origin(self, permit: Permit, origin: MemoryOrigin) -> None:
        """Write the origin, durably."""
        permit.check()
        write_atomically(self._origin, msgspec.json.encode(origin), mode=0o600)
        sync_folder(self._path)

    def machine_for(self, instance_id: str, spec: Spec) -> Machine:
        """Return the machine to create so that the guest can be restored with `spec`.

        Raises:
            GuestNotFound: nothing is saved.
            OperationRejected: it was saved with another spec.
        """
        if not self.saved.exists():
            if self.used.exists():
                raise GuestNotFound(
                    f"VM {instance_id} had begun to run from its saved memory when it was lost, and "
                    f"cannot run from {self.used} again."
                )
            raise GuestNotFound(f"The saved memory of VM {instance_id} was not found: {self.saved} is missing.")
        try:
            origin = msgspec.json.decode(self._origin.read_bytes(), type=MemoryOrigin)
        except (FileNotFoundError, msgspec.DecodeError) as error:
            raise OperationRejected(
                f"The machine that the saved memory of VM {instance_id} belongs to cannot be read: {error}",
                remedy=f"Restore {self._origin}, or start the VM, which discards the memory.",
            ) from error
        if _normalised(origin.spec) != _normalised(spec):
            raise OperationRejected(
                f"The memory of VM {instance_id} was saved with another specification: "
                f"{', '.join(_differing(origin.spec, spec))} changed since.",
                remedy="Change it back, or start the VM, which discards the memory.",
            )
        return origin.machine

    def new_part(self, permit: Permit) -> int:
        """Create an empty file to write to; return its descriptor."""
        permit.check()
        self.part.unlink(missing_ok=True)
        return os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    async def commit(self, permit: Permit) -> None:
        """Make the written file, whose content is durable, the saved memory."""
        permit.check()
        self.part.replace(self.saved)
        await asyncio.to_thread(sync_folder, self._path)

    async def mark_used(self, permit: Permit) -> None:
        """Record durably that vCPUs may run from it now, so that they never do again."""
        permit.check()
        self.saved.replace(self.used)
        await asyncio.to_thread(sync_folder, self._path)

    async def mark_unused(self, permit: Permit, guest: Guest) -> None:
        """Undo `mark_used` for a guest whose process has ended and is known never to have run.

        That is known only if its event log was read to the end: QEMU reports that vCPUs run before they do. If both
        QEMU and the server have crashed it is not known, and the memory stays used.
        """
        if guest.process.ended.is_set() and not guest.has_run and self.used.exists():
            permit.check()
            self.used.replace(self.saved)
            await asyncio.to_thread(sync_folder, self._path)

    async def remove(self, permit: Permit) -> None:
        """Remove all files, durably."""
        if not self.any():
            return
        for path in (self.saved, self.used, self.part, self._origin):
            permit.check()
            path.unlink(missing_ok=True)
        await asyncio.to_thread(sync_folder, self._path)


def _normalised(spec: Spec) -> Spec:
    """Return a spec for comparison: without the order of devices, which the machine has, and without `root_made`."""
    return msgspec.structs.replace(
        spec,
        root_made=True,
        disks=tuple(sorted(spec.disks, key=lambda disk: disk.id)),
        interfaces=tuple(sorted(spec.interfaces, key=lambda interface: interface.id)),
    )


def _differing(one: Spec, other: Spec) -> list[str]:
    one, other = _normalised(one), _normalised(other)
    return [name for name in Spec.__struct_fields__ if getattr(one, name) != getattr(other, name)]
