"""`interlock vm screenshot` and `interlock vm vnc`: a guest's screen, as a picture and for a VNC viewer."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

import click

from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation, needs_invocation
from interlock.cli.naming import INSTANCES, path_of, suggesting, vm_argument
from interlock.cli.web_sockets import connected

_CHUNK_BYTES = 65_536
_VNC_PORT = 5900


@click.command()
@vm_argument
@click.option("--output", "-o", metavar="FILE", help="Where to; - for standard output. Default: NAME.png.")
@needs_invocation
def screenshot(invocation: Invocation, *, vm: str, output: str | None) -> None:
    """Save what a VM's screen shows, as a PNG."""
    with suggesting(invocation.client, INSTANCES, vm):
        picture = invocation.client.get(path_of(INSTANCES, vm, "screenshot")).body
    if output == "-" or (output is None and not sys.stdout.isatty()):
        sys.stdout.buffer.write(picture)
        return
    path = Path(output or f"{vm}.png")
    try:
        path.write_bytes(picture)
    except OSError as error:
        raise Failure(ExitCode.USAGE, f"{path} cannot be written: {error.strerror}.") from None
    invocation.say(f"Saved: {path}")


@click.command()
@vm_argument
@click.option(
    "--listen",
    default=f"127.0.0.1:{_VNC_PORT}",
    show_default=True,
    metavar="ADDRESS:PORT",
    help="Where the viewer finds it; port 0: any free one.",
)
@needs_invocation
def vnc(invocation: Invocation, *, vm: str, listen: str) -> None:
    """Let an ordinary VNC viewer see a VM's screen, until Ctrl-C.

    Whoever can connect to the address can see and type, without a password: keep it on loopback.
    """
    address, colon, port = listen.rpartition(":")
    if not (colon and address and port.isdecimal() and int(port) < 1 << 16):
        raise click.UsageError(f"{listen!r} is no address; write ADDRESS:PORT, as in 127.0.0.1:{_VNC_PORT}.")
    with suggesting(invocation.client, INSTANCES, vm):
        asyncio.run(_serve(invocation, vm, address.strip("[]"), int(port)))


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
