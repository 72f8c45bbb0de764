"""`interlock vm migrate` and `evacuate`: VMs that go to another host."""

from __future__ import annotations

import click
import msgspec

from interlock.cli.invocation import Invocation, needs_invocation
from interlock.cli.naming import INSTANCES, completer, path_of, suggesting, vm_argument
from interlock.cli.other_hosts import HOSTS
from interlock.cli.submitting import asking_options, submit
from interlock.core.operations import CATALOGUE, Operation
from interlock.core.states import VmState


@click.command()
@vm_argument
@click.option(
    "--host",
    shell_complete=completer(HOSTS),
    help="Where it is taken up; `any`: where there is room. Default: the server's own host.",
)
@click.option(
    "--from-image",
    is_flag=True,
    help="Let its root disk begin as its image again: needed where it was on the lost host's own disk.",
)
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
@click.option(
    "--live/--cold",
    "live",
    default=None,
    help="As it runs, or powered off meanwhile. Default: live for what runs or is paused, cold for all else.",
)
@asking_options
@needs_invocation
def migrate(invocation: Invocation, *, vm: str, host: str, live: bool | None, wait: bool, hold: str | None) -> None:
    """Bring a VM to another HOST, as it runs or powered off, with its root disk.

    HOST may be `any`: the one with the fewest VMs of those that have room.
    Cancelling the request leaves it where it is.
    """
    if live is None:
        with suggesting(invocation.client, INSTANCES, vm):
            live = invocation.client.get(path_of(INSTANCES, vm)).decode(_Seen).vm_state in _LIVE
    operation = Operation.LIVE_MIGRATE if live else Operation.MIGRATE
    submit(invocation, vm, operation, wait=wait, hold=hold, parameters={"host": host})


class _Seen(msgspec.Struct):
    vm_state: VmState


_LIVE = CATALOGUE[Operation.LIVE_MIGRATE].sources

COMMANDS: tuple[click.Command, ...] = (migrate, evacuate)
"""What `interlock vm` has for hosts."""
