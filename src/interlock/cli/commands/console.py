"""`interlock vm console`: the guest's serial console, interactive or as a log.

On a terminal every key goes to the guest, including Ctrl-C. Without one, standard input is sent to the guest.
"""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any, Final

import click

from interlock.cli.commands.vm import vm_commands
from interlock.cli.commands.watch import print_console
from interlock.cli.completion import vm_argument
from interlock.cli.context import Invocation, needs_invocation

_CHUNK_BYTES: Final = 4096
_HISTORY_LINES: Final = 50
_INPUT_WAIT_S: Final = 0.05


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
        return self.fail(f"Invalid key {text!r}: expected '^]' for Ctrl-], one character, or none.", param, ctx)


@vm_commands.command()
@vm_argument
@click.option(
    "--log",
    "-l",
    "only_log",
    is_flag=True,
    help="Only print the console's log. Control sequences are removed on a terminal.",
)
@click.option("--follow", "-f", "following", is_flag=True, help="Print the output until Ctrl-C, without input.")
@click.option(
    "--history",
    type=click.IntRange(0, 10_000),
    metavar="LINES",
    help=f"How many lines of the log to print first. Default: {_HISTORY_LINES}; with --log or --follow, all.",
)
@click.option("--escape", type=Key(), default="^]", show_default=True, help="Detach key: ^X for Ctrl-X, or none.")
@click.option(
    "--linger",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Without a terminal: exit after the end of input and this time without output.",
)
@needs_invocation
def console(
    invocation: Invocation,
    *,
    vm: str,
    only_log: bool,
    following: bool,
    history: int | None,
    escape: bytes,
    linger: float,
) -> None:
    """Connect to a VM's serial console; Ctrl-] detaches.

    If standard input is not a terminal, it is sent to the guest, and the output is printed. If it is empty, or if only
    standard output is not a terminal, the log is printed as with --log.
    """
    data: bytes | None = b""
    if not (only_log or following):
        if sys.stdin.isatty():
            only_log = not sys.stdout.isatty()
        else:
            data = _pending_input()
            only_log = data is None
    if only_log or following or data is None:
        print_console(invocation, vm, following=following, history=history)
        return
    # Slow to import.
    from interlock.cli.commands.console_session import run_session

    run_session(invocation, vm, escape, linger, _HISTORY_LINES if history is None else history, data)


def _pending_input() -> bytes | None:
    """Return the input that is available now; None at the end of input."""
    try:
        descriptor = sys.stdin.fileno()
    except (io.UnsupportedOperation, ValueError):
        return None
    readable, _, _ = select.select([descriptor], [], [], _INPUT_WAIT_S)
    return (os.read(descriptor, _CHUNK_BYTES) or None) if readable else b""
