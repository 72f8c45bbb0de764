"""The option `--config`, loading the configuration, and Interlock's exceptions as failures of the command."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from interlock.cli.failures import ExitCode, Failure
from interlock.core.errors import InterlockError, Invalid, PolicyError

if TYPE_CHECKING:
    from interlock.config import Config

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
