"""`interlock policy import`: convert the policy file of OpenStack Nova's API."""

from __future__ import annotations

from pathlib import Path

import click

from interlock.cli.commands.policy.group import policy_commands
from interlock.cli.commands.policy.output import write
from interlock.cli.context import Invocation, with_json
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.options.configuration import errors_as_failures


@policy_commands.command("import")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--name", default="imported", show_default=True, help="Name of the policy.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Output file. Default: standard output.")
@with_json
def import_policy(invocation: Invocation, *, file: Path, name: str, out: Path | None) -> None:
    """Convert OpenStack Nova's policy.yaml to a policy that extends `nova`.

    Reads the rules about operations on VMs, with the rules that they name, and Nova's defaults for those that the file
    leaves out. Comments list what was not carried over, with line and reason. Where a rule depends on what is not known
    here, the operation is denied.
    """
    from interlock.policies.importer import import_nova_policy

    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Failure(
            ExitCode.USAGE, f"File {str(file)!r} not found.", remedy="Name the policy file of Nova."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(ExitCode.USAGE, f"Cannot read {file}: {error}.") from None
    with errors_as_failures():
        imported = import_nova_policy(text, file.name, name)
    if invocation.json:
        invocation.emit(imported)
        return
    write(invocation, out, [imported.toml])
    count = len(imported.remarks)
    invocation.echo(
        f"{imported.rules} rule{'s' * (imported.rules != 1)}; "
        f"{count} remark{'s' * (count != 1)} on what was not carried over as it stands, in comments.",
        error=True,
    )
