"""How an agent reaches its server: a WebSocket to the server's own door, made again whenever it broke."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Final

from websockets.asyncio.client import connect
from websockets.asyncio.connection import Connection
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from interlock.core.errors import Forbidden, Invalid
from interlock.hypervisors.remote.wire import FRAME_BYTES_MAX

_OPEN_S: Final = 10.0
_REFUSED: Final = frozenset({401, 403, 404})


class WebSocketLink:
    """Satisfies `ports.hosts.Link`."""

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

    async def close(self) -> None:
        await self._connection.close()


async def dial(server: str, name: str, token: str, certificate: Path | None = None) -> WebSocketLink:
    """Call the server whose URL is `server`, with a bearer token; `certificate` is one to trust beside the system's.

    Raises:
        ConnectionError: it cannot be reached now.
        Forbidden: it does not let this token in.
        Invalid: the URL is none.
    """
    address = f"{server.rstrip('/')}/v1/hosts/{name}/link"
    address = address.replace("https://", "wss://", 1).replace("http://", "ws://", 1)
    trusted = None
    if address.startswith("wss://"):
        trusted = ssl.create_default_context()
        if certificate is not None:
            await asyncio.to_thread(trusted.load_verify_locations, certificate)
    try:
        connection = await connect(
            address,
            additional_headers={"Authorization": f"Bearer {token}"},
            compression=None,
            max_size=FRAME_BYTES_MAX,
            open_timeout=_OPEN_S,
            ssl=trusted,
            proxy=None,
        )
    except InvalidURI as error:
        raise Invalid(f"{server} is no URL of a server.", remedy="Write it as https://HOST:PORT.") from error
    except InvalidStatus as error:
        if error.response.status_code in _REFUSED:
            raise Forbidden(
                f"The server at {server} does not let this agent in ({error.response.status_code}).",
                remedy="Give it the secret of a token with the role agent or admin.",
            ) from error
        raise ConnectionError(str(error)) from error
    except (OSError, InvalidHandshake, TimeoutError) as error:
        raise ConnectionError(str(error)) from error
    return WebSocketLink(connection)
