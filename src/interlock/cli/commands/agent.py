"""`interlock agent`: the process on another host that runs guests for a server."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Final

import click

from interlock.cli.client.connection import CA_VARIABLE, encrypted_url
from interlock.cli.context import Invocation, needs_invocation
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.options.configuration import config_option, errors_as_failures, read_config, run

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
