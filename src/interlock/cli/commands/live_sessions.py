"""Sessions of a terminal with a guest's console, and of VNC viewers with its display.

A module of its own, since asyncio takes longer to import than most commands take.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from interlock.cli.client.paths import INSTANCES, path_of
from interlock.cli.client.web_sockets import connected, ending
from interlock.cli.context import Invocation
from interlock.cli.failures import ExitCode, Failure

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

_CHUNK_BYTES: Final = 4096
_END_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)


def run_session(invocation: Invocation, vm: str, escape: bytes, linger_s: float, history: int, data: bytes) -> None:
    """Run a session, starting with the input `data`. Raises `Failure`."""
    asyncio.run(Session(invocation, vm, escape, linger_s).run(history, data))


def _key_name(key: bytes) -> str:
    return f"Ctrl-{chr(key[0] | 0x40)}" if key < b" " else key.decode()


class Session:
    """A connection between a terminal, or pipes, and a guest's console."""

    def __init__(self, invocation: Invocation, vm: str, escape: bytes, linger_s: float) -> None:
        self._invocation = invocation
        self._vm = vm
        self._on_terminal = sys.stdin.isatty()
        self._escape = escape if self._on_terminal else b""
        self._linger_s = linger_s
        self._keys: asyncio.Queue[bytes] = asyncio.Queue(16)
        self._output_received = asyncio.Event()

    async def run(self, history: int, data: bytes) -> None:
        """Relay in both directions until one side closes, then restore the terminal. Raises `Failure`."""
        path = path_of(INSTANCES, self._vm, "console/live")
        async with connected(self._invocation.client, path, {"history": history}) as connection:
            with _raw(sys.stdin.fileno()) if self._on_terminal else contextlib.nullcontext():
                if self._on_terminal:
                    how = f"{_key_name(self._escape)} detaches" if self._escape else "close the window to detach"
                    self._invocation.echo(f"-- connected to the console of {self._vm}; {how}\r", error=True)
                why = await self._relay(connection, data)
        if self._on_terminal:
            self._invocation.echo(f"\n-- {why}", error=True)

    async def _relay(self, connection: ClientConnection, data: bytes) -> str:
        """Relay until one side closes. Return why."""
        from websockets.exceptions import ConnectionClosed

        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        for number in _END_SIGNALS:
            loop.add_signal_handler(number, task.cancel)
        if data:
            await self._keys.put(data)
        threading.Thread(target=self._read_keys, args=(loop,), daemon=True).start()
        tasks = {asyncio.ensure_future(self._send(connection)), asyncio.ensure_future(self._receive(connection))}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        except ConnectionClosed as closed:
            return ending(closed, "console")
        finally:
            for each in tasks:
                each.cancel()
            await asyncio.wait(tasks)
            for number in _END_SIGNALS:
                loop.remove_signal_handler(number)

    def _read_keys(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read standard input in a thread: not every kind of file can be polled."""
        with contextlib.suppress(OSError, ValueError, RuntimeError, asyncio.CancelledError):
            while data := os.read(sys.stdin.fileno(), _CHUNK_BYTES):
                asyncio.run_coroutine_threadsafe(self._keys.put(data), loop).result()
        with contextlib.suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(self._keys.put(b""), loop)

    async def _send(self, connection: ClientConnection) -> str:
        while data := await self._keys.get():
            before, found, _ = data.partition(self._escape) if self._escape else (data, b"", b"")
            if before:
                await connection.send(before)
            if found:
                return f"detached from {self._vm}"
        with contextlib.suppress(TimeoutError):
            while True:
                self._output_received.clear()
                async with asyncio.timeout(self._linger_s):
                    await self._output_received.wait()
        return "end of input"

    async def _receive(self, connection: ClientConnection) -> str:
        output = sys.stdout.buffer
        while True:
            data = await connection.recv()
            self._output_received.set()
            try:
                output.write(data if isinstance(data, bytes) else data.encode())
                output.flush()
            except BrokenPipeError:
                return "output closed"


@contextlib.contextmanager
def _raw(descriptor: int) -> Iterator[None]:
    """Set the terminal to raw mode, and restore it afterwards."""
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


_DISPLAY_CHUNK_BYTES = 65_536


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
            await _relay_display(invocation, path, reader, writer)
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


async def _relay_display(
    invocation: Invocation, path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    from websockets.exceptions import ConnectionClosed

    async with connected(invocation.client, path) as connection:

        async def inward() -> None:
            while data := await reader.read(_DISPLAY_CHUNK_BYTES):
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
