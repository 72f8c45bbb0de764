"""Start a QEMU process whose guest is paused: files are opened, handed over to QEMU, and closed again here."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Final

from interlock.core.errors import GuestNotFound, NotResponding, OperationRejected
from interlock.core.records import Disk, Spec
from interlock.hypervisors.qemu.command_line import (
    AGENT,
    CONSOLE,
    MONITOR,
    Descriptors,
    Machine,
    all_disks,
    arguments,
    backing_images,
    booted_image,
    failed_forward,
    machine_of,
)
from interlock.hypervisors.qemu.consoles import Consoles
from interlock.hypervisors.qemu.disks import root_disks
from interlock.hypervisors.qemu.files.file_handles import open_disk, open_kernel
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder, Phase, ProcessRecord
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.process.qemu_process import FIRST_DESCRIPTOR, spawn
from interlock.hypervisors.qemu.process_registry import ProcessRegistry
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.images.subprocess_runner import Account, confined
from interlock.ports import Permit

_MIB: Final = 1024**2


class Launcher:
    """Starts QEMU processes."""

    def __init__(self, registry: ProcessRegistry, consoles: Consoles) -> None:
        self._registry = registry
        self._consoles = consoles

    async def start(self, permit: Permit, instance_id: str, spec: Spec, machine: Machine | None = None) -> Guest:
        """Start a process with a paused guest; return when QEMU responds.

        Args:
            permit: of the worker.
            instance_id: the instance, which has no process.
            spec: its disks and size.
            machine: the machine to create, which then waits for its memory; None: what the settings say.

        Raises:
            GuestNotFound: the instance is not defined on this host.
            OperationRejected: QEMU did not start, or the host runs as many guests as it may.
            NotResponding: QEMU does not respond, or an unknown process holds the instance.
        """
        folder, settings = self._registry.folder(instance_id), self._registry.settings
        if not folder.inside.is_dir():
            raise GuestNotFound(f"VM {instance_id} is not defined on this host.")
        if len(self._registry) >= settings.processes_max:
            raise OperationRejected(
                f"This host runs {len(self._registry)} VMs, its maximum.",
                remedy="Stop one, or raise processes_max.",
            )
        with folder.os_errors_rejected():
            root_disks.require_files(folder, spec)
            await root_disks.make_seed_disk(permit, folder, instance_id, spec)
        guest = self._registry.add(instance_id, folder, self._launch(permit, instance_id, folder, spec, machine))
        self._consoles.limit_log_sizes()
        guest.event_log.negotiate()
        guest.watch()
        await self._await_greeting(guest)
        return guest

    def _launch(
        self, permit: Permit, instance_id: str, folder: InstanceFolder, spec: Spec, machine: Machine | None
    ) -> int:
        """Start the process and return its id.

        Nothing waits in here, so that nothing in this process comes between the steps. A crash between them leaves at
        most a process that holds the lock of the instance, by which it is found.
        """
        settings, account = self._registry.settings, self._registry.account
        with contextlib.ExitStack() as opened, folder.os_errors_rejected():
            lock = folder.lock()
            if lock is None:
                raise folder.held_by_unknown()
            opened.callback(os.close, lock)
            permit.check()
            handed_over, at = _open_all(folder, spec, account, opened)
            errors = os.open(folder.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
            opened.callback(os.close, errors)
            command = [settings.qemu_binary, *arguments(instance_id, spec, settings, at, machine)]
            marks = self._registry.home.marks(instance_id)
            words = confined(command, folder.inside, _limits(spec, settings), account, marks)
            folder.make_event_pipes(None if account is None else (account.user_id, account.group_id))
            folder.remove_node_names()
            folder.write_spec(spec)
            folder.write_machine(machine or machine_of(settings, spec))
            folder.write_process_record(ProcessRecord(phase=Phase.STARTING))
            permit.check()
            return spawn(words, errors, [*handed_over, lock])

    async def _await_greeting(self, guest: Guest) -> None:
        settings = self._registry.settings
        greeting = asyncio.ensure_future(guest.monitor.connect(settings.start_timeout_ms))
        ended = asyncio.ensure_future(guest.process.ended.wait())
        try:
            await asyncio.wait({greeting, ended}, return_when=asyncio.FIRST_COMPLETED)
            if greeting.done() and (greeting.exception() is None or isinstance(greeting.exception(), NotResponding)):
                return greeting.result()
            # The connection breaks a moment before the process has ended.
            await asyncio.wait({ended}, timeout=settings.qmp_timeout_ms / 1000)
        finally:
            for task in (greeting, ended):
                task.cancel()
        error = guest.folder.last_error()
        if (port := failed_forward(error)) is not None:
            raise OperationRejected(
                f"The host's port {port} cannot be forwarded to VM {guest.instance_id}: another program "
                "probably listens on it.",
                remedy=f"End what listens on 127.0.0.1:{port}, then start the VM.",
            )
        raise OperationRejected(
            f"QEMU did not start for VM {guest.instance_id}: {error}",
            remedy=f"QEMU's log is {guest.folder.errors}.",
        )


def _open_all(
    folder: InstanceFolder, spec: Spec, account: Account | None, opened: contextlib.ExitStack
) -> tuple[list[int], Descriptors]:
    """Open what QEMU uses; return the descriptors to hand over, and the numbers under which QEMU finds them."""
    handed_over: list[int] = []

    def hand_over(descriptor: int) -> int:
        opened.callback(os.close, descriptor)
        handed_over.append(descriptor)
        return FIRST_DESCRIPTOR + len(handed_over) - 1

    monitor = hand_over(folder.listen(MONITOR).detach())
    agent = hand_over(folder.listen(AGENT).detach())
    console = hand_over(folder.listen(CONSOLE).detach())
    console_log = os.open(folder.console, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    image = booted_image(spec)
    kernel = image.kind == "kernel"
    at = Descriptors(
        monitor=monitor,
        agent=agent,
        console=console,
        console_log=hand_over(console_log),
        seed=None if spec.seed is None else hand_over(open_disk(folder.seed_disk, read_only=True)),
        cdrom=hand_over(open_disk(Path(image.path), read_only=True)) if image.kind == "iso" else None,
        kernel=hand_over(open_kernel(Path(image.path), account)) if kernel else None,
        initrd=hand_over(open_kernel(Path(image.initrd), account)) if kernel and image.initrd else None,
        backings={
            disk_id: hand_over(open_disk(Path(backing.path), read_only=True))
            for disk_id, backing in backing_images(spec).items()
        },
        disks={
            disk.id: hand_over(open_disk(_path_of(disk, spec, folder), read_only=disk.read_only))
            for disk in all_disks(spec)
        },
    )
    return handed_over, at


def _path_of(disk: Disk, spec: Spec, folder: InstanceFolder) -> Path:
    match disk.id:
        case "root":
            return folder.roots(spec).disk(spec.root)
        case "rescue":
            return folder.rescue_disk
        case _:
            return Path(disk.path)


def _limits(spec: Spec, settings: QemuSettings) -> list[str]:
    memory_mib = spec.memory_mib + settings.translation_cache_mib + settings.address_space_extra_mib
    return ["--core=0", f"--nofile={settings.open_files_max}", f"--as={memory_mib * _MIB}"]
