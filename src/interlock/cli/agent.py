"""`interlock agent`: the process that holds the guests of a host beside the server's own."""

from __future__ import annotations

import platform
from pathlib import Path

import click

from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation, needs_invocation
from interlock.cli.server import config_option, read_config, run, told

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


def _folder(asked: Path | None, configured: str) -> Path | None:
    if asked is not None:
        return asked.absolute()
    return Path(configured) if configured else None


@click.command()
@click.option("--server", required=True, metavar="URL", help="The server's URL, as in https://HOST:7420.")
@click.option("--token-file", required=True, type=_FILE, help="A file with the secret of a token of the role agent.")
@click.option("--name", help="What this host is called. Default: what the system calls itself.")
@click.option("--data-dir", type=_FOLDER, help="This agent's own folder, instead of what the configuration says.")
@click.option("--trust", type=_FILE, help="A certificate (PEM) to trust beside the system's, such as the server's own.")
@click.option(
    "--shared",
    type=_FOLDER,
    help="A folder that this host has in common with the server, by the same name. Default: hosts.shared_dir.",
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
    trust: Path | None,
    shared: Path | None,
    path: Path | None,
) -> None:
    """Hold the guests of this host for a server, in the foreground.

    Ctrl-C or SIGTERM ends it. Its VMs go on without it for as long as the
    lease lasts that the server gave it (hosts.lease_ms); so start it again soon.
    """
    from interlock import hosting
    from interlock.service import server_log

    environment = dict(invocation.environment)
    if data_dir is not None:
        environment["INTERLOCK_DATA_DIR"] = str(data_dir)
    config = read_config(path, environment)
    try:
        token = token_file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(ExitCode.USAGE, f"The token file {token_file} cannot be read: {error}.") from None
    contact = hosting.Contact(
        server=server,
        token=token,
        name=name or config.host or platform.node().partition(".")[0].lower() or "localhost",
        certificate=trust,
        shared=_folder(shared, config.hosts.shared_dir),
    )

    async def serve() -> None:
        await hosting.HostAgent(config, contact).run()

    with told():
        server_log.configure_logging(config)
        run(serve())
