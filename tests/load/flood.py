"""Clients that hold connections and give nothing for them: a program, so that they have a process of their own.

    python -m load.flood URL SECRET SECONDS

Each of 500 connections is of one kind, and is opened again when the server has closed it: a header that grows without
an end, half a head, nothing at all, a body that comes in drops, and an event stream that is not read. Prints how often
each kind was closed, as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import urlsplit

OF_EACH_KIND: Final = 100
_DROP_S: Final = 0.05
_AGAIN_S: Final = 0.1
Kind = Callable[[asyncio.StreamReader, asyncio.StreamWriter, str], Awaitable[None]]


async def growing_header(_: asyncio.StreamReader, writer: asyncio.StreamWriter, __: str) -> None:
    writer.write(b"GET /v1/instances HTTP/1.1\r\nHost: x\r\nX-Growing: ")
    while True:
        writer.write(b"a" * 16_384)
        await writer.drain()
        await asyncio.sleep(_DROP_S / 5)


async def half_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: str) -> None:
    writer.write(b"GET /v1/instances HTTP/1.1\r\nHost: x\r\n")
    await reader.read()


async def idle(reader: asyncio.StreamReader, _: asyncio.StreamWriter, __: str) -> None:
    await reader.read()


async def slow_body(_: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: str) -> None:
    head = f"POST /v1/instances HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {secret}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: 100000\r\n\r\n{{".encode())
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(_DROP_S)


async def unread_stream(_: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: str) -> None:
    writer.write(f"GET /v1/events?after=0 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {secret}\r\n\r\n".encode())
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.Event().wait()


KINDS: Final[tuple[Kind, ...]] = (growing_header, half_head, idle, slow_body, unread_stream)


async def _hold(kind: Kind, host: str, port: int, secret: str, closed: Counter[str]) -> None:
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(host, port, limit=4_096)
            try:
                await kind(reader, writer, secret)
            finally:
                writer.transport.abort()
        closed[kind.__name__] += 1
        await asyncio.sleep(_AGAIN_S)


async def flood(url: str, secret: str, seconds: float) -> Counter[str]:
    parts = urlsplit(url)
    closed: Counter[str] = Counter()
    host, port = parts.hostname or "", parts.port or 80
    holding = [
        asyncio.create_task(_hold(kind, host, port, secret, closed)) for _ in range(OF_EACH_KIND) for kind in KINDS
    ]
    await asyncio.sleep(seconds)
    for task in holding:
        task.cancel()
    await asyncio.wait(holding)
    return closed


if __name__ == "__main__":
    began_s = time.monotonic()
    counts = asyncio.run(flood(sys.argv[1], sys.argv[2], float(sys.argv[3])))
    sys.stdout.write(json.dumps({"seconds": round(time.monotonic() - began_s, 1), "closed": counts}) + "\n")
