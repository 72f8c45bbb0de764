"""`interlock vm ssh`: the system's own ssh, over the port of this host that is forwarded to the guest's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import click

from interlock.api.schemas import Instance
from interlock.cli.connection import folder_of
from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.invocation import Invocation, needs_invocation
from interlock.cli.naming import INSTANCES, path_of, suggesting, vm_argument

SSH_PORT = 22


@click.command(context_settings={"ignore_unknown_options": True})
@vm_argument
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--user", help="As whom to log in; by default as ssh's own configuration says.")
@needs_invocation
def ssh(invocation: Invocation, *, vm: str, arguments: tuple[str, ...], user: str | None) -> None:
    """Log in to a VM by ssh, or run a command there.

    It needs a forward to the guest's port 22 (`vm create --forward 2222:22`). What follows `--` is handed to ssh. A
    guest's host key is noted when it is first seen, by the VM's id, so that another VM under its name is noticed.
    """
    with suggesting(invocation.client, INSTANCES, vm):
        instance = invocation.client.get(path_of(INSTANCES, vm)).decode(Instance)
    command = ssh_command(instance, known_hosts(invocation), user, arguments)
    if shutil.which(command[0]) is None:
        raise Failure(ExitCode.USAGE, "The program ssh is not installed: run `sudo apt-get install openssh-client`.")
    os.execvp(command[0], command)  # noqa: S606 - the words are no shell's


def known_hosts(invocation: Invocation) -> Path:
    """The file in which the guests' host keys are noted: with the server's data if we may write there, or our own."""
    folder = folder_of(invocation.environment)
    if not os.access(folder, os.W_OK):
        own = invocation.environment.get("XDG_CONFIG_HOME") or "~/.config"
        folder = Path(own).expanduser() / "interlock"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder / "known_hosts"


def ssh_command(instance: Instance, hosts: Path, user: str | None, arguments: tuple[str, ...]) -> list[str]:
    """The words with which ssh is started. Raises `Failure` if no port is forwarded to the guest's ssh."""
    port = next((one.host_port for one in instance.forwards if one.guest_port == SSH_PORT), None)
    if port is None:
        others = ", ".join(f"{one.host_port}:{one.guest_port}" for one in instance.forwards) or "none"
        raise Failure(
            ExitCode.USAGE,
            f"{instance.name} has no forward to port {SSH_PORT} of the guest (its forwards: {others}). "
            f"Create it with `--forward 2222:{SSH_PORT}`.",
        )
    # A port is reused by other guests, so that a key belongs to the VM and not to the address.
    options = (f"UserKnownHostsFile={hosts}", f"HostKeyAlias={instance.id}", "StrictHostKeyChecking=accept-new")
    words = ["ssh", "-p", str(port), *(word for option in options for word in ("-o", option))]
    words += ["-l", user] if user else []
    return [*words, "127.0.0.1", *arguments]
