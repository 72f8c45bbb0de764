"""`interlock policy diagram`: a policy drawn, without a server; and the pages in docs/policies."""

from __future__ import annotations

from pathlib import Path

import click

from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation, json_option, needs_invocation
from interlock.cli.policy_output import compiled, write
from interlock.core.errors import Invalid


@click.command()
@click.argument("name", metavar="NAME|FILE")
@click.option(
    "--of", "subject", type=click.Choice(["states", "table", "tasks"]), default="states", show_default=True,
    help="states: which operations lead from state to state. table: what is answered in each state. tasks: what is "
    "answered to an active instance by what is being done.",
)  # fmt: skip
@click.option(
    "--format", "form", type=click.Choice(["svg", "dot"]), default="svg", show_default=True,
    help="dot is the language of Graphviz, for states only.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write it there.")
@json_option
@needs_invocation
def diagram(invocation: Invocation, /, *, name: str, subject: str, form: str, out: Path | None) -> None:
    """Draw a policy.

    The diagram of states has an arrow for what the policy admits when nothing else is outstanding. Graphviz lays it
    out; the other pictures need nothing.
    """
    from interlock.policies import drawing, grids

    if form == "dot" and subject != "states":
        raise Failure(ExitCode.USAGE, "Only the diagram of states can be had as dot.", remedy="Leave out --format dot.")
    policy = compiled(name)
    try:
        match subject:
            case "table":
                text = grids.svg_grid(grids.of_states(policy))
            case "tasks":
                text = grids.svg_grid(grids.of_tasks(policy))
            case _:
                text = drawing.dot_source(policy)
                text = drawing.svg_of(text) if form == "svg" else text
    except Invalid as error:
        raise Failure(ExitCode.USAGE, error.message, remedy=error.remedy) from None
    if invocation.json:
        invocation.emit({"policy": policy.stamp, "of": subject, "format": form, "content": text})
    else:
        write(invocation, out, [text])


@click.command(hidden=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("docs/policies"),
    help="The folder. Default: docs/policies.",
)
@needs_invocation
def pages(invocation: Invocation, /, *, out: Path) -> None:
    """Draw the pages of the built-in policies.

    This is how docs/policies is made.
    """
    from interlock.policies.policy_pages import files

    try:
        drawn = list(files())
        out.mkdir(parents=True, exist_ok=True)
    except Invalid as error:
        raise Failure(ExitCode.USAGE, error.message, remedy=error.remedy) from None
    except OSError as error:
        raise Failure(ExitCode.USAGE, f"{out} cannot be made: {error.strerror}.") from None
    for name, text in drawn:
        write(invocation, out / name, [text])


COMMANDS: tuple[click.Command, ...] = (diagram, pages)
"""What draws a policy."""
