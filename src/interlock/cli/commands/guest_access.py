"""Commands of `interlock vm` that reach into a guest: console, display, ssh and memory dumps.

On a terminal every key goes to the guest of `console`, including Ctrl-C. Without one, standard input is sent to it.
"""

from __future__ import annotations

import io
import os
import select
import shutil
import sys
from pathlib import Path
from typing import Any, Final

import click

from interlock.api.schemas.inventory import DumpList
from interlock.api.schemas.responses import Admitted, Instance, Request
from interlock.cli.client.connection import folder_of
from interlock.cli.client.paths import INSTANCES, path_of
from interlock.cli.commands.inventory import download
from interlock.cli.commands.submission import post_operation, wait_for_end
from interlock.cli.commands.vm import vm_commands
from interlock.cli.commands.watch import print_console
from interlock.cli.completion import vm_argument
from interlock.cli.context import Invocation, needs_invocation, with_json
from interlock.cli.failures import ExitCode, Failure, writing
from interlock.cli.output.formatting import clock, size
from interlock.core.operations import Operation

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
    from interlock.cli.commands.live_sessions import run_session

    run_session(invocation, vm, escape, linger, _HISTORY_LINES if history is None else history, data)


def _pending_input() -> bytes | None:
    """Return the input that is available now; None at the end of input."""
    try:
        descriptor = sys.stdin.fileno()
    except (io.UnsupportedOperation, ValueError):
        return None
    readable, _, _ = select.select([descriptor], [], [], _INPUT_WAIT_S)
    return (os.read(descriptor, _CHUNK_BYTES) or None) if readable else b""


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
    with writing(path):
        path.write_bytes(picture)
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
    from interlock.cli.commands.live_sessions import serve_display

    serve_display(invocation, vm, address.strip("[]"), int(port))


SSH_PORT = 22


@vm_commands.command(context_settings={"ignore_unknown_options": True})
@vm_argument
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--user", help="User to log in as. Default: from ssh's configuration.")
@needs_invocation
def ssh(invocation: Invocation, *, vm: str, arguments: tuple[str, ...], user: str | None) -> None:
    """Log in to a VM by ssh, or run a command there.

    Requires a forward to the guest's port 22 (`vm create --forward 2222:22`). Arguments after `--` are passed to ssh.
    The guest's host key is recorded on first use, by the VM's id.
    """
    instance = invocation.client.get(path_of(INSTANCES, vm)).decode(Instance)
    command = ssh_command(instance, known_hosts(invocation), user, arguments)
    if shutil.which(command[0]) is None:
        raise Failure(ExitCode.USAGE, "ssh not found: run `sudo apt-get install openssh-client`.")
    os.execvp(command[0], command)  # noqa: S606 - no shell


def known_hosts(invocation: Invocation) -> Path:
    """Return the known_hosts file: in the data folder if it is writable, else in the user's configuration."""
    folder = folder_of(invocation.environment)
    if not os.access(folder, os.W_OK):
        own = invocation.environment.get("XDG_CONFIG_HOME") or "~/.config"
        folder = Path(own).expanduser() / "interlock"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder / "known_hosts"


def ssh_command(instance: Instance, hosts: Path, user: str | None, arguments: tuple[str, ...]) -> list[str]:
    """Return the ssh command line. Raises `Failure` if no port is forwarded to the guest's port 22."""
    port = next((one.host_port for one in instance.forwards if one.guest_port == SSH_PORT), None)
    if port is None:
        others = ", ".join(f"{one.host_port}:{one.guest_port}" for one in instance.forwards) or "none"
        raise Failure(
            ExitCode.USAGE,
            f"{instance.name} has no forward to port {SSH_PORT} of the guest (its forwards: {others}). "
            f"Create it with `--forward 2222:{SSH_PORT}`.",
        )
    # Other guests reuse the port, so the key is recorded for the VM and not for the address.
    options = (f"UserKnownHostsFile={hosts}", f"HostKeyAlias={instance.id}", "StrictHostKeyChecking=accept-new")
    words = ["ssh", "-p", str(port), *(word for option in options for word in ("-o", option))]
    words += ["-l", user] if user else []
    return [*words, "127.0.0.1", *arguments]


@vm_commands.command("dumps")
@vm_argument
@click.option("--delete", "delete_id", metavar="ID", help="Delete this dump, instead of listing them.")
@with_json
def dumps(invocation: Invocation, *, vm: str, delete_id: str | None) -> None:
    """List the memory dumps of a VM, oldest first, or delete one."""
    if delete_id is not None:
        invocation.client.delete(path_of(INSTANCES, vm, "dumps", delete_id))
        if not invocation.json:
            invocation.echo(f"Deleted: dump {delete_id} of {vm}")
        return
    columns = {
        "ID": lambda one: one.id,
        "SIZE": lambda one: size(one.size_bytes),
        "CREATED": lambda one: clock(one.made_at, invocation.client.now),
    }
    reply = invocation.client.get(path_of(INSTANCES, vm, "dumps"))
    invocation.print_items(reply, DumpList, columns, none=f"No dumps. `interlock vm dump {vm}` creates one.")


@vm_commands.command("dump")
@vm_argument
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Output file. Default: the VM's name with .kdump, in the current folder.",
)
@click.option("--id", "dump_id", help="Download this dump instead of creating one.")
@with_json
def dump(invocation: Invocation, *, vm: str, output: Path | None, dump_id: str | None) -> None:
    """Dump a VM's memory for a debugger, and download it."""
    target = output or Path(f"{vm}.kdump")
    if target.exists():
        raise click.UsageError(f"{target} already exists; choose another file with --output.")
    source = dump_id or _create_dump(invocation, vm).id
    written = download(invocation, path_of(INSTANCES, vm, "dumps", source), target).size_bytes
    if not invocation.json:
        invocation.echo(f"Written: {target} ({size(written)})")


def _create_dump(invocation: Invocation, vm: str) -> Request:
    """Create a dump, wait for it, and return its request. Raises `Failure`."""
    request = post_operation(invocation, vm, Operation.CRASH_DUMP).decode(Admitted).request
    wait_for_end(invocation, request, vm)
    return request
