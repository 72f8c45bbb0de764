"""`interlock vm dump` and `interlock vm dumps`: memory dumps for a debugger."""

from __future__ import annotations

from pathlib import Path

import click

from interlock.api.schemas.inventory import DumpList
from interlock.api.schemas.responses import Admitted, Request
from interlock.cli.client.paths import INSTANCES, path_of
from interlock.cli.commands.request_waiter import wait_for_end
from interlock.cli.commands.submission import post_operation
from interlock.cli.commands.transfers import download
from interlock.cli.commands.vm import vm_commands
from interlock.cli.completion import vm_argument
from interlock.cli.context import Invocation, with_json
from interlock.cli.output.formatting import clock, size
from interlock.core.operations import Operation


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
