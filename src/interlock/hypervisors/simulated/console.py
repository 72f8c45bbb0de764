"""What is read from and written to a simulated guest: its serial console, and its screen."""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections.abc import Callable
from typing import Final

from interlock.core.errors import NotThere
from interlock.core.states import PowerState
from interlock.hypervisors.simulated.guest import RUNS, Guest

RFB_VERSION: Final = b"RFB 003.008\n"
"""What a display says first."""
_WIDTH, _HEIGHT = 64, 48
_COLOURS: Final = {PowerState.RUNNING: (32, 96, 32), PowerState.PAUSED: (96, 96, 32)}


class SimulatedStream:
    """A connection with a guest. What is typed goes to `_typed`."""

    def __init__(self, guest: Guest, gone: Callable[[SimulatedStream], None]) -> None:
        self._guest = guest
        self._gone = gone
        self._said: asyncio.Queue[bytes] = asyncio.Queue()
        self._ended = False

    async def read(self) -> bytes:
        if self._ended and self._said.empty():
            return b""
        return await self._said.get()

    async def write(self, data: bytes) -> None:
        if self._ended:
            raise NotThere(f"The connection with the guest of instance {self._guest.instance_id} has ended.")
        self._typed(data)

    async def close(self) -> None:
        self.end()

    def end(self) -> None:
        """Let who reads come to the end."""
        if not self._ended:
            self._ended = True
            self._said.put_nowait(b"")
            self._gone(self)

    def say(self, data: bytes) -> None:
        if not self._ended:
            self._said.put_nowait(data)

    def look(self, guest: Guest) -> None:
        """Take note that the guest has changed."""
        if guest.seen not in RUNS:
            self.end()

    def _typed(self, data: bytes) -> None:
        """Take what was typed."""


class SimulatedConsole(SimulatedStream):
    """A serial console: it says what the guest does, and a guest that runs echoes what is typed."""

    def __init__(self, guest: Guest, gone: Callable[[SimulatedStream], None]) -> None:
        super().__init__(guest, gone)
        self._unread = b""
        self._shown = (guest.power, guest.starts, guest.resets)

    def look(self, guest: Guest) -> None:
        now = (guest.power, guest.starts, guest.resets)
        before, self._shown = self._shown, now
        if now[1:] != before[1:]:
            self.say(b"The guest starts again.\r\n")
        elif now[0] is not before[0]:
            self.say(f"The guest is {guest.seen.value}.\r\n".encode())
        self._echo()
        super().look(guest)

    def _typed(self, data: bytes) -> None:
        self._unread += data
        self._echo()

    def _echo(self) -> None:
        if self._guest.power is PowerState.RUNNING and not self._guest.frozen and self._unread:
            unread, self._unread = self._unread, b""
            self.say(unread)


class SimulatedDisplay(SimulatedStream):
    """A display that says which protocol it speaks, and no more."""

    def __init__(self, guest: Guest, gone: Callable[[SimulatedStream], None]) -> None:
        super().__init__(guest, gone)
        self.say(RFB_VERSION)


def picture(guest: Guest) -> bytes:
    """A PNG of the guest's screen: one colour, by what the guest does."""
    row = b"\0" + bytes(_COLOURS.get(guest.power, (0, 0, 0))) * _WIDTH
    head = struct.pack(">IIBBBBB", _WIDTH, _HEIGHT, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(row * _HEIGHT)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
