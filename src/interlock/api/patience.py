"""Holding a request open only as long as somebody is there to be answered."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

ValueT = TypeVar("ValueT")


async def while_connected(request: Request, waiting: Coroutine[Any, Any, ValueT]) -> ValueT:
    """What `waiting` answers; it is cancelled as soon as the client has gone away.

    The body of the request must have been read, or there must be none.

    Raises:
        ClientDisconnect: the client has gone away.
    """
    work = asyncio.ensure_future(waiting)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientDisconnect
    finally:
        work.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
