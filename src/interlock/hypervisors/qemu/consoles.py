"""Consoles of guests: serial console, its log, screenshots and VNC. QEMU gets descriptors, and listens nowhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import Final

from interlock.core.errors import GuestNotFound, HypervisorError, NotResponding, OperationRejected
from interlock.hypervisors.qemu.console import console_log
from interlock.hypervisors.qemu.guest import UNFENCED, Guest
from interlock.hypervisors.qemu.process.qemu_process import spawn
from interlock.hypervisors.qemu.process_registry import ProcessRegistry
from interlock.ports import Stream

_SCREENSHOT_BYTES_MAX: Final = 64 * 1024 * 1024
_READ_BYTES: Final = 65_536
_CLIENT_NAME: Final = "display"


class Consoles:
    """Consoles and displays. See `ports.Hypervisor` for the methods."""

    def __init__(self, registry: ProcessRegistry) -> None:
        self._registry = registry
        self._log_limiter: int | None = None
        """The process that limits the size of the console logs, if this process started it."""

    async def console_tail(self, instance_id: str, length: int) -> bytes | None:
        if not self._registry.can_name_folder(instance_id):
            return None
        return await asyncio.to_thread(console_log.tail, self._registry.folder(instance_id).console, length)

    async def open_console(self, instance_id: str) -> Stream:
        guest = self._registry.require(instance_id)
        stream = await guest.console.open()
        # QEMU has accepted the connection, and sends the output from now on, when it answers a later query.
        try:
            with contextlib.suppress(HypervisorError):
                await guest.query("query-chardev")
        except BaseException:
            await stream.close()
            raise
        return stream

    async def screenshot(self, instance_id: str) -> bytes:
        return await _screenshot(self._registry.require_started(instance_id))

    async def open_display(self, instance_id: str) -> Stream:
        return await _open_display(self._registry.require_started(instance_id))

    def limit_log_sizes(self) -> None:
        """Start the process that limits the size of the console logs, unless it runs. It outlives the server."""
        if self._log_limiter is not None and os.waitpid(self._log_limiter, os.WNOHANG)[0]:
            self._log_limiter = None
        settings = self._registry.settings
        command = console_log.limiter_command(
            self._registry.path, settings.console_bytes_max, settings.console_check_interval_ms
        )
        if command is not None and self._log_limiter is None:
            nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            try:
                self._log_limiter = spawn(command, nowhere, ())
            finally:
                os.close(nowhere)


async def _screenshot(guest: Guest) -> bytes:
    """Return a screenshot as PNG. Raises as `Hypervisor.screenshot`."""
    picture = os.memfd_create("screenshot", os.MFD_CLOEXEC)
    try:
        os.fchmod(picture, 0o666)
        given = await guest.execute(UNFENCED, "add-fd", attach=picture)
        try:
            # By the number of the descriptor, not of its set: QEMU would never remove a set that it has written to.
            wanted = {"filename": f"/proc/self/fd/{given['fd']}", "format": "png"}
            await guest.execute(UNFENCED, "screendump", wanted)
        except OperationRejected as refusal:
            raise _no_display(guest, refusal) from refusal
        finally:
            with contextlib.suppress(OperationRejected, GuestNotFound, NotResponding):
                await guest.execute(UNFENCED, "remove-fd", {"fdset-id": given["fdset-id"]})
        return os.pread(picture, _SCREENSHOT_BYTES_MAX, 0)
    finally:
        os.close(picture)


def _has_display(guest: Guest) -> bool:
    machine = guest.folder.machine()
    return machine is not None and machine.display


def _no_display(guest: Guest, refusal: OperationRejected) -> OperationRejected:
    if _has_display(guest):
        return OperationRejected(
            f"The display of VM {guest.instance_id} cannot be shown: {refusal.message}",
            remedy="Try again; if it fails again, stop and start the VM.",
        )
    return OperationRejected(
        f"VM {guest.instance_id} has no display.", remedy="Enable display, then stop and start the VM."
    )


class _Display:
    """A VNC connection to the display. Satisfies `ports.Stream`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, instance_id: str) -> None:
        self._reader = reader
        self._writer = writer
        self._instance_id = instance_id

    async def read(self) -> bytes:
        try:
            return await self._reader.read(_READ_BYTES)
        except OSError:
            return b""

    async def write(self, data: bytes) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise GuestNotFound(f"The display of VM {self._instance_id} has closed: {error}") from error

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


async def _open_display(guest: Guest) -> _Display:
    """Open a VNC connection. Raises as `Hypervisor.open_display`."""
    if not _has_display(guest):
        raise _no_display(guest, OperationRejected("it has none"))
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            await guest.execute(UNFENCED, "getfd", {"fdname": _CLIENT_NAME}, attach=theirs.fileno())
        try:
            await guest.execute(UNFENCED, "add_client", {"protocol": "vnc", "fdname": _CLIENT_NAME, "skipauth": True})
        except OperationRejected as refusal:
            raise _no_display(guest, refusal) from refusal
        reader, writer = await asyncio.open_connection(sock=ours)
    except BaseException:
        ours.close()
        raise
    return _Display(reader, writer, guest.instance_id)
