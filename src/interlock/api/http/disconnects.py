"""Cancel a waiting request when its client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

ValueT = TypeVar("ValueT")


async def cancel_on_disconnect(request: Request, waiting: Coroutine[Any, Any, ValueT]) -> ValueT:
    """Return the result of `waiting`, or cancel it as soon as the client disconnects.

    The body of the request must have been read.

    Raises:
        ClientDisconnect: the client disconnected.
    """
    work = asyncio.ensure_future(waiting)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait((work, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientDisconnect
    finally:
        work.cancel()
        disconnect.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
