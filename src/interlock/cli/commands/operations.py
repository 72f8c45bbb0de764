"""The commands of `interlock vm` that submit one operation each, made from the catalogue.

What needs more than its parameters is written by hand: `metadata`, `protect` and migrations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import click
import msgspec

from interlock.api.schemas.responses import Instance
from interlock.cli.client.paths import HOSTS, IMAGES, INSTANCES, NETWORKS, VOLUMES, path_of
from interlock.cli.commands.submission import operation_options, submit
from interlock.cli.commands.vm import vm_commands
from interlock.cli.completion import OperationNames, completer, vm_argument
from interlock.cli.context import Invocation, with_json
from interlock.cli.failures import Failure
from interlock.cli.options.quantities import Size
from interlock.cli.output.confirmation import confirm, yes_option
from interlock.cli.output.formatting import humanize
from interlock.core.command_forms import Argument, Option
from interlock.core.operations import CATALOGUE, FIELDS, Entry, Operation
from interlock.core.parameters import Field, Refers
from interlock.core.states import VmState

_COLLECTIONS: Final = {
    Refers.IMAGE: IMAGES,
    Refers.VOLUME_IN: VOLUMES,
    Refers.VOLUME_OUT: VOLUMES,
    Refers.HOST: HOSTS,
    Refers.NETWORK: NETWORKS,
}
"""Where the names are that a parameter may have."""


def _command(entry: Entry) -> click.Command:
    """Return the command of an operation, with an argument or an option for each of its parameters."""
    fields = tuple(field for field in FIELDS[entry.operation] if field.form is not None)

    def run(invocation: Invocation, /, *, vm: str, wait: bool, hold: str | None, **values: Any) -> None:
        given = _given(fields, values)
        if entry.parameters.required_any and not given:
            raise click.UsageError(f"Nothing to change: use {_flags(fields)}.")
        if entry.confirm is not None:
            confirm(entry.confirm.format(vm=vm), yes=values["yes"])
        submit(invocation, vm, entry.operation, wait=wait, hold=hold, parameters=given or None)

    run = operation_options(run)
    if entry.confirm is not None:
        run = yes_option(run)
    for field in reversed(fields):
        run = _parameter(field)(run)
    asks = "" if entry.confirm is None else " Asks for confirmation."
    return click.command(entry.command, help=entry.summary + asks)(vm_argument(run))


def _parameter(field: Field) -> Any:
    """Return the decorator that adds a parameter to its command."""
    form = field.form
    assert form is not None
    completion: dict[str, Any] = {}
    if field.refers in _COLLECTIONS:
        completion["shell_complete"] = completer(_COLLECTIONS[field.refers])
    if isinstance(form, Argument):
        return click.argument(field.name, metavar=form.metavar, type=_type(field, None), **completion)
    help_text = form.help or field.description
    if bool in field.kinds or form.prompt is not None:
        return click.option(form.flag, field.name, is_flag=True, help=help_text)
    default = form.default if field.required else field.default
    return click.option(
        form.flag,
        field.name,
        type=_type(field, form.unit),
        required=field.required and default is None,
        default=default,
        show_default=default is not None,
        help=help_text,
        **completion,
    )


def _type(field: Field, unit: str | None) -> click.ParamType[Any] | None:
    if unit is not None:
        return Size(unit, field.least or 0)
    if int in field.kinds:
        return click.IntRange(field.least, field.most)
    return click.Choice(field.choices) if field.choices else None


def _given(fields: tuple[Field, ...], values: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters to submit. A flag that is not set is left out, and one that is set negates the default."""
    given: dict[str, Any] = {}
    for field in fields:
        value, form = values[field.name], field.form
        if isinstance(form, Option) and form.prompt is not None:
            if value:
                given[field.name] = click.prompt(form.prompt, hide_input=True, confirmation_prompt=True, err=True)
        elif isinstance(value, bool):
            if value:
                given[field.name] = not field.default
        elif value is not None:
            given[field.name] = value
    return given


def _flags(fields: tuple[Field, ...]) -> str:
    *first, last = [field.form.flag for field in fields if isinstance(field.form, Option)]
    return f"{', '.join(first)} or {last}"


