"""`interlock vm console`: the serial console in the terminal, live, until the detach key.

On a terminal every key goes to the guest, Ctrl-C too; the terminal is what it was before however this ends. Without
one, what comes on standard input is typed, and what the guest writes is printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import select
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import click

from interlock.cli.invocation import Invocation, needs_invocation
from interlock.cli.naming import INSTANCES, path_of, suggesting, vm_argument
from interlock.cli.watching import print_console
from interlock.cli.web_sockets import connected, ending

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

_CHUNK_BYTES: Final = 4096
_HISTORY_LINES: Final = 50
_AT_ONCE_S: Final = 0.05
_ENDINGS: Final = (signal.SIGTERM, signal.SIGHUP)


class Key(click.ParamType[Any]):
    """A key with Ctrl held down (`^]`), one character, or `none`."""

    name = "key"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = str(value)
        if text == "none":
            return b""
        if len(text) == 2 and text[0] == "^" and "?" < text[1].upper() <= "_":  # noqa: PLR2004 - ^ and a character
            return bytes([ord(text[1].upper()) & 0x1F])
        if len(text) == 1 and text.isascii():
            return text.encode()
        return self.fail(f"{text!r} is no key; write one such as '^]' for Ctrl-], one character, or none.", param, ctx)


def _named(key: bytes) -> str:
    return f"Ctrl-{chr(key[0] | 0x40)}" if key < b" " else key.decode()


@click.command()
@vm_argument
@click.option("--log", "-l", "only_log", is_flag=True, help="Only print what the guest has written, and end.")
@click.option("--follow", "-f", "following", is_flag=True, help="Print what it writes, and type nothing, until Ctrl-C.")
@click.option(
    "--history",
    type=click.IntRange(0, 10_000),
    default=_HISTORY_LINES,
    show_default=True,
    metavar="LINES",
    help="How much of what was written before to begin with.",
)
@click.option(
    "--escape", type=Key(), default="^]", show_default=True, help="The key that detaches: ^X for Ctrl-X, or none."
)
@click.option(
    "--linger",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Without a terminal: how long the guest must be silent after the end of the input.",
)
@needs_invocation
def console(
    invocation: Invocation,
    *,
    vm: str,
    only_log: bool,
    following: bool,
    history: int,
    escape: bytes,
    linger: float,
) -> None:
    """Sit at a VM's serial console; Ctrl-] detaches.

    Where standard input is no terminal, it is typed, and the answer printed; where it is empty, or where standard
    output alone is no terminal, only what was written so far is printed, as with --log.
    """
    typed: bytes | None = b""
    if not (only_log or following):
        if sys.stdin.isatty():
            only_log = not sys.stdout.isatty()
        else:
            typed = _typed_at_once()
            only_log = typed is None
    if only_log or following or typed is None:
        print_console(invocation, vm, following=following)
        return
    session = Session(invocation, vm, escape, linger)
    with suggesting(invocation.client, INSTANCES, vm):
        asyncio.run(session.run(history, typed))


def _typed_at_once() -> bytes | None:
    """What of the input is there already; None where there is none and will be none."""
    try:
        descriptor = sys.stdin.fileno()
    except (io.UnsupportedOperation, ValueError):
        return None
    readable, _, _ = select.select([descriptor], [], [], _AT_ONCE_S)
    return (os.read(descriptor, _CHUNK_BYTES) or None) if readable else b""


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
            if self._on_terminal:
                how = f"{_named(self._escape)} detaches" if self._escape else "end it with the window"
                self._invocation.say(f"-- at the console of {self._vm}; {how}", error=True)
            with _raw(sys.stdin.fileno()) if self._on_terminal else contextlib.nullcontext():
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
