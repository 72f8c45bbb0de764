"""The listening socket of the HTTP server, and its protocol: a response leaves in one packet."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from interlock.core.errors import Unavailable

_GATHERED_BYTES_MAX: Final = 64 * 1024
"""Gathered output beyond this is written at once."""


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with the head and body of a response written in one system call."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_GatheringTransport(transport))  # type: ignore[arg-type]


class _GatheringTransport:
    """A transport that gathers what is written in one turn of the event loop."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._gathered: list[bytes] = []
        self._bytes = 0
        self._call_soon = asyncio.get_running_loop().call_soon

    def write(self, data: bytes) -> None:
        if not self._gathered:
            self._call_soon(self._flush)
        self._gathered.append(data)
        self._bytes += len(data)
        if self._bytes > _GATHERED_BYTES_MAX:
            self._flush()

    def _flush(self) -> None:
        if self._gathered:
            data = b"".join(self._gathered)
            self._gathered.clear()
            self._bytes = 0
            self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises `Unavailable`."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise Unavailable(
            f"Cannot listen on {host}:{port}: {os.strerror(error.errno) if error.errno else error}.",
            remedy="Stop what uses it, or choose another with INTERLOCK_LISTEN_PORT (0: any free one) or --listen.",
        ) from None


def url_of(listening: socket.socket, *, tls: bool) -> str:
    """Return the URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
