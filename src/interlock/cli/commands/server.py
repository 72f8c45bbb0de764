"""`interlock serve`, `agent`, `db`, `version`, `completion` and `token recover`: commands without a running server."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from interlock.cli.client.connection import CA_VARIABLE, encrypted_url
from interlock.cli.context import Invocation, needs_invocation, with_json
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.options.configuration import config_option, errors_as_failures, read_config, run

ValueT = TypeVar("ValueT")


class Address(click.ParamType[Any]):
    """HOST:PORT; an IPv6 address in brackets."""

    name = "host:port"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        host, colon, port = str(value).rpartition(":")
        if not (colon and host and port.isdecimal()):
            self.fail(
                f"Invalid address {value!r}: expected HOST:PORT, such as 127.0.0.1:7420 or [::1]:7420.", param, ctx
            )
        return host.removeprefix("[").removesuffix("]"), port


@click.command()
@config_option
@click.option("--listen", type=Address(), help="Address to listen on, instead of the configured one.")
@needs_invocation
def serve(invocation: Invocation, *, path: Path | None, listen: tuple[str, str] | None) -> None:
    """Run a server in the foreground. Ctrl-C or SIGTERM stops it; VMs keep running."""
    from interlock import server
    from interlock.service import server_log

    config = read_config(path, invocation.environment, listen)
    with errors_as_failures():
        server_log.configure_logging(config)
        server_log.warn_of_variables(invocation.environment)
        run(server.Server(config).serve())


@click.group("db")
def db_commands() -> None:
    """The database of the server on this machine."""


@db_commands.command()
@config_option
@needs_invocation
def upgrade(invocation: Invocation, *, path: Path | None) -> None:
    """Upgrade the database to this version's schema. The server must not be running."""
    from interlock import maintenance

    config = read_config(path, invocation.environment)
    with errors_as_failures():
        maintenance.upgrade_database(config)
    invocation.echo(f"The database in {config.folder} is up to date.")


@db_commands.command()
@config_option
@needs_invocation
def new(invocation: Invocation, *, path: Path | None) -> None:
    """Create an empty database where the old one is permanently lost.

    It has no tokens, VMs, images or volumes; their files are kept. The next
    start writes a new admin token.
    """
    from interlock import maintenance

    config = read_config(path, invocation.environment)
    with errors_as_failures():
        maintenance.new_database(config)
    invocation.echo(f"Created: an empty database in {config.folder}")


@click.command()
@with_json
def version(invocation: Invocation) -> None:
    """Print the version."""
    from interlock import __version__

    if invocation.json:
        invocation.emit({"version": __version__})
    else:
        invocation.echo(f"interlock {__version__}")


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
"""Environment variable of shell completion."""


@click.command("recover")
@config_option
@needs_invocation
def recover_token(invocation: Invocation, *, path: Path | None) -> None:
    """Create an admin token if none is left. The server must not be running.

    The token is written to the file admin.token in the data folder, where this
    program finds it. Run this as the server's user.
    """
    from interlock import maintenance

    config = read_config(path, invocation.environment)
    with errors_as_failures():
        file = run(maintenance.recover_admin_token(config))
    invocation.echo(f"Created: an admin token, in {file}")


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
PLAIN_HTTP: Final = "--insecure-plain-http"


def _folder(option: Path | None, configured: str) -> Path | None:
    if option is not None:
        return option.absolute()
    return Path(configured) if configured else None


@click.command()
@click.option("--server", required=True, metavar="URL", help="The server's URL, such as https://HOST:7420.")
@click.option(
    "--token-file",
    required=True,
    type=_FILE,
    help="A file with the secret of a token of the role agent, read for each connection.",
)
@click.option("--name", help="Name of this host. Default: the system's hostname.")
@click.option("--data-dir", type=_FOLDER, help="Data folder of this agent, instead of the configured one.")
@click.option(
    "--ca",
    type=_FILE,
    envvar=CA_VARIABLE,
    show_envvar=True,
    help="PEM file of CAs that the server's certificate may be from, besides the system's.",
)
@click.option(
    "--enrolment-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file with a secret of `interlock host enroll`; it is used until the host has a certificate.",
)
@click.option(PLAIN_HTTP, "plain_http", is_flag=True, help="Allow http:// to another machine: nothing is encrypted.")
@click.option(
    "--shared",
    type=_FOLDER,
    help="Folder shared with the server, under the same path. Default: hosts.shared_dir.",
)
@config_option
@needs_invocation
def agent(
    invocation: Invocation,
    *,
    server: str,
    token_file: Path,
    name: str | None,
    data_dir: Path | None,
    ca: Path | None,
    enrolment_file: Path | None,
    plain_http: bool,
    shared: Path | None,
    path: Path | None,
) -> None:
    """Run this host's VMs for a server, in the foreground.

    The data folder identifies the host: the server accepts another folder, or
    a copy, under the same name only when the VMs of the first have ended.

    Ctrl-C or SIGTERM stops the agent. Its VMs continue until the host's lease
    (hosts.lease_ms) expires, so restart it soon.
    """
    from interlock import agent as hosting
    from interlock.service import server_log

    environment = dict(invocation.environment)
    if data_dir is not None:
        environment["INTERLOCK_DATA_DIR"] = str(data_dir)
    config = read_config(path, environment)
    url = encrypted_url(
        server,
        allowed=plain_http,
        exposed="this host's token, images and the secrets of its VMs",
        by=PLAIN_HTTP,
    )
    try:
        token = hosting.read_token(token_file)
    except OSError as error:
        raise Failure(ExitCode.USAGE, f"Cannot read token file {token_file}: {error}.") from None
    contact = hosting.Contact(
        server=url,
        token=token,
        token_file=token_file,
        name=name or config.host or platform.node().partition(".")[0].lower() or "localhost",
        ca=ca,
        enrolment=enrolment_file,
        shared=_folder(shared, config.hosts.shared_dir),
    )

    async def serve() -> None:
        await hosting.HostAgent(config, contact).run()

    with errors_as_failures():
        server_log.configure_logging(config)
        run(serve())
