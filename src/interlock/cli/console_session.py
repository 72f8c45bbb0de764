"""The conversation of `interlock vm console`: keys to the guest, what it writes, and a terminal left as it was."""

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

from interlock.cli.invocation import Invocation
from interlock.cli.naming import INSTANCES, path_of
from interlock.cli.web_sockets import connected, ending

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

_CHUNK_BYTES: Final = 4096
_ENDINGS: Final = (signal.SIGTERM, signal.SIGHUP)


def converse(invocation: Invocation, vm: str, escape: bytes, linger_s: float, history: int, typed: bytes) -> None:
    """Carry both ways until one end has enough. Raises `Failure`, with the terminal as it was."""
    asyncio.run(Session(invocation, vm, escape, linger_s).run(history, typed))


def _named(key: bytes) -> str:
    return f"Ctrl-{chr(key[0] | 0x40)}" if key < b" " else key.decode()


class Session:
    """One connection between a terminal, or a pair of pipes, and a console."""

    def __init__(self, invocation: Invocation, vm: str, escape: bytes, linger_s: float) -> None:
        self._invocation = invocation
        self._vm = vm
        self._on_terminal = sys.stdin.isatty()
        self._escape = escape if self._on_terminal else b""
        self._linger_s = linger_s
        self._keys: asyncio.Queue[bytes] = asyncio.Queue(16)
        self._said = asyncio.Event()

    async def run(self, history: int, typed: bytes) -> None:
        """Carry both ways until one end has enough. Raises `Failure`, with the terminal as it was."""
        path = path_of(INSTANCES, self._vm, "console/live")
        async with connected(self._invocation.client, path, {"history": history}) as talk:
            with _raw(sys.stdin.fileno()) if self._on_terminal else contextlib.nullcontext():
                if self._on_terminal:
                    # Not before: what is typed when it can be read goes to the guest.
                    how = f"{_named(self._escape)} detaches" if self._escape else "end it with the window"
                    self._invocation.say(f"-- at the console of {self._vm}; {how}\r", error=True)
                why = await self._carry(talk, typed)
        if self._on_terminal:
            self._invocation.say(f"\n-- {why}", error=True)

    async def _carry(self, talk: ClientConnection, typed: bytes) -> str:
        from websockets.exceptions import ConnectionClosed

        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        for number in _ENDINGS:
            loop.add_signal_handler(number, task.cancel)
        if typed:
            await self._keys.put(typed)
        threading.Thread(target=self._read_keys, args=(loop,), daemon=True).start()
        either = {asyncio.ensure_future(self._type(talk)), asyncio.ensure_future(self._show(talk))}
        try:
            done, _ = await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        except ConnectionClosed as closed:
            return ending(closed, "console")
        finally:
            for each in either:
                each.cancel()
            await asyncio.wait(either)
            for number in _ENDINGS:
                loop.remove_signal_handler(number)

    def _read_keys(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hand over what is typed, in a thread of its own: not every kind of input can be waited for otherwise."""
        with contextlib.suppress(OSError, ValueError, RuntimeError, asyncio.CancelledError):
            while data := os.read(sys.stdin.fileno(), _CHUNK_BYTES):
                asyncio.run_coroutine_threadsafe(self._keys.put(data), loop).result()
        with contextlib.suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(self._keys.put(b""), loop)

    async def _type(self, talk: ClientConnection) -> str:
        while data := await self._keys.get():
            before, found, _ = data.partition(self._escape) if self._escape else (data, b"", b"")
            if before:
                await talk.send(before)
            if found:
                return f"detached from {self._vm}; it goes on"
        with contextlib.suppress(TimeoutError):
            while True:
                self._said.clear()
                async with asyncio.timeout(self._linger_s):
                    await self._said.wait()
        return "the input has ended"

    async def _show(self, talk: ClientConnection) -> str:
        output = sys.stdout.buffer
        while True:
            data = await talk.recv()
            self._said.set()
            try:
                output.write(data if isinstance(data, bytes) else data.encode())
                output.flush()
            except BrokenPipeError:
                return "nobody reads on"


@contextlib.contextmanager
def _raw(descriptor: int) -> Iterator[None]:
    """Have every key as it is pressed, unshown; the terminal is afterwards what it was."""
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
