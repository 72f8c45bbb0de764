"""`interlock vm protect` and `unprotect`: operations that are refused for one VM, whoever asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from interlock.api.schemas import Instance
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation, json_option, needs_invocation
from interlock.cli.naming import INSTANCES, OperationName, path_of, suggesting, vm_argument
from interlock.cli.wording import spoken
from interlock.core.operations import Operation

_TRIES = 5
_OTHERS_CHANGED_IT = 412
_DELETIONS = (Operation.DELETE, Operation.SOFT_DELETE, Operation.FORCE_DELETE)


class OperationNames(OperationName):
    """Operations separated by commas."""

    name = "operations"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        convert = super().convert
        return tuple(convert(word.strip(), param, ctx) for word in str(value).split(",") if word.strip())


@click.command()
@vm_argument
@click.option(
    "--from",
    "names",
    required=True,
    multiple=True,
    type=OperationNames(),
    help="Such as delete,rebuild. May be repeated.",
)
@json_option
@needs_invocation
def protect(invocation: Invocation, *, vm: str, names: tuple[tuple[Operation, ...], ...]) -> None:
    """Have operations refused for a VM, whoever asks for them.

    What it is protected from already stays so; `vm unprotect` takes it away.
    """
    named = [operation for group in names for operation in group]
    if not named:
        raise click.UsageError("Name at least one operation, as in --from delete,rebuild.")
    _change(invocation, vm, lambda blocked: tuple(dict.fromkeys((*blocked, *named))))


@click.command()
@vm_argument
@click.option(
    "--from", "names", multiple=True, type=OperationNames(), help="Only these, such as delete,rebuild. Default: all."
)
@json_option
@needs_invocation
def unprotect(invocation: Invocation, *, vm: str, names: tuple[tuple[Operation, ...], ...]) -> None:
    """Take the protection of a VM away, or a part of it."""
    named = {operation for group in names for operation in group}
    _change(invocation, vm, lambda blocked: tuple(one for one in blocked if named and one not in named))


def _change(invocation: Invocation, vm: str, changed: Callable[[tuple[Operation, ...]], tuple[Operation, ...]]) -> None:
    """Replace the list by what it becomes; somebody else's change in between is not undone."""
    client = invocation.client
    for attempt in range(_TRIES):
        with suggesting(client, INSTANCES, vm):
            before = client.get(path_of(INSTANCES, vm)).decode(Instance)
        wish = {"blocked_operations": changed(before.blocked_operations)}
        try:
            reply = client.patch(path_of(INSTANCES, before.id), wish, {"If-Match": f'"{before.generation}"'})
        except Failure as failure:
            if failure.document.get("status") != _OTHERS_CHANGED_IT or attempt == _TRIES - 1:
                raise
            continue
        if not invocation.answer(reply):
            after = reply.decode(Instance)
            names = ", ".join(spoken(operation) for operation in after.blocked_operations)
            invocation.say(f"{after.name} is protected from: {names or 'nothing'}")
            open_ends = [spoken(one) for one in _DELETIONS if one not in after.blocked_operations]
            if 0 < len(open_ends) < len(_DELETIONS):
                invocation.say(f"  Not from: {', '.join(open_ends)}, by which it can be deleted too.")
        return
