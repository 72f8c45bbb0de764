"""Start a QEMU process whose guest is paused: files are opened, handed over to QEMU, and closed again here."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import structlog

from interlock.confinement.control_groups import GroupLimits
from interlock.confinement.sandbox import Namespaces, View, confined
from interlock.core.errors import GuestNotFound, HypervisorError, NotResponding, OperationRejected
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
from interlock.hypervisors.qemu.files.file_handles import BootFiles, open_disk
from interlock.hypervisors.qemu.files.instance_folder import InstanceFolder, Phase, ProcessRecord
from interlock.hypervisors.qemu.guest import Guest
from interlock.hypervisors.qemu.network.taps import Taps
from interlock.hypervisors.qemu.network.user_networks import UserNetworks
from interlock.hypervisors.qemu.process.accelerator import DEVICE
from interlock.hypervisors.qemu.process.qemu_process import FIRST_DESCRIPTOR, reap, reported_child, spawn
from interlock.hypervisors.qemu.process_registry import ProcessRegistry
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.ports import Permit

_LOG = structlog.get_logger(__name__)
_MIB: Final = 1024**2
_WEIGHT_MAX: Final = 10_000
_REPORT_MS: Final = 5_000
"""How long bubblewrap may take to report the process that becomes QEMU, in milliseconds."""
_FIRMWARE: Final = ("/usr/share/qemu", "/usr/share/seabios", "/usr/share/OVMF", "/usr/share/ovmf")


class Launcher:
    """Starts QEMU processes."""

    def __init__(self, registry: ProcessRegistry, consoles: Consoles, networks: UserNetworks, taps: Taps) -> None:
        self._registry = registry
        self._networks = networks
        self._taps = taps
        self._consoles = consoles
        self._boot_files = BootFiles()

    def close(self) -> None:
        """Close the files that are kept open for the next start."""
        self._boot_files.close()

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
        await self._networks.end_former(folder)
        try:
            async with self._taps.plugged(permit, instance_id, spec) as taps:
                process_id = self._launch(permit, instance_id, folder, spec, machine, taps)
                guest = self._registry.add(instance_id, folder, process_id)
        except ProcessLookupError:
            raise _not_started(instance_id, folder) from None
        placing = asyncio.create_task(self._place_in_group(guest, spec))
        connecting = asyncio.create_task(self._networks.connect_all(guest, spec))
        try:
            self._consoles.limit_log_sizes()
            guest.event_log.negotiate()
            guest.watch()
            await self._await_greeting(guest)
            await connecting
        except HypervisorError:
            await guest.kill(permit)
            raise
        finally:
            connecting.cancel()
            await asyncio.wait({placing, connecting})  # before anything of the guest is run or read
        return guest

    async def connect(self, guest: Guest, spec: Spec) -> None:
        """Complete the connections of a guest whose start was cut short. Raises as `start`."""
        await self._networks.connect_all(guest, spec)

    async def _place_in_group(self, guest: Guest, spec: Spec) -> None:
        groups, settings = self._registry.groups, self._registry.settings
        if groups is None:
            return
        limits = GroupLimits(
            memory_bytes=(spec.memory_mib + settings.translation_cache_mib + settings.memory_overhead_mib) * _MIB,
            threads=spec.vcpus + settings.threads_extra,
            cpu_weight=min(settings.cpu_weight * spec.vcpus, _WEIGHT_MAX),
            io_weight=settings.io_weight,
        )
        name = self._registry.group_name(guest.instance_id)
        try:
            await asyncio.to_thread(groups.place, name, guest.process.process_id, limits)
        except OSError as error:
            if not guest.process.ended.is_set():
                _LOG.warning("guest not limited", instance=guest.instance_id, why=str(error), by=groups.kind)

    def _launch(
        self,
        permit: Permit,
        instance_id: str,
        folder: InstanceFolder,
        spec: Spec,
        machine: Machine | None,
        taps: Mapping[str, int],
    ) -> int:
        """Start the process and return its id.

        Nothing waits in here, so that nothing in this process comes between the steps. A crash between them leaves at
        most a process that holds the lock of the instance, by which it is found.
        """
        registry = self._registry
        settings, namespaces = registry.settings, registry.namespaces
        with contextlib.ExitStack() as opened, folder.os_errors_rejected():
            lock = folder.lock()
            if lock is None:
                raise folder.held_by_unknown()
            opened.callback(os.close, lock)
            permit.check()
            handed_over = [lock]
            account, claim = registry.claim_user(instance_id, opened)
            if claim is not None:
                handed_over.append(claim.descriptor)
            at = self._open_all(folder, spec, taps, handed_over, opened)
            errors = os.open(folder.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
            opened.callback(os.close, errors)
            command = [settings.qemu_binary, *arguments(instance_id, spec, settings, at, machine)]
            words = confined(
                command,
                _view(settings, folder, network=not self._networks.separate),
                _limits(spec, settings, alone=registry.users is not None),
                account,
                registry.home.marks(instance_id),
                namespaces=namespaces,
                report=FIRST_DESCRIPTOR + len(handed_over),
            )
            folder.make_event_pipes()
            folder.remove_node_names()
            folder.write_spec(spec)
            folder.write_machine(machine or machine_of(settings, spec))
            folder.write_process_record(ProcessRecord(phase=Phase.STARTING))
            permit.check()
            if namespaces is Namespaces.NONE:
                return spawn(words, errors, handed_over)
            return _spawn_in_namespaces(words, errors, handed_over, folder)

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
        raise _not_started(guest.instance_id, guest.folder)

    def _open_all(
        self,
        folder: InstanceFolder,
        spec: Spec,
        taps: Mapping[str, int],
        handed_over: list[int],
        opened: contextlib.ExitStack,
    ) -> Descriptors:
        """Open what QEMU uses, and append it to the descriptors to hand over; return their numbers in QEMU."""

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
        networks = {one: os.dup(tap) for one, tap in taps.items()}
        networks |= {one: socket.detach() for one, socket in self._networks.listen(folder, spec).items()}
        return Descriptors(
            networks={interface_id: hand_over(descriptor) for interface_id, descriptor in networks.items()},
            monitor=monitor,
            agent=agent,
            console=console,
            console_log=hand_over(console_log),
            seed=None if spec.seed is None else hand_over(open_disk(folder.seed_disk, read_only=True)),
            cdrom=hand_over(open_disk(Path(image.path), read_only=True)) if image.kind == "iso" else None,
            kernel=hand_over(self._boot_file(image.path)) if kernel else None,
            initrd=hand_over(self._boot_file(image.initrd)) if kernel and image.initrd else None,
            backings={
                disk_id: hand_over(open_disk(Path(backing.path), read_only=True))
                for disk_id, backing in backing_images(spec).items()
            },
            disks={
                disk.id: hand_over(open_disk(_path_of(disk, spec, folder), read_only=disk.read_only))
                for disk in all_disks(spec)
            },
        )

    def _boot_file(self, path: str) -> int:
        """Open a kernel or initrd, which QEMU opens again as the user that it runs as."""
        own = self._registry.account is None
        return open_disk(Path(path), read_only=True) if own else self._boot_files.open(Path(path))


def _spawn_in_namespaces(words: list[str], errors: int, handed_over: list[int], folder: InstanceFolder) -> int:
    """Start QEMU as the child of bubblewrap; return QEMU's process id."""
    report, reported = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            monitor = spawn(words, errors, [*handed_over, reported])
        finally:
            os.close(reported)
        process_id = reported_child(report, _REPORT_MS)
    finally:
        os.close(report)
    if process_id is None:
        reap(monitor)
        raise _not_started(folder.path.name, folder)
    return process_id


