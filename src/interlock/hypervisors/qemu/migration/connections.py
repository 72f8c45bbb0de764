"""Connections between two hosts for a migration: TLS 1.3 with the certificates of both, then a line each way.

Sockets are not blocking; a connection that is not needed any more is closed by who has it.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

import msgspec

from interlock.core.errors import OperationRejected
from interlock.hypervisors.certificates.host_certificate import HostCertificate
from interlock.ports.hosts import certified_host
from interlock.ports.migration import MigrationEndpoint

_ResultT = TypeVar("_ResultT")
_LINE_BYTES_MAX: Final = 400
OK: Final = "ok"
_EXPIRED: Final = 10
_NOT_YET_VALID: Final = 9
"""OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED and X509_V_ERR_CERT_NOT_YET_VALID."""
_OTHER_CA: Final = (
    "Restart the agents of both hosts: each gets a certificate of its server's CA when it connects. If it stays so, "
    "another program answers at that address: check qemu.migration_address of the target."
)
_RENEW: Final = (
    "See that the agents of both hosts are connected (`interlock host list`) and that the clocks are right: an agent "
    "renews its certificate while it is connected, and when it is restarted."
)


class PeerTls(msgspec.Struct, frozen=True):
    """TLS with one other host."""

    certificate: HostCertificate
    """This host's."""
    peer: str
    """The host that the other side's certificate must name."""

    async def secure(self, connection: socket.socket, *, server_side: bool) -> ssl.SSLSocket:
        """Return the connection with TLS; `connection` is detached, also on failure.

        Raises:
            OperationRejected: this host has no certificate.
            OSError: the connection or the handshake failed, also because of the other side's certificate.
            _WrongHost: the certificate is another host's.
        """
        settings = self.certificate.settings(server_side=server_side)
        secured = settings.wrap_socket(
            connection, server_side=server_side, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        try:
            await _until_done(secured, secured.do_handshake, writing=False)
            found = certified_host(secured.getpeercert())
            wrong = None if found == self.peer else f"its certificate is of host {found}, not of host {self.peer}"
            if wrong is not None and server_side:
                await send_line(secured, wrong)
        except BaseException:
            secured.close()
            raise
        if wrong is not None:
            secured.close()
            raise _WrongHost(wrong)
        return secured


class _WrongHost(ConnectionError):
    """The certificate of the other side is valid, and another host's."""


async def connect(endpoint: MigrationEndpoint, what: str, tls: PeerTls | None, timeout_s: float) -> socket.socket:
    """Return a connection to the target for `what`, which the target has accepted.

    Raises:
        OperationRejected: it cannot be reached, or does not accept it, or a certificate is not valid.
    """
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().sock_connect(connection, (endpoint.host, endpoint.port))
            if tls is not None:
                connection = await tls.secure(connection, server_side=False)
            await send_line(connection, f"{endpoint.secret} {what}")
            answer = await read_line(connection)
            if answer != OK:
                raise ConnectionError(f"the target refused it: {answer}")  # noqa: TRY301 - handled like any other
    except (OSError, TimeoutError) as error:
        connection.close()
        why, remedy = explain(error)
        target = "The target host" if tls is None else f"The target host {tls.peer}"
        raise OperationRejected(
            f"{target} cannot be sent the VM at {endpoint.host}:{endpoint.port}: {why}.", remedy=remedy
        ) from error
    except BaseException:
        connection.close()
        raise
    return connection


def explain(error: Exception) -> tuple[str, str]:
    """Return why a connection failed, and what to do."""
    match error:
        case ssl.SSLCertVerificationError(verify_code=code) if code in {_EXPIRED, _NOT_YET_VALID}:
            return f"its certificate is not valid now ({error.verify_message})", _RENEW
        case ssl.SSLCertVerificationError():
            return f"its certificate is not from this server's CA ({error.verify_message})", _OTHER_CA
        case ssl.SSLError(reason=str(reason)) if "ALERT" in reason:
            words = reason.partition("ALERT_")[2].lower().replace("_", " ")
            return f"it rejected the certificate of this host ({words})", _RENEW
        case ssl.SSLError():
            return (
                f"no TLS connection ({error.reason or error})",
                "Check that both hosts run the same version, and that qemu.migration_address of the target is its own.",
            )
        case _WrongHost():
            return (
                str(error),
                "Another host answers at that address: set qemu.migration_address of each host to its own address.",
            )
        case TimeoutError():
            return "timed out", "Check that the hosts can reach each other."
        case _:
            return str(error), "Check that the hosts can reach each other."


async def send_line(connection: socket.socket, line: str) -> None:
    """Send a line. Raises OSError."""
    left = memoryview(f"{line}\n".encode())
    while left:
        left = left[await _until_done(connection, partial(connection.send, left), writing=True) :]


async def read_line(connection: socket.socket) -> str:
    """Read one line and no more: QEMU reads what follows. Raises OSError."""
    line = b""
    while not line.endswith(b"\n"):
        byte = await _until_done(connection, partial(connection.recv, 1), writing=False)
        if not byte or len(line) > _LINE_BYTES_MAX:
            raise ConnectionError("it closed the connection")
        line += byte
    return line[:-1].decode("ascii", "replace")


async def _until_done(connection: socket.socket, action: Callable[[], _ResultT], *, writing: bool) -> _ResultT:
    """Return the result of an action on a socket, which is repeated while it would block."""
    while True:
        try:
            return action()
        except ssl.SSLWantReadError:
            await _ready(connection, writable=False)
        except ssl.SSLWantWriteError:
            await _ready(connection, writable=True)
        except BlockingIOError:
            await _ready(connection, writable=writing)


async def _ready(connection: socket.socket, *, writable: bool) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    descriptor = connection.fileno()
    (loop.add_writer if writable else loop.add_reader)(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        (loop.remove_writer if writable else loop.remove_reader)(descriptor)
