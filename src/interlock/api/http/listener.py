"""The listening socket of the HTTP server."""

from __future__ import annotations

import os
import socket

from interlock.core.errors import Unavailable


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
