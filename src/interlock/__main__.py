"""The program `interlock`. The only place that knows both the command line and the benchmarks."""

from __future__ import annotations

import sys

import click

from interlock.cli.application import build, run


@click.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Measure this machine, and print the figures as JSON.

    `interlock bench --help` says what can be measured.
    """
    from interlock.bench import main as measure

    if code := measure(arguments):
        raise click.exceptions.Exit(code)


def root() -> click.Group:
    """The tree of all commands."""
    return build(bench)


def main() -> None:
    """Run the command line of this process, and end it."""
    sys.exit(run(root(), sys.argv[1:]))


if __name__ == "__main__":
    main()
