"""The serial console of one guest: one connection to QEMU, shared by all its users.

The connection is open while somebody uses it. QEMU writes the log itself at all times: see `console_log`. A guest
blocks while its console is not read; so it is always read, and a slow reader loses the oldest output.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Final

from interlock.core.errors import GuestNotFound

_CHUNK_BYTES: Final = 65_536


class ConsoleStream:
    """One user of a console. Satisfies `ports.Stream`."""

    def __init__(self, console: Console, bytes_max: int) -> None:
        self._console = console
        self._bytes_max = bytes_max
        self._waiting = bytearray()
        self._lost_bytes = 0
        self._changed = asyncio.Event()
        self._ended = False

    def feed(self, data: bytes) -> None:
        """Buffer output until it is read; above the limit the oldest is dropped."""
        self._waiting += data
        excess = len(self._waiting) - self._bytes_max
        if excess > 0:
            del self._waiting[:excess]
            self._lost_bytes += excess
        self._changed.set()

    def end(self) -> None:
        """Note the end of the output."""
        self._ended = True
        self._changed.set()

    async def read(self) -> bytes:
        """Return the output since the last call, with a notice of what was dropped; empty at the end."""
        while not self._waiting and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        notice = b""
        if self._lost_bytes:
            notice = f"\r\n[interlock: {self._lost_bytes} bytes of the console were dropped here]\r\n".encode()
        found = notice + bytes(self._waiting)
        self._waiting.clear()
        self._lost_bytes = 0
        return found

    async def write(self, data: bytes) -> None:
        """Send input. Waits while the guest accepts none. Raises `GuestNotFound` when it has ended."""
        if self._ended:
            raise self._console.gone()
        await self._console.send(data)

    async def close(self) -> None:
        self.end()
        await self._console.leave(self)


class Console:
    """The connection, and its users."""

    def __init__(self, instance_id: str, connect: Callable[[], socket.socket], reader_bytes_max: int) -> None:
        """Args:
        instance_id: for messages.
        connect: returns a connected socket, or raises OSError if nobody listens.
        reader_bytes_max: how much is buffered for a user who does not read.
        """
        self._instance_id = instance_id
        self._open_socket = connect
        self._reader_bytes_max = reader_bytes_max
        self._streams: set[ConsoleStream] = set()
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()

    async def open(self) -> ConsoleStream:
        """Add a user; the first one opens the connection. Raises `GuestNotFound` if QEMU does not listen."""
        stream = ConsoleStream(self, self._reader_bytes_max)
        async with self._changing:
            if self._writer is None:
                await self._connect()
            self._streams.add(stream)
        return stream

    async def _connect(self) -> None:
        try:
            reader, writer = await asyncio.open_unix_connection(sock=self._open_socket(), limit=_CHUNK_BYTES)
        except OSError:
            raise self.gone() from None
        self._writer = writer
        self._reading = asyncio.create_task(self._read(reader, writer), name=f"console of {self._instance_id}")

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                for stream in self._streams:
                    stream.feed(data)
        # The next user opens a new connection.
        if self._writer is writer:
            self._hang_up()

    async def send(self, data: bytes) -> None:
        if self._writer is None:
            raise self.gone()
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError:
            raise self.gone() from None

    async def leave(self, stream: ConsoleStream) -> None:
        """Remove a user; the last one closes the connection."""
        async with self._changing:
            self._streams.discard(stream)
            if not self._streams:
                self.close()

    def close(self) -> None:
        """Close the connection; for its users the console has ended."""
        if self._reading is not None:
            self._reading.cancel()
        self._hang_up()

    def _hang_up(self) -> None:
        if self._writer is not None:
            # A guest that accepts no input must not keep the connection open: QEMU serves one at a time.
            self._writer.transport.abort()
        self._writer = self._reading = None
        streams, self._streams = self._streams, set()
        for stream in streams:
            stream.end()

    def gone(self) -> GuestNotFound:
        return GuestNotFound(f"The console of VM {self._instance_id} has ended.")
