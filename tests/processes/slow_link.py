"""A link between agents and a server: TCP, with a limited rate for all connections together, that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Self
from urllib.parse import urlsplit

from waiting import PATIENCE_S

_PIECE_BYTES = 8 << 10
_FILES = b"/files/"


class _Connection:
    def __init__(self, agent: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.writers = (agent, server)
        self.carries_files = False
        self.received = 0
        """The bytes that the agent has received."""


class SlowLink:
    """Forwards connections to a server, in a thread of its own.

    Args:
        server: the server's URL.
        bytes_per_s: the rate of all connections together, in both directions.
        cut_after: after how many bytes of files the connections that carry them are cut, once; None: never.
        listening: a socket, perhaps of another network namespace, that agents connect to; None: one is made.
    """

    def __init__(
        self, server: str, bytes_per_s: int, cut_after: int | None = None, listening: socket.socket | None = None
    ) -> None:
        split = urlsplit(server)
        self._server = (split.hostname, split.port)
        self._bytes_per_s = bytes_per_s
        self._cut_after = cut_after
        self._listening = listening or socket.create_server(("127.0.0.1", 0))
        self._connections: list[_Connection] = []
        self._turn = asyncio.Lock()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._listens = threading.Event()
        self._stop: Callable[[], object] = lambda: None
        self.url = ""
        self.cuts = 0

    @property
    def received_files(self) -> int:
        """The bytes that agents have received on connections that carry files."""
        return sum(one.received for one in self._connections if one.carries_files)

    @property
    def file_connections(self) -> int:
        return sum(one.carries_files for one in self._connections)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._listens.wait(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._thread.join()

    async def _run(self) -> None:
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()
        self._stop = lambda: loop.call_soon_threadsafe(stopped.set)
        async with await asyncio.start_server(self._forward, sock=self._listening) as server:
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            self._listens.set()
            await stopped.wait()
            for one in self._connections:
                for writer in one.writers:
                    writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(*self._server, limit=_PIECE_BYTES)
        one = _Connection(writer, upstream_writer)
        self._connections.append(one)
        await asyncio.gather(
            self._copy(reader, upstream_writer, one, to_agent=False),
            self._copy(upstream_reader, writer, one, to_agent=True),
        )

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, one: _Connection, *, to_agent: bool
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(_PIECE_BYTES):
                async with self._turn:  # in the order of arrival: each connection has its share
                    await asyncio.sleep(len(piece) / self._bytes_per_s)
                if to_agent:
                    one.received += len(piece)
                elif _FILES in piece:
                    one.carries_files = True
                writer.write(piece)
                await writer.drain()
                self._cut()
        writer.close()

    def _cut(self) -> None:
        if self._cut_after is None or self.cuts or self.received_files < self._cut_after:
            return
        self.cuts += 1
        for one in self._connections:
            if one.carries_files:
                for writer in one.writers:
                    writer.transport.abort()
