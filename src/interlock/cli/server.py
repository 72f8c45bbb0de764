"""`interlock serve`, `interlock db` and what else runs in this process rather than on a server."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation, json_option, needs_invocation
from interlock.core.errors import InterlockError, Invalid, PolicyError

if TYPE_CHECKING:
    from interlock.config import Config

ValueT = TypeVar("ValueT")

CONFIG_VARIABLE = "INTERLOCK_CONFIG"
_FILE = click.Path(dir_okay=False, path_type=Path)
config_option = click.option(
    "--config", "path", type=_FILE, envvar=CONFIG_VARIABLE, show_envvar=True, help="A configuration file (TOML)."
)


class Address(click.ParamType[Any]):
    """HOST:PORT; an IPv6 address stands in brackets."""

    name = "host:port"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        host, colon, port = str(value).rpartition(":")
        if not (colon and host and port.isdecimal()):
            self.fail(f"{value!r} is no address; write HOST:PORT, as in 127.0.0.1:7420 or [::1]:7420.", param, ctx)
        return host.removeprefix("[").removesuffix("]"), port


@click.command()
@config_option
@click.option("--listen", type=Address(), help="Where to listen, instead of what the configuration says.")
@needs_invocation
def serve(invocation: Invocation, *, path: Path | None, listen: tuple[str, str] | None) -> None:
    """Run a server in the foreground. Ctrl-C or SIGTERM ends it; VMs go on without it."""
    from interlock import wiring
    from interlock.service import server_log

    config = read_config(path, invocation.environment, listen)
    with told():
        server_log.configure_logging(config)
        server_log.warn_of_variables(invocation.environment)
        run(wiring.Server(config).serve())


def read_config(path: Path | None, environment: Mapping[str, str], listen: tuple[str, str] | None = None) -> Config:
    """The configuration, with the address laid over it. Raises `Failure`."""
    from interlock import config

    laid_over = dict(environment)
    if listen is not None:
        laid_over["INTERLOCK_LISTEN_HOST"], laid_over["INTERLOCK_LISTEN_PORT"] = listen
    with told():
        return config.load(path, laid_over)


class told:  # noqa: N801 - reads as a sentence where it is used
    """A context in which Interlock's own errors become failures with an exit code."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InterlockError):
            wrong_input = isinstance(error, Invalid | PolicyError)
            code = ExitCode.USAGE if wrong_input else ExitCode.SERVER_ERROR
            raise Failure(code, error.message, remedy=error.remedy) from error


def run(main: Coroutine[Any, Any, ValueT]) -> ValueT:
    """Run something of a server on an event loop like the server's, to its end."""
    import asyncio

    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


@click.group("db")
def db_commands() -> None:
    """The database of the server on this machine."""


@db_commands.command()
@config_option
@needs_invocation
def upgrade(invocation: Invocation, *, path: Path | None) -> None:
    """Bring the database to this version's schema. The server must not be running."""
    from interlock import wiring

    config = read_config(path, invocation.environment)
    with told():
        wiring.upgrade_database(config)
    invocation.say(f"The database in {config.folder} has this version's schema.")


@click.command()
@json_option
@needs_invocation
def version(invocation: Invocation) -> None:
    """Print the version."""
    from interlock import __version__

    if invocation.json:
        invocation.emit({"version": __version__})
    else:
        invocation.say(f"interlock {__version__}")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    r"""Print the completion script for a shell.

    \b
    bash:  eval "$(interlock completion bash)"       in ~/.bashrc
    zsh:   eval "$(interlock completion zsh)"        in ~/.zshrc, after compinit
    fish:  interlock completion fish | source        in ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(context.find_root().command, {}, "interlock", COMPLETION_VARIABLE).source())


COMPLETION_VARIABLE = "_INTERLOCK_COMPLETE"
"""The variable through which a shell asks for completions."""


@click.command("recover")
@config_option
@needs_invocation
def recover_token(invocation: Invocation, *, path: Path | None) -> None:
    """Make another admin token, when none is left. The server must not run.

    The token is put into the file admin.token of the data folder, where this
    program finds it; only the server's user can do this.
    """
    from interlock import wiring

    config = read_config(path, invocation.environment)
    with told():
        file = run(wiring.recover_admin_token(config))
    invocation.say(f"Made: an admin token, in {file}")
