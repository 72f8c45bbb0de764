"""The serial console of one guest, live: one connection to QEMU, shared by everybody who looks on or types.

The connection is there while somebody uses it. The log of the console is written by QEMU itself at all times; see
`console_log`. A guest waits while its console is not read, so that it is always read, and a reader who is slow loses
the middle of what came.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Final

from interlock.core.errors import NotThere

_CHUNK_BYTES: Final = 65_536


class ConsoleStream:
    """One user of a console. Satisfies `ports.Stream`."""

    def __init__(self, console: Console, bytes_max: int) -> None:
        self._console = console
        self._bytes_max = bytes_max
        self._waiting = bytearray()
        self._lost_bytes = 0
        self._news = asyncio.Event()
        self._ended = False

    def feed(self, data: bytes) -> None:
        """Keep what came until it is read; what is over the limit goes, the oldest first."""
        self._waiting += data
        excess = len(self._waiting) - self._bytes_max
        if excess > 0:
            del self._waiting[:excess]
            self._lost_bytes += excess
        self._news.set()

    def end(self) -> None:
        """Nothing will come any more."""
        self._ended = True
        self._news.set()

    async def read(self) -> bytes:
        """What came since the last time; empty at the end. What was lost before it is told in its place."""
        while not self._waiting and not self._ended:
            self._news.clear()
            await self._news.wait()
        notice = b""
        if self._lost_bytes:
            notice = f"\r\n[interlock: {self._lost_bytes} bytes of the console were left out here]\r\n".encode()
        found = notice + bytes(self._waiting)
        self._waiting.clear()
        self._lost_bytes = 0
        return found

    async def write(self, data: bytes) -> None:
        """Type. Waits while the guest takes nothing in. Raises `NotThere` when it has ended."""
        if self._ended:
            raise self._console.gone()
        await self._console.send(data)

    async def close(self) -> None:
        self.end()
        await self._console.leave(self)


class Console:
    """The connection, and who uses it."""

    def __init__(self, instance_id: str, call: Callable[[], socket.socket], reader_bytes_max: int) -> None:
        """Args:
        instance_id: for messages.
        call: gives a connected socket, or raises OSError when nobody listens.
        reader_bytes_max: how much is kept for a user who does not read.
        """
        self._instance_id = instance_id
        self._call = call
        self._reader_bytes_max = reader_bytes_max
        self._streams: set[ConsoleStream] = set()
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()

    async def open(self) -> ConsoleStream:
        """Join the users, as the first one with a new connection. Raises `NotThere` if nobody answers."""
        stream = ConsoleStream(self, self._reader_bytes_max)
        async with self._changing:
            if self._writer is None:
                await self._connect()
            self._streams.add(stream)
        return stream

    async def _connect(self) -> None:
        try:
            reader, writer = await asyncio.open_unix_connection(sock=self._call(), limit=_CHUNK_BYTES)
        except OSError:
            raise self.gone() from None
        self._writer = writer
        self._reading = asyncio.create_task(self._read(reader, writer), name=f"console of {self._instance_id}")

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                for stream in self._streams:
                    stream.feed(data)
        # Whoever comes next makes a connection of its own.
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
        """Let one user go; with the last one the connection goes too."""
        async with self._changing:
            self._streams.discard(stream)
            if not self._streams:
                self.close()

    def close(self) -> None:
        """Let go of the console; for everybody who uses it, it has ended."""
        if self._reading is not None:
            self._reading.cancel()
        self._hang_up()

    def _hang_up(self) -> None:
        if self._writer is not None:
            # A guest that takes nothing in must not keep the connection open: QEMU serves one at a time.
            self._writer.transport.abort()
        self._writer = self._reading = None
        streams, self._streams = self._streams, set()
        for stream in streams:
            stream.end()

    def gone(self) -> NotThere:
        return NotThere(f"The console of instance {self._instance_id} has ended.")
