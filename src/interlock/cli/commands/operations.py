"""The commands of `interlock vm` that submit one operation each, made from the catalogue.

What needs more than its parameters is written by hand: `metadata` here, and migrations in `migrate`.
"""

from __future__ import annotations

from typing import Any, Final

import click

from interlock.cli.client.paths import HOSTS, IMAGES, VOLUMES
from interlock.cli.commands.submission import operation_options, submit
from interlock.cli.commands.vm import vm_commands
from interlock.cli.completion import completer, vm_argument
from interlock.cli.context import Invocation
from interlock.cli.options.quantities import Size
from interlock.cli.output.confirmation import confirm, yes_option
from interlock.core.command_forms import Argument, Option
from interlock.core.operations import CATALOGUE, FIELDS, Entry, Operation
from interlock.core.parameters import Field, Refers

_COLLECTIONS: Final = {
    Refers.IMAGE: IMAGES,
    Refers.VOLUME_IN: VOLUMES,
    Refers.VOLUME_OUT: VOLUMES,
    Refers.HOST: HOSTS,
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
        return click.argument(field.name, metavar=form.metavar, **completion)
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
