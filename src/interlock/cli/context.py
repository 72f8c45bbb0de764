"""The context of one command: HTTP client, environment and output."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, update_wrapper
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import click
import msgspec

from interlock.cli.client.connection import find
from interlock.cli.client.http_client import Client, Reply
from interlock.cli.output.progress import LiveLine

Parameters = ParamSpec("Parameters")
AnswerT = TypeVar("AnswerT")
FallbackT = TypeVar("FallbackT")

_GAP = "  "
_NARROW = 100


class Cell:
    """A table cell with an optional colour."""

    def __init__(self, text: str, colour: str | None = None) -> None:
        self.text = text
        self.colour = colour


class Invocation:
    """The context of one command, which gets it as its first argument."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.json = False
        """Whether to print JSON."""
        self.url: str | None = None
        self.ca: str | None = None
        self.reconnect_timeout_s = 60.0
        """How long to try to reconnect while waiting for a request."""
        self.plain = bool(environment.get("NO_COLOR")) or environment.get("TERM") == "dumb"

    @cached_property
    def client(self) -> Client:
        return Client(lambda: find(self.environment, self.url, self.ca))

    def close(self) -> None:
        """Close the connection to the server, if it is open."""
        if "client" in vars(self):
            self.client.close()

    def echo(self, text: str, *, error: bool = False) -> None:
        """Print text, without colours if they are disabled."""
        click.echo(text, err=error, color=False if self.plain else None)

    def emit(self, value: Any) -> None:
        """Print one JSON document, on one line."""
        click.echo(msgspec.json.encode(value))

    def print_json(self, reply: Reply) -> bool:
        """Print the reply's JSON document if `--json` is given. Return whether it is."""
        if self.json:
            click.echo(reply.body.rstrip(b"\n"))
        return self.json

    def print_items(
        self, reply: Reply, kind: Any, columns: Mapping[str, Callable[[Any], str | Cell]], *, none: str | None = None
    ) -> None:
        """Print the items of a reply of type `kind` as a table, or `none` if there are none; or print its JSON."""
        if self.print_json(reply):
            return
        items = reply.decode(kind).items
        if items or none is None:
            self.table(tuple(columns), ([text(one) for text in columns.values()] for one in items))
        else:
            self.echo(none, error=True)

    def print_facts(self, facts: Mapping[str, Any], width: int) -> None:
        """Print one fact per line, behind its title of `width` characters; those that are empty are left out."""
        for title, fact in facts.items():
            if fact:
                self.echo(f"{title + ':':<{width}}{fact}")

    def print_removed(self, reply: Reply, text: str) -> None:
        """Print that something was removed, or the JSON of the reply."""
        click.echo(reply.body or b"{}") if self.json else self.echo(text)

    def progress(self, since_s: float = 0) -> LiveLine:
        """Return the display of an operation's progress: on standard output, or with `--json` not at all."""
        return LiveLine(sys.stderr if self.json else sys.stdout, silent=self.json, plain=self.plain, since_s=since_s)

    def transfer_progress(self) -> LiveLine:
        """Return the display of a transfer: on standard error, if that is a terminal."""
        return LiveLine(sys.stderr, silent=self.json or not sys.stderr.isatty(), plain=self.plain)

    def table(self, titles: Sequence[str], rows: Iterable[Sequence[str | Cell]]) -> None:
        """Print aligned columns. On a terminal the last column is truncated to the width."""
        cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
        widths = [max([len(title), *(len(row[i].text) for row in cells)]) for i, title in enumerate(titles)]
        room = shutil.get_terminal_size((_NARROW, 24)).columns if sys.stdout.isatty() else None
        self.echo(click.style(_line([Cell(title) for title in titles], widths, None), bold=True))
        for row in cells:
            self.echo(_line(row, widths, room))


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
    """Pass the invocation to a command as its first argument."""

    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> AnswerT:
        return command(click.get_current_context().find_object(Invocation) or Invocation({}), *args, **kwargs)

    return cast("Callable[Parameters, AnswerT]", update_wrapper(run, command))


def with_json(command: Callable[Concatenate[Invocation, Parameters], AnswerT]) -> Callable[Parameters, AnswerT]:
    """Pass the invocation to a command as its first argument, and add `--json`."""
    return json_option(needs_invocation(command))


def json_option(command: Callable[Parameters, AnswerT]) -> Callable[Parameters, AnswerT]:
    """Add `--json`: print one JSON document, or one per line for a stream."""

    def remember(context: click.Context, _parameter: click.Parameter, value: Any) -> None:
        invocation = context.find_object(Invocation)
        if invocation is not None and value:
            invocation.json = True

    option = click.option(
        "--json", is_flag=True, is_eager=True, expose_value=False, callback=remember, help="Print JSON."
    )
    return option(command)
