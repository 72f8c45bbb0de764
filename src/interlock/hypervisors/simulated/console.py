"""The serial console and display of a simulated guest."""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections.abc import Callable
from typing import Final

from interlock.core.errors import GuestNotFound
from interlock.core.states import PowerState
from interlock.hypervisors.simulated.guest import RUNS, SimulatedGuest

RFB_VERSION: Final = b"RFB 003.008\n"
"""The first bytes that a display sends."""
_WIDTH, _HEIGHT = 64, 48
_COLOURS: Final = {PowerState.RUNNING: (32, 96, 32), PowerState.PAUSED: (96, 96, 32)}


class SimulatedStream:
    """A connection to a guest. Input goes to `_on_input`."""

    def __init__(self, guest: SimulatedGuest, on_end: Callable[[SimulatedStream], None]) -> None:
        self._guest = guest
        self._on_end = on_end
        self._output: asyncio.Queue[bytes] = asyncio.Queue()
        self._ended = False

    async def read(self) -> bytes:
        if self._ended and self._output.empty():
            return b""
        return await self._output.get()

    async def write(self, data: bytes) -> None:
        if self._ended:
            raise GuestNotFound(f"The connection to VM {self._guest.instance_id} has ended.")
        self._on_input(data)

    async def close(self) -> None:
        self.end()

    def end(self) -> None:
        """End the stream for its reader."""
        if not self._ended:
            self._ended = True
            self._output.put_nowait(b"")
            self._on_end(self)

    def send(self, data: bytes) -> None:
        if not self._ended:
            self._output.put_nowait(data)

    def update(self, guest: SimulatedGuest) -> None:
        """Note that the guest has changed."""
        if guest.seen not in RUNS:
            self.end()

    def _on_input(self, data: bytes) -> None:
        """Handle input."""


class SimulatedConsole(SimulatedStream):
    """A serial console: it prints what the guest does, and a running guest echoes input."""

    def __init__(self, guest: SimulatedGuest, on_end: Callable[[SimulatedStream], None]) -> None:
        super().__init__(guest, on_end)
        self._unread = b""
        self._shown = (guest.power, guest.starts, guest.resets)

    def update(self, guest: SimulatedGuest) -> None:
        now = (guest.power, guest.starts, guest.resets)
        before, self._shown = self._shown, now
        if now[1:] != before[1:]:
            self.send(b"The guest starts again.\r\n")
        elif now[0] is not before[0]:
            self.send(f"The guest is {guest.seen.value}.\r\n".encode())
        self._echo()
        super().update(guest)

    def _on_input(self, data: bytes) -> None:
        self._unread += data
        self._echo()

    def _echo(self) -> None:
        if self._guest.power is PowerState.RUNNING and not self._guest.frozen and self._unread:
            unread, self._unread = self._unread, b""
            self.send(unread)


class SimulatedDisplay(SimulatedStream):
    """A display that sends its protocol version only."""

    def __init__(self, guest: SimulatedGuest, on_end: Callable[[SimulatedStream], None]) -> None:
        super().__init__(guest, on_end)
        self.send(RFB_VERSION)


def screenshot_png(guest: SimulatedGuest) -> bytes:
    """Return a screenshot as PNG: one colour, by power state."""
    row = b"\0" + bytes(_COLOURS.get(guest.power, (0, 0, 0))) * _WIDTH
    head = struct.pack(">IIBBBBB", _WIDTH, _HEIGHT, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(row * _HEIGHT)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
