"""Options that select a recorded history and a time range of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import click

from interlock.cli.context import Invocation
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.options.configuration import CONFIG_VARIABLE, errors_as_failures, read_config
from interlock.cli.output.formatting import clock

if TYPE_CHECKING:
    from interlock.stores.history import History

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

FILE: Final = click.Path(path_type=Path)
_EXPECTED: Final = (
    "Expected a time before the last event, such as 30d or 12h, or a date and time, such as 2026-10-01T08:30."
)


def span_options(command: CommandT) -> CommandT:
    """Add the options that select a history and a time range."""
    for option in (
        click.option("--until", metavar="MOMENT", help="Only events before this; format as for --since."),
        click.option(
            "--since",
            metavar="MOMENT",
            help="Only events from this on: a date and time, or a time before the last recorded event (30d).",
        ),
        click.option("--config", "path", type=FILE, envvar=CONFIG_VARIABLE, help="The server's configuration (TOML)."),
        click.option("--database", type=FILE, metavar="FILE", help="Database, or a copy. Default: the server's."),
    ):
        command = option(command)
    return command


class Span(NamedTuple):
    """A time range, and the first and last event, in ms since the Unix epoch."""

    since_ms: int | None
    until_ms: int | None
    first_ms: int
    last_ms: int

    def no_records(self, what: str) -> Failure:
        begin, end = self.since_ms or self.first_ms, self.until_ms or self.last_ms
        return Failure(
            ExitCode.USAGE,
            f"No {what} was recorded between {moment(begin)} and {moment(end)}.",
            remedy=f"The database has events from {moment(self.first_ms)} to {moment(self.last_ms)}.",
        )


@contextmanager
def open_history(invocation: Invocation, database: Path | None, path: Path | None) -> Iterator[History]:
    """Open the given database, or that of the configured data folder."""
    if database is None:
        from interlock.server import DATABASE

        database = read_config(path, invocation.environment).folder / DATABASE
    from interlock.stores.history import History

    with errors_as_failures(), History(database) as history:
        yield history


def span_of(history: History, since: str | None, until: str | None) -> Span:
    first_ms, last_ms = history.first_at_ms, history.last_at_ms
    if first_ms is None or last_ms is None:
        raise Failure(ExitCode.USAGE, f"No events in {history.path}.")
    since_ms = None if since is None else _parse(since, "since", last_ms)
    until_ms = None if until is None else _parse(until, "until", last_ms)
    if since_ms is not None and until_ms is not None and since_ms >= until_ms:
        raise Failure(ExitCode.USAGE, f"since: {moment(since_ms)} is not before {moment(until_ms)}.")
    return Span(since_ms, until_ms, first_ms, last_ms)


def _parse(text: str, option: str, last_ms: int) -> int:
    """Parse a time to ms since the Unix epoch; local time without a zone. Raises `Failure`."""
    from interlock.core.durations import parse_duration

    before_ms = parse_duration(text)
    if before_ms is not None:
        return last_ms - before_ms
    try:
        return int(datetime.fromisoformat(text).astimezone(UTC).timestamp() * 1000)
    except (ValueError, OverflowError, OSError):
        raise Failure(ExitCode.USAGE, f"Invalid --{option} {text[:80]!r}.", remedy=_EXPECTED) from None


def moment(at_ms: int) -> str:
    return clock(datetime.fromtimestamp(at_ms / 1000, UTC).isoformat())
