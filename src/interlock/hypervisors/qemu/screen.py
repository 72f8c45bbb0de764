"""A guest's screen, as a picture and over VNC. QEMU opens nothing for either: it is handed descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import Final

from interlock.core.errors import NotResponding, NotThere, Refused
from interlock.hypervisors.qemu.guest import Guest

_PICTURE_BYTES_MAX: Final = 64 * 1024 * 1024
_READ_BYTES: Final = 65_536
_CLIENT_NAME: Final = "display"


class _Looking:
    """The permit of who only looks."""

    fence = 0

    def check(self) -> None:
        return


async def screenshot(guest: Guest) -> bytes:
    """What the screen shows, as PNG. Raises as `Hypervisor.screenshot`."""
    picture = os.memfd_create("screenshot", os.MFD_CLOEXEC)
    try:
        os.fchmod(picture, 0o666)
        given = await guest.tell(_Looking(), "add-fd", attach=picture)
        try:
            # Under its number, not that of its set: QEMU would not forget the set of a picture that it has written.
            wanted = {"filename": f"/proc/self/fd/{given['fd']}", "format": "png"}
            await guest.tell(_Looking(), "screendump", wanted)
        except Refused as refusal:
            raise _no_screen(guest, refusal) from refusal
        finally:
            with contextlib.suppress(Refused, NotThere, NotResponding):
                await guest.tell(_Looking(), "remove-fd", {"fdset-id": given["fdset-id"]})
        return os.pread(picture, _PICTURE_BYTES_MAX, 0)
    finally:
        os.close(picture)


def _has_screen(guest: Guest) -> bool:
    machine = guest.folder.machine()
    return machine is not None and machine.display


def _no_screen(guest: Guest, refusal: Refused) -> Refused:
    if _has_screen(guest):
        return Refused(
            f"The screen of instance {guest.instance_id} cannot be shown: {refusal.message}",
            remedy="Try again; if it stays so, stop and start it.",
        )
    return Refused(
        f"The guest of instance {guest.instance_id} has no screen.", remedy="Set display, then stop and start it."
    )


class Display:
    """A `ports.Stream` that speaks VNC with the screen."""

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
            raise NotThere(f"The screen of instance {self._instance_id} has gone: {error}") from error

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


async def open_display(guest: Guest) -> Display:
    """A connection with the screen. Raises as `Hypervisor.open_display`."""
    if not _has_screen(guest):
        raise _no_screen(guest, Refused("it has none"))
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            await guest.tell(_Looking(), "getfd", {"fdname": _CLIENT_NAME}, attach=theirs.fileno())
        try:
            await guest.tell(_Looking(), "add_client", {"protocol": "vnc", "fdname": _CLIENT_NAME, "skipauth": True})
        except Refused as refusal:
            raise _no_screen(guest, refusal) from refusal
        reader, writer = await asyncio.open_connection(sock=ours)
    except BaseException:
        ours.close()
        raise
    return Display(reader, writer, guest.instance_id)
