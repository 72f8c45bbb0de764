"""Proxy between VNC viewers on this machine and a guest's display on the server."""

from __future__ import annotations

import asyncio
import contextlib

from interlock.cli.client.paths import INSTANCES, path_of
from interlock.cli.client.web_sockets import connected
from interlock.cli.context import Invocation
from interlock.cli.failures import ExitCode, Failure

_CHUNK_BYTES = 65_536


def serve_display(invocation: Invocation, vm: str, address: str, port: int) -> None:
    """Listen for VNC viewers and relay their connections until Ctrl-C. Raises `Failure`."""
    asyncio.run(_serve(invocation, vm, address, port))


async def _serve(invocation: Invocation, vm: str, address: str, port: int) -> None:
    path = path_of(INSTANCES, vm, "display")
    # Report errors before a viewer connects.
    async with connected(invocation.client, path):
        pass

    async def view(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await _relay(invocation, path, reader, writer)
        except Failure as failure:
            invocation.echo(f"-- {failure}", error=True)
        finally:
            writer.close()

    try:
        server = await asyncio.start_server(view, address, port)
    except OSError as error:
        raise Failure(
            ExitCode.USAGE,
            f"Cannot listen on {address}:{port}: {error.strerror}.",
            remedy="Choose another address with --listen.",
        ) from None
    async with server:
        host, number = server.sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        invocation.echo(f"-- VNC display of {vm} on {shown}:{number}; Ctrl-C ends it", error=True)
        await server.serve_forever()


async def _relay(invocation: Invocation, path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    from websockets.exceptions import ConnectionClosed

    async with connected(invocation.client, path) as connection:

        async def inward() -> None:
            while data := await reader.read(_CHUNK_BYTES):
                await connection.send(data)

        async def outward() -> None:
            async for data in connection:
                writer.write(data if isinstance(data, bytes) else data.encode())
                await writer.drain()

        tasks = {asyncio.ensure_future(inward()), asyncio.ensure_future(outward())}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            with contextlib.suppress(ConnectionClosed, OSError):
                done.pop().result()
        finally:
            for each in tasks:
                each.cancel()
            await asyncio.wait(tasks)