for _entry in CATALOGUE.values():
    if _entry.command is not None:
        vm_commands.add_command(_command(_entry))


@vm_commands.command(help=CATALOGUE[Operation.SET_METADATA].summary)
@vm_argument
@click.argument("items", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="Same as the argument. May be repeated.")
@click.option("--remove", multiple=True, metavar="KEY", help="Key to remove. May be repeated.")
@operation_options
def metadata(
    invocation: Invocation,
    *,
    vm: str,
    items: tuple[str, ...],
    pairs: tuple[str, ...],
    remove: tuple[str, ...],
    wait: bool,
    hold: str | None,
) -> None:
    given = (*items, *pairs)
    if not (given or remove):
        raise click.UsageError("Nothing to change: use KEY=VALUE or --remove.")
    for item in given:
        if not item.partition("=")[0] or "=" not in item:
            raise click.UsageError(f"Invalid metadata {item!r}: expected KEY=VALUE, such as owner=alice.")
    values = dict(item.partition("=")[::2] for item in given)
    if len(values) < len(given):
        raise click.UsageError("Duplicate key; give each once.")
    parameters = {"set": values, "remove": remove}
    submit(invocation, vm, Operation.SET_METADATA, wait=wait, hold=hold, parameters=parameters)


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


@vm_commands.command(help=f"{CATALOGUE[Operation.EVACUATE].summary} --from-image requires confirmation.")
@vm_argument
@click.option(
    "--host",
    shell_complete=completer(HOSTS),
    help="Target host, or `any` for one with free capacity. Default: the server's own host.",
)
@click.option(
    "--from-image",
    is_flag=True,
    help="Recreate its root disk from its image: required if the disk is lost with the host.",
)
@yes_option
@operation_options
def evacuate(
    invocation: Invocation, *, vm: str, host: str | None, from_image: bool, yes: bool, wait: bool, hold: str | None
) -> None:
    if from_image:
        confirm(f"Recreate {vm} from its image, and lose the data on its root disk?", yes=yes)
    parameters: dict[str, object] = {} if host is None else {"host": host}
    if from_image:
        parameters["from_image"] = True
    submit(invocation, vm, Operation.EVACUATE, wait=wait, hold=hold, parameters=parameters)


@vm_commands.command()
@vm_argument
@click.argument("host", shell_complete=completer(HOSTS))
@click.option(
    "--live/--cold",
    "live",
    default=None,
    help="Live or cold migration. Default: live if the VM runs or is paused, otherwise cold.",
)
@click.option(
    "--converge-timeout",
    metavar="TIME",
    help="Live migration: cancel if it has not converged after TIME, such as 10m. Default: the server's.",
)
@click.option("--post-copy", is_flag=True, help="Not supported; rejected with the reason.")
@operation_options
def migrate(
    invocation: Invocation,
    *,
    vm: str,
    host: str,
    live: bool | None,
    converge_timeout: str | None,
    post_copy: bool,
    wait: bool,
    hold: str | None,
) -> None:
    """Migrate a VM with its root disk to HOST, live or cold.

    HOST may be `any`: the host with the fewest VMs that has free capacity.
    Cancelling the request leaves the VM on its host. A guest that writes memory
    faster than the link is throttled until the migration converges.
    """
    if live is None:
        live = invocation.client.get(path_of(INSTANCES, vm)).decode(_VmState).vm_state in _LIVE
    operation = Operation.LIVE_MIGRATE if live else Operation.MIGRATE
    parameters: dict[str, object] = {"host": host}
    if converge_timeout is not None or post_copy:
        if not live:
            raise click.UsageError("--converge-timeout and --post-copy require a live migration.")
        parameters |= {} if converge_timeout is None else {"converge_timeout": converge_timeout}
        parameters |= {"post_copy": True} if post_copy else {}
    submit(invocation, vm, operation, wait=wait, hold=hold, parameters=parameters)


class _VmState(msgspec.Struct):
    vm_state: VmState


_LIVE = CATALOGUE[Operation.LIVE_MIGRATE].sources
