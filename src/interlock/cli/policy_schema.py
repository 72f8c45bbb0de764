"""`interlock policy schema`: what an editor needs to know of policy files."""

from __future__ import annotations

import json
from typing import Final

import click

from interlock.cli.invocation import Invocation, json_option, needs_invocation


@click.command("schema")
@json_option
@needs_invocation
def schema_command(invocation: Invocation) -> None:
    """Print the JSON Schema of policy files, for editors.

    A policy that begins with the line `#:schema ./policy.schema.json` is then completed and checked while it is
    written, for instance by Even Better TOML in VS Code. With --json, the schema is printed on one line.
    """
    from interlock.policies.schema_for_editors import schema

    if invocation.json:
        invocation.emit(schema())
    else:
        click.echo(schema_page(), nl=False)


def schema_page() -> str:
    """docs/reference/policy.schema.json."""
    from interlock.policies.schema_for_editors import schema

    return json.dumps(schema(), indent=2) + "\n"


COMMANDS: Final[tuple[click.Command, ...]] = (schema_command,)
