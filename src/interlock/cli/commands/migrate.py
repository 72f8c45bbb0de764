"""`interlock vm migrate` and `interlock vm evacuate`: move a VM to another host."""

from __future__ import annotations

import click
import msgspec

from interlock.cli.client.paths import HOSTS, INSTANCES, path_of
from interlock.cli.commands.submission import operation_options, submit
from interlock.cli.commands.vm import vm_commands
from interlock.cli.completion import completer, vm_argument
from interlock.cli.context import Invocation
from interlock.cli.output.confirmation import confirm, yes_option
from interlock.core.operations import CATALOGUE, Operation
from interlock.core.states import VmState


@vm_commands.command(help=f"{CATALOGUE[Operation.EVACUATE].summary} --from-image requires confirmation.")
@vm_argument
@click.option(
    "--host",
    shell_complete=completer(HOSTS),
    help="Target host, or `any` for one with free capacity. Default: the server's own host.",
)
@click.option(
    "--from-image",
    is_flag=True,
    help="Recreate its root disk from its image: required if the disk is lost with the host.",
)
@yes_option
@operation_options
def evacuate(
    invocation: Invocation, *, vm: str, host: str | None, from_image: bool, yes: bool, wait: bool, hold: str | None
) -> None:
    if from_image:
        confirm(f"Recreate {vm} from its image, and lose the data on its root disk?", yes=yes)
    parameters: dict[str, object] = {} if host is None else {"host": host}
    if from_image:
        parameters["from_image"] = True
    submit(invocation, vm, Operation.EVACUATE, wait=wait, hold=hold, parameters=parameters)


@vm_commands.command()
@vm_argument
@click.argument("host", shell_complete=completer(HOSTS))
@click.option(
    "--live/--cold",
    "live",
    default=None,
    help="Live or cold migration. Default: live if the VM runs or is paused, otherwise cold.",
)
@click.option(
    "--converge-timeout",
    metavar="TIME",
    help="Live migration: cancel if it has not converged after TIME, such as 10m. Default: the server's.",
)
@click.option("--post-copy", is_flag=True, help="Not supported; rejected with the reason.")
@operation_options
def migrate(
    invocation: Invocation,
    *,
    vm: str,
    host: str,
    live: bool | None,
    converge_timeout: str | None,
    post_copy: bool,
    wait: bool,
    hold: str | None,
) -> None:
    """Migrate a VM with its root disk to HOST, live or cold.

    HOST may be `any`: the host with the fewest VMs that has free capacity.
    Cancelling the request leaves the VM on its host. A guest that writes memory
    faster than the link is throttled until the migration converges.
    """
    if live is None:
        live = invocation.client.get(path_of(INSTANCES, vm)).decode(_VmState).vm_state in _LIVE
    operation = Operation.LIVE_MIGRATE if live else Operation.MIGRATE
    parameters: dict[str, object] = {"host": host}
    if converge_timeout is not None or post_copy:
        if not live:
            raise click.UsageError("--converge-timeout and --post-copy require a live migration.")
        parameters |= {} if converge_timeout is None else {"converge_timeout": converge_timeout}
        parameters |= {"post_copy": True} if post_copy else {}
    submit(invocation, vm, operation, wait=wait, hold=hold, parameters=parameters)


class _VmState(msgspec.Struct):
    vm_state: VmState


_LIVE = CATALOGUE[Operation.LIVE_MIGRATE].sources
