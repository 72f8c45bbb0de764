"""What one run of the command line works with: the server, the environment, and the way to print."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, update_wrapper
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import click
import msgspec

from interlock.cli.client import Client, Reply
from interlock.cli.connection import find

Parameters = ParamSpec("Parameters")
AnswerT = TypeVar("AnswerT")
FallbackT = TypeVar("FallbackT")

_GAP = "  "
_NARROW = 100


class Cell:
    """One cell of a table, with its colour."""

    def __init__(self, text: str, colour: str | None = None) -> None:
        self.text = text
        self.colour = colour


class Invocation:
    """One run. Commands get it as their first argument."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.json = False
        """Whether answers are for a program."""
        self.url: str | None = None
        self.patience_s = 60.0
        """How long a server may be gone while something is waited for."""
        self.plain = bool(environment.get("NO_COLOR")) or environment.get("TERM") == "dumb"

    @cached_property
    def client(self) -> Client:
        return Client(lambda: find(self.environment, self.url))

    def say(self, text: str, *, error: bool = False) -> None:
        """Print for people; colours are left out where nobody would see them."""
        click.echo(text, err=error, color=False if self.plain else None)

    def emit(self, value: Any) -> None:
        """Print one JSON document, on one line."""
        click.echo(msgspec.json.encode(value))

    def answer(self, reply: Reply) -> bool:
        """Print the server's own document if that is what was asked for; whether it was."""
        if self.json:
            click.echo(reply.body.rstrip(b"\n"))
        return self.json

    def table(self, titles: Sequence[str], rows: Iterable[Sequence[str | Cell]]) -> None:
        """Print aligned columns. On a terminal the last column is cut where the line would break."""
        cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
        widths = [max([len(title), *(len(row[i].text) for row in cells)]) for i, title in enumerate(titles)]
        room = shutil.get_terminal_size((_NARROW, 24)).columns if sys.stdout.isatty() else None
        self.say(click.style(_line([Cell(title) for title in titles], widths, None), bold=True))
        for row in cells:
            self.say(_line(row, widths, room))


def _line(row: Sequence[Cell], widths: Sequence[int], room: int | None) -> str:
    parts = []
    used = 0
    for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
        last = index == len(row) - 1
        text = cell.text
        if last and room is not None and used + len(text) > room > used:
            text = text[: room - used - 1] + "…"
        padding = "" if last else " " * (width - len(text))
        parts.append((click.style(text, fg=cell.colour) if cell.colour else text) + padding)
        used += width + len(_GAP)
    return _GAP.join(parts).rstrip()


def needs_invocation(
    command: Callable[Concatenate[Invocation, Parameters], AnswerT],
) -> Callable[Parameters, AnswerT]:
    """Give a command the invocation as its first argument."""

    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> AnswerT:
        return command(click.get_current_context().find_object(Invocation) or Invocation({}), *args, **kwargs)

    return cast("Callable[Parameters, AnswerT]", update_wrapper(run, command))


def json_option(command: Callable[Parameters, AnswerT]) -> Callable[Parameters, AnswerT]:
    """`--json`: print one JSON document, or one a line where the answer does not end."""

    def remember(context: click.Context, _parameter: click.Parameter, value: Any) -> None:
        invocation = context.find_object(Invocation)
        if invocation is not None and value:
            invocation.json = True

    option = click.option(
        "--json", is_flag=True, is_eager=True, expose_value=False, callback=remember, help="Print JSON for programs."
    )
    return option(command)
