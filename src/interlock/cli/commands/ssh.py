"""`interlock vm ssh`: run the system's ssh over the port forwarded to the guest."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import click

from interlock.api.schemas.responses import Instance
from interlock.cli.client.connection import folder_of
from interlock.cli.client.paths import INSTANCES, path_of
from interlock.cli.commands.vm import vm_commands
from interlock.cli.completion import vm_argument
from interlock.cli.context import Invocation, needs_invocation
from interlock.cli.failures import ExitCode, Failure

SSH_PORT = 22


@vm_commands.command(context_settings={"ignore_unknown_options": True})
@vm_argument
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--user", help="User to log in as. Default: from ssh's configuration.")
@needs_invocation
def ssh(invocation: Invocation, *, vm: str, arguments: tuple[str, ...], user: str | None) -> None:
    """Log in to a VM by ssh, or run a command there.

    Requires a forward to the guest's port 22 (`vm create --forward 2222:22`). Arguments after `--` are passed to ssh.
    The guest's host key is recorded on first use, by the VM's id.
    """
    instance = invocation.client.get(path_of(INSTANCES, vm)).decode(Instance)
    command = ssh_command(instance, known_hosts(invocation), user, arguments)
    if shutil.which(command[0]) is None:
        raise Failure(ExitCode.USAGE, "ssh not found: run `sudo apt-get install openssh-client`.")
    os.execvp(command[0], command)  # noqa: S606 - no shell


def known_hosts(invocation: Invocation) -> Path:
    """Return the known_hosts file: in the data folder if it is writable, else in the user's configuration."""
    folder = folder_of(invocation.environment)
    if not os.access(folder, os.W_OK):
        own = invocation.environment.get("XDG_CONFIG_HOME") or "~/.config"
        folder = Path(own).expanduser() / "interlock"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder / "known_hosts"


def ssh_command(instance: Instance, hosts: Path, user: str | None, arguments: tuple[str, ...]) -> list[str]:
    """Return the ssh command line. Raises `Failure` if no port is forwarded to the guest's port 22."""
    port = next((one.host_port for one in instance.forwards if one.guest_port == SSH_PORT), None)
    if port is None:
        others = ", ".join(f"{one.host_port}:{one.guest_port}" for one in instance.forwards) or "none"
        raise Failure(
            ExitCode.USAGE,
            f"{instance.name} has no forward to port {SSH_PORT} of the guest (its forwards: {others}). "
            f"Create it with `--forward 2222:{SSH_PORT}`.",
        )
    # Other guests reuse the port, so the key is recorded for the VM and not for the address.
    options = (f"UserKnownHostsFile={hosts}", f"HostKeyAlias={instance.id}", "StrictHostKeyChecking=accept-new")
    words = ["ssh", "-p", str(port), *(word for option in options for word in ("-o", option))]
    words += ["-l", user] if user else []
    return [*words, "127.0.0.1", *arguments]
