"""The agent's connection to its server: a WebSocket, with a bearer token."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Final

import msgspec
from websockets.asyncio.client import connect
from websockets.asyncio.connection import Connection
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus, InvalidURI
from websockets.frames import CloseCode

from interlock.core.errors import Forbidden, Invalid
from interlock.hypervisors.remote.protocol import FRAME_BYTES_MAX
from interlock.ports.hosts import LINK_ALPN

_ENROLMENT_HEADER: Final = "Interlock-Enrolment"
_OPEN_S: Final = 10.0
_REFUSED: Final = frozenset({401, 403, 404, 422})


class WebSocketLink:
    """Implements `ports.hosts.Link`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def send(self, frame: bytes) -> None:
        try:
            await self._connection.send(frame)
        except ConnectionClosed as closed:
            raise ConnectionError(str(closed)) from closed

    async def receive(self) -> bytes:
        try:
            frame = await self._connection.recv()
        except ConnectionClosed as closed:
            raise ConnectionError(str(closed)) from closed
        return frame.encode() if isinstance(frame, str) else frame

    async def close(self, reason: str = "") -> None:
        try:
            await self._connection.close(CloseCode.TRY_AGAIN_LATER if reason else CloseCode.NORMAL_CLOSURE, reason)
        finally:
            # A peer that does not read leaves no space for the close frame, and who closes waits no longer.
            self._connection.transport.abort()


class _Problem(msgspec.Struct):
    detail: str = "No reason given."
    remedy: str | None = None


def _problem(body: bytes | bytearray | None) -> tuple[str, str | None]:
    """Return detail and remedy of an error response."""
    try:
        problem = msgspec.json.decode(bytes(body or b"{}"), type=_Problem)
    except msgspec.DecodeError:
        problem = _Problem()
    return problem.detail, problem.remedy


async def tls_settings(server: str, ca: Path | None, certificate: Path | None = None) -> ssl.SSLContext | None:
    """Return the TLS settings for a server's URL; None without TLS.

    `ca` is trusted besides the system's CAs, and `certificate` shown to a server that asks for one. Raises OSError if
    one of them cannot be read.
    """
    if not server.startswith("https://"):
        return None
    settings = ssl.create_default_context()
    if ca is not None:
        await asyncio.to_thread(settings.load_verify_locations, ca)
    if certificate is not None:
        await asyncio.to_thread(settings.load_cert_chain, certificate)
    return settings


async def dial(
    server: str, name: str, token: str, tls: ssl.SSLContext | None = None, enrolment: str | None = None
) -> WebSocketLink:
    """Connect to the server whose URL is `server`; `tls` is for such connections alone.

    `enrolment` is a secret of `interlock host enroll`.

    Raises:
        ConnectionError: it cannot be reached now.
        Forbidden: it rejects the token.
        Invalid: the URL is invalid.
    """
    if tls is not None:
        tls.set_alpn_protocols([LINK_ALPN, "http/1.1"])
    address = f"{server.rstrip('/')}/v1/hosts/{name}/link"
    address = address.replace("https://", "wss://", 1).replace("http://", "ws://", 1)
    headers = {"Authorization": f"Bearer {token}"} | ({} if enrolment is None else {_ENROLMENT_HEADER: enrolment})
    try:
        connection = await connect(
            address,
            additional_headers=headers,
            compression=None,
            max_size=FRAME_BYTES_MAX,
            open_timeout=_OPEN_S,
            ssl=tls,
            proxy=None,
        )
    except InvalidURI as error:
        raise Invalid(f"Invalid server URL {server!r}.", remedy="Write it as https://HOST:PORT.") from error
    except InvalidStatus as error:
        if error.response.status_code in _REFUSED:
            why, remedy = _problem(error.response.body)
            raise Forbidden(
                f"The server at {server} refuses this agent ({error.response.status_code}): {why}",
                remedy=remedy or f"Make a token for it: `interlock token create NAME --role agent --host {name}`.",
            ) from error
        raise ConnectionError(str(error)) from error
    except ssl.SSLCertVerificationError as error:
        raise ConnectionError(
            f"{error}. Name the file of the server's CA with --ca; its certificate must be for the host in the URL."
        ) from error
    except InvalidMessage as error:
        # As far as a client of TLS 1.3 sees, also if its certificate was rejected.
        raise ConnectionError(
            f"{error}. If the server requires certificates, that of this host may have expired: create a secret with "
            f"`interlock host enroll {name}`, and start the agent with --enrolment-file."
        ) from error
    except (OSError, InvalidHandshake, TimeoutError) as error:
        raise ConnectionError(str(error)) from error
    return WebSocketLink(connection)
