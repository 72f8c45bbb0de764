"""`interlock policy diagram`: diagrams of a policy, without a server."""

from __future__ import annotations

from pathlib import Path

import click

from interlock.cli.commands.policy.group import policy_commands
from interlock.cli.commands.policy.output import compiled, write
from interlock.cli.context import Invocation, with_json
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.options.configuration import errors_as_failures


@policy_commands.command()
@click.argument("name", metavar="NAME|FILE")
@click.option(
    "--of", "subject", type=click.Choice(["states", "table", "tasks"]), default="states", show_default=True,
    help="states: the operations between states. table: the verdicts in each state. tasks: the verdicts for an active "
    "instance in each task_state.",
)  # fmt: skip
@click.option(
    "--format", "form", type=click.Choice(["svg", "dot"]), default="svg", show_default=True,
    help="dot (Graphviz) is available for states only.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Output file. Default: standard output.")
@with_json
def diagram(invocation: Invocation, /, *, name: str, subject: str, form: str, out: Path | None) -> None:
    """Draw a diagram of a policy.

    The state diagram has an arrow for each operation admitted while nothing is outstanding. It requires Graphviz.
    """
    from interlock.policies.rendering import answer_grid_svg, state_diagram

    if form == "dot" and subject != "states":
        raise Failure(ExitCode.USAGE, "The format dot is available for states only.", remedy="Leave out --format dot.")
    policy = compiled(name)
    with errors_as_failures():
        match subject:
            case "table":
                text = answer_grid_svg.svg_grid(answer_grid_svg.of_states(policy))
            case "tasks":
                text = answer_grid_svg.svg_grid(answer_grid_svg.of_tasks(policy))
            case _:
                text = state_diagram.dot_source(policy)
                text = state_diagram.svg_of(text) if form == "svg" else text
    if invocation.json:
        invocation.emit({"policy": policy.stamp, "of": subject, "format": form, "content": text})
    else:
        write(invocation, out, [text])
