"""Confirmation of destructive commands: a prompt on a terminal, `--yes` elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable

import click

Command = Callable[..., None]


def yes_option(command: Command) -> Command:
    """Add `--yes`, which skips the prompt of `confirm`."""
    return click.option("--yes", "-y", is_flag=True, help="Do not prompt; required without a terminal.")(command)


def confirm(question: str, *, yes: bool) -> None:
    """Return once confirmed.

    Raises:
        click.Abort: the answer is no.
        click.UsageError: there is no terminal, and no `--yes`.
    """
    if yes:
        return
    if not _is_interactive():
        raise click.UsageError(f"{question} Cannot prompt without a terminal: add --yes to confirm.")
    click.confirm(question, abort=True, err=True)


def _is_interactive() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()
