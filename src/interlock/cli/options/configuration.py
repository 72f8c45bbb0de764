"""Options that select a configuration, or a recorded history and a time range of it; exceptions as failures."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import click

from interlock.cli.context import Invocation
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.output.formatting import clock
from interlock.core.errors import InterlockError, Invalid, PolicyError

if TYPE_CHECKING:
    from interlock.config import Config
    from interlock.stores.history import History

ValueT = TypeVar("ValueT")

CONFIG_VARIABLE = "INTERLOCK_CONFIG"
_FILE = click.Path(dir_okay=False, path_type=Path)
config_option = click.option(
    "--config", "path", type=_FILE, envvar=CONFIG_VARIABLE, show_envvar=True, help="A configuration file (TOML)."
)


def read_config(path: Path | None, environment: Mapping[str, str], listen: tuple[str, str] | None = None) -> Config:
    """Load the configuration; `listen` (host, port) overrides its address. Raises `Failure`."""
    from interlock import config_file

    variables = dict(environment)
    if listen is not None:
        variables["INTERLOCK_LISTEN_HOST"], variables["INTERLOCK_LISTEN_PORT"] = listen
    with errors_as_failures():
        return config_file.load(path, variables)


class errors_as_failures:  # noqa: N801 - used like a function
    """Context manager that turns `InterlockError` into `Failure` with an exit code."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InterlockError):
            code = ExitCode.USAGE if isinstance(error, Invalid | PolicyError) else ExitCode.SERVER_ERROR
            raise Failure(code, error.message, remedy=error.remedy) from error


def run(main: Coroutine[Any, Any, ValueT]) -> ValueT:
    """Run a coroutine on a uvloop event loop, as the server does."""
    import asyncio

    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


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
