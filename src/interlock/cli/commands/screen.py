"""`interlock vm screenshot` and `interlock vm vnc`: a guest's display as PNG and over VNC."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from interlock.cli.client.paths import INSTANCES, path_of
from interlock.cli.commands.vm import vm_commands
from interlock.cli.completion import vm_argument
from interlock.cli.context import Invocation, needs_invocation
from interlock.cli.failures import ExitCode, Failure

_VNC_PORT = 5900


@vm_commands.command()
@vm_argument
@click.option(
    "--output",
    "-o",
    metavar="FILE",
    help="Output file; - for standard output. Default: NAME.png; in a pipe, standard output.",
)
@needs_invocation
def screenshot(invocation: Invocation, *, vm: str, output: str | None) -> None:
    """Save a screenshot of a VM's display as PNG."""
    picture = invocation.client.get(path_of(INSTANCES, vm, "screenshot")).body
    if output == "-" or (output is None and not sys.stdout.isatty()):
        sys.stdout.buffer.write(picture)
        return
    path = Path(output or f"{vm}.png")
    try:
        path.write_bytes(picture)
    except OSError as error:
        raise Failure(ExitCode.USAGE, f"Cannot write {path}: {error.strerror}.") from None
    invocation.echo(f"Saved: {path}")


@vm_commands.command()
@vm_argument
@click.option(
    "--listen",
    default=f"127.0.0.1:{_VNC_PORT}",
    show_default=True,
    metavar="ADDRESS:PORT",
    help="Address to listen on; port 0: any free port.",
)
@needs_invocation
def vnc(invocation: Invocation, *, vm: str, listen: str) -> None:
    """Serve a VM's display to VNC viewers, until Ctrl-C.

    There is no password: anyone who can connect can view and type. Keep it on loopback.
    """
    address, colon, port = listen.rpartition(":")
    if not (colon and address and port.isdecimal() and int(port) < 1 << 16):
        raise click.UsageError(f"Invalid address {listen!r}: expected ADDRESS:PORT, such as 127.0.0.1:{_VNC_PORT}.")
    # Slow to import.
    from interlock.cli.commands.vnc_proxy import serve_display

    serve_display(invocation, vm, address.strip("[]"), int(port))
