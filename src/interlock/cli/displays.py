"""A guest's display, carried between VNC viewers on this machine and the server."""

from __future__ import annotations

import asyncio
import contextlib

from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation
from interlock.cli.naming import INSTANCES, path_of
from interlock.cli.web_sockets import connected

_CHUNK_BYTES = 65_536


def serve_display(invocation: Invocation, vm: str, address: str, port: int) -> None:
    """Listen for viewers, and carry what they and the guest's display say, until Ctrl-C. Raises `Failure`."""
    asyncio.run(_serve(invocation, vm, address, port))


async def _serve(invocation: Invocation, vm: str, address: str, port: int) -> None:
    path = path_of(INSTANCES, vm, "display")
    # Whoever cannot have the display is told before a viewer is.
    async with connected(invocation.client, path):
        pass

    async def view(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await _carry(invocation, path, reader, writer)
        except Failure as failure:
            invocation.say(f"-- {failure}", error=True)
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
        invocation.say(f"-- the screen of {vm} is at {shown}:{number} for a VNC viewer; Ctrl-C ends it", error=True)
        await server.serve_forever()


async def _carry(invocation: Invocation, path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    from websockets.exceptions import ConnectionClosed

    async with connected(invocation.client, path) as talk:

        async def inward() -> None:
            while data := await reader.read(_CHUNK_BYTES):
                await talk.send(data)

        async def outward() -> None:
            async for data in talk:
                writer.write(data if isinstance(data, bytes) else data.encode())
                await writer.drain()

        either = {asyncio.ensure_future(inward()), asyncio.ensure_future(outward())}
        try:
            done, _ = await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            with contextlib.suppress(ConnectionClosed, OSError):
                done.pop().result()
        finally:
            for each in either:
                each.cancel()
            await asyncio.wait(either)
