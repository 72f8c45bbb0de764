"""`interlock vm migrate` and `evacuate`: VMs that go to another host."""

from __future__ import annotations

import click

from interlock.cli.invocation import Invocation, needs_invocation
from interlock.cli.naming import completer, vm_argument
from interlock.cli.other_hosts import HOSTS
from interlock.cli.submitting import asking_options, submit
from interlock.core.operations import Operation


@click.command()
@vm_argument
@click.option("--host", shell_complete=completer(HOSTS), help="Where it is taken up. Default: the server's own host.")
@click.option("--from-image", is_flag=True, help="Let its root disk begin as its image again: it was on the lost host.")
@asking_options
@needs_invocation
def evacuate(
    invocation: Invocation, *, vm: str, host: str | None, from_image: bool, wait: bool, hold: str | None
) -> None:
    """Take a VM up on another host, once its own is lost and fenced."""
    parameters: dict[str, object] = {} if host is None else {"host": host}
    if from_image:
        parameters["from_image"] = True
    submit(invocation, vm, Operation.EVACUATE, wait=wait, hold=hold, parameters=parameters)


@click.command()
@vm_argument
@click.argument("host", shell_complete=completer(HOSTS))
@asking_options
@needs_invocation
def migrate(invocation: Invocation, *, vm: str, host: str, wait: bool, hold: str | None) -> None:
    """Bring a VM to another HOST as it runs, with its root disk.

    Cancelling the request leaves it where it runs.
    """
    submit(invocation, vm, Operation.LIVE_MIGRATE, wait=wait, hold=hold, parameters={"host": host})


COMMANDS: tuple[click.Command, ...] = (migrate, evacuate)
"""What `interlock vm` has for hosts."""
