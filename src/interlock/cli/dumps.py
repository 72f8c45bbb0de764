"""`interlock vm dump` and `interlock vm dumps`: a guest's memory for a debugger."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from interlock.api.dump_schemas import DumpList
from interlock.api.schemas import Admitted, Request
from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation, json_option, needs_invocation
from interlock.cli.live_line import LiveLine, Standing
from interlock.cli.naming import INSTANCES, path_of, suggesting, vm_argument
from interlock.cli.refusals import explain_failure
from interlock.cli.submitting import fresh_key
from interlock.cli.waiting import wait_for_end
from interlock.cli.wording import clock, size
from interlock.core.operations import Operation

_SILENCE_S = 60


@click.command("dumps")
@vm_argument
@click.option("--delete", "spent", metavar="ID", help="Delete this dump, instead of listing them.")
@json_option
@needs_invocation
def dumps(invocation: Invocation, *, vm: str, spent: str | None) -> None:
    """List the memory dumps of a VM, oldest first, or delete one."""
    if spent is not None:
        with suggesting(invocation.client, INSTANCES, vm):
            invocation.client.delete(path_of(INSTANCES, vm, "dumps", spent))
        if not invocation.json:
            invocation.say(f"Deleted: the dump {spent} of {vm}.")
        return
    with suggesting(invocation.client, INSTANCES, vm):
        reply = invocation.client.get(path_of(INSTANCES, vm, "dumps"))
    if invocation.answer(reply):
        return
    found = reply.decode(DumpList).items
    if not found:
        invocation.say(f"No dumps. `interlock vm dump {vm}` makes one.", error=True)
        return
    now = invocation.client.now
    rows = ((dump.id, size(dump.size_bytes), clock(dump.made_at, now)) for dump in found)
    invocation.table(("ID", "SIZE", "MADE"), rows)


@click.command("dump")
@vm_argument
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write. Default: the VM's name with .kdump, in this folder.",
)
@click.option("--id", "dump_id", help="Download this dump, instead of making one.")
@json_option
@needs_invocation
def dump(invocation: Invocation, *, vm: str, output: Path | None, dump_id: str | None) -> None:
    """Dump a VM's memory for a debugger, and download it."""
    target = output or Path(f"{vm}.kdump")
    if target.exists():
        raise click.UsageError(f"{target} is there already; name another file with --output.")
    made = dump_id or _made(invocation, vm).id
    written = _download(invocation, path_of(INSTANCES, vm, "dumps", made), target)
    if not invocation.json:
        invocation.say(f"Written: {target} ({size(written)})")


def _made(invocation: Invocation, vm: str) -> Request:
    """The request of a new dump, once it is there. Raises `Failure`."""
    client = invocation.client
    try:
        with suggesting(client, INSTANCES, vm):
            body = {"operation": Operation.CRASH_DUMP.value, "parameters": {}}
            reply = client.post(path_of(INSTANCES, vm, "requests"), body, fresh_key())
    except Failure as failure:
        explain_failure(failure, vm, client.now)
        raise
    request = reply.decode(Admitted).request
    wait_for_end(invocation, request, vm)
    return request


def _received(target: Path, written: int, total: int | None, elapsed_s: float) -> Standing:
    per_s = int(written / elapsed_s) if elapsed_s >= 1 else None
    return Standing(f"downloading {target}", written / total if total else None, written, total, per_s)


def _download(invocation: Invocation, path: str, target: Path) -> int:
    """Write the answer to a file that is there whole or not at all, and only for its owner; its size in bytes."""
    draft = target.with_name(f"{target.name}.part")
    written = 0
    try:
        accept = {"Accept": "application/octet-stream"}
        stream = invocation.client.stream(path, None, accept, _SILENCE_S)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        silent = invocation.json or not sys.stderr.isatty()
        with os.fdopen(descriptor, "wb") as file, LiveLine(sys.stderr, silent=silent, plain=invocation.plain) as line:
            total = stream.length
            for chunk in stream.chunks():
                written += file.write(chunk)
                line.tell("", _received(target, written, total, line.elapsed_s))
        draft.replace(target)
    except OSError as error:
        raise Failure(ExitCode.NOT_REACHABLE, f"{target} could not be written: {error.strerror or error}.") from error
    finally:
        draft.unlink(missing_ok=True)
    return written
