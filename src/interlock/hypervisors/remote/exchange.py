"""One connection in use: a bounded send queue, and the messages of both directions in order."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec

from interlock.hypervisors.remote.protocol import (
    LeaseGranted,
    Message,
    Ping,
    Pong,
    Renew,
    TransferMessage,
    Welcome,
    decode,
    encode,
)
from interlock.ports.hosts import Link

QUEUE_BYTES_MAX: Final = 32 << 20
"""Limit of what waits to be sent. A peer that reads more slowly than that is disconnected."""
_URGENT: Final = (Welcome, Renew, LeaseGranted, Ping, Pong)
_CLOSE_S: Final = 2.0
"""For how long the close handshake is waited for; a peer that does not read does not answer it."""


class SendQueue:
    """Encoded messages that wait to be sent: the welcome and those about the lease first, all others in order.

    The progress of a call replaces an earlier one of the same call that is still in the queue.
    """

    def __init__(self, bytes_max: int = QUEUE_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._urgent: deque[bytes] = deque()
        self._ordered: deque[list[bytes]] = deque()
        self._progress: dict[int, list[bytes]] = {}
        """The entry of each call's progress in `_ordered`, by the call's number."""
        self._numbers: deque[int | None] = deque()
        self._bytes = 0
        self._filled = asyncio.Event()
        self.full = asyncio.Event()
        """Set once a message did not fit; nothing is queued from then on."""

    def put(self, message: Message) -> None:
        """Queue a message, unless the queue is full."""
        frame = encode(message)
        if self.full.is_set():
            return
        if self._bytes + len(frame) > self._bytes_max:
            self.full.set()
            return
        if isinstance(message, TransferMessage) and message.number in self._progress:
            entry = self._progress[message.number]
            self._bytes += len(frame) - len(entry[0])
            entry[0] = frame
            return
        self._bytes += len(frame)
        if isinstance(message, _URGENT):
            self._urgent.append(frame)
        else:
            entry = [frame]
            number = message.number if isinstance(message, TransferMessage) else None
            if number is not None:
                self._progress[number] = entry
            self._ordered.append(entry)
            self._numbers.append(number)
        self._filled.set()

    async def get(self) -> bytes:
        """Remove and return the next message."""
        while not (self._urgent or self._ordered):
            self._filled.clear()
            await self._filled.wait()
        if self._urgent:
            frame = self._urgent.popleft()
        else:
            (frame,), number = self._ordered.popleft(), self._numbers.popleft()
            if number is not None:
                del self._progress[number]
        self._bytes -= len(frame)
        return frame


class Exchange:
    """Sends and receives messages over a connection."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._queue = SendQueue()

    def post(self, message: Message) -> None:
        """Queue a message to be sent, without waiting."""
        self._queue.put(message)

    async def receive(self) -> Message:
        """Return the next message. Raises `ConnectionError`, also for an invalid message."""
        try:
            return decode(await self._link.receive())
        except msgspec.DecodeError as error:
            raise ConnectionError(f"invalid message: {error}") from error

    async def run(self, on_message: Callable[[Message], None]) -> None:
        """Send and receive until the connection ends, and close it. Raises `ConnectionError`."""
        sending = asyncio.create_task(self._send(), name="send messages")
        receiving = asyncio.create_task(self._receive(on_message), name="receive messages")
        overflowing = asyncio.create_task(self._queue.full.wait(), name="send queue full")
        tasks, reason = {sending, receiving, overflowing}, ""
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if overflowing in done:
                reason = f"Send queue full: {QUEUE_BYTES_MAX >> 20} MiB were not read."
                raise ConnectionError(reason)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await self._link.close(reason)

    async def _receive(self, on_message: Callable[[Message], None]) -> None:
        while True:
            on_message(await self.receive())

    async def _send(self) -> None:
        while True:
            await self._link.send(await self._queue.get())