def _not_started(instance_id: str, folder: InstanceFolder) -> OperationRejected:
    return OperationRejected(
        f"QEMU did not start for VM {instance_id}: {folder.last_error()}",
        remedy=f"QEMU's log is {folder.errors}.",
    )


def _view(settings: QemuSettings, folder: InstanceFolder, *, network: bool) -> View:
    """Return what QEMU can reach: its firmware, its pipes, and for its own user network that of the host."""
    files = tuple(Path(path) for path in (*_FIRMWARE, *settings.program_paths))
    devices = (DEVICE,) if settings.accelerator == "kvm" else ()
    return View(folder=folder.inside, files=files, devices=devices, network=network)


def _path_of(disk: Disk, spec: Spec, folder: InstanceFolder) -> Path:
    match disk.id:
        case "root":
            return folder.roots(spec).disk(spec.root)
        case "rescue":
            return folder.rescue_disk
        case _:
            return Path(disk.path)


def _limits(spec: Spec, settings: QemuSettings, *, alone: bool) -> list[str]:
    """Return the resource limits; `alone`: no other process runs as its user, whose processes are counted."""
    memory_mib = spec.memory_mib + settings.translation_cache_mib + settings.address_space_extra_mib
    threads = [f"--nproc={spec.vcpus + settings.threads_extra}"] if alone else []
    return ["--core=0", f"--nofile={settings.open_files_max}", f"--as={memory_mib * _MIB}", *threads]
