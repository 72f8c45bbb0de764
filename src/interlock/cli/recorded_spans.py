"""Which part of which recorded history a command looks at: its options, opening it, and moments as people write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import click

from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation
from interlock.cli.server import CONFIG_VARIABLE, read_config, told
from interlock.cli.wording import clock

if TYPE_CHECKING:
    from interlock.stores.history import History

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

FILE: Final = click.Path(path_type=Path)
_EXPECTED: Final = "Write how long before the last event, as in 30d or 12h, or a moment, as in 2026-10-01T08:30."


def span_options(command: CommandT) -> CommandT:
    """The options that say which history is looked at."""
    for option in (
        click.option("--until", metavar="MOMENT", help="Only what came before this; written as for --since."),
        click.option(
            "--since",
            metavar="MOMENT",
            help="Only what came from this on: a date or a moment, or how long before the last recorded event (30d).",
        ),
        click.option("--config", "path", type=FILE, envvar=CONFIG_VARIABLE, help="The server's configuration (TOML)."),
        click.option(
            "--database", type=FILE, metavar="FILE", help="A database, or a copy of one. Default: the server's."
        ),
    ):
        command = option(command)
    return command


class Span(NamedTuple):
    """The part of a history that is looked at, in ms since the Unix epoch."""

    since_ms: int | None
    until_ms: int | None
    first_ms: int
    last_ms: int

    def nothing(self, what: str) -> Failure:
        begin, end = self.since_ms or self.first_ms, self.until_ms or self.last_ms
        return Failure(
            ExitCode.USAGE,
            f"No {what} was recorded between {moment(begin)} and {moment(end)}.",
            remedy=f"The database has events from {moment(self.first_ms)} to {moment(self.last_ms)}.",
        )


@contextmanager
def opened(invocation: Invocation, database: Path | None, path: Path | None) -> Iterator[History]:
    """The history that is named, or that of the configured data folder."""
    if database is None:
        from interlock.wiring import DATABASE

        database = read_config(path, invocation.environment).folder / DATABASE
    from interlock.stores.history import History

    with told(), History(database) as history:
        yield history


def span_of(history: History, since: str | None, until: str | None) -> Span:
    first_ms, last_ms = history.first_at_ms, history.last_at_ms
    if first_ms is None or last_ms is None:
        raise Failure(ExitCode.USAGE, f"Nothing was ever recorded in {history.path}.")
    since_ms = None if since is None else _parse(since, "since", last_ms)
    until_ms = None if until is None else _parse(until, "until", last_ms)
    if since_ms is not None and until_ms is not None and since_ms >= until_ms:
        raise Failure(ExitCode.USAGE, f"since: {moment(since_ms)} is not before {moment(until_ms)}.")
    return Span(since_ms, until_ms, first_ms, last_ms)


def _parse(text: str, option: str, last_ms: int) -> int:
    """A moment in ms since the Unix epoch; without a zone it is local time. Raises `Failure`."""
    from interlock.policies.durations import parse_duration

    before_ms = parse_duration(text)
    if before_ms is not None:
        return last_ms - before_ms
    try:
        return int(datetime.fromisoformat(text).astimezone(UTC).timestamp() * 1000)
    except (ValueError, OverflowError, OSError):
        raise Failure(ExitCode.USAGE, f"{option}: {text[:80]!r} is no moment.", remedy=_EXPECTED) from None


def moment(at_ms: int) -> str:
    return clock(datetime.fromtimestamp(at_ms / 1000, UTC).isoformat())
