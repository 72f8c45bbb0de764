"""`interlock vm console`: the serial console in the terminal, live, until the detach key.

On a terminal every key goes to the guest, Ctrl-C too; the terminal is what it was before however this ends. Without
one, what comes on standard input is typed, and what the guest writes is printed.
"""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any, Final

import click

from interlock.cli.invocation import Invocation, needs_invocation
from interlock.cli.naming import INSTANCES, suggesting, vm_argument
from interlock.cli.watching import print_console

_CHUNK_BYTES: Final = 4096
_HISTORY_LINES: Final = 50
_AT_ONCE_S: Final = 0.05


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
    # What it needs takes longer to import than a whole command otherwise takes.
    from interlock.cli.console_session import converse

    with suggesting(invocation.client, INSTANCES, vm):
        converse(invocation, vm, escape, linger, history, typed)


def _typed_at_once() -> bytes | None:
    """What of the input is there already; None where there is none and will be none."""
    try:
        descriptor = sys.stdin.fileno()
    except (io.UnsupportedOperation, ValueError):
        return None
    readable, _, _ = select.select([descriptor], [], [], _AT_ONCE_S)
    return (os.read(descriptor, _CHUNK_BYTES) or None) if readable else b""
