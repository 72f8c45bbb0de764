"""The listening socket of the HTTP server, how many connections it accepts, and which of them are of agents."""

from __future__ import annotations

import ipaddress
import os
import re
import resource
import socket
import threading
from collections.abc import Callable
from typing import Final

from interlock.config import HttpConfig
from interlock.core.errors import Unavailable
from interlock.ports.hosts import LINK_ALPN
from interlock.service.load_limits import Slots

_TLS_HANDSHAKE: Final = 0x16
"""First byte of a connection with TLS: the record type of its handshake."""
_TLS_HEAD_BYTES: Final = 5
_BEGINNING: Final = b"GET /v1/hosts/"
_LINK: Final = re.compile(rb"GET /v1/hosts/[^/ ]+/link[ ?]")
PEEK_BYTES_MAX: Final = 16 * 1024
"""How much of a connection is looked at before it is read."""
_NETWORK_BITS: Final = 64


class ConnectionSlots:
    """Counts connections, in all and by address. Every method may be called from any thread.

    Args:
        most: the largest number in all.
        per_client: the largest number of one client.
    """

    def __init__(self, most: int, per_client: int) -> None:
        self._slots = Slots(most, per_client)
        self._lock = threading.Lock()

    def take(self, address: str) -> Callable[[], None] | None:
        """Count a connection, unless it is too many; return what counts its end, once however often it is called."""
        client = client_of(address)
        with self._lock:
            if not self._slots.take(client):
                return None
        taken = [client]

        def release() -> None:
            with self._lock:
                if taken:
                    self._slots.release(taken.pop())

        return release


def client_of(address: str) -> str:
    """Return whom an address stands for: of IPv6 the /64 network, since one client can have all addresses of that."""
    if ":" not in address:
        return address
    parsed = ipaddress.IPv6Address(address.partition("%")[0])
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((parsed, _NETWORK_BITS), strict=False))


def is_agent(seen: bytes, *, tls: bool) -> bool | None:
    """Return whether a connection that begins like that is of an agent; None if more must be seen.

    With TLS an agent names its protocol in the handshake, in clear; without, it sends nothing but the request of its
    WebSocket. A client that imitates this is only served in the agents' thread.
    """
    if tls:
        if seen[0] != _TLS_HANDSHAKE:
            return False
        length = _TLS_HEAD_BYTES + int.from_bytes(seen[3:_TLS_HEAD_BYTES], "big")
        if len(seen) < min(max(length, _TLS_HEAD_BYTES), PEEK_BYTES_MAX):
            return None
        return LINK_ALPN.encode() in seen
    if not seen.startswith(_BEGINNING[: len(seen)]):
        return False
    if b"\r\n" in seen or len(seen) >= PEEK_BYTES_MAX:
        return _LINK.match(seen) is not None
    return None


def connection_slots(limits: HttpConfig) -> tuple[ConnectionSlots, ConnectionSlots]:
    """Return the slots of clients and those of agents, within the number of files that the process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    most = min(limits.connections_max, hard // 2)
    return ConnectionSlots(most, limits.connections_per_client_max), ConnectionSlots(most, most)


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
