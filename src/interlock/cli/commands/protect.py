"""`interlock vm protect` and `unprotect`: block operations on a VM for every caller."""

from __future__ import annotations

from collections.abc import Callable

import click

from interlock.api.schemas.responses import Instance
from interlock.cli.client.paths import INSTANCES, path_of
from interlock.cli.commands.vm import vm_commands
from interlock.cli.completion import OperationNames, vm_argument
from interlock.cli.context import Invocation, with_json
from interlock.cli.failures import Failure
from interlock.cli.output.formatting import humanize
from interlock.core.operations import Operation

_TRIES = 5
_PRECONDITION_FAILED = 412
_DELETIONS = (Operation.DELETE, Operation.SOFT_DELETE, Operation.FORCE_DELETE)


@vm_commands.command()
@vm_argument
@click.option(
    "--from",
    "names",
    required=True,
    multiple=True,
    type=OperationNames(),
    help="Operations, such as delete,rebuild. May be repeated.",
)
@with_json
def protect(invocation: Invocation, *, vm: str, names: tuple[tuple[Operation, ...], ...]) -> None:
    """Block operations on a VM for every caller.

    Existing protection is kept; `vm unprotect` removes it.
    """
    named = [operation for group in names for operation in group]
    if not named:
        raise click.UsageError("--from requires an operation, such as delete,rebuild.")
    _change(invocation, vm, lambda blocked: tuple(dict.fromkeys((*blocked, *named))))


@vm_commands.command()
@vm_argument
@click.option(
    "--from", "names", multiple=True, type=OperationNames(), help="Operations, such as delete,rebuild. Default: all."
)
@with_json
def unprotect(invocation: Invocation, *, vm: str, names: tuple[tuple[Operation, ...], ...]) -> None:
    """Remove the protection of a VM, or a part of it."""
    named = {operation for group in names for operation in group}
    _change(invocation, vm, lambda blocked: tuple(one for one in blocked if named and one not in named))


def _change(invocation: Invocation, vm: str, changed: Callable[[tuple[Operation, ...]], tuple[Operation, ...]]) -> None:
    """Change the list of blocked operations; retry if it was changed concurrently."""
    client = invocation.client
    for attempt in range(_TRIES):
        before = client.get(path_of(INSTANCES, vm)).decode(Instance)
        body = {"blocked_operations": changed(before.blocked_operations)}
        try:
            reply = client.patch(path_of(INSTANCES, before.id), body, {"If-Match": f'"{before.generation}"'})
        except Failure as failure:
            if failure.document.get("status") != _PRECONDITION_FAILED or attempt == _TRIES - 1:
                raise
            continue
        if not invocation.print_json(reply):
            after = reply.decode(Instance)
            names = ", ".join(humanize(operation) for operation in after.blocked_operations)
            invocation.echo(f"{after.name} is protected from: {names or 'nothing'}")
            unprotected = [humanize(one) for one in _DELETIONS if one not in after.blocked_operations]
            if 0 < len(unprotected) < len(_DELETIONS):
                invocation.echo(f"  Not from: {', '.join(unprotected)}, which also delete it.")
        return
