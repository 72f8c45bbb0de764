"""WebSocket connections to the server, with its errors as `Failure`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from interlock.cli.client.http_client import Client, Query, Reply, target
from interlock.cli.failures import ExitCode, Failure, of_status

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection
    from websockets.exceptions import ConnectionClosed

_PROBLEM = 4000
_ENDED = 1000
_MESSAGE_BYTES_MAX = 16 * 1024 * 1024


@contextlib.asynccontextmanager
async def connected(client: Client, path: str, query: Query | None = None) -> AsyncIterator[ClientConnection]:
    """Open a WebSocket connection. Raises `Failure`."""
    # Slow to import.
    from websockets.asyncio.client import connect
    from websockets.exceptions import InvalidHandshake, InvalidStatus

    url = "ws" + client.server.url.removeprefix("http") + target(path, query)
    headers = {"Authorization": f"Bearer {client.server.token}"}
    async with contextlib.AsyncExitStack() as held:
        try:
            connecting = connect(
                url,
                additional_headers=headers,
                compression=None,
                max_size=_MESSAGE_BYTES_MAX,
                ssl=client.server.tls(),
                proxy=None,
            )
            connection = await held.enter_async_context(connecting)
        except InvalidStatus as refused:
            response = refused.response
            found = {name.lower(): value for name, value in response.headers.raw_items()}
            client.raise_for_status(Reply(response.status_code, found, bytes(response.body or b"")))
            raise client.unreachable(refused) from refused
        except (OSError, EOFError, InvalidHandshake) as error:
            raise client.unreachable(error) from error
        yield connection


def ending(closed: ConnectionClosed, what: str) -> str:
    """Return why a connection was closed normally.

    Raises:
        Failure: connection lost, or closed with an error.
    """
    if closed.rcvd is not None and closed.rcvd.code == _ENDED:
        return closed.rcvd.reason or f"The {what} has ended."
    if closed.rcvd is not None and closed.rcvd.code > _PROBLEM:
        raise Failure(of_status(closed.rcvd.code - _PROBLEM), closed.rcvd.reason or f"The {what} was closed.")
    raise Failure(
        ExitCode.NOT_REACHABLE,
        f"Connection to the {what} lost; the VM is not affected.",
        remedy="Check whether the server is running, and retry.",
    )
