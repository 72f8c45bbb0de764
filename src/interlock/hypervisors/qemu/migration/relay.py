"""Forwards the bytes of a migration between QEMU and the other host, which see a socket and a TLS connection.

QEMU has no key of the host: TLS ends here, in the process of the agent or server.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import ssl
import threading
from typing import Final

_BUFFER_BYTES: Final = 1 << 18
_LINGER_S: Final = 5.0
"""How long the other side may take to read what was sent last, in seconds."""
_WOULD_BLOCK: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class _Direction:
    """One of the two directions, with what was received and is not sent yet."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self.active = source
        """The socket of the last system call."""
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self.pending = self._buffer[:0]

    def move(self) -> bool:
        """Receive and send what is possible now; return whether anything was. Raises EOFError, OSError."""
        moved = False
        with contextlib.suppress(*_WOULD_BLOCK):
            if not self.pending:
                self.active = self.source
                self.pending = self._buffer[: self._receive()]
                moved = True
            self.active = self.sink
            while self.pending:
                self.pending = self.pending[self.sink.send(self.pending) :]
                moved = True
        return moved

    def _receive(self) -> int:
        """Fill the buffer: a TLS connection returns one record at a time. Raises EOFError at the end of the source."""
        size = 0
        try:
            while size < _BUFFER_BYTES:
                received = self.source.recv_into(self._buffer[size:])
                if received == 0:
                    break
                size += received
        except _WOULD_BLOCK:
            if size == 0:
                raise
        if size == 0:
            raise EOFError
        return size


class Relay:
    """Forwards both ways, in a thread of its own, until either side ends or `close`.

    Both sockets are the relay's from then on: it closes them.

    Args:
        inner: the socket whose other end QEMU has.
        outer: the connection to the other host, with or without TLS, not blocking.
        name: of the thread.
    """

    def __init__(self, inner: socket.socket, outer: socket.socket, name: str) -> None:
        inner.setblocking(False)
        self._inner = inner
        self._outer = outer
        self._closed, self._closer = socket.socketpair()
        self._loop = asyncio.get_running_loop()
        self.ended = asyncio.Event()
        self.failure: str | None = None
        """Why the connection to the other host broke; None if it did not."""
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def close(self) -> None:
        """End it now; what is being forwarded is lost. Idempotent."""
        self._closer.close()

    def _run(self) -> None:
        try:
            with self._inner:
                self._forward()
            self._finish()
        finally:
            for each in (self._outer, self._closed, self._closer):
                each.close()
            with contextlib.suppress(RuntimeError):  # the event loop may be closed
                self._loop.call_soon_threadsafe(self.ended.set)

    def _forward(self) -> None:
        directions = (_Direction(self._inner, self._outer), _Direction(self._outer, self._inner))
        while True:
            moved = False
            for direction in directions:
                try:
                    moved |= direction.move()
                except EOFError:
                    return  # all that this source had sent was forwarded before
                except OSError as error:
                    if direction.active is self._outer:
                        self.failure = error.strerror or str(error)
                    return
            if not moved and not self._wait(directions):
                return

    def _wait(self, directions: tuple[_Direction, ...]) -> bool:
        """Wait until something can be moved. Return whether `close` was not called."""
        wanted = {self._closed.fileno(): select.POLLIN}
        for direction in directions:
            one = (direction.sink, select.POLLOUT) if direction.pending else (direction.source, select.POLLIN)
            wanted[one[0].fileno()] = wanted.get(one[0].fileno(), 0) | one[1]
        poll = select.poll()
        for descriptor, events in wanted.items():
            poll.register(descriptor, events)
        return self._closed.fileno() not in dict(poll.poll())

    def _finish(self) -> None:
        """Say that nothing follows, and wait until the other side has read everything.

        A socket that is closed before that discards what was sent.
        """
        with contextlib.suppress(OSError, ValueError):
            if isinstance(self._outer, ssl.SSLSocket):
                self._outer.unwrap()
        with contextlib.suppress(OSError), socket.socket(fileno=self._outer.detach()) as outer:
            outer.shutdown(socket.SHUT_WR)
            outer.settimeout(_LINGER_S)
            while outer.recv(_BUFFER_BYTES):
                pass
