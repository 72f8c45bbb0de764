"""From a spec to a running QEMU whose guest stands still: everything opened, handed over and let go of again.

There is no wait in here, so that within one of our processes nothing comes between its steps. Whoever is killed
between them leaves at most a process that holds the instance's lock, and is found by it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from interlock.core.errors import NotResponding, Refused
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
    machine_of,
)
from interlock.hypervisors.qemu.instance_folder import InstanceFolder, Phase, ProcessRecord
from interlock.hypervisors.qemu.opening import open_disk, open_kernel
from interlock.hypervisors.qemu.process import FIRST_DESCRIPTOR, Account, confined, spawn
from interlock.hypervisors.qemu.settings import QemuSettings
from interlock.ports import Permit

_MIB = 1024**2


def launch(
    permit: Permit,
    instance_id: str,
    folder: InstanceFolder,
    spec: Spec,
    settings: QemuSettings,
    account: Account | None,
    machine: Machine | None = None,
) -> int:
    """Start the process and return its id. With a `machine`, it waits for the memory that belongs to it.

    Raises:
        Refused: something that it needs is not there, or there is no room.
        NotResponding: another process holds the instance, one that we know nothing of.
    """
    with contextlib.ExitStack() as opened, refused(folder):
        lock = folder.lock()
        if lock is None:
            raise NotResponding(
                f"A process that is not known holds instance {instance_id}.",
                remedy="Restart the server: it looks for such processes when it starts.",
            )
        opened.callback(os.close, lock)
        permit.check()
        handed_over, at = _open_all(folder, spec, account, opened)
        errors = os.open(folder.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        opened.callback(os.close, errors)
        command = [settings.qemu_binary, *arguments(instance_id, spec, settings, at, machine)]
        words = confined(command, folder.inside, _limits(spec, settings), account)
        folder.make_journal(None if account is None else (account.user_id, account.group_id))
        folder.forget_node_names()
        folder.keep_spec(spec)
        folder.keep_machine(machine or machine_of(settings, spec))
        folder.keep_process_record(ProcessRecord(phase=Phase.STARTING))
        permit.check()
        return spawn(words, errors, [*handed_over, lock])


def _open_all(
    folder: InstanceFolder, spec: Spec, account: Account | None, opened: contextlib.ExitStack
) -> tuple[list[int], Descriptors]:
    """Open what QEMU uses; the answer is what to hand over, and under which numbers QEMU finds it."""
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


@contextlib.contextmanager
def refused(folder: InstanceFolder, place: Path | None = None) -> Iterator[None]:
    """Tell people what a failure of the operating system means for the instance.

    `place` is the folder that is written to, where that is another than the instance's.
    """
    place = place or folder.path
    try:
        yield
    except OSError as error:
        remedy: str | None
        match error.errno:
            case errno.ENOSPC | errno.EDQUOT:
                remedy = f"Make room on the file system of {place}."
            case errno.EACCES | errno.EPERM | errno.EROFS:
                remedy = f"Give the server's user write access to {place}."
            case errno.EMFILE | errno.ENFILE | errno.EAGAIN | errno.ENOMEM:
                remedy = "The host is out of descriptors, processes or memory; hold fewer guests or raise its limits."
            case _:
                remedy = None
        where = error.filename or place
        raise Refused(f"Instance {folder.path.name}: {where}: {error.strerror}.", remedy=remedy) from error
