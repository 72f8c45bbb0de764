"""`interlock vm screenshot` and `interlock vm vnc`: a guest's screen, as a picture and for a VNC viewer."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation, needs_invocation
from interlock.cli.naming import INSTANCES, path_of, suggesting, vm_argument

_VNC_PORT = 5900


@click.command()
@vm_argument
@click.option(
    "--output",
    "-o",
    metavar="FILE",
    help="Where to; - for standard output. Default: NAME.png; in a pipe, standard output.",
)
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
    # What it needs takes longer to import than a whole command otherwise takes.
    from interlock.cli.displays import serve_display

    with suggesting(invocation.client, INSTANCES, vm):
        serve_display(invocation, vm, address.strip("[]"), int(port))
